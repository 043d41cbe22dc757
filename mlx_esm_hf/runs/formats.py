"""Writing the results of a run to formats that other programs read, one result at a time."""

from __future__ import annotations

import csv
import io
import json
import math
import zipfile
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mlx_esm_hf.runs.job import Result
from mlx_esm_hf.runs.run import Run

GROUP_BYTES = 1 << 26  # of results that form a row group of a Parquet file
COMPACT_BYTES = 60_000  # of an HDF5 dataset that is stored in its header, which is faster; a header has at most 64 KiB


def metadata(run: Run) -> dict[str, Any]:
    """Return the command and its settings for a file's metadata, without the memory limit, which affects no values."""
    settings = {key: value for key, value in run.manifest["settings"].items() if key != "memory"}
    return {"command": run.manifest["command"], **settings}


class Column(NamedTuple):
    """An array that is read block by block while it is written.

    Attributes:
        dtype: its dtype.
        shape: its shape.
        blocks: its rows, in order.
    """

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    blocks: Iterable[np.ndarray]


def columns(run: Run) -> dict[str, Column]:
    """Return the array of each kind: [proteins, width], or [residues, width] of all proteins one after the other.

    If there are residues, `offsets` [proteins + 1] tells where each protein begins and the last one ends.
    """
    first = next(run.results()).arrays
    lengths = np.fromiter((length for _, _, length in run.items()), np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    found = {}
    for kind, array in first.items():
        rows = len(lengths) if array.ndim == 1 else int(offsets[-1])
        found[kind] = Column(array.dtype, (rows, array.shape[-1]), _blocks(run, kind))
    if any(array.ndim > 1 for array in first.values()):
        found["offsets"] = Column(offsets.dtype, offsets.shape, [offsets])
    return found


def _blocks(run: Run, kind: str) -> Iterator[np.ndarray]:
    for result in run.results(kind):
        array = result.arrays[kind]
        assert array.ndim == 1 or len(array) == result.length, "a result has one row for each residue"
        yield np.ascontiguousarray(array)


def write_npz(path: Path, run: Run) -> None:
    """Write the `columns` of a run and `ids`, one result at a time."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, column in columns(run).items():
            _add(archive, name, column)
        _add_ids(archive, run)


def write_maps(path: Path, run: Run) -> None:
    """Write the array of each result under its id, and `ids`."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for result in run.results():
            ((kind, array),) = result.arrays.items()
            _add(archive, map_name(result.id, kind), _as_column(array))
        _add_ids(archive, run)


def map_name(id: str, kind: str) -> str:
    """Return the name of a protein's array in an `.npz` file: its id, or `id/kind` where `np.load` needs another name.

    `ids` and `metadata` are other arrays, and names that differ only in `.npy` are the same to `np.load`.
    """
    is_taken = id in ("ids", "metadata") or id.endswith((".npy", f"/{kind}"))
    return f"{id}/{kind}" if is_taken else id


def _add(archive: zipfile.ZipFile, name: str, column: Column) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(column.dtype), "fortran_order": False, "shape": column.shape}
    with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for block in column.blocks:
            file.write(block.tobytes())


def _as_column(array: np.ndarray) -> Column:
    return Column(array.dtype, array.shape, [array])


def _add_ids(archive: zipfile.ZipFile, run: Run) -> None:
    count, longest = 0, 1
    for _, id, _ in run.items():
        count, longest = count + 1, max(longest, len(id))
    dtype = np.dtype(f"U{longest}")
    _add(archive, "ids", Column(dtype, (count,), (np.array(id, dtype) for _, id, _ in run.items())))
    _add(archive, "metadata", _as_column(np.array(json.dumps(metadata(run)))))


def write_safetensors(path: Path, run: Run) -> None:
    """Write the `columns` of a run, one result at a time, with the ids as a JSON list in the metadata.

    The library would need all arrays in memory, write the metadata in varying order, and ignore the umask.
    """
    details = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata(run).items()}
    details["ids"] = json.dumps([id for _, id, _ in run.items()])
    header: dict[str, Any] = {"__metadata__": dict(sorted(details.items()))}
    # Larger elements first keep every array aligned.
    found = sorted(columns(run).items(), key=lambda pair: -pair[1].dtype.itemsize)
    end = 0
    for name, column in found:
        begin, end = end, end + math.prod(column.shape) * column.dtype.itemsize
        dtype = f"{column.dtype.kind}{8 * column.dtype.itemsize}".upper()
        header[name] = {"dtype": dtype, "shape": column.shape, "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, column in found:
            for block in column.blocks:
                file.write(block.tobytes())


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


def h5_name(id: str) -> str:
    """Return an id as a name in HDF5, where `/` separates groups, `.` is the group itself, and "" is no name.

    `/` becomes `%2F` and `%` becomes `%25`, as in URLs.
    """
    return {"": "%", ".": "%2E"}.get(id) or id.replace("%", "%25").replace("/", "%2F")


def write_h5(path: Path, run: Run) -> None:
    """Write a dataset for each protein, named by its id, or a group of datasets if results have several arrays.

    Datasets are in the order of the proteins. An id that is not a name in HDF5 is in the attribute `original_id`.
    """
    import h5py

    with KeptErrors(path, "r+") as raw, h5py.File(raw, "w", track_order=True) as file:
        file.attrs.update({key: json.dumps(value) for key, value in metadata(run).items()})
        for result in run.results():
            name = h5_name(result.id)
            for kind, array in result.arrays.items():
                _create_dataset(file.id, name if len(result.arrays) == 1 else f"{name}/{kind}", array)
            if name != result.id:
                file[name].attrs["original_id"] = result.id


def _create_dataset(file: Any, name: str, array: np.ndarray) -> None:
    """Create a dataset through HDF5's own functions, several times faster than h5py's `create_dataset`."""
    from h5py import h5d, h5s

    dtype, creation, link = _h5_objects(array.dtype, is_compact=array.nbytes <= COMPACT_BYTES)
    dataset = h5d.create(file, name.encode(), dtype, h5s.create_simple(array.shape), creation, link)
    dataset.write(h5s.ALL, h5s.ALL, np.ascontiguousarray(array), dtype)


@cache
def _h5_objects(dtype: np.dtype[Any], is_compact: bool) -> tuple[Any, Any, Any]:
    """Return HDF5's dtype, and the properties for creating a dataset and its link."""
    from h5py import h5d, h5p, h5t

    creation, link = h5p.create(h5p.DATASET_CREATE), h5p.create(h5p.LINK_CREATE)
    creation.set_obj_track_times(False)
    if is_compact:
        creation.set_layout(h5d.COMPACT)
    link.set_create_intermediate_group(True)
    link.set_char_encoding(h5t.CSET_UTF8)
    return h5t.py_create(dtype), creation, link


def write_csv(path: Path, run: Run) -> None:
    """Write a row for each protein: number, id, length in residues, and the values of each vector.

    A vector of one number has the name of its kind; other vectors have the columns `kind_0`, `kind_1` and so on. The
    digits give back every bit.
    """
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        for result in run.results():
            if result.number == 0:
                table.writerow(["number", "id", "length", *_csv_names(result)])
            values = (_csv_values(array) for array in result.arrays.values())
            table.writerow([result.number, result.id, result.length, *chain.from_iterable(values)])


def _csv_values(array: np.ndarray) -> list[Any]:
    if array.dtype == np.float32:  # converted to float64, it would have 17 digits
        return [f"{value:.9g}" for value in array.tolist()]
    return array.tolist()


def _csv_names(result: Result) -> Iterator[str]:
    for kind, array in result.arrays.items():
        yield from [kind] if len(array) == 1 else [f"{kind}_{i}" for i in range(len(array))]


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
