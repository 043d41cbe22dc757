"""The results of a run as files that other programs read; each is written from the shards, one after the other."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from mlx_esm_hf.runs.run import Record, Run

PICTURES = (".png", ".svg", ".pdf")
# What a file of this suffix is written with, and the extra that brings it.
WRITERS = {
    ".h5": ("h5py", "hdf5"),
    ".parquet": ("pyarrow", "parquet"),
    **dict.fromkeys(PICTURES, ("matplotlib", "plots")),
}


def require(path: str | os.PathLike[str]) -> None:
    """
    Raises:
        ValueError: there is no such folder, or what writes such a file is not installed. To be known before the work.
    """
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise ValueError(f"{os.fspath(path)} cannot be written: there is no folder {folder}.")
    module, extra = WRITERS.get(os.path.splitext(path)[1], ("", ""))
    if module and importlib.util.find_spec(module) is None:
        raise ValueError(f"{os.fspath(path)} needs {module}: pip install 'mlx-esm-hf[{extra}]'.")


def check_picture(path: str | os.PathLike[str]) -> None:
    """
    Raises:
        ValueError: a picture of this suffix cannot be drawn.
    """
    if os.path.splitext(path)[1] not in PICTURES:
        raise ValueError(f"{os.fspath(path)}: pictures are told by the suffixes {', '.join(PICTURES)}.")
    require(path)


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` make a file, which is then there as a whole, on the disk, or not at all."""
    part = path.with_name(f"{path.name}.part{path.suffix}")
    try:
        write(part)
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise OSError(f"{path} cannot be written ({error}). The same command goes on from there.") from error


def unique_names(run: Run) -> Iterator[tuple[str, Record]]:
    """Each record under its id; the second one with an id under `id#2`, and so on."""
    used, counts = {"metadata"}, dict[str, int]()
    for record in run.records():
        name = record.id
        while name in used:
            counts[record.id] = counts.get(record.id, 1) + 1
            name = f"{record.id}#{counts[record.id]}"
        used.add(name)
        yield name, record


def accession(name: str) -> str:
    """`P12345` of UniProt's `sp|P12345|NAME_HUMAN`; other names as they are."""
    parts = name.split("|")
    return parts[1] if len(parts) == 3 and parts[0] in ("sp", "tr") and parts[1] else name


def metadata(run: Run) -> dict[str, Any]:
    return {"command": run.manifest["command"], **run.manifest["settings"]}


def per_protein(run: Run) -> bool:
    """Whether each result is one vector, so that all of them make a matrix."""
    return all(array.ndim == 1 for record in run.records() for array in record.arrays.values())


def write_npz(path: Path, run: Run) -> None:
    """Vectors as one matrix for each kind, beside `ids`; larger results each under its id (`id/kind` if several)."""
    details = np.array(json.dumps(metadata(run)))
    if per_protein(run):
        np.savez(path, **stacked(run), ids=np.array([r.id for r in run.records()], dtype=str), metadata=details)
        return
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:

        def add(key: str, array: np.ndarray) -> None:
            with archive.open(f"{key}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)

        for name, record in unique_names(run):
            for kind, array in record.arrays.items():
                add(name if len(record.arrays) == 1 else f"{name}/{kind}", array)
        add("metadata", details)


def write_safetensors(path: Path, run: Run) -> None:
    """As `write_npz`; the ids, a JSON list, are in the metadata."""
    if per_protein(run):
        tensors = stacked(run)
    else:
        tensors = {
            name if len(record.arrays) == 1 else f"{name}/{kind}": array
            for name, record in unique_names(run)
            for kind, array in record.arrays.items()
        }
    details = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata(run).items()}
    save_file(tensors, path, {"ids": json.dumps([record.id for record in run.records()]), **details})


def stacked(run: Run) -> dict[str, Any]:
    columns: dict[str, list[np.ndarray]] = {}
    for record in run.records():
        for kind, array in record.arrays.items():
            columns.setdefault(kind, []).append(array)
    return {kind: np.stack(rows) for kind, rows in columns.items()}


def write_h5(path: Path, run: Run) -> None:
    """UniProt's layout: a dataset for each accession; a group of them where there are several kinds of results."""
    import h5py

    with h5py.File(path, "w") as file:
        file.attrs.update({key: json.dumps(value) for key, value in metadata(run).items()})
        for name, record in unique_names(run):
            short = accession(record.id) + name[len(record.id) :]
            for kind, array in record.arrays.items():
                key = short.replace("/", "_") + (f"/{kind}" if len(record.arrays) > 1 else "")
                if key in file:  # two entries with one accession
                    key = f"{record.number}_{key}"
                file.create_dataset(key, data=array).attrs["original_id"] = record.id


def write_csv(path: Path, run: Run) -> None:
    """A row for each protein: record, id, length in residues, and the number of each kind of result."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        for record in run.records():
            if record.number == 0:
                table.writerow(["record", "id", "length", *record.arrays])
            values = (float(array[0]) for array in record.arrays.values())
            table.writerow([record.number, record.id, record.length, *values])


def write_parquet(path: Path, run: Run) -> None:
    """A row for each protein: record, id, length in residues, and for each kind a list of numbers, or of lists."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def column(arrays: list[np.ndarray]) -> pa.Array:
        flat = np.concatenate([array.reshape(-1, array.shape[-1]) for array in arrays])
        values = pa.FixedSizeListArray.from_arrays(pa.array(flat.ravel()), flat.shape[-1])
        if arrays[0].ndim == 1:
            return values
        offsets = np.cumsum([0, *(len(array) for array in arrays)], dtype=np.int64)
        return pa.LargeListArray.from_arrays(pa.array(offsets), values)

    writer = None
    try:
        for records in _groups(run):
            columns: dict[str, Any] = {
                "record": pa.array([r.number for r in records]),
                "id": pa.array([r.id for r in records]),
                "length": pa.array([r.length for r in records]),
            }
            columns |= {kind: column([r.arrays[kind] for r in records]) for kind in records[0].arrays}
            table = pa.table(columns)
            if writer is None:
                writer = pq.ParquetWriter(
                    path, table.schema.with_metadata({k: json.dumps(v) for k, v in metadata(run).items()})
                )
            writer.write_table(table)
    finally:
        if writer is not None:
            writer.close()


def _groups(run: Run, size: int = 1 << 26) -> Iterator[list[Record]]:
    """The records in groups of some 64 MB."""
    group, total = list[Record](), 0
    for record in run.records():
        group.append(record)
        total += sum(array.nbytes for array in record.arrays.values())
        if total > size:
            yield group
            group, total = [], 0
    if group:
        yield group
