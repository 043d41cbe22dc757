"""One way to start the command, to end it, and to compare what it wrote."""

import json
import random
import re
import subprocess
import sys
import time

from tests.jobs.models import UBIQUITIN, write_model
from tests.processes import ENVIRONMENT, ROOT

RESIDUES = "ACDEFGHIKLMNPQRSTVWY"
WILD_TYPE = UBIQUITIN[:20]
TIMEOUT = 300  # seconds, in which a process would have ended a hundred times
DONE, FAILED, LEFT_OUT = 0, 1, 3  # exit codes; one record of the input is bad, and left out

# Each job with each format: the files that it writes, the first one its --output, and its options.
CASES = {
    "embed .h5": ("embed", ["out.h5"], ["--pooling", "mean,residues"]),
    "embed .npz": ("embed", ["out.npz"], ["--pooling", "mean,residues"]),
    "embed .parquet": ("embed", ["out.parquet"], ["--pooling", "mean,residues"]),
    "embed .safetensors": ("embed", ["out.safetensors"], ["--pooling", "mean,residues"]),
    "embed folder": ("embed", ["out"], ["--pooling", "mean,residues"]),
    "score .csv": ("score", ["out.csv"], []),
    "score .csv .png": ("score", ["out.csv", "--picture", "out.png"], []),  # all mutations, none of them bad
    "fill-mask .csv": ("fill-mask", ["out.csv"], []),
    "contacts .npz .csv": ("contacts", ["out.npz", "--top", "top.csv"], []),
    "contacts .csv": ("contacts", ["out.csv"], []),
    "perplexity .csv": ("perplexity", ["out.csv"], []),
    "generate .fasta": ("generate", ["out.fasta"], ["--order", "left-to-right"]),
}
# The others ask ESM-2.
FAMILY_OF = {"score": "ESM-1v", "fill-mask": "ESM-1v", "contacts": "ESM-1b", "perplexity": "ESM-1b"}


class Inputs:
    """What the commands are given: models of three families, proteins, and mutants.

    Args:
        folder: where they are.
    """

    def __init__(self, folder):
        self.models = {}
        for family in ("ESM-2", "ESM-1b", "ESM-1v"):
            (folder / family).mkdir()
            self.models[family] = write_model(folder / family, family)
        self.fasta = folder / "in.fasta"
        rng = random.Random(0)
        records = [[f"p{i}", "".join(rng.choices(RESIDUES, k=rng.randint(8, 24)))] for i in range(24)]
        for record in records:
            place = rng.randrange(len(record[1]))
            record[1] = f"{record[1][:place]}<mask>{record[1][place + 1 :]}"
        records[5][1] = "MK1"  # is left out
        records[9][0] = "p8"  # is there twice
        self.fasta.write_text("".join(f">{name}\n{sequence}\n" for name, sequence in records))
        self.mutants = folder / "mutants.csv"
        rows = [f"{residue}{place}{to}" for place, residue in enumerate(WILD_TYPE, 1) for to in "AG"]
        rows[7] = "A1M"  # is left out
        self.mutants.write_text("\n".join(["mutant", *rows, ""]))

    def command(self, case, folder, fasta=None, batch_tokens=8):
        """The arguments of a case whose files go into a folder.

        Args:
            fasta: proteins; by default those of these inputs.
        """
        job, files, options = CASES[case]
        if job != "score":
            given = [fasta or self.fasta]
        elif "--picture" in files:
            given = ["--sequence", WILD_TYPE]
        else:
            given = [self.mutants, "--sequence", WILD_TYPE, "--model", self.models["ESM-2"]]
        files = [name if name.startswith("--") else folder / name for name in files]
        model = self.models[FAMILY_OF.get(job, "ESM-2")]
        arguments = [job, *given, "--model", model, "--batch-tokens", batch_tokens, *options, "--output", *files]
        return [sys.executable, "-m", "tests.abuse.child", *map(str, arguments)]


def start(arguments, **options):
    """The command as a process; what it says goes into a pipe."""
    env = ENVIRONMENT | {"COLUMNS": "1000"} | options.pop("env", {})
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, **options)


def run(arguments, **options):
    """Let the command end; returns its exit code and what it said."""
    process = start(arguments, **options)
    said = process.communicate(timeout=TIMEOUT)[0]
    return process.returncode, said


def done(case):
    """The exit code of a case that nobody disturbs."""
    return DONE if "--picture" in CASES[case][1] else LEFT_OUT


def has_ended(case, code, said):
    """Whether this is the end of a run that is done now, or was before, of which there is only the file."""
    return code == done(case) or (code == FAILED and "already exists. Choose another" in said)


def outputs(case, folder):
    """The files of a case, the first one its --output."""
    return [folder / name for name in CASES[case][1] if not name.startswith("--")]


def wait_for_shard(process, folder):
    """Until a command has written its first shard somewhere in a folder; or has ended."""
    while process.poll() is None and not list(folder.rglob("shard-*")):
        time.sleep(0.005)


def file_operations(said):
    """How many the command counted."""
    return int(re.search(r"file operations: (\d+)", said)[1])


def contents(folder):
    """{path: bytes} of all that is in a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def outcomes(module, arguments, at_once=100):
    """What a module of this folder says of each argument, {argument: line}, in processes that may die of one: the
    outcome of that is "crash" or "hang"."""
    found, left = {}, list(arguments)
    while left:
        command = [sys.executable, "-m", module, *left[:at_once]]
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        try:
            out, died = process.communicate(timeout=TIMEOUT)[0], "crash"
        except subprocess.TimeoutExpired:
            process.kill()
            out, died = process.communicate()[0], "hang"
        said = [json.loads(line) for line in out.splitlines() if line.startswith('{"argument"')]
        found |= {line["argument"]: line for line in said}
        if len(said) < min(at_once, len(left)):
            found[left[len(said)]] = {"outcome": died, "error": f"exit code {process.returncode}"}
        left = [argument for argument in left if argument not in found]
    return found
