"""The workloads, their models and peers, and the alternation of measurements."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from benchmarks.models import CONVERTED, OURS_BFLOAT16, PROTEINS, SHAPES, Shape
from benchmarks.worker import NotInstalled, Worker

OURS, KERNELS_OFF = "ours", "ours, kernels off"
USUAL = "transformers sdpa, as they arrive"
BEST = ("transformers sdpa, one at a time", "transformers sdpa, by length")
QUICK = 1  # seconds; after a faster warm-up, a full measurement is a second warm-up
MIN_ROUNDS = 2  # of ours and of the best peer, however long they take
CHUNKS = (4, 16, 64, None)  # chunk sizes of transformers' triangle attention, in rows of pairs
SAMPLES = 4  # of the denoiser
PROBE = 64  # tokens, to estimate how long a peer will take
BFLOAT16, DYNAMIC = "transformers sdpa, bfloat16", "torch's dynamic int8"
PRECISIONS = {
    OURS_BFLOAT16: "bfloat16",
    "ours, 8 bits, int8": "8 bits",
    "ours, 8 bits, int8, groups of 64": "8 bits",
    "ours, 4 bits": "4 bits",
    "ours, 4 bits, int8": "4 bits",
    BFLOAT16: "bfloat16",
    DYNAMIC: "8 bits",
}
PEAK, BLAS = "FMA loop", "OpenBLAS under MLX"
TOKENS = (16, 64, 256, 1024, 2048)
SLICE, MOST = 2e9, 100  # operations of one call, and maximum number of products
ESMC = ("ESMC-300M", "tiny-ESMC")
LONGEST = 1022  # residues, the limit of ESM-1b
TOLERANCE = {  # relative to the largest value
    "float32": 1e-3,
    "float16": 2e-2,
    "bfloat16": 1e-1,
    "8 bits": 1e-1,
    "4 bits": 0.5,
}


@dataclass
class Runner:
    """A measurement of one peer: a warm-up, then values, which are speeds unless the case says otherwise.

    Attributes:
        name: of the peer.
        run: measures once; takes a file for the result, or None.
        warm: warms up.
        needed: rounds to measure even after the time budget.
        guess: estimates the seconds of a round.
        precision: of the result, if different from that of the case.
    """

    name: str
    run: Callable[[Path | None], float]
    warm: Callable[[], object] = lambda: None
    needed: int = 0
    guess: Callable[[], float] = lambda: 0
    precision: str = ""


class Process(NamedTuple):
    """The contents of a worker: a library and a checkpoint in some dtype."""

    peer: str
    folder: Path | None
    dtype: str
    environment: dict[str, str] = {}


class Case(NamedTuple):
    """A case of a workload: the runners, ours first, and the unit in which values are shown."""

    name: str
    unit: str
    runners: list[Runner]
    rounds: int = MIN_ROUNDS
    dtype: str = ""  # in which a peer computes part of the model, if different from the settings


@dataclass
class Result:
    """The values of each round, and the peers without values, with the reason."""

    workload: str
    model: str
    case: str
    unit: str
    rounds: list[dict[str, float]] = field(default_factory=list)
    deviation: dict[str, float] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def names(self) -> list[str]:
        """Return the names of all measured runners."""
        return list(dict.fromkeys(name for values in self.rounds for name in values))

    def values(self, name: str) -> list[float]:
        """Return the values of a runner."""
        return [values[name] for values in self.rounds if name in values]

    def peers(self, prefix: str = "") -> list[str]:
        """Return the names of the peers that start with a prefix."""
        return [name for name in self.names() if name.startswith(prefix) and not name.startswith(OURS)]

    def ratios(self, *names: str, ours: str = OURS) -> list[float]:
        """Return ours ÷ the best of these peers in each round with both. The smallest number of bytes is the best."""
        best = min if self.unit == "GB" else max
        return [
            values[ours] / best(values[name] for name in names if name in values)
            for values in self.rounds
            if ours in values and any(name in values for name in names)
        ]


@dataclass
class Settings:
    """The options of a run."""

    repeats: int
    budget: float  # seconds for a workload; after that, only needed rounds are measured
    at_least: float  # seconds; a faster call is repeated, and the mean is used
    dtype: str
    proteins: int | None
    esm_cpp_python: str
    cores: int
    slow_schedules: set[str] = field(default_factory=set)  # slower for the smallest model


@dataclass
class Session:
    """One model's checkpoint, and the workers that have loaded it.

    Workers start concurrently, as soon as a runner that needs them is created. Call `wait` before measuring.
    """

    model: str
    folder: Path | None  # None if no workload needs it
    settings: Settings
    pool: Executor
    workers: dict[tuple[str, int], Future[Worker]] = field(default_factory=dict)
    about: dict[str, dict[str, str]] = field(default_factory=dict)
    processes: dict[str, Process] = field(default_factory=dict)  # workers whose name is not that of their library
    paces: dict[str, float] = field(default_factory=dict)
    best_schedule: str = BEST[0]

    @property
    def shape(self) -> Shape:
        """Size of the model."""
        return SHAPES[self.model]

    def start(self, name: str, cores: int = 0) -> Worker:
        """Start a worker; 0 cores means all."""
        process = self.processes.get(name) or Process(name, self.folder, self.settings.dtype)
        if name == KERNELS_OFF:
            process = process._replace(peer=OURS, environment={"MLX_ESM_KERNELS": "0"})
        python = {"python": self.settings.esm_cpp_python} if name == "esm-cpp" else {}
        worker = Worker(process.peer, process.folder, process.dtype, cores, process.environment, **python)
        self.about[name] = worker.ready["about"]
        return worker

    def worker(self, name: str, cores: int = 0) -> Worker:
        """Return a started worker."""
        return self.workers[name, cores].result()

    def wait(self) -> None:
        """Wait until all workers have loaded their checkpoints."""
        wait(self.workers.values())

    def close(self) -> None:
        """End all workers."""
        while self.workers:
            worker = self.workers.popitem()[1]
            if worker.exception() is None:
                worker.result().close()

    def pace(self, name: str) -> float:
        """Return the approximate seconds per token."""
        if name not in self.paces:
            args = {"ids": token_ids(1, PROBE)} | ({"attention": "sdpa"} if name == "transformers" else {})
            self.paces[name] = self.worker(name).ask("hidden", args)["seconds"] / PROBE
        return self.paces[name]

    def proteins(self, default: int) -> list[str]:
        """Return the sequences to use, `default` of them unless the settings give a number."""
        assert self.folder
        sequences = json.loads((self.folder / PROTEINS).read_text())
        return [sequence for sequence in sequences if len(sequence) <= LONGEST][: self.settings.proteins or default]

    def runner(
        self,
        call: str,
        args: dict[str, Any],
        process: str,
        name: str = "",
        work: float = 1,
        warm: dict[str, Any] | None = None,
        needed: int = 0,
        cores: int = 0,
        tokens: int = 0,
        precision: str = "",
    ) -> Runner:
        """Return a runner that calls a peer's method and measures `work` per second.

        Args:
            call: name of the method.
            args: its arguments.
            process: the worker.
            name: name of the runner; by default that of the worker.
            work: amount of work of a call.
            warm: replaces arguments, for a smaller warm-up.
            needed: rounds to measure even after the time budget.
            cores: cores of the worker; 0 means all.
            tokens: number of tokens, to estimate the time.
            precision: of the result, if different from that of the case.
        """
        if (process, cores) not in self.workers:
            self.workers[process, cores] = self.pool.submit(self.start, process, cores)

        def run(keep: Path | None) -> float:
            return work / self.worker(process, cores).ask(call, args, self.settings.at_least, keep)["seconds"]

        def warm_up() -> None:
            seconds = self.worker(process, cores).ask(call, args | (warm or {}))["seconds"]
            if seconds < QUICK:
                self.worker(process, cores).ask(call, args)

        return Runner(name or process, run, warm_up, needed, lambda: tokens and tokens * self.pace(process), precision)

    def everyone(self, call: str, args: dict[str, Any], attentions: tuple[str, ...], **options: Any) -> list[Runner]:
        """Return runners of the same call for all peers that support this model."""
        runners = [self.runner(call, args, OURS, **options)]
        for attention in attentions:
            theirs, needed = args | {"attention": attention}, int(attention == "sdpa")
            name = f"transformers {attention}"
            runners.append(self.runner(call, theirs, "transformers", name, needed=needed, **options))
        esm2 = self.shape.rotary and not self.shape.gated
        if esm2:
            runners.append(self.runner(call, args, "fair-esm", **options))
        runners.append(self.runner(call, args, KERNELS_OFF, **options))
        if esm2 and self.settings.dtype == "float32" and call != "contacts":
            runners.append(self.runner(call, args, "esm-cpp", **options))
        return runners


def token_ids(rows: int, length: int) -> list[list[int]]:
    """Return rows of random residues between <cls> and <eos>."""
    ids = np.random.default_rng(0).integers(4, 24, (rows, length))
    ids[:, 0], ids[:, -1] = 0, 2
    return ids.tolist()


def bulk(s: Session) -> Iterator[Case]:
    """Measure embedding of proteins of several lengths."""
    sequences = s.proteins(16 if s.shape.hidden >= 1280 else 64)
    args: dict[str, Any] = {"sequences": sequences}
    residues = sum(map(len, sequences))
    options: dict[str, Any] = {"work": residues, "tokens": residues, "warm": {"sequences": sequences[:2]}}
    ours, *others = s.everyone("embed", args, (), **options)
    schedules = []
    for name in (*BEST, USUAL, *(name.replace("sdpa", "eager") for name in BEST)):
        attention, schedule = name.removeprefix("transformers ").split(", ")
        theirs = args | {"attention": attention, "schedule": schedule}
        needed = attention == "sdpa" and name not in s.settings.slow_schedules
        schedules.append(s.runner("embed", theirs, "transformers", name, needed=int(needed), **options))
    yield Case(f"{len(sequences)} proteins", "residues/s", [ours, *schedules, *others])


def uniform(s: Session) -> Iterator[Case]:
    """Measure the hidden states of a batch without padding."""
    ids = token_ids(4, 512)
    runners = s.everyone("hidden", {"ids": ids}, ("sdpa", "eager"), warm={"ids": ids[:1]}, tokens=2048)
    yield Case("4 x 512 tokens", "ms", runners)


def single(s: Session) -> Iterator[Case]:
    """Measure the hidden states of one protein."""
    for residues in (64, 256, LONGEST):
        ids = token_ids(1, residues + 2)
        runners = s.everyone("hidden", {"ids": ids}, ("sdpa", "eager"), tokens=residues)
        yield Case(f"{residues} residues", "ms", runners)


def contacts(s: Session) -> Iterator[Case]:
    """Measure the contacts of one protein."""
    runners = s.everyone("contacts", {"ids": token_ids(1, 258)}, ("eager",), tokens=256)
    yield Case("256 residues", "ms", runners)


def masked_batches(lengths: list[int], rows: int) -> list[dict[str, Any]]:
    """Return batches of `rows` random sequences with these lengths, in their order, with 15% of the residues masked."""
    rng, batches = np.random.default_rng(1), []
    for start in range(0, len(lengths), rows):
        sizes = np.array(lengths[start : start + rows])
        ids = np.array(token_ids(len(sizes), max(sizes)))
        ids[np.arange(len(sizes)), sizes - 1] = 2
        real = np.arange(ids.shape[1]) < sizes[:, None]
        masked = real & (ids > 3) & (rng.random(ids.shape) < 0.15)
        batch = {"input_ids": np.where(real, np.where(masked, 32, ids), 1), "labels": np.where(masked, ids, -100)}
        if not real.all():
            batch["attention_mask"] = real.astype(int)
        batches.append({name: value.tolist() for name, value in batch.items()})
    return batches


def training(s: Session) -> Iterator[Case]:
    """Measure steps of AdamW on equal lengths and on proteins as they arrive, and the peak memory of both."""
    lengths = [len(protein) + 2 for protein in s.proteins(16)]
    # With eight of these proteins in a batch, transformers needs 20 GB at 150M, and ours without kernels more.
    steps = {"8 x 256 tokens": ([256] * 8, 8), f"{len(lengths)} proteins as they arrive, 4 a batch": (lengths, 4)}
    peer, theirs = "transformers sdpa", {"attention": "sdpa"}
    calls = {name: {"case": name, "batches": masked_batches(*step)} for name, step in steps.items()}
    for name, args in calls.items():
        options: dict[str, Any] = {"work": sum(steps[name][0]), "warm": {"batches": args["batches"][:1]}}
        ours, off = (s.runner("train", args, process, **options) for process in (OURS, KERNELS_OFF))
        torch = s.runner("train", args | theirs, "transformers", peer, needed=1, **options)
        yield Case(name, "tokens/s", [ours, torch, off])
    for name, args in calls.items():
        yield peak_memory(s, f"{name}, peak memory", "train", args, peer, theirs)


def lora(s: Session) -> Iterator[Case]:
    """Measure steps of AdamW on LoRA adapters of query and value, compared with PEFT, and their peak memory."""
    name, sizes = "4 x 256 tokens", [256] * 4
    peer, theirs = "transformers sdpa, PEFT", {"attention": "sdpa"}
    args = {"case": name, "batches": masked_batches(sizes, 4), "lora": True}
    torch = s.runner("train", args | theirs, "transformers", peer, sum(sizes), needed=1)
    yield Case(name, "tokens/s", [s.runner("train", args, OURS, work=sum(sizes)), torch])
    yield peak_memory(s, f"{name}, peak memory", "train", args, peer, theirs)


def fold(s: Session) -> Iterator[Case]:
    """Measure one pass of a folding trunk with its structure module, and its peak memory.

    The peak memory is compared with transformers' smallest chunks. ESMFold's workload is loading and one pass over a
    protein, in fresh processes.
    """
    smallest = chunks_of(CHUNKS[0])
    if s.model == "ESMFold":
        args = "100 residues", "fold", {"length": 100}, *smallest
        # transformers computes the stem in float16.
        yield started(s, *args)._replace(dtype="float16")
        yield peak_memory(s, f"{args[0]}, peak memory", *args[1:])._replace(dtype="float16")
        return
    lengths = (64, 128, 256, 384) if s.shape.blocks > 1 else (16,)
    for length in lengths:
        args = {"length": length}
        theirs = [
            s.runner("trunk", args | chunk, "transformers", name, needed=1) for name, chunk in map(chunks_of, CHUNKS)
        ]
        yield Case(f"{length} residues", "s", [s.runner("trunk", args, OURS), *theirs])
    for length in lengths:
        yield peak_memory(s, f"{length} residues, peak memory", "trunk", {"length": length}, *smallest)


def fold2(s: Session) -> Iterator[Case]:
    """Measure four layers of ESMFold2's trunk and one call of its denoiser.

    The trunk is compared with transformers at several chunk sizes.
    """
    lengths = lengths_of(s)
    for length in lengths:
        args: dict[str, Any] = {"length": length}
        theirs = [
            s.runner("pair_trunk", args | chunk, "transformers", name, needed=1)
            for name, chunk in map(chunks_of, CHUNKS[1:])
        ]
        yield Case(f"{length} tokens, trunk", "s", [s.runner("pair_trunk", args, OURS), *theirs])
    for length in lengths:
        args = {"length": length, "samples": SAMPLES}
        runners = [s.runner("denoise", args, OURS), s.runner("denoise", args, "transformers", needed=1)]
        yield Case(f"{length} tokens, {SAMPLES} samples, denoiser", "s", runners)


def fold2_memory(s: Session) -> Iterator[Case]:
    """Measure the peak memory of the same, after all weights have been read; transformers with the smallest chunks."""
    for length in lengths_of(s):
        smallest = chunks_of(CHUNKS[1])
        yield peak_memory(s, f"{length} tokens, trunk", "pair_trunk", {"length": length}, *smallest)
        args = {"length": length, "samples": SAMPLES}
        yield peak_memory(s, f"{length} tokens, denoiser", "denoise", args, "transformers", {})


def lengths_of(s: Session) -> tuple[int, ...]:
    """Return the tokens of the proteins that ESMFold2 is measured with."""
    return (64, 128, 256, 384) if s.shape.pair_layers > 1 else (16,)


def chunks_of(size: int | None) -> tuple[str, dict[str, Any]]:
    """Return the name and arguments of transformers' folding with this chunk size in rows."""
    return f"transformers, {f'chunks of {size}' if size else 'in one chunk'}", {"chunk_size": size}


def quantized(s: Session) -> Iterator[Case]:
    """Measure checkpoints with fewer bits: bulk embedding, its memory, and one short sequence."""
    assert s.folder
    s.close()  # so that the peak memory is that of this workload
    for name in CONVERTED:
        dtype = "bfloat16" if name == OURS_BFLOAT16 else "float32"
        s.processes[name] = Process(OURS, s.folder.with_name(name), dtype)
    s.processes[BFLOAT16] = Process("transformers", s.folder, "bfloat16")
    schedule = {"attention": "sdpa", "schedule": "one at a time"}  # the fastest in float32 on a CPU
    theirs = {"transformers": BEST[0], BFLOAT16: BFLOAT16, DYNAMIC: DYNAMIC}
    named = {OURS: OURS, **{name: name for name in CONVERTED}, **theirs}

    def everyone(call: str, args: dict[str, Any], more: dict[str, Any], **options: Any) -> list[Runner]:
        found = []
        for process, name in named.items():
            given = args | (more if process in theirs else {})
            options |= {"needed": MIN_ROUNDS, "precision": PRECISIONS.get(name, "")}
            found.append(s.runner(call, given, process, name, **options))
        return found

    def held(what: Callable[[Worker, str], float]) -> list[Runner]:
        """Return runners that measure bytes of the same processes."""

        def runner(process: str, name: str) -> Runner:
            return Runner(name, lambda keep: what(s.worker(process), process), needed=1)

        return [runner(*pair) for pair in named.items()]

    def weights(worker: Worker, process: str) -> float:
        return worker.ready["weights_bytes"]

    def peak(worker: Worker, process: str) -> float:
        """Return the peak memory, with one more embedding of the shortest sequence."""
        more = schedule if process in theirs else {}
        return worker.ask("embed", {"sequences": [min(sequences, key=len)]} | more)["peak_bytes"]

    sequences = s.proteins(64 if s.shape.hidden < 640 else 16 if s.shape.hidden < 1280 else 6)
    args: dict[str, Any] = {"sequences": sequences}
    bulk = everyone("embed", args, schedule, work=sum(map(len, sequences)), warm={"sequences": sequences[:2]})
    yield Case(f"{len(sequences)} proteins", "residues/s", bulk)
    yield Case("weights", "GB", held(weights), 1)
    yield Case("peak memory", "GB", held(peak), 1)
    short = everyone("hidden", {"ids": token_ids(1, 66)}, {"attention": "sdpa"})
    yield Case("64 residues", "ms", short)


def encoder(s: Session) -> Iterator[Case]:
    """Measure the encoder and its matrix products: the ratio is the fraction of the machine's speed."""
    rows, length, layers = 4, 512, 4
    ids, flops = token_ids(rows, length), s.shape.layer_flops(rows, length)
    model = s.runner("hidden", {"ids": ids}, OURS, work=flops * s.shape.layers, warm={"ids": ids[:1]})
    layer = {"rows": rows, "length": length, "hidden": s.shape.hidden, "heads": s.shape.heads}
    args = {"layer": layer, "repeats": layers}
    products = [
        s.runner("gemm", args, process, f"gemm by {name}", flops * layers, warm={"repeats": 1}, needed=MIN_ROUNDS)
        for process, name in (("transformers", "torch"), (OURS, "MLX"))
    ]
    yield Case(f"{rows} x {length} tokens", "GFLOP/s", [model, *products])


def gemm(s: Session) -> Iterator[Case]:
    """Measure the products of the linear layers of a model, compared with the peak of the machine."""
    hidden = s.shape.hidden
    for inputs, outputs in ((hidden, hidden), (hidden, 4 * hidden), (4 * hidden, hidden)):
        for tokens in TOKENS:
            flops = 2 * tokens * inputs * outputs
            repeats = min(max(1, round(SLICE / flops)), MOST)
            args = {"shape": [tokens, inputs, outputs], "repeats": repeats}
            rounds = 3 if flops < 1e11 else MIN_ROUNDS
            options: dict[str, Any] = {"work": flops * repeats, "warm": {"repeats": 1}, "needed": rounds}
            runners = [
                s.runner("product", args, OURS, **options),
                s.runner("product", args, "transformers", "torch", **options),
                s.runner("product", args | {"blas": True}, OURS, BLAS, **options),
                s.runner("peak", {"operations": SLICE}, OURS, PEAK, SLICE, needed=rounds),
            ]
            yield Case(f"{tokens} x {inputs} x {outputs}", "GFLOP/s", runners, rounds)


def scaling(s: Session) -> Iterator[Case]:
    """Measure embedding on 1, 2, 4, … cores."""
    sequences, most = s.proteins(16), s.settings.cores
    counts = [most, *(2**n for n in reversed(range(most.bit_length())) if 2**n < most)]
    runners = [
        s.runner(
            "embed",
            {"sequences": sequences},
            OURS,
            f"on {count} of them" if count < most else OURS,
            work=sum(map(len, sequences)),
            warm={"sequences": sequences[:2]},
            needed=MIN_ROUNDS,
            cores=count if count < most else 0,
        )
        for count in counts
    ]
    yield Case(f"{len(sequences)} proteins on {most} cores", "residues/s", runners)


def loading(s: Session) -> Iterator[Case]:
    """Measure loading a checkpoint and a first forward pass of 8 tokens, in fresh processes, without the imports."""
    yield started(s, "and 8 tokens", "hidden", {"ids": token_ids(1, 8)}, "transformers sdpa", {"attention": "sdpa"})


def started(s: Session, case: str, call: str, args: dict[str, Any], peer: str, theirs: dict[str, Any]) -> Case:
    """Return a case of loading and a first call in fresh processes. `theirs` are more arguments for transformers."""

    def runner(name: str, process: str, args: dict[str, Any]) -> Runner:
        def run(keep: Path | None) -> float:
            s.close()
            with s.start(process) as worker:
                return 1 / (worker.ready["seconds"] + worker.ask(call, args, keep=keep)["seconds"])

        return Runner(name, run)

    return Case(case, "s", [runner(OURS, OURS, args), runner(peer, "transformers", args | theirs)])


def memory(s: Session) -> Iterator[Case]:
    """Measure the peak memory of bulk embedding."""
    sequences = s.proteins(16)
    attention, schedule = s.best_schedule.removeprefix("transformers ").split(", ")
    args, theirs = {"sequences": sequences}, {"attention": attention, "schedule": schedule}
    yield peak_memory(s, f"bulk, {len(sequences)} proteins", "embed", args, s.best_schedule, theirs)


def peak_memory(s: Session, case: str, call: str, args: dict[str, Any], peer: str, theirs: dict[str, Any]) -> Case:
    """Return a case of peak memory in fresh processes. `theirs` are more arguments for transformers."""

    def runner(name: str, process: str, args: dict[str, Any]) -> Runner:
        def run(keep: Path | None) -> float:
            s.close()
            with s.start(process) as worker:
                if s.shape.pair_layers:  # each case uses a part of the weights, and the peers map them
                    worker.ask("read_weights", {})
                return worker.ask(call, args, keep=keep)["peak_bytes"]

        return Runner(name, run, needed=1)

    return Case(case, "GB", [runner(OURS, OURS, args), runner(peer, "transformers", args | theirs)], rounds=1)


WITHOUT_CHECKPOINT = {"gemm"}

# The order matters: workloads in fresh processes close the workers, and training changes their weights.
WORKLOADS: dict[str, tuple[Callable[[Session], Iterator[Case]], tuple[str, ...]]] = {
    "bulk": (bulk, ("8M", "150M", "650M", "ESM-1b", *ESMC)),
    "uniform": (uniform, ("8M", "150M", "650M", *ESMC)),
    "single": (single, ("8M", "150M", "650M", *ESMC)),
    "contacts": (contacts, ("150M",)),
    "fold": (fold, ("ESMFold trunk", "ESMFold", "tiny ESMFold")),
    "fold2": (fold2, ("ESMFold2 parts", "tiny ESMFold2")),
    "fold2-memory": (fold2_memory, ("ESMFold2 parts", "tiny ESMFold2")),
    "encoder": (encoder, ("650M",)),
    "gemm": (gemm, ("8M", "35M", "150M", "650M", "3B", "15B")),
    "quantized": (quantized, ("8M", "150M", "650M")),
    "scaling": (scaling, ("8M", "150M")),
    "training": (training, ("8M", "35M", "150M", *ESMC)),
    "lora": (lora, ("650M",)),
    "loading": (loading, ("650M",)),
    "memory": (memory, ("650M",)),
}


def alternate(session: Session, workload: str, case: Case, scratch: Path, budget: float) -> Result:
    """Measure all peers in rounds, every second round in reverse order.

    Ours, and after the first round the best peer, are measured in every round; the others only within the budget in
    seconds. A peer whose result differs from ours has failed.
    """
    session.wait()
    settings, result = session.settings, Result(workload, session.model, case.name, case.unit)
    begin, took, answers = time.monotonic(), dict[str, float](), dict[str, np.ndarray]()
    ours, *others = case.runners
    ours.needed = min(case.rounds, settings.repeats)

    def fits(*runners: Runner) -> bool:
        cost = sum(took[runner.name] if runner.name in took else runner.guess() for runner in runners)
        return time.monotonic() - begin + cost <= budget

    def measure(runner: Runner) -> float:
        first, keep = runner.name not in took, scratch / "answer.npy"
        if first:
            keep.unlink(missing_ok=True)
            runner.warm()
        start = time.monotonic()
        value = runner.run(keep if first else None)
        took[runner.name] = time.monotonic() - start
        if first and keep.exists():
            answers[runner.name] = np.load(keep)
            check(runner)
        return value

    def check(runner: Runner) -> None:
        name = runner.name
        if OURS in answers and name != OURS:
            difference = np.abs(answers[name] - answers[OURS]).max() / np.abs(answers[OURS]).max()
            result.deviation[name] = float(difference)
            if not difference <= TOLERANCE[runner.precision or case.dtype or settings.dtype]:
                raise RuntimeError(f"its result differs from ours by {difference:.1e}")

    for turn in range(settings.repeats):
        if turn >= ours.needed and not fits(ours, *(runner for runner in others if runner.needed > 1)):
            break
        result.rounds.append({})
        for runner in case.runners[:: -1 if turn % 2 else 1]:
            if runner.name in result.absent:
                continue
            try:
                if runner is ours or turn < runner.needed or fits(runner):
                    result.rounds[-1][runner.name] = measure(runner)
                elif turn == 0:
                    result.absent[runner.name] = "skipped: no time left"
            except NotInstalled as reason:
                result.absent[runner.name] = str(reason)
            except RuntimeError as reason:
                if runner is ours:
                    raise
                result.failed[runner.name] = result.absent[runner.name] = str(reason)
                for values in result.rounds:
                    values.pop(runner.name, None)
        for prefix in ("transformers", ""):
            if turn == 0 and (peers := result.peers(prefix)):
                best = min(peers, key=took.__getitem__)
                next(runner for runner in others if runner.name == best).needed = ours.needed

    speeds = {name: median(result.values(name)) for name in BEST if result.values(name)}
    if workload == "bulk" and speeds:
        session.best_schedule = max(speeds, key=speeds.__getitem__)
        settings.slow_schedules |= {name for name in speeds if speeds[name] < 0.9 * speeds[session.best_schedule]}
    return result
