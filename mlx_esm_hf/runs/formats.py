"""Writing the results of a run to formats that other programs read, one result at a time."""

from __future__ import annotations

import csv
import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from mlx_esm_hf.runs.ids import accession
from mlx_esm_hf.runs.job import Result
from mlx_esm_hf.runs.run import Run

GROUP_BYTES = 1 << 26  # of results that form a row group of a Parquet file


def metadata(run: Run) -> dict[str, Any]:
    """Return the command and its settings for a file's metadata, without the memory limit, which affects no values."""
    settings = {key: value for key, value in run.manifest["settings"].items() if key != "memory"}
    return {"command": run.manifest["command"], **settings}


def unique_names(run: Run) -> Iterator[tuple[str, Result]]:
    """Yield each result with a unique name: its id, or `id#2` for the second result with that id, and so on.

    Names that differ only in `.npy` are the same to `np.load`. `__metadata__` is the header of a safetensors file.
    """
    used, counts = {"metadata", "__metadata__"}, dict[str, int]()
    for result in run.results():
        name = result.id
        while without_npy(name) in used:
            counts[result.id] = counts.get(result.id, 1) + 1
            name = f"{result.id}#{counts[result.id]}"
        used.add(without_npy(name))
        yield name, result


def without_npy(name: str) -> str:
    """Remove all `.npy` suffixes from a name."""
    while name.endswith(".npy"):
        name = name.removesuffix(".npy")
    return name


def named_arrays(run: Run) -> Iterator[tuple[str, np.ndarray]]:
    """Yield each array with the unique name of its result, or `name/kind` if results have several arrays."""
    for name, result in unique_names(run):
        for kind, array in result.arrays.items():
            yield name if len(result.arrays) == 1 else f"{name}/{kind}", array


def per_protein(run: Run) -> bool:
    """Return whether all arrays are vectors, so that those of each kind form a matrix."""
    return all(array.ndim == 1 for result in run.results() for array in result.arrays.values())


def stacked(run: Run) -> dict[str, Any]:
    """Stack the vectors of each kind into a matrix."""
    columns: dict[str, list[np.ndarray]] = {}
    for result in run.results():
        for kind, array in result.arrays.items():
            columns.setdefault(kind, []).append(array)
    return {kind: np.stack(rows) for kind, rows in columns.items()}


def write_npz(path: Path, run: Run) -> None:
    """Write vectors as one matrix of each kind with `ids`, or larger arrays by id (`id/kind` if there are several)."""
    details = np.array(json.dumps(metadata(run)))
    if per_protein(run):
        np.savez(path, **stacked(run), ids=np.array([r.id for r in run.results()], dtype=str), metadata=details)
        return
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:

        def add(key: str, array: np.ndarray) -> None:
            with archive.open(f"{key}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)

        for name, array in named_arrays(run):
            add(name, array)
        add("metadata", details)


def write_safetensors(path: Path, run: Run) -> None:
    """Write the arrays as `write_npz` does, with the ids as a JSON list in the metadata.

    Raises:
        OSError: the file cannot be written.
    """
    tensors = stacked(run) if per_protein(run) else dict(named_arrays(run))
    details = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata(run).items()}
    try:
        save_file(tensors, path, {"ids": json.dumps([result.id for result in run.results()]), **details})
    except SafetensorError as error:
        raise OSError(str(error)) from error
    sort_metadata(path)


def sort_metadata(path: Path) -> None:
    """Sort the metadata of a safetensors file, which the library writes in varying order."""
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        assert len(text) <= size, "sorting must not change the size of the metadata"
        file.seek(8)
        file.write(text.ljust(size))


class KeptErrors(io.FileIO):
    """A file that raises write errors when it is closed, and not before.

    HDF5 also writes while Python objects are destroyed, where errors cannot be caught.
    """

    error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write bytes, and keep an error for later."""
        rest = memoryview(data).cast("B")
        size = len(rest)
        try:
            while rest and self.error is None:
                rest = rest[super().write(rest) :]
        except OSError as error:
            self.error = error
        return size

    def __exit__(self, *details: Any) -> None:
        super().__exit__(*details)
        if self.error is not None:
            raise self.error


def h5_name(name: str) -> str:
    """Make a name valid in HDF5, where `/` separates groups, and `.` and "" are the group itself."""
    return "_" if name in ("", ".") else name.replace("/", "_")


def write_h5(path: Path, run: Run) -> None:
    """Write UniProt's layout: a dataset for each accession, or a group of datasets if results have several arrays."""
    import h5py

    with KeptErrors(path, "r+") as raw, h5py.File(raw, "w") as file:
        file.attrs.update({key: json.dumps(value) for key, value in metadata(run).items()})
        for name, result in unique_names(run):
            short = accession(result.id) + name[len(result.id) :]
            for kind, array in result.arrays.items():
                key = h5_name(short) + (f"/{kind}" if len(result.arrays) > 1 else "")
                while key in file:  # two ids with the same accession
                    key = f"{result.number}_{key}"
                file.create_dataset(key, data=array).attrs["original_id"] = result.id


def write_csv(path: Path, run: Run) -> None:
    """Write a row for each protein: number, id, length in residues, and the value of each array."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        for result in run.results():
            if file.tell() == 0:
                table.writerow(["number", "id", "length", *result.arrays])
            values = (float(array[0]) for array in result.arrays.values())
            table.writerow([result.number, result.id, result.length, *values])


def write_parquet(path: Path, run: Run) -> None:
    """Write a row for each protein: number, id, length in residues, and each array as a list, or a list of lists."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    writer = None
    try:
        for results in groups(run):
            columns: dict[str, Any] = {
                "number": pa.array([r.number for r in results]),
                "id": pa.array([r.id for r in results]),
                "length": pa.array([r.length for r in results]),
            }
            columns |= {kind: parquet_column([r.arrays[kind] for r in results]) for kind in results[0].arrays}
            table = pa.table(columns)
            if writer is None:
                details = {key: json.dumps(value) for key, value in metadata(run).items()}
                writer = pq.ParquetWriter(path, table.schema.with_metadata(details))
            writer.write_table(table)
    finally:
        if writer is not None:
            writer.close()


def parquet_column(arrays: list[np.ndarray]) -> Any:
    """Return a column of fixed-size lists for vectors, or of lists of them for matrices."""
    import pyarrow as pa

    flat = np.concatenate([array.reshape(-1, array.shape[-1]) for array in arrays])
    values = pa.FixedSizeListArray.from_arrays(pa.array(flat.ravel()), flat.shape[-1])
    if arrays[0].ndim == 1:
        return values
    offsets = np.cumsum([0, *(len(array) for array in arrays)], dtype=np.int64)
    return pa.LargeListArray.from_arrays(pa.array(offsets), values)


def groups(run: Run) -> Iterator[list[Result]]:
    """Yield the results in groups of about `GROUP_BYTES`."""
    group, total = list[Result](), 0
    for result in run.results():
        group.append(result)
        total += sum(array.nbytes for array in result.arrays.values())
        if total > GROUP_BYTES:
            yield group
            group, total = [], 0
    if group:
        yield group
