"""A job with given ids and arrays, to write every format without a model; and a reader of each format.

A reader uses the library that people use, not this package, and returns {id: {kind: array}} in the file's order.
"""

import csv
import json
from urllib.parse import unquote

import h5py
import numpy as np
import pyarrow.parquet
from safetensors import safe_open

from mlx_esm_hf.jobs import contacts, embed
from mlx_esm_hf.runs.job import Item, ItemList, Job, no_progress
from mlx_esm_hf.runs.run import write_results

WIDTH = 5


def made(ids, kinds, seed=0):
    """Return random arrays for each id: `residues` and `chains` have a row for each residue, others are vectors."""
    rng, arrays = np.random.default_rng(seed), []
    for number in range(len(ids)):
        length = int(rng.integers(1, 9)) if number else 3
        of_kind = {"contacts": (length, length), "residues": (length, WIDTH), "chains": (length, 1)}
        arrays.append({kind: rng.standard_normal(of_kind.get(kind, (WIDTH,))).astype(np.float32) for kind in kinds})
        if "chains" in kinds:
            arrays[-1]["chains"] = arrays[-1]["chains"].astype(np.int32)
    return arrays


def lengths(arrays):
    return [max((len(array) for array in one.values() if array.ndim == 2), default=1) for one in arrays]


def write(ids, arrays, output, chunk_work=3):
    """Write the results of a job with these ids and arrays."""
    items = [
        Item(number, id, number, length, 1, 0)
        for number, (id, length) in enumerate(zip(ids, lengths(arrays), strict=True))
    ]
    job = Job(
        "embed",
        {"model": "m", "pooling": list(arrays[0])},
        ItemList(items, {"name": "ids", "sha256": ""}),
        lambda chunk: [arrays[item.content] for item in chunk],
        chunk_work,
    )
    writers = contacts.FORMATS if "contacts" in arrays[0] else embed.FORMATS
    write_results(job, output, writers, no_progress)


def read(path):
    """Read an output, by its suffix."""
    return READERS[path.suffix](path)


def read_rows(columns, ids):
    """Split `columns`, {kind: array}, into one dictionary for each id."""
    found = {id: {} for id in ids}
    for kind, array in columns.items():
        if kind in ("offsets", "ids", "metadata"):
            continue
        pieces = array
        if "offsets" in columns and len(array) == columns["offsets"][-1] and kind.split(".")[0] in PER_RESIDUE:
            pieces = [array[start:stop] for start, stop in zip(columns["offsets"], columns["offsets"][1:])]  # noqa: B905
        for id, piece in zip(ids, pieces, strict=True):
            found[id][kind] = piece
    return found


PER_RESIDUE = ("residues", "chains")


def read_npz(path):
    with np.load(path) as file:
        ids = file["ids"].tolist()
        if json.loads(str(file["metadata"]))["pooling"] == ["contacts"]:
            is_taken = [id in ("ids", "metadata") or id.endswith((".npy", "/contacts")) for id in ids]
            keys = [f"{id}/contacts" if taken else id for id, taken in zip(ids, is_taken, strict=True)]
            assert file.files[: len(ids)] == keys
            return {id: {"contacts": file[key]} for id, key in zip(ids, keys, strict=True)}
        return read_rows(dict(file), ids)


def read_safetensors(path):
    with safe_open(path, framework="numpy") as file:
        ids = json.loads(file.metadata()["ids"])
        return read_rows({key: file.get_tensor(key) for key in file.keys()}, ids)  # noqa: SIM118


def read_h5(path):
    found = {}
    with h5py.File(path) as file:
        kinds = json.loads(file.attrs["pooling"])
        for key, node in file.items():
            id = node.attrs.get("original_id", key)
            assert unquote(key) == id or id in (".", "")
            found[id] = {kinds[0]: node[()]} if isinstance(node, h5py.Dataset) else {k: node[k][()] for k in node}
    return found


def read_parquet(path):
    rows = pyarrow.parquet.read_table(path).to_pylist()
    return {
        row["id"]: {
            kind: np.array(row[kind], np.int32 if kind == "chains" else np.float32)
            for kind in row.keys() - {"number", "id", "length"}
        }
        for row in rows
    }


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert header[:3] == ["number", "id", "length"]
    kinds = list(dict.fromkeys(name.rpartition("_")[0] for name in header[3:]))
    found = {}
    for number, row in enumerate(rows):
        assert int(row[0]) == number
        values = np.array(row[3:], np.float32).reshape(len(kinds), -1)
        found[row[1]] = dict(zip(kinds, values, strict=True))
    return found


def read_folder(path):
    with open(path / "index.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    found = {}
    for row in rows:
        with safe_open(path / row["shard"], framework="numpy") as file:
            prefix = f"{int(row['number']):08d}/"
            names = [key for key in file.keys() if key.startswith(prefix)]  # noqa: SIM118
            found[row["id"]] = {name.removeprefix(prefix): file.get_tensor(name) for name in names}
    return found


READERS = {
    "": read_folder,
    ".npz": read_npz,
    ".safetensors": read_safetensors,
    ".h5": read_h5,
    ".parquet": read_parquet,
    ".csv": read_csv,
}
