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


def flip_bytes(path, dice, stop=None):
    data = bytearray(path.read_bytes())
    for _ in range(dice.randint(1, 4)):
        data[dice.randrange(stop or len(data))] = dice.randrange(256)
    path.write_bytes(data)


def cut(path, dice):
    path.write_bytes(path.read_bytes()[: dice.randrange(path.stat().st_size)])


def edit_header(path, dice):
    """Change the header of a safetensors file, but not the order in which tensors of one shape lie in it."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    name = dice.choice([key for key in header if key != "__metadata__"])
    what = dice.choice(["dtype", "shape", "data_offsets", "name", "gone", "size", "metadata", "field"])
    if what == "dtype":
        header[name]["dtype"] = dice.choice(["I32", "U32", "F16", "F64", "BOOL", "F8_E4M3", "X", 3, None])
    elif what == "shape":
        header[name]["shape"] = dice.choice([[], [0], [-1], [10**12], header[name]["shape"][::-1] + [2], "x", None])
    elif what == "data_offsets":
        header[name]["data_offsets"] = dice.choice([[0, 0], [-4, 4], [10**12, 10**12 + 4], [8, 4], ["a", 1], None, []])
    elif what == "name":
        header[dice.choice(["", "x", name + ".x", "../" + name, "\0", "é" * 999])] = header.pop(name)
    elif what == "gone":
        del header[name]
    elif what == "metadata":
        header["__metadata__"] = dice.choice([None, [], {"format": 3}, {"format": "tf"}, "x"])
    elif what == "field":
        header[name] = dice.choice(VALUES)
    text = json.dumps(header).encode()
    length = dice.choice([0, 1, 2**63, 2**64 - 1, len(text) + 10**9]) if what == "size" else len(text)
    path.write_bytes(struct.pack("<Q", length) + text + data[8 + size :])


def abuse_safetensors(folder, dice):
    path = folder / "model.safetensors"
    choice = dice.randrange(3)
    if choice == 0:
        cut(path, dice)
    elif choice == 1:
        (size,) = struct.unpack("<Q", path.read_bytes()[:8])
        flip_bytes(path, dice, stop=8 + size)
    else:
        edit_header(path, dice)


def abuse_index(folder, dice):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    name = dice.choice(list(index["weight_map"]))
    outside = ["../model.safetensors", "/etc/passwd", ".", "", "nowhere.safetensors", "config.json", *VALUES]
    choice = dice.randrange(5)
    if choice == 0:
        cut(path, dice)
    elif choice == 1:
        flip_bytes(path, dice)
    elif choice == 2:
        index["weight_map"][name] = dice.choice(outside)
        path.write_text(json.dumps(index))
    elif choice == 3:
        path.write_text(json.dumps(dice.choice([*VALUES, {"weight_map": dice.choice(VALUES)}])))
    else:
        shard = folder / index["weight_map"][name]
        dice.choice([cut, edit_header])(shard, dice)


def abuse_config(folder, dice):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    choice = dice.randrange(6)
    if choice == 0:
        cut(path, dice)
    elif choice == 1:
        flip_bytes(path, dice)
    else:
        for _ in range(dice.randint(1, 3)):
            config[dice.choice(list(config))] = dice.choice(VALUES)
        path.write_text(json.dumps(config))


def abuse_bin(folder, dice):
    path = dice.choice(sorted(folder.glob("*.bin")))
    dice.choice([cut, flip_bytes])(path, dice)


def abuse_tokenizer(folder, dice):
    path = dice.choice([folder / "vocab.txt", folder / "tokenizer_config.json"])
    choice = dice.randrange(5)
    if choice == 0:
        cut(path, dice)
    elif choice == 1:
        flip_bytes(path, dice)
    elif choice == 2:
        path.unlink()
    elif path.name == "vocab.txt":
        abuse_vocabulary(path, dice)
    else:
        config = json.loads(path.read_text())
        name = dice.choice([*config, "auto_map", "added_tokens_decoder", "extra_special_tokens", "model_max_length"])
        # The file of code is there: to load it would be to execute what is in a checkpoint.
        (folder / "code.py").write_text("open(__file__ + '.ran', 'w')\nclass Tokenizer: pass\n")
        code = {"AutoTokenizer": ["code.Tokenizer", None]}
        config[name] = dice.choice([*VALUES, code, {"0": "<cls>"}, "os.system", "A", "<mask>", "EsmModel"])
        path.write_text(json.dumps(config))


def abuse_vocabulary(path, dice):
    lines = path.read_text().split("\n")
    what = dice.choice(["shuffled", "swapped", "gone", "twice", "more", "lower case", "spaces"])
    if what == "shuffled":
        dice.shuffle(lines)
    elif what == "swapped":
        i, j = dice.sample(range(len(lines)), 2)
        lines[i], lines[j] = lines[j], lines[i]
    elif what == "gone":
        lines.pop(dice.randrange(len(lines)))
    elif what == "twice":
        lines.insert(dice.randrange(len(lines)), dice.choice(lines))
    elif what == "more":
        lines += ["x"] * dice.randint(1, 9)
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
    dice = random.Random(kind)
    folders = {tmp_path / f"{number:04d}": FAMILIES[number % len(FAMILIES)] for number in range(EACH)}
    for folder, family in folders.items():
        shutil.copytree(tmp_path / family, folder)
        abuse(folder, dice)
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
