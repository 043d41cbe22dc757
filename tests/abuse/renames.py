"""Kill whatever writes files before each of its renames, links and removals.

    python -m tests.abuse.renames CASE INPUTS FOLDER

`INPUTS` is a folder made by `write_inputs`. Prints JSON: {"operations", "kills", "shortfalls"}. Each run is a process
forked from this one, which itself never computes.
"""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    sys.modules["torch"] = None  # type: ignore[assignment]  # keeps transformers from importing torch

import mlx.core as mx
from mlx.utils import tree_flatten
from transformers import AutoTokenizer
from typer.testing import CliRunner

from mlx_esm_hf import LoraConfig, MLXAutoModelForMaskedLM, MLXEsmForMaskedLM, add_adapters, load_adapter, save_adapter
from mlx_esm_hf.cli import app
from tests.killing import forked
from tests.processes import ENVIRONMENT

if __name__ == "__main__":
    del sys.modules["torch"]  # scipy looks for torch's classes in it

SHARDS, SMALLER_SHARDS, WHOLE = "40KB", "20KB", "5GB"
RESIDUES = "ACDEFGHIKLMNPQRSTVWY"
SEQUENCES = [(RESIDUES[i:] + RESIDUES[:i])[: 10 + i % 7] for i in range(20)]
# Numbers in logs, tables and states of trainings that differ between equal runs.
MEASURED = re.compile(rb'"[a-z_]*(?:per_second|memory_gb|runtime)": [^,}]+')
REFUSALS = ("already exists", "already contains")

TORCH = """
import hashlib, json, sys
import transformers
for line in sys.stdin:
    try:
        state = transformers.EsmForMaskedLM.from_pretrained(line.strip()).state_dict()
        names = sorted(name for name in state if "position_ids" not in name)
        found = hashlib.sha256(b"".join(state[name].numpy().tobytes() for name in names)).hexdigest()
    except Exception as error:
        found = None
    print(json.dumps(found), flush=True)
"""


def write_inputs(folder):
    """Write models, proteins and tables, with torch, for all cases."""
    import torch

    from tests.conversion import checkpoints, test_esmc, test_mlx_esm_npz
    from tests.jobs.models import write_folding_model, write_model

    for name, seed in (("old", 0), ("new", 1)):
        (folder / name).mkdir()
        write_model(folder / name, seed=seed)
    (folder / "contacts_model").mkdir()
    write_model(folder / "contacts_model", "ESM-1b")
    write_folding_model(folder / "fold_model")
    test_mlx_esm_npz.np.savez(folder / "weights.npz", **test_mlx_esm_npz.WEIGHTS)
    test_esmc.write(folder, test_esmc.original_weights(layers=1))
    torch.manual_seed(0)
    checkpoints.save(checkpoints.build("esm2_tiny", 2, 32, 4), folder / "esm2_tiny.pt")
    records = "".join(f">p{i}\n{sequence}\n" for i, sequence in enumerate(SEQUENCES))
    (folder / "in.fasta").write_text(records)
    (folder / "masked.fasta").write_text(records.replace("ACD", "A<mask>D"))
    (folder / "short.fasta").write_text(">a\nMKTAY\n>b\nACDEF\n")
    rows = "".join(f"{sequence},{'ab'[i % 2]}\n" for i, sequence in enumerate(SEQUENCES))
    (folder / "table.csv").write_text(f"sequence,label\n{rows}")


class Case:
    """Something that writes files into a folder.

    Attributes:
        torch: whether torch's transformers loads the result.
        volatile: pattern of the names of files whose bytes differ between equal runs.
    """

    torch = False
    volatile = "never"

    def __init__(self, inputs):
        self.inputs = inputs

    def make(self, folder):
        """Write what the folder contains before."""

    def act(self, folder):
        """Write the files. Returns the exit code and what is printed."""
        raise NotImplementedError

    def load(self, folder):
        """Return a checksum of what this library loads."""
        raise NotImplementedError


def checksum(parameters):
    return hashlib.sha256(b"".join(bytes(memoryview(x)) for _, x in sorted(parameters))).hexdigest()


class Save(Case):
    """`save_pretrained` of a model over another one."""

    torch = True

    def __init__(self, inputs, before, after):
        super().__init__(inputs)
        self.before, self.after = before, after

    def save(self, name, folder, size):
        MLXEsmForMaskedLM.from_pretrained(self.inputs / name).save_pretrained(folder, max_shard_size=size)
        return 0, ""

    def make(self, folder):
        self.save("old", folder, self.before)

    def act(self, folder):
        return self.save("new", folder, self.after)

    def load(self, folder):
        return checksum(tree_flatten(MLXAutoModelForMaskedLM.from_pretrained(folder).parameters()))


class SaveAdapter(Case):
    """`save_adapter` over another adapter."""

    def base(self):
        return MLXEsmForMaskedLM.from_pretrained(self.inputs / "old")

    def save(self, folder, rank):
        model = self.base()
        mx.random.seed(rank)
        add_adapters(model, LoraConfig(r=rank, target_modules=["query"], lora_alpha=rank))
        save_adapter(model, folder)
        return 0, ""

    def make(self, folder):
        self.save(folder, 2)

    def act(self, folder):
        return self.save(folder, 4)

    def load(self, folder):
        return checksum(tree_flatten(load_adapter(self.base(), folder).trainable_parameters()))


class Command(Case):
    """A command that writes into a new folder, or files into an existing one.

    Args:
        inputs: the folder of the inputs.
        *arguments: of the command. A name that the inputs contain is completed, and `{out}` stands for the folder.
        torch: see `Case`.
        model: name in the folder of a model or an adapter that is loaded.
        volatile: see `Case`.
    """

    def __init__(self, inputs, *arguments, torch=False, model=None, volatile="never"):
        super().__init__(inputs)
        self.arguments, self.torch, self.model, self.volatile = arguments, torch, model, volatile

    def act(self, folder):
        names = {path.name for path in self.inputs.iterdir()}
        arguments = [str(self.inputs / x) if x in names else x.format(out=folder) for x in self.arguments]
        result = CliRunner().invoke(app, arguments)
        return result.exit_code, f"{result.output}\n{result.exception!r}"

    def load(self, folder):
        if self.model is None or not (folder / self.model).is_dir():
            raise OSError
        if (folder / self.model / "adapter_config.json").exists():
            return (folder / self.model / "adapter_model.safetensors").read_bytes().hex()
        AutoTokenizer.from_pretrained(folder / self.model)
        mx.random.seed(0)  # of heads that the model lacks
        return checksum(tree_flatten(MLXAutoModelForMaskedLM.from_pretrained(folder / self.model).parameters()))


class Script(Command):
    """A script of `conversion/`."""

    def act(self, folder):
        import importlib

        script, *files = self.arguments
        convert = importlib.import_module(f"conversion.{script}").convert
        convert(*(self.inputs / name for name in files), folder / self.model)
        return 0, ""


TRAIN = (
    "train",
    "in.fasta",
    "--steps",
    "4",
    "--save-every",
    "2",
    "--log-every",
    "1",
    "--quiet",
    "--context",
    "32",
    "--validation-share",
    "0",
)
FINETUNE = ("finetune", "table.csv", "--model", "old", "--epochs", "2", "--output", "{out}/o", "--quiet")
JOB = ("--batch-tokens", "8", "--quiet")
CASES = {
    "save_pretrained, whole to shards": partial(Save, before=WHOLE, after=SHARDS),
    "save_pretrained, shards to whole": partial(Save, before=SHARDS, after=WHOLE),
    "save_pretrained, shards to shards": partial(Save, before=SHARDS, after=SMALLER_SHARDS),
    "save_pretrained, same shards": partial(Save, before=SHARDS, after=SHARDS),
    "save_pretrained, whole to whole": partial(Save, before=WHOLE, after=WHOLE),
    "save_adapter": SaveAdapter,
    "train": lambda i: Command(i, *TRAIN, "--shape", "1,32,4", "--output", "{out}/o", torch=True, model="o"),
    "train --model": lambda i: Command(i, *TRAIN, "--model", "old", "--output", "{out}/o", torch=True, model="o"),
    "finetune": lambda i: Command(i, *FINETUNE, model="o"),
    "finetune --train full": lambda i: Command(i, *FINETUNE, "--train", "full", model="o"),
    "finetune --merge": lambda i: Command(i, *FINETUNE, "--merge", model="o"),
    "convert": lambda i: Command(i, "convert", "old", "{out}/o", torch=True, model="o"),
    "convert in shards": lambda i: Command(
        i, "convert", "old", "{out}/o", "--max-shard-size", "20KB", torch=True, model="o"
    ),
    "convert --quantize": lambda i: Command(
        i, "convert", "old", "{out}/o", "-q", "--bits", "8", "--group-size", "32", model="o"
    ),
}
for suffix in (".h5", ".npz", ".parquet", ".safetensors", ""):
    CASES[f"embed {suffix or 'folder'}"] = lambda i, end=suffix: Command(
        i, "embed", "in.fasta", "--model", "old", "--pooling", "mean", "--output", "{out}/o" + end, *JOB
    )
CASES |= {
    "score .csv": lambda i: Command(
        i, "score", "--sequence", "MKTAYIAK", "--model", "old", "--output", "{out}/o.csv", *JOB
    ),
    "score .csv .png": lambda i: Command(
        i, "score", "--sequence", "MKTAYIAK", "--model", "old", "--output", "{out}/o.csv",
        "--picture", "{out}/o.png", *JOB
    ),
    "contacts": lambda i: Command(
        i, "contacts", "in.fasta", "--model", "contacts_model", "--output", "{out}/o.npz", "--top", "{out}/o.csv", *JOB
    ),
    "perplexity": lambda i: Command(i, "perplexity", "in.fasta", "--model", "old", "--output", "{out}/o.csv", *JOB),
    "fill-mask": lambda i: Command(i, "fill-mask", "masked.fasta", "--model", "old", "--output", "{out}/o.csv", *JOB),
    "generate": lambda i: Command(i, "generate", "masked.fasta", "--model", "old", "--output", "{out}/o.fasta", *JOB),
    "fold": lambda i: Command(
        i, "fold", "short.fasta", "--model", "fold_model", "--num-recycles", "0", "--output", "{out}/o", "--quiet",
        volatile=r"o/(shard.*|index\.csv|checksums\.txt|manifest\.json)",
    ),
    "conversion/esmc.py": lambda i: Script(i, "esmc", "esmc.pth", model="o"),
    "conversion/fair_esm.py": lambda i: Script(i, "fair_esm", "esm2_tiny.pt", model="o"),
    "conversion/mlx_esm_npz.py": lambda i: Script(i, "mlx_esm_npz", "weights.npz", model="o"),
}  # fmt: skip


def contents(folder, volatile="never"):
    """Return {path: bytes} of a folder, without what differs between equal runs. Folders end with a slash."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir():
            found[f"{name}/"] = b""
        else:
            found[name] = b"" if re.fullmatch(volatile, name) else MEASURED.sub(b"", path.read_bytes())
    return found


def loaded(case, folder):
    """Return a checksum of what this library loads, or None if it refuses."""
    try:
        return case.load(folder)
    except (OSError, ValueError):
        return None


class Campaign:
    """The kills of a case.

    Args:
        case: the case.
        folder: for its files.
    """

    def __init__(self, case, folder):
        self.case, self.folder, self.shortfalls = case, folder, []
        self.torch = None
        if case.torch:
            command = [sys.executable, "-c", TORCH]
            self.torch = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                env=ENVIRONMENT,
            )  # fmt: skip

    def fork(self, action, *arguments, kill_at=0):
        outcome = forked(lambda: action(*arguments), self.folder, kill_at, opens=False)
        if outcome.error:
            raise AssertionError(outcome.error)
        return outcome

    def start(self):
        """Make the folder as it is before."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        self.fork(self.case.make, self.folder)

    def state(self):
        """Return the checksums of what torch and this library load."""
        theirs = None
        if self.torch:
            print(self.folder / (getattr(self.case, "model", None) or ""), file=self.torch.stdin, flush=True)
            theirs = json.loads(self.torch.stdout.readline())
        return theirs, self.fork(loaded, self.case, self.folder).result

    def run(self):
        case = self.case
        self.start()
        old = self.state()
        done = self.fork(case.act, self.folder)
        assert done.result[0] == 0, done.result[1]
        new, expected = self.state(), contents(self.folder, case.volatile)
        assert old != new or old == (None, None), "the two states must differ"
        for number in range(1, done.operations + 1):
            self.start()
            if not self.fork(case.act, self.folder, kill_at=number).killed:
                self.shortfalls.append(f"{number}: was not killed")
                continue
            theirs, ours = self.state()
            if theirs not in (old[0], new[0], None):
                self.shortfalls.append(f"{number}: torch loads a mixture")
            if ours not in (old[1], new[1]):
                self.shortfalls.append(f"{number}: a mixture, or nothing, is loaded")
            code, printed = self.fork(case.act, self.folder).result
            if code and not any(text in printed for text in REFUSALS):
                self.shortfalls.append(f"{number}: the same command fails: {printed[-300:]}")
            found = contents(self.folder, case.volatile)
            if wrong := sorted(name for name in found.keys() | expected if found.get(name) != expected.get(name)):
                self.shortfalls.append(f"{number}: different after the same command: {wrong}")
        return {"operations": done.operations, "kills": done.operations, "shortfalls": self.shortfalls}


if __name__ == "__main__":
    name, inputs, folder = sys.argv[1:]
    print(json.dumps(Campaign(CASES[name](Path(inputs)), Path(folder)).run()))
