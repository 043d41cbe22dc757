"""A thousand malformed checkpoints: none crashes, none is a traceback, none gives other numbers than the sound one."""

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

EACH = 180  # of six kinds
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
    """Change the header of a safetensors file, but not the order in which tensors of one shape lie in it."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    name = rng.choice([key for key in header if key != "__metadata__"])
    what = rng.choice(["dtype", "shape", "data_offsets", "name", "gone", "size", "metadata", "field"])
    if what == "dtype":
        header[name]["dtype"] = rng.choice(["I32", "U32", "F16", "F64", "BOOL", "F8_E4M3", "X", 3, None])
    elif what == "shape":
        header[name]["shape"] = rng.choice([[], [0], [-1], [10**12], header[name]["shape"][::-1] + [2], "x", None])
    elif what == "data_offsets":
        header[name]["data_offsets"] = rng.choice([[0, 0], [-4, 4], [10**12, 10**12 + 4], [8, 4], ["a", 1], None, []])
    elif what == "name":
        header[rng.choice(["", "x", name + ".x", "../" + name, "\0", "é" * 999])] = header.pop(name)
    elif what == "gone":
        del header[name]
    elif what == "metadata":
        header["__metadata__"] = rng.choice([None, [], {"format": 3}, {"format": "tf"}, "x"])
    elif what == "field":
        header[name] = rng.choice(VALUES)
    text = json.dumps(header).encode()
    length = rng.choice([0, 1, 2**63, 2**64 - 1, len(text) + 10**9]) if what == "size" else len(text)
    path.write_bytes(struct.pack("<Q", length) + text + data[8 + size :])


def abuse_safetensors(folder, rng):
    path = folder / "model.safetensors"
    choice = rng.randrange(3)
    if choice == 0:
        cut(path, rng)
    elif choice == 1:
        (size,) = struct.unpack("<Q", path.read_bytes()[:8])
        flip_bytes(path, rng, stop=8 + size)
    else:
        edit_header(path, rng)


def abuse_index(folder, rng):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    name = rng.choice(list(index["weight_map"]))
    outside = ["../model.safetensors", "/etc/passwd", ".", "", "nowhere.safetensors", "config.json", *VALUES]
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


def abuse_config(folder, rng):
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


def abuse_bin(folder, rng):
    path = rng.choice(sorted(folder.glob("*.bin")))
    rng.choice([cut, flip_bytes])(path, rng)


def abuse_tokenizer(folder, rng):
    path = rng.choice([folder / "vocab.txt", folder / "tokenizer_config.json"])
    choice = rng.randrange(5)
    if choice == 0:
        cut(path, rng)
    elif choice == 1:
        flip_bytes(path, rng)
    elif choice == 2:
        path.unlink()
    elif path.name == "vocab.txt":
        abuse_vocabulary(path, rng)
    else:
        config = json.loads(path.read_text())
        name = rng.choice([*config, "auto_map", "added_tokens_decoder", "extra_special_tokens", "model_max_length"])
        # The file of code is there: to load it would be to execute what is in a checkpoint.
        (folder / "code.py").write_text("open(__file__ + '.ran', 'w')\nclass Tokenizer: pass\n")
        code = {"AutoTokenizer": ["code.Tokenizer", None]}
        config[name] = rng.choice([*VALUES, code, {"0": "<cls>"}, "os.system", "A", "<mask>", "EsmModel"])
        path.write_text(json.dumps(config))


def abuse_vocabulary(path, rng):
    lines = path.read_text().split("\n")
    what = rng.choice(["shuffled", "swapped", "gone", "twice", "more", "lower case", "spaces"])
    if what == "shuffled":
        rng.shuffle(lines)
    elif what == "swapped":
        i, j = rng.sample(range(len(lines)), 2)
        lines[i], lines[j] = lines[j], lines[i]
    elif what == "gone":
        lines.pop(rng.randrange(len(lines)))
    elif what == "twice":
        lines.insert(rng.randrange(len(lines)), rng.choice(lines))
    elif what == "more":
        lines += ["x"] * rng.randint(1, 9)
    elif what == "lower case":
        lines = [line.lower() for line in lines]
    else:
        lines = [f" {line}" for line in lines]
    path.write_text("\n".join(lines))


KINDS = {
    "safetensors": (save, abuse_safetensors),
    "index": (save_shards, abuse_index),
    "config": (save, abuse_config),
    "bin": (save_bin, abuse_bin),
    "old bin": (save_old_bin, abuse_bin),
    "tokenizer": (save, abuse_tokenizer),
}
SAME_NUMBERS = ("safetensors", "index", "tokenizer")


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_malformed_checkpoints(kind, tmp_path):
    write, abuse = KINDS[kind]
    for family in FAMILIES:
        sound = tmp_path / family
        write(torch_model(kind=family), sound)
        EsmTokenizer(write_vocabulary(sound)).save_pretrained(sound)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    rng = random.Random(kind)
    folders = {tmp_path / f"{number:04d}": FAMILIES[number % len(FAMILIES)] for number in range(EACH)}
    for folder, family in folders.items():
        shutil.copytree(tmp_path / family, folder)
        abuse(folder, rng)
    sound = {family: str(tmp_path / family) for family in FAMILIES}
    found = outcomes("tests.abuse.loader", [*sound.values(), *map(str, folders)])
    assert all(found[folder]["outcome"] == "loaded" for folder in sound.values())
    counts = Counter(found[str(folder)]["outcome"] for folder in folders)
    wrong = []
    for folder, family in folders.items():
        result, expected = found[str(folder)], found[sound[family]]
        if result["outcome"] in ("crash", "hang", "bug"):
            wrong.append((folder, result["error"]))
        # A flipped byte of a .bin's storages, or another config, is a model with other numbers, and a sound one.
        if result["outcome"] == "loaded" and kind in SAME_NUMBERS:
            names = ("logits", "log_probabilities")
            told = any("another order" in warning for warning in result["warned"])  # of residues: it may be meant
            if not told and not all(np.array_equal(np.array(result[name]), np.array(expected[name])) for name in names):
                wrong.append((folder, "other numbers"))
    print(f"{kind}: {EACH} malformed, {dict(counts)}, wrong: {len(wrong)}")
    assert not wrong, wrong[:3]
    assert all(path.read_bytes() == data for path, data in before.items())
    assert not list(tmp_path.rglob("*.ran"))
    assert counts["refused"] > EACH / 4
