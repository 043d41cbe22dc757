"""Load a thousand damaged checkpoints: none may crash, raise an unexpected error or change results silently."""

import json
import random
import shutil
import struct
from collections import Counter

import numpy as np
import pytest

from mlx_esm_hf import EsmTokenizer
from tests.abuse.command import outcomes
from tests.checkpoints import save, save_bin, save_old_bin, save_shards, torch_model
from tests.vocabulary import write_vocabulary

PER_KIND = 180
FAMILIES = ("esm2", "esm1b", "esm1v")
VALUES = [None, True, -1, 0, 1, 3, 10**6, 10**12, 0.5, -0.5, float("nan"), "", "32", "x" * 1000, [], [1], {}, {"a": 1}]


def flip_bytes(path, rng, stop=None):
    data = bytearray(path.read_bytes())
    for _ in range(rng.randint(1, 4)):
        data[rng.randrange(stop or len(data))] = rng.randrange(256)
    path.write_bytes(data)


def cut(path, rng):
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def edit_header(path, rng):
    """Change the header of a safetensors file, but never swap tensors of one shape: no reader could detect that."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    name = rng.choice([key for key in header if key != "__metadata__"])
    what = rng.choice(["dtype", "shape", "data_offsets", "name", "missing", "size", "metadata", "field"])
    if what == "dtype":
        header[name]["dtype"] = rng.choice(["I32", "U32", "F16", "F64", "BOOL", "F8_E4M3", "X", 3, None])
    elif what == "shape":
        header[name]["shape"] = rng.choice([[], [0], [-1], [10**12], header[name]["shape"][::-1] + [2], "x", None])
    elif what == "data_offsets":
        header[name]["data_offsets"] = rng.choice([[0, 0], [-4, 4], [10**12, 10**12 + 4], [8, 4], ["a", 1], None, []])
    elif what == "name":
        header[rng.choice(["", "x", name + ".x", "../" + name, "\0", "é" * 999])] = header.pop(name)
    elif what == "missing":
        del header[name]
    elif what == "metadata":
        header["__metadata__"] = rng.choice([None, [], {"format": 3}, {"format": "tf"}, "x"])
    elif what == "field":
        header[name] = rng.choice(VALUES)
    text = json.dumps(header).encode()
    length = rng.choice([0, 1, 2**63, 2**64 - 1, len(text) + 10**9]) if what == "size" else len(text)
    path.write_bytes(struct.pack("<Q", length) + text + data[8 + size :])


def damage_safetensors(folder, rng):
    path = folder / "model.safetensors"
    choice = rng.randrange(3)
    if choice == 0:
        cut(path, rng)
    elif choice == 1:
        (size,) = struct.unpack("<Q", path.read_bytes()[:8])
        flip_bytes(path, rng, stop=8 + size)
    else:
        edit_header(path, rng)


def damage_index(folder, rng):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    name = rng.choice(list(index["weight_map"]))
    outside = ["../model.safetensors", "/etc/passwd", ".", "", "missing.safetensors", "config.json", *VALUES]
    choice = rng.randrange(5)
    if choice == 0:
        cut(path, rng)
    elif choice == 1:
        flip_bytes(path, rng)
    elif choice == 2:
        index["weight_map"][name] = rng.choice(outside)
        path.write_text(json.dumps(index))
    elif choice == 3:
        path.write_text(json.dumps(rng.choice([*VALUES, {"weight_map": rng.choice(VALUES)}])))
    else:
        shard = folder / index["weight_map"][name]
        rng.choice([cut, edit_header])(shard, rng)


def damage_config(folder, rng):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    choice = rng.randrange(6)
    if choice == 0:
        cut(path, rng)
    elif choice == 1:
        flip_bytes(path, rng)
    else:
        for _ in range(rng.randint(1, 3)):
            config[rng.choice(list(config))] = rng.choice(VALUES)
        path.write_text(json.dumps(config))


def damage_bin(folder, rng):
    path = rng.choice(sorted(folder.glob("*.bin")))
    rng.choice([cut, flip_bytes])(path, rng)


def damage_tokenizer(folder, rng):
    path = rng.choice([folder / "vocab.txt", folder / "tokenizer_config.json"])
    choice = rng.randrange(5)
    if choice == 0:
        cut(path, rng)
    elif choice == 1:
        flip_bytes(path, rng)
    elif choice == 2:
        path.unlink()
    elif path.name == "vocab.txt":
        damage_vocabulary(path, rng)
    else:
        config = json.loads(path.read_text())
        name = rng.choice([*config, "auto_map", "added_tokens_decoder", "extra_special_tokens", "model_max_length"])
        # A loader that trusted the config would execute this file. It leaves a file *.ran behind.
        (folder / "code.py").write_text("open(__file__ + '.ran', 'w')\nclass Tokenizer: pass\n")
        auto_map = {"AutoTokenizer": ["code.Tokenizer", None]}
        config[name] = rng.choice([*VALUES, auto_map, {"0": "<cls>"}, "os.system", "A", "<mask>", "EsmModel"])
        path.write_text(json.dumps(config))


def damage_vocabulary(path, rng):
    lines = path.read_text().split("\n")
    what = rng.choice(["shuffle", "swap", "remove", "repeat", "append", "lower case", "spaces"])
    if what == "shuffle":
        rng.shuffle(lines)
    elif what == "swap":
        i, j = rng.sample(range(len(lines)), 2)
        lines[i], lines[j] = lines[j], lines[i]
    elif what == "remove":
        lines.pop(rng.randrange(len(lines)))
    elif what == "repeat":
        lines.insert(rng.randrange(len(lines)), rng.choice(lines))
    elif what == "append":
        lines += ["x"] * rng.randint(1, 9)
    elif what == "lower case":
        lines = [line.lower() for line in lines]
    else:
        lines = [f" {line}" for line in lines]
    path.write_text("\n".join(lines))


KINDS = {
    "safetensors": (save, damage_safetensors),
    "index": (save_shards, damage_index),
    "config": (save, damage_config),
    "bin": (save_bin, damage_bin),
    "old bin": (save_old_bin, damage_bin),
    "tokenizer": (save, damage_tokenizer),
}
# Damage of these kinds is detected, or does not change the results.
SAME_RESULTS = ("safetensors", "index", "tokenizer")


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_checkpoints(kind, tmp_path):
    write, damage = KINDS[kind]
    for family in FAMILIES:
        intact = tmp_path / family
        write(torch_model(kind=family), intact)
        EsmTokenizer(write_vocabulary(intact)).save_pretrained(intact)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    rng = random.Random(kind)
    folders = {tmp_path / f"{number:04d}": FAMILIES[number % len(FAMILIES)] for number in range(PER_KIND)}
    for folder, family in folders.items():
        shutil.copytree(tmp_path / family, folder)
        damage(folder, rng)
    intact = {family: str(tmp_path / family) for family in FAMILIES}
    results = outcomes("tests.abuse.loader", [*intact.values(), *map(str, folders)])
    assert all(results[folder]["outcome"] == "loaded" for folder in intact.values())
    counts = Counter(results[str(folder)]["outcome"] for folder in folders)
    wrong = []
    for folder, family in folders.items():
        result, expected = results[str(folder)], results[intact[family]]
        if result["outcome"] in ("crash", "hang", "bug"):
            wrong.append((folder, result["error"]))
        # A flipped byte in the storages of a .bin, or another config, gives another valid model.
        if result["outcome"] == "loaded" and kind in SAME_RESULTS:
            names = ("logits", "log_probabilities")
            warned = any(
                "other ids than in its family" in warning for warning in result["warnings"]
            )  # residue order may be intended
            if not warned and not all(
                np.array_equal(np.array(result[name]), np.array(expected[name])) for name in names
            ):
                wrong.append((folder, "results differ"))
    print(f"{kind}: {PER_KIND} damaged, {dict(counts)}, wrong: {len(wrong)}")
    assert not wrong, wrong[:3]
    assert all(path.read_bytes() == data for path, data in before.items())
    assert not list(tmp_path.rglob("*.ran"))
    assert counts["refused"] > PER_KIND / 4
