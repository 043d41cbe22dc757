"""Helpers that start the command, wait for it and read what it wrote."""

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
TIMEOUT = 300  # seconds; far more than any of these processes needs
DONE, FAILED, LEFT_OUT = 0, 1, 3  # exit codes; LEFT_OUT: done, but some records were left out

# Each job with each format: the job, its files (the first one is --output) and its options.
CASES = {
    "embed .h5": ("embed", ["out.h5"], ["--pooling", "mean,residues"]),
    "embed .npz": ("embed", ["out.npz"], ["--pooling", "mean,residues"]),
    "embed .parquet": ("embed", ["out.parquet"], ["--pooling", "mean,residues"]),
    "embed .safetensors": ("embed", ["out.safetensors"], ["--pooling", "mean,residues"]),
    "embed folder": ("embed", ["out"], ["--pooling", "mean,residues"]),
    "score .csv": ("score", ["out.csv"], []),
    "score .csv .png": ("score", ["out.csv", "--picture", "out.png"], []),  # all mutations, all of them valid
    "fill-mask .csv": ("fill-mask", ["out.csv"], []),
    "contacts .npz .csv": ("contacts", ["out.npz", "--top", "top.csv"], []),
    "contacts .csv": ("contacts", ["out.csv"], []),
    "perplexity .csv": ("perplexity", ["out.csv"], []),
    "generate .fasta": ("generate", ["out.fasta"], ["--order", "left-to-right"]),
}
# The other jobs use ESM-2.
FAMILY_OF = {"score": "ESM-1v", "fill-mask": "ESM-1v", "contacts": "ESM-1b", "perplexity": "ESM-1b"}


class Inputs:
    """The inputs of the commands: models of three families, proteins, and mutants.

    Args:
        folder: where to write them.
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
            position = rng.randrange(len(record[1]))
            record[1] = f"{record[1][:position]}<mask>{record[1][position + 1 :]}"
        records[5][1] = "MK1"  # invalid
        records[9][0] = "p8"  # duplicate id
        self.fasta.write_text("".join(f">{name}\n{sequence}\n" for name, sequence in records))
        self.mutants = folder / "mutants.csv"
        rows = [f"{residue}{position}{to}" for position, residue in enumerate(WILD_TYPE, 1) for to in "AG"]
        rows[7] = "A1M"  # invalid
        self.mutants.write_text("\n".join(["mutant", *rows, ""]))

    def command(self, case, folder, fasta=None, batch_tokens=8):
        """Return the command line of a case that writes its files into a folder.

        Args:
            case: a key of `CASES`.
            folder: where the outputs go.
            fasta: proteins; by default `self.fasta`.
            batch_tokens: the value of --batch-tokens.
        """
        job, files, options = CASES[case]
        if job != "score":
            inputs = [fasta or self.fasta]
        elif "--picture" in files:
            inputs = ["--sequence", WILD_TYPE]
        else:
            inputs = [self.mutants, "--sequence", WILD_TYPE, "--model", self.models["ESM-2"]]
        files = [name if name.startswith("--") else folder / name for name in files]
        model = self.models[FAMILY_OF.get(job, "ESM-2")]
        arguments = [job, *inputs, "--model", model, "--batch-tokens", batch_tokens, *options, "--output", *files]
        return [sys.executable, "-m", "tests.abuse.child", *map(str, arguments)]


def start(arguments, **options):
    """Start the command. Both of its output streams go into one pipe."""
    env = ENVIRONMENT | {"COLUMNS": "1000"} | options.pop("env", {})
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, **options)


def run(arguments, **options):
    """Run the command to its end. Returns its exit code and what it printed."""
    process = start(arguments, **options)
    printed = process.communicate(timeout=TIMEOUT)[0]
    return process.returncode, printed


def success_code(case):
    """Return the exit code of a case that runs undisturbed."""
    return DONE if "--picture" in CASES[case][1] else LEFT_OUT


def is_finished(case, code, printed):
    """Return whether a run has finished, either now or earlier. A second run of a finished file is refused."""
    return code == success_code(case) or (code == FAILED and "already exists. Choose another" in printed)


def outputs(case, folder):
    """Return the paths that a case writes, --output first."""
    return [folder / name for name in CASES[case][1] if not name.startswith("--")]


def wait_for_shard(process, folder):
    """Wait until a command has written its first shard anywhere in a folder, or has ended."""
    while process.poll() is None and not list(folder.rglob("shard-*")):
        time.sleep(0.005)


def file_operations(printed):
    """Return the number of file operations that the command counted."""
    return int(re.search(r"file operations: (\d+)", printed)[1])


def contents(folder):
    """Return {path: bytes} of all files in a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def outcomes(module, arguments, per_process=100):
    """Run a module of this folder on many arguments and return {argument: result}.

    Each process takes several arguments and prints a JSON line for each. If a process dies or hangs, the outcome of the
    argument it was working on is "crash" or "hang", and a new process takes the rest.
    """
    results, remaining = {}, list(arguments)
    while remaining:
        command = [sys.executable, "-m", module, *remaining[:per_process]]
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        try:
            printed, failure = process.communicate(timeout=TIMEOUT)[0], "crash"
        except subprocess.TimeoutExpired:
            process.kill()
            printed, failure = process.communicate()[0], "hang"
        lines = [json.loads(line) for line in printed.splitlines() if line.startswith('{"argument"')]
        results |= {line["argument"]: line for line in lines}
        if len(lines) < min(per_process, len(remaining)):
            results[remaining[len(lines)]] = {"outcome": failure, "error": f"exit code {process.returncode}"}
        remaining = [argument for argument in remaining if argument not in results]
    return results
