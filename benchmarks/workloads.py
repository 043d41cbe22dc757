"""What is measured, of which model, against whom, and how the peers take turns."""

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
QUICK = 1  # seconds; what warms up sooner is warmed up by a whole measurement, too
MIN_ROUNDS = 2  # of ours and of the best peer, whatever they take
CHUNKS = (4, 16, 64, None)  # rows of pairs that transformers' triangle attention takes at a time
PROBE = 64  # tokens, for a guess of how long a peer will take
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
SLICE, MOST = 2e9, 100  # operations of one call, and products
ESMC = ("ESMC-300M", "tiny-ESMC")
LONGEST = 1022  # residues that ESM-1b has positions for
TOLERANCE = {  # relative to the largest value
    "float32": 1e-3,
    "float16": 2e-2,
    "bfloat16": 1e-1,
    "8 bits": 1e-1,
    "4 bits": 0.5,
}


@dataclass
class Runner:
    """One measurement of one peer: a warm-up, then values, speeds unless the case says otherwise.

    `run` takes a file for the answer, or None. `needed` rounds are measured even if time is up; `guess` is how many
    seconds one will take. `precision` is that of the answer, if not the case's.
    """

    name: str
    run: Callable[[Path | None], float]
    warm: Callable[[], object] = lambda: None
    needed: int = 0
    guess: Callable[[], float] = lambda: 0
    precision: str = ""


class Process(NamedTuple):
    """What a worker holds: a library, with the checkpoint of a folder in some dtype."""

    peer: str
    folder: Path | None
    dtype: str
    environment: dict[str, str] = {}


class Case(NamedTuple):
    """What the runners, ours first, do; `unit` is how their values are shown."""

    name: str
    unit: str
    runners: list[Runner]
    rounds: int = MIN_ROUNDS
    dtype: str = ""  # that a part of the model is computed in by a peer, if not the settings'


@dataclass
class Result:
    """The values of each round, and the peers that have none, with the reason."""

    workload: str
    model: str
    case: str
    unit: str
    rounds: list[dict[str, float]] = field(default_factory=list)
    deviation: dict[str, float] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def names(self) -> list[str]:
        return list(dict.fromkeys(name for values in self.rounds for name in values))

    def values(self, name: str) -> list[float]:
        return [values[name] for values in self.rounds if name in values]

    def peers(self, prefix: str = "") -> list[str]:
        return [name for name in self.names() if name.startswith(prefix) and not name.startswith(OURS)]

    def ratios(self, *names: str, ours: str = OURS) -> list[float]:
        """Ours ÷ the best of these peers in each round that has both; what counts in bytes is best when small."""
        best = min if self.unit == "GB" else max
        return [
            values[ours] / best(values[name] for name in names if name in values)
            for values in self.rounds
            if ours in values and any(name in values for name in names)
        ]


@dataclass
class Settings:
    repeats: int
    budget: float  # seconds for a workload, beyond which only needed rounds are measured
    at_least: float  # seconds; what is over sooner is repeated, and its mean counts
    dtype: str
    proteins: int | None
    esm_cpp_python: str
    cores: int
    slow_schedules: set[str] = field(default_factory=set)  # that the smallest model has shown to be slower


@dataclass
class Session:
    """One model's checkpoint, and the workers that have loaded it.

    They are started side by side, as soon as a runner that needs them is made; `wait` before measuring.
    """

    model: str
    folder: Path | None  # None, where no workload needs it
    settings: Settings
    pool: Executor
    workers: dict[tuple[str, int], Future[Worker]] = field(default_factory=dict)
    about: dict[str, dict[str, str]] = field(default_factory=dict)
    processes: dict[str, Process] = field(default_factory=dict)  # those that are not called as their library is
    paces: dict[str, float] = field(default_factory=dict)
    best_schedule: str = BEST[0]

    @property
    def shape(self) -> Shape:
        return SHAPES[self.model]

    def start(self, name: str, cores: int = 0) -> Worker:
        process = self.processes.get(name) or Process(name, self.folder, self.settings.dtype)
        if name == KERNELS_OFF:
            process = process._replace(peer=OURS, environment={"MLX_ESM_KERNELS": "0"})
        python = {"python": self.settings.esm_cpp_python} if name == "esm-cpp" else {}
        worker = Worker(process.peer, process.folder, process.dtype, cores, process.environment, **python)
        self.about[name] = worker.ready["about"]
        return worker

    def worker(self, name: str, cores: int = 0) -> Worker:
        return self.workers[name, cores].result()

    def wait(self) -> None:
        wait(self.workers.values())

    def close(self) -> None:
        while self.workers:
            worker = self.workers.popitem()[1]
            if worker.exception() is None:
                worker.result().close()

    def pace(self, name: str) -> float:
        """About how many seconds a token takes."""
        if name not in self.paces:
            args = {"ids": token_ids(1, PROBE)} | ({"attention": "sdpa"} if name == "transformers" else {})
            self.paces[name] = self.worker(name).ask("hidden", args)["seconds"] / PROBE
        return self.paces[name]

    def proteins(self, default: int) -> list[str]:
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
        """A call of a peer's method, as `work` per second. `warm` replaces arguments of a smaller warm-up.

        `tokens` is how many it has, for a guess of its time.
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
        """The same call of all peers that have this model."""
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
    """Rows of residues between <cls> and <eos>."""
    ids = np.random.default_rng(0).integers(4, 24, (rows, length))
    ids[:, 0], ids[:, -1] = 0, 2
    return ids.tolist()


def bulk(s: Session) -> Iterator[Case]:
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
    ids = token_ids(4, 512)
    runners = s.everyone("hidden", {"ids": ids}, ("sdpa", "eager"), warm={"ids": ids[:1]}, tokens=2048)
    yield Case("4 x 512 tokens", "ms", runners)


def single(s: Session) -> Iterator[Case]:
    for residues in (64, 256, LONGEST):
        ids = token_ids(1, residues + 2)
        runners = s.everyone("hidden", {"ids": ids}, ("sdpa", "eager"), tokens=residues)
        yield Case(f"{residues} residues", "ms", runners)


def contacts(s: Session) -> Iterator[Case]:
    runners = s.everyone("contacts", {"ids": token_ids(1, 258)}, ("eager",), tokens=256)
    yield Case("256 residues", "ms", runners)


def masked_batches(lengths: list[int], rows: int) -> list[dict[str, Any]]:
    """Random sequences of these lengths, in batches of `rows` as they arrive, of whose residues 15% are to be told."""
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
    """Steps of AdamW: of equal lengths, of proteins as they arrive, and the peak memory of both."""
    lengths = [len(protein) + 2 for protein in s.proteins(16)]
    # Eight of these proteins in a batch would take transformers 20 GB at 150M, and kernels off more.
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
    """Steps of AdamW on LoRA adapters of query and value, beside PEFT's, and their peak memory."""
    name, sizes = "4 x 256 tokens", [256] * 4
    peer, theirs = "transformers sdpa, PEFT", {"attention": "sdpa"}
    args = {"case": name, "batches": masked_batches(sizes, 4), "lora": True}
    torch = s.runner("train", args | theirs, "transformers", peer, sum(sizes), needed=1)
    yield Case(name, "tokens/s", [s.runner("train", args, OURS, work=sum(sizes)), torch])
    yield peak_memory(s, f"{name}, peak memory", "train", args, peer, theirs)


def fold(s: Session) -> Iterator[Case]:
    """One pass of a folding trunk with its structure module, and its peak memory beside transformers' smallest; of the
    whole model, loading and one pass over a protein, in fresh processes."""
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


def chunks_of(size: int | None) -> tuple[str, dict[str, Any]]:
    """The name and the arguments of transformers' folding in chunks of so many rows."""
    return f"transformers, {f'chunks of {size}' if size else 'in one chunk'}", {"chunk_size": size}


def quantized(s: Session) -> Iterator[Case]:
    """Checkpoints in fewer bits: bulk embedding, what it takes of memory, and one short sequence."""
    assert s.folder
    s.close()  # the peak memory is to be that of what is done here
    for name in CONVERTED:
        dtype = "bfloat16" if name == OURS_BFLOAT16 else "float32"
        s.processes[name] = Process(OURS, s.folder.with_name(name), dtype)
    s.processes[BFLOAT16] = Process("transformers", s.folder, "bfloat16")
    schedule = {"attention": "sdpa", "schedule": "one at a time"}  # the best of float32 on a CPU
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
        """What is asked of the same processes, in bytes."""

        def runner(process: str, name: str) -> Runner:
            return Runner(name, lambda keep: what(s.worker(process), process), needed=1)

        return [runner(*pair) for pair in named.items()]

    def weights(worker: Worker, process: str) -> float:
        return worker.ready["weights_bytes"]

    def peak(worker: Worker, process: str) -> float:
        """Asked while it embeds the shortest once more."""
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
    """The encoder, against its matrix products alone: the ratio is the share of the machine's speed."""
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
    """The products of the linear layers of a model, beside what the machine could do at most."""
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
    """Checkpoint and a first forward of 8 tokens, in fresh processes; without the imports."""
    yield started(s, "and 8 tokens", "hidden", {"ids": token_ids(1, 8)}, "transformers sdpa", {"attention": "sdpa"})


def started(s: Session, case: str, call: str, args: dict[str, Any], peer: str, theirs: dict[str, Any]) -> Case:
    """Loading and a first call in fresh processes, beside transformers, which takes the arguments `theirs` besides."""

    def runner(name: str, process: str, args: dict[str, Any]) -> Runner:
        def run(keep: Path | None) -> float:
            s.close()
            with s.start(process) as worker:
                return 1 / (worker.ready["seconds"] + worker.ask(call, args, keep=keep)["seconds"])

        return Runner(name, run)

    return Case(case, "s", [runner(OURS, OURS, args), runner(peer, "transformers", args | theirs)])


def memory(s: Session) -> Iterator[Case]:
    """Peak memory of bulk embedding."""
    sequences = s.proteins(16)
    attention, schedule = s.best_schedule.removeprefix("transformers ").split(", ")
    args, theirs = {"sequences": sequences}, {"attention": attention, "schedule": schedule}
    yield peak_memory(s, f"bulk, {len(sequences)} proteins", "embed", args, s.best_schedule, theirs)


def peak_memory(s: Session, case: str, call: str, args: dict[str, Any], peer: str, theirs: dict[str, Any]) -> Case:
    """Of a call in fresh processes, beside transformers, which takes the arguments `theirs` besides."""

    def runner(name: str, process: str, args: dict[str, Any]) -> Runner:
        def run(keep: Path | None) -> float:
            s.close()
            with s.start(process) as worker:
                return worker.ask(call, args, keep=keep)["peak_bytes"]

        return Runner(name, run, needed=1)

    return Case(case, "GB", [runner(OURS, OURS, args), runner(peer, "transformers", args | theirs)], rounds=1)


WITHOUT_CHECKPOINT = {"gemm"}

# In this order: those in fresh processes close the workers, and training changes their weights.
WORKLOADS: dict[str, tuple[Callable[[Session], Iterator[Case]], tuple[str, ...]]] = {
    "bulk": (bulk, ("8M", "150M", "650M", "ESM-1b", *ESMC)),
    "uniform": (uniform, ("8M", "150M", "650M", *ESMC)),
    "single": (single, ("8M", "150M", "650M", *ESMC)),
    "contacts": (contacts, ("150M",)),
    "fold": (fold, ("ESMFold trunk", "ESMFold", "tiny ESMFold")),
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
    """Rounds in which one peer after the other is measured, in turned order every second time.

    Ours, and after the first round the best peer, go on until there are enough rounds; the others only as long as
    the budget, in seconds, lasts. A peer whose answer is not ours has failed.
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
                raise RuntimeError(f"its answer differs from ours by {difference:.1e}")

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
                    result.absent[runner.name] = "left out: no time"
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
