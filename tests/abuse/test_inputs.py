"""Run the commands on a thousand malformed FASTA files and tables of mutants.

None may crash, end with a traceback, give a wrong result or lose a record silently.
"""

import csv
import gzip
import io
import itertools
import json
import random
import re
from collections import Counter

import h5py
import mlx.core as mx
import numpy as np
import pyarrow.parquet
import pytest
import zstandard
from safetensors import safe_open

from mlx_esm_hf import MLXAutoModelForMaskedLM
from tests.abuse.command import RESIDUES, WILD_TYPE, outcomes
from tests.vocabulary import write_vocabulary

PER_KIND = 200

TITLES = [
    "",
    " ",
    "p",
    "p p",
    "\tp\t x",
    "sp|P12345|X_HUMAN",
    "metadata",
    "ids",
    "p/q",
    "../p",
    "é蛋白",
    "p#2",
    "\x7f\x01p",
]
TITLES += ["x" * 5000, ">>p", "p>q", "\u2028p", "p\x85q", "-", "'\"", ";x", "p,q", "[p]", "%s", "NaN"]
PIECES = [
    "",
    "-",
    ".",
    "*",
    "1",
    "?",
    "é",
    "ſ",
    "ı",
    "İ",
    "J",
    "j",
    "<mask>",
    "<eos>",
    "<",
    ">",
    "<pad>",
    "<null_1>",
    "< mask>",
]
PIECES += [
    " ",
    "\t",
    "\x0b",
    "\x0c",
    "\x1c",
    "\x85",
    "\u2028",
    "\u00a0",
    "\u200b",
    "\0",
    "\ufeff",
    "x",
    "X",
    "O",
    "Α",
    "Ａ",
    "\n",
]
ENDS = ["\n", "\n", "\r\n", "\r", "\n\n"]


# Random FASTA files


def records(rng):
    """Return the text of a FASTA file with unusual titles, letters and line ends."""
    end, text = rng.choice(ENDS), ""
    for number in range(rng.randint(1, 6)):
        sequence = rng.choices(RESIDUES, k=rng.randint(0, 30))
        for _ in range(rng.choice([0, 0, 1, 3])):
            sequence.insert(rng.randint(0, len(sequence)), rng.choice(PIECES))
        title = rng.choice(TITLES) if rng.random() < 0.4 else f"p{number}"
        text += f">{title}{end}{''.join(sequence)}{rng.choice([end, end, end * 3])}"
    return rng.choice(["", "", "", "\ufeff", "\n\n", " \n", ";comment\n", "MKT\n"]) + text.rstrip(
        rng.choice([" ", end])
    )


def odd_records(rng):
    return records(rng).encode(rng.choice(["utf-8"] * 8 + ["utf-16"]), "replace")


def valid_records(rng):
    return "".join(f">p{i}\n{''.join(rng.choices(RESIDUES, k=20))}\n" for i in range(4)).encode()


def damaged(data, rng):
    """Return the data with some bytes changed, inserted or removed, or with the end cut off or overwritten."""
    data = bytearray(data)
    what = rng.choice(["flip", "cut", "insert", "remove", "noise"])
    start = rng.randrange(len(data))
    if what == "flip":
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
    elif what == "cut":
        del data[start:]
    elif what == "insert":
        data[start:start] = rng.randbytes(rng.randint(1, 8))
    elif what == "remove":
        del data[start : start + rng.randint(1, 30)]
    else:
        data[start:] = rng.randbytes(len(data) - start)
    return bytes(data)


def damaged_records(rng):
    return damaged(valid_records(rng), rng)


def compressed(rng):
    """Return a damaged stream, a stream of odd records, two streams, or a stream followed by other bytes."""
    compress = rng.choice([gzip.compress, zstandard.ZstdCompressor(write_checksum=True).compress])
    return rng.choice(
        [
            lambda: damaged(compress(valid_records(rng)), rng),
            lambda: compress(odd_records(rng)),
            lambda: compress(valid_records(rng)) + compress(valid_records(rng)),
            lambda: compress(valid_records(rng)) + rng.choice([b"\0" * 9, b"x", b"\n"]),
        ]
    )()


FASTA = {"odd records": odd_records, "damaged records": damaged_records, "compressed": compressed}


# Expected records of a file, from the rules in the documentation and without the package's code


def decoded(data):
    """Return the text of a file; None if its compressed stream is damaged."""
    try:
        if data.startswith(b"\x1f\x8b"):
            data = gzip.decompress(data)
        elif data.startswith(b"\x28\xb5\x2f\xfd"):
            rest, data = data, b""
            while rest:
                frame = zstandard.ZstdDecompressor().decompressobj()
                data += frame.decompress(rest)
                if not frame.eof:
                    return None
                rest = frame.unused_data
    except Exception:
        return None
    return data.decode("utf-8-sig", "replace")


def cleaned(sequence):
    """Return the tokens of a sequence; None if it is invalid."""
    tokens = re.findall(r"<[^<>]*>|.", "".join(sequence.split()), re.DOTALL)
    if tokens[-1:] == ["*"]:
        tokens.pop()
    tokens = [token for token in tokens if token not in "-."]
    kept = []
    for token in tokens:
        if token in ("<mask>", "<cls>", "<eos>", "<unk>"):
            kept.append(token)
        elif re.fullmatch("[A-Za-z]", token):
            kept.append("X" if token.upper() == "J" else token.upper())
        else:
            return None
    return kept or None


def expected_records(text):
    """Return (id, tokens or None) for each record of a text; None if the text is not FASTA."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    while lines and not lines[0].strip():
        lines.pop(0)
    if not lines:
        return []
    if not lines[0].startswith(">"):
        return None
    found = []
    for line in lines:
        if line.startswith(">"):
            words = line[1:].split()
            found.append([words[0] if words else f"record_{len(found) + 1}", ""])
        else:
            found[-1][1] += line
    return [(name, cleaned(sequence)) for name, sequence in found]


class Model:
    """The model's answers for tokens, without the package's jobs and tokenizer."""

    def __init__(self, folder, tmp_path):
        self.network = MLXAutoModelForMaskedLM.from_pretrained(folder).eval()
        with open(write_vocabulary(tmp_path)) as file:
            self.ids = {token: number for number, token in enumerate(file.read().split("\n"))}

    def outputs(self, tokens):
        ids = [self.ids[token] for token in ["<cls>", *tokens, "<eos>"]]
        return self.network(mx.array([ids]), output_hidden_states=True)

    def mean(self, tokens):
        return np.array(self.outputs(tokens).hidden_states[-1])[0, 1:-1].mean(axis=0)

    def log_probabilities(self, tokens):
        logits = np.array(self.outputs(tokens).logits, np.float64)[0, 1:-1]
        return (
            logits
            - np.log(np.exp(logits - logits.max(axis=-1, keepdims=True)).sum(axis=-1, keepdims=True))
            - logits.max(axis=-1, keepdims=True)
        )


@pytest.fixture(scope="module")
def model(inputs, tmp_path_factory):
    return Model(inputs.models["ESM-2"], tmp_path_factory.mktemp("vocabulary"))


def close(a, b):
    return np.allclose(a, b, rtol=1e-4, atol=1e-4)


# Readers of the ids in an output, in the order of the input


def npz_ids(path):
    with np.load(path) as file:
        return file["ids"].tolist()


def map_ids(path):
    with np.load(path) as file:
        *names, last, metadata = file.files
        assert (last, metadata) == ("ids", "metadata")
        assert all(np.isfinite(file[name]).all() for name in names)
        return file["ids"].tolist()


def h5_ids(path):
    with h5py.File(path) as file:
        return [dataset.attrs.get("original_id", name) for name, dataset in file.items()]


def parquet_ids(path):
    return pyarrow.parquet.read_table(path)["id"].to_pylist()


def safetensors_ids(path):
    with safe_open(path, framework="numpy") as file:
        return json.loads(file.metadata()["ids"])


def csv_ids(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list({row["number"]: row["id"] for row in csv.DictReader(file)}.values())


def folder_ids(path):
    return csv_ids(path / "index.csv")


def fasta_ids(path):
    lines = path.read_text(encoding="utf-8").split("\n")
    return [line[1:].rsplit(" mean_log_p=")[0].removesuffix("_1") for line in lines if line.startswith(">")]


JOBS = {
    ("embed", ".npz"): npz_ids,
    ("embed", ".h5"): h5_ids,
    ("embed", ".parquet"): parquet_ids,
    ("embed", ".safetensors"): safetensors_ids,
    ("embed", ""): folder_ids,
    ("contacts", ".npz"): map_ids,
    ("perplexity", ".csv"): csv_ids,
    ("fill-mask", ".csv"): csv_ids,
    ("generate", ".fasta"): fasta_ids,
}


def has_work(job, tokens):
    """Return whether a job has something to compute for a record."""
    return bool(tokens) and (job not in ("fill-mask", "generate") or "<mask>" in tokens)


def unique(names):
    """Return the names that records with these ids have."""
    found = []
    for name in names:
        numbers = (f"{name}#{number}" for number in itertools.count(2))
        found.append(next(one for one in itertools.chain([name], numbers) if one not in found))
    return found


def fasta_problem(job, suffix, data, result, output, model):
    """Return what is wrong with the outcome of a job on a FASTA file; None if it is right."""
    text = decoded(data)
    expected = None if text is None else expected_records(text)
    valid = [record for record in expected or [] if has_work(job, record[1])]
    if result["code"] == 1:
        if valid:
            return "refused, but some records are valid"
        if output.exists():
            return "refused, but a file was written"
        named = result["printed"].count(", line ")
        return "refused without naming every record" if named < len(expected or []) else None
    left_out = len(re.findall("^Left out: ", result["printed"], re.MULTILINE))
    if left_out != len(expected) - len(valid) or result["code"] != (3 if left_out else 0):
        return f"{left_out} left out, exit code {result['code']}"
    ids, names = JOBS[job, suffix](output), unique([name for name, _ in expected])
    if ids != [name for name, record in zip(names, expected, strict=True) if record in valid]:
        return f"ids differ: {ids}"
    if suffix == ".npz":
        with np.load(output) as file:
            means = file["mean"]
        if not all(close(mean, model.mean(tokens)) for mean, (_, tokens) in zip(means, valid, strict=True)):
            return "embeddings differ"
    return None


@pytest.mark.long
@pytest.mark.parametrize("kind", FASTA)
def test_malformed_fasta(kind, inputs, model, tmp_path):
    rng, jobs = random.Random(kind), [("embed", ".npz")] * 8 + list(JOBS)
    cases, calls = {}, {}
    for number in range(PER_KIND):
        path = tmp_path / f"{number}.fasta"
        job, suffix = rng.choice(jobs)
        output = path.with_name(f"out{number}{suffix}")
        cases[path] = job, suffix, FASTA[kind](rng), output
        path.write_bytes(cases[path][2])
        arguments = [job, path, "--model", inputs.models["ESM-2"], "--output", output]
        calls[path] = json.dumps([str(a) for a in arguments])

    def find_problem(path, result):
        job, suffix, data, output = cases[path]
        return fasta_problem(job, suffix, data, result, output, model)

    check_results(kind, calls, find_problem)


# Tables of mutants

CELLS = ["", " ", "A", "1", "A1", "1A", "A0G", "A-1G", "A99G", "A1G:", ":", "A 1 G", "m1g", "M1*", "M1J", "Á1G", "M١G"]
CELLS += ["M1G;Q2A", "M1G:M1A", "Q2G", "M1M", " M1G ", "M1G: Q2A", "M1X", "M" + "1" * 30 + "G", "nan", "M1G\nQ2A", '"']
CELLS += ["M1<mask>", "=1+1", "\0"]
COLUMNS = [["mutant"], ["mutant", "y"], ["x", "mutant", "é"], ["mutant", "mutant"], ["Mutant"], ["mutant", ""], []]


def table(rng):
    """Return the text of a CSV file with unusual columns, cells and rows."""
    columns = rng.choice(COLUMNS)
    if rng.random() < 0.7:
        columns = rng.choice([["mutant"], ["id", "mutant", "note"]])
    positions = [rng.randrange(len(WILD_TYPE)) for _ in range(rng.randint(0, 8))]
    rows = []
    for position in positions:
        cell = f"{WILD_TYPE[position]}{position + 1}{rng.choice(RESIDUES)}" if rng.random() < 0.7 else rng.choice(CELLS)
        row = [cell if name == "mutant" else rng.choice(["", "1", "a,b", 'q"q', "é\n", "x" * 99]) for name in columns]
        if rng.random() < 0.03:
            row = rng.choice([row[:-1], [*row, "more"], []])
        rows.append(row)
    text = io.StringIO()
    writer = csv.writer(
        text, lineterminator=rng.choice(["\n", "\r\n", "\r"]), delimiter=rng.choice([","] * 9 + [";", "\t"])
    )
    writer.writerows([columns, *rows])
    return rng.choice(["", "", "", "\ufeff", "\n"]) + text.getvalue()


def odd_table(rng):
    return table(rng).encode(rng.choice(["utf-8"] * 9 + ["utf-16"]))


def damaged_table(rng):
    rows = [[f"{WILD_TYPE[i]}{i + 1}{rng.choice(RESIDUES)}", str(i), '"a,b"'] for i in range(6)]
    return damaged("\n".join(map(",".join, [["mutant", "number", "note"], *rows, []])).encode(), rng)


TABLES = {"odd tables": odd_table, "damaged tables": damaged_table}


def expected_rows(data):
    """Return the header and the rows of a table; None if it is invalid or has no column of mutants."""
    if b"\0" in data:
        return None
    try:
        rows = list(csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True))
    except (csv.Error, UnicodeDecodeError):
        return None
    if not rows or rows[0].count("mutant") != 1 or len(set(rows[0])) < len(rows[0]):
        return None
    rows = [row for row in rows if row]
    return None if any(len(row) != len(rows[0]) for row in rows) else rows


def substitutions(cell):
    """Return [(position, residue)] of a cell like M1G:Q2A, positions from 0; None if it does not fit the wild type."""
    found = {}
    for part in cell.split(":"):
        match = re.fullmatch(r"\s*([A-Za-z])(-?\d{1,9})([A-Za-z])\s*", part)
        if not match or match[3].upper() == "J":
            return None
        position = int(match[2]) - 1
        if not 0 <= position < len(WILD_TYPE) or WILD_TYPE[position] != match[1].upper() or position in found:
            return None
        found[position] = match[3].upper()
    return found.items()


class ReferenceScores:
    """Scores of mutations, computed without the package's jobs: one masked position at a time."""

    def __init__(self, model):
        self.ids, self.rows = model.ids, []
        for position in range(len(WILD_TYPE)):
            masked = [*WILD_TYPE[:position], "<mask>", *WILD_TYPE[position + 1 :]]
            self.rows.append(model.log_probabilities(masked)[position])

    def score(self, mutant):
        rows, ids = self.rows, self.ids
        return sum(rows[i][ids[to]] - rows[i][ids[WILD_TYPE[i]]] for i, to in mutant)


def table_problem(data, result, output, expected, name):
    """Return what is wrong with the outcome of `score`; None if it is right."""
    rows = expected_rows(data)
    mutants = [] if rows is None else [substitutions(row[rows[0].index("mutant")]) for row in rows[1:]]
    if result["code"] == 1:
        if any(mutants):
            return "refused, but some rows are valid"
        return "refused, but a file was written" if output.exists() else None
    if rows is None:
        return "not refused"
    left_out = len(re.findall(r"^Left out: row \d+: ", result["printed"], re.MULTILINE))
    if left_out != mutants.count(None) or result["code"] != (3 if left_out else 0):
        return f"{left_out} left out, exit code {result['code']}"
    with open(output, newline="", encoding="utf-8") as file:
        written = [row for row in csv.reader(file) if row]
    if [row[:-1] for row in written] != rows or written[0][-1] != name:
        return "rows differ"
    for row, mutant in zip(written[1:], mutants, strict=True):
        if (row[-1] == "") is not (mutant is None) or (mutant and not close(float(row[-1]), expected.score(mutant))):
            return f"score differs: {row}"
    return None


@pytest.mark.long
@pytest.mark.parametrize("kind", TABLES)
def test_malformed_tables(kind, inputs, model, tmp_path):
    rng, expected, name = random.Random(kind), ReferenceScores(model), str(inputs.models["ESM-2"])
    files = {tmp_path / f"{number}.csv": TABLES[kind](rng) for number in range(PER_KIND)}
    calls = {}
    for path, data in files.items():
        path.write_bytes(data)
        arguments = ["score", path, "--sequence", WILD_TYPE, "--model", name, "--output", f"{path}.out.csv"]
        calls[path] = json.dumps([str(a) for a in arguments])
    check_results(
        kind,
        calls,
        lambda path, result: table_problem(files[path], result, path.with_name(f"{path.name}.out.csv"), expected, name),
    )


def check_results(kind, calls, find_problem):
    """Run the command on each input and assert that every outcome is right.

    Args:
        kind: the kind of input, for the printed summary.
        calls: {path: arguments}.
        find_problem: returns what is wrong with the result for a path (done or refused), or None.
    """
    results = outcomes("tests.abuse.caller", list(calls.values()))
    wrong, counts = [], Counter()
    for path, argument in calls.items():
        result = results[argument]
        counts[result["outcome"]] += 1
        problem = result["outcome"] if result["outcome"] not in ("done", "refused") else find_problem(path, result)
        if problem:
            wrong.append((problem, path, result))
    print(f"{kind}: {len(calls)} malformed, {dict(counts)}, wrong: {len(wrong)}")
    assert not wrong, wrong[:3]
    assert min(counts["done"], counts["refused"]) > 0
