"""Runs that are stopped, resumed, and shared among ranks."""

import gzip
import hashlib
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from mlx_esm_hf import MLXAutoModel, embed, load_protein_model
from mlx_esm_hf.errors import NonFiniteError
from mlx_esm_hf.runs.job import Item, ItemList, Job, no_progress
from mlx_esm_hf.runs.manifest import read_manifest
from mlx_esm_hf.runs.run import Run, chunks, compute_items, compute_run
from tests.jobs.models import UBIQUITIN, write_model
from tests.processes import ON_TWO_RANKS, RESTORE_SIGINT

# Without torch, which transformers would import: that takes seconds each time.
COMMAND = [sys.executable, "-c", "import sys; sys.modules['torch'] = None; from mlx_esm_hf.cli import app; app()"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(write_model(tmp_path_factory.mktemp("esm2")))


@pytest.fixture(scope="module")
def fasta(tmp_path_factory):
    """300 proteins, one of them bad, and a repeated id."""
    residues, path = random.Random(0), tmp_path_factory.mktemp("fasta") / "p.fasta"
    with path.open("w") as file:
        for i in range(300):
            sequence = "".join(residues.choices("ACDEFGHIKLMNPQRSTVWY", k=residues.randint(20, 200)))
            file.write(f">p{i // 2 if i < 4 else i}\n{sequence if i != 7 else ''}\n")
    return path


def command(fasta, folder, output, *options):
    return [*COMMAND, "embed", fasta, "--model", folder, "--output", output, "--batch-tokens", "256", *options]


def digests(output):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(output.glob("shard-*.safetensors"))
    }


@pytest.fixture(scope="module")
def whole(fasta, folder, tmp_path_factory):
    """A run without interruption."""
    output = tmp_path_factory.mktemp("whole") / "out"
    done = subprocess.run(command(fasta, folder, output), capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr  # one record was left out
    assert "'p7' is empty" in done.stderr
    return output


def kill_and_resume(fasta, folder, whole, output, kills, seed):
    """Kill the command several times at random moments after a new shard, then let it finish."""
    moments = random.Random(seed)
    for _ in range(kills):
        before = len(digests(output))
        process = subprocess.Popen(command(fasta, folder, output), stderr=subprocess.DEVNULL)
        while process.poll() is None and len(digests(output)) <= before:
            time.sleep(0.01)
        time.sleep(moments.random() * 0.2)
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = subprocess.run(command(fasta, folder, output), capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    assert digests(output) == digests(whole)
    assert (output / "index.csv").read_bytes() == (whole / "index.csv").read_bytes()
    assert json.loads((output / "manifest.json").read_text()) == json.loads((whole / "manifest.json").read_text())


def test_three_kills_do_not_change_the_result(fasta, folder, whole, tmp_path):
    assert len(digests(whole)) > 5
    kill_and_resume(fasta, folder, whole, tmp_path / "out", kills=3, seed=0)


@pytest.mark.long
def test_twenty_kills_do_not_change_the_result(fasta, folder, whole, tmp_path):
    for seed in range(5):
        kill_and_resume(fasta, folder, whole, tmp_path / f"out{seed}", kills=4, seed=seed)


# The command, with a Ctrl-C as soon as its first shard is written.
INTERRUPTED = f"""
{RESTORE_SIGINT}
import os, sys
sys.modules["torch"] = None
from mlx_esm_hf.cli import app
from mlx_esm_hf.runs.run import Run
add = Run.add
def add_and_stop(self, name, data):
    add(self, name, data)
    os.kill(os.getpid(), signal.SIGINT)
Run.add = add_and_stop
app()
"""


def test_ctrl_c_ends_cleanly_and_resumes(fasta, folder, whole, tmp_path):
    output = tmp_path / "out"
    arguments = command(fasta, folder, output)[len(COMMAND) :]
    stopped = subprocess.run([sys.executable, "-c", INTERRUPTED, *arguments], capture_output=True, text=True)
    assert stopped.returncode == 130, stopped.stderr
    assert (
        "Progress is saved in" in stopped.stderr
        and "run the same command again" in stopped.stderr
        and "Traceback" not in stopped.stderr
    )
    assert digests(output).keys() == {"shard-00000000.safetensors"}
    subprocess.run(command(fasta, folder, output), capture_output=True, check=False)
    assert digests(output) == digests(whole)


def test_file_output_is_resumed(fasta, folder, whole, tmp_path):
    """The shards are kept until the file exists."""
    output = tmp_path / "out.npz"
    process = subprocess.Popen(command(fasta, folder, output), stderr=subprocess.DEVNULL)
    shards = Path(f"{output}.shards")
    while process.poll() is None and not digests(shards):
        time.sleep(0.01)
    process.kill()
    process.wait()
    subprocess.run(command(fasta, folder, output), capture_output=True, check=False)
    assert not shards.exists()
    with np.load(output) as file:
        assert file["mean"].shape == (299, 32) and file["ids"][:3].tolist() == ["p0", "p0#2", "p1"]


def test_other_settings_and_other_input_are_refused(fasta, folder, whole, tmp_path):
    with pytest.raises(ValueError, match=r"layers: 3; now: 0"):
        embed(fasta, folder, whole, layers=[0], batch_tokens=256)
    other = tmp_path / "other.fasta"
    other.write_bytes(fasta.read_bytes().replace(b"A", b"C", 1))
    with pytest.raises(ValueError, match="sha256: .*; now: "):
        embed(other, folder, whole, batch_tokens=256)
    other_model = str(write_model(tmp_path / "model", seed=1))
    with pytest.raises(ValueError, match="model: .*; now: "):
        embed(fasta, other_model, whole, batch_tokens=256)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(ValueError, match="already exists and is not a run"):
        embed(fasta, folder, tmp_path / "mine")
    assert len(digests(whole)) > 5


def test_finished_run_is_not_recomputed(fasta, folder, whole):
    before = {path: path.stat().st_mtime_ns for path in whole.iterdir()}
    done = []
    embed(fasta, folder, whole, batch_tokens=256, progress=done.append)
    assert not any(progress.residues_done for progress in done)
    assert {path: path.stat().st_mtime_ns for path in whole.iterdir()} == before


def test_resumed_run_keeps_its_batch_size(fasta, folder, whole, tmp_path):
    """`--batch-tokens auto` depends on free memory, so the number in the manifest is used."""
    assert load_protein_model(MLXAutoModel, folder, output=whole).batch_tokens == 256


def test_standard_input_streams_and_does_not_resume(folder, tmp_path):
    arguments = [*COMMAND, "embed", "-", "--model", folder, "--output", tmp_path / "out"]
    done = subprocess.run(arguments, input=b">a\nMKT\n", capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    again = subprocess.run(arguments, input=b">a\nMKT\n", capture_output=True, check=False)
    assert again.returncode == 1 and b"cannot be resumed" in again.stderr


FROM = {
    "a pipe of the shell": "{command} embed <(cat {fasta}) {rest}",
    "/dev/stdin": "cat {fasta} | {command} embed /dev/stdin {rest}",
    "a named pipe": "mkfifo {pipe} && (cat {fasta} > {pipe} &) && {command} embed {pipe} {rest}",
}


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize("line", FROM.values(), ids=FROM)
def test_pipes_stream_and_do_not_resume(line, folder, tmp_path):
    fasta, output = tmp_path / "in.fasta.gz", tmp_path / "out"
    fasta.write_bytes(gzip.compress(b">a\nMKT\n>b\nMKTAYI\n"))
    parts = {"command": shlex.join(COMMAND), "fasta": fasta, "pipe": tmp_path / "pipe"}
    line = line.format(**parts, rest=f"--model {folder} --output {output}")
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert [result.id for result in Run(output, read_manifest(output)).results()] == ["a", "b"]
    again = subprocess.run(["bash", "-c", line.split("&&")[-1]], capture_output=True, text=True, timeout=600)
    assert again.returncode == 1 and "cannot be resumed" in again.stderr


def test_closed_standard_input(folder, fasta, tmp_path):
    """MLX treats file descriptor 0, which the next opened file gets, as an error."""
    done = []
    for source in ("-", fasta):
        arguments = [*COMMAND, "embed", source, "--model", folder, "--output", tmp_path / "out.npz"]
        done.append(subprocess.run(["bash", "-c", 'exec "$@" <&-', "bash", *arguments], capture_output=True, text=True))
    assert done[0].returncode == 1 and "\nError: Standard input is closed" in f"\n{done[0].stderr}", done[0].stderr
    assert done[1].returncode == 3, done[1].stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.npz"]


def test_input_changed_while_it_is_read(folder, tmp_path):
    fasta, output = tmp_path / "in.fasta", tmp_path / "out"
    fasta.write_text(f">a\n{UBIQUITIN}\n>b\n{UBIQUITIN}\n")
    before = fasta.read_bytes()

    def change(progress):
        if progress.residues_done:
            fasta.write_text(f">a\n{UBIQUITIN}\n>c\n{UBIQUITIN}\n")

    with pytest.raises(ValueError, match="in.fasta has changed while it was read.*Remove .*out, then start again"):
        embed(fasta, folder, output, progress=change)
    with pytest.raises(ValueError, match="sha256: .*; now: "):
        embed(fasta, folder, output)
    fasta.write_bytes(before)
    reported = []
    embed(fasta, folder, output, progress=reported.append)
    assert sum(progress.residues_computed for progress in reported) == 2 * len(UBIQUITIN)


def test_results_from_a_changed_input_are_recomputed(tmp_path):
    job, reported = small_job(), []
    job.items.has_changed = lambda: True
    with pytest.raises(ValueError, match="x has changed while it was read"):
        compute_run(job, tmp_path / "out", no_progress)
    assert not Run(tmp_path / "out", read_manifest(tmp_path / "out")).finished
    compute_run(small_job(), tmp_path / "out", reported.append)
    assert [progress.residues_computed for progress in reported if not progress.phase] == [10] * 6


def test_folder_that_cannot_be_written(fasta, folder, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="out cannot be written: .*file is not a folder"):
        embed(fasta, folder, tmp_path / "file" / "out")
    if os.geteuid():  # root may write everywhere
        tmp_path.chmod(0o500)
        with pytest.raises(OSError, match="Permission denied"):
            embed(fasta, folder, tmp_path / "out")
        tmp_path.chmod(0o700)


def item(number):
    return Item(number, str(number), None, 10, 16, 8)


def small_job(count=6):
    """Return a job with one shard for each item."""

    def compute(items):
        return [{"x": np.arange(3)} for _ in items]

    items = ItemList([item(number) for number in range(count)], {"name": "x", "sha256": "y"})
    return Job("test", {}, items, compute, chunk_work=16)


@pytest.mark.parametrize("name", ["manifest.json", "shard-00000002.safetensors", "index.csv"])
def test_temporary_files_of_a_killed_run_are_removed(name, tmp_path, monkeypatch):
    """When the run is resumed in the same folder."""
    folder, whole = tmp_path / "out", tmp_path / "whole"
    replace = os.replace

    def kill(source, target):
        if target.name == name:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", kill)
        patch.setattr(Path, "unlink", lambda path, missing_ok: None)
        compute_run(small_job(), folder, no_progress)
    assert len([path for path in folder.iterdir() if ".part" in path.name]) == 1
    compute_run(small_job(), folder, no_progress)
    compute_run(small_job(), whole, no_progress)
    assert sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in whole.iterdir())


def test_full_disk_keeps_finished_shards(tmp_path, monkeypatch):
    fsync, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 6:  # after the manifest and two shards with their checksums
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        OSError, match="shard-00000002.safetensors cannot be written .No space left on device.*again to resume"
    ):
        compute_run(small_job(), tmp_path / "out", no_progress)
    assert not Run(tmp_path / "out", read_manifest(tmp_path / "out")).finished
    assert len(digests(tmp_path / "out")) == 2
    monkeypatch.undo()
    computed = []
    run = compute_run(small_job(), tmp_path / "out", computed.append)
    assert [progress.residues_computed for progress in computed if not progress.phase] == [0, 0, 10, 10, 10, 10]
    assert run.finished and [result.number for result in run.results()] == list(range(6))


def test_chunks_are_limited_by_work_and_bytes():
    items = [item(i) for i in range(10)]
    assert [[i.number for i in chunk.items] for chunk in chunks(items, 64)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    large = [Item(i, "", None, 1, 1, 1 << 27) for i in range(5)]
    assert [len(chunk.items) for chunk in chunks(large, 1000)] == [2, 2, 1]


def on_two_ranks(*arguments):
    command = [str(a) for a in [*ON_TWO_RANKS, *arguments]]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def test_two_ranks_give_the_results_of_one(fasta, folder, whole, tmp_path):
    done = on_two_ranks(*command(fasta, folder, tmp_path / "out.npz", "--pooling", "mean,residues"))
    assert done.stdout.count("'p7' is empty") + done.stderr.count("'p7' is empty") == 1, done.stderr
    embed(fasta, folder, tmp_path / "one.npz", pooling=["mean", "residues"], batch_tokens=256)
    with np.load(tmp_path / "out.npz") as ours, np.load(tmp_path / "one.npz") as theirs:
        assert ours.files == theirs.files
        assert ours["ids"].tolist() == theirs["ids"].tolist()
        for name in set(ours.files) - {"metadata", "ids"}:
            np.testing.assert_allclose(ours[name], theirs[name], atol=1e-5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.npz", "out.npz"]


def test_two_ranks_give_the_scores_of_one(folder, tmp_path):
    options = ["score", "--sequence", UBIQUITIN, "--model", folder, "--batch-tokens", "256", "--output"]
    done = on_two_ranks(*COMMAND, *options, tmp_path / "two.csv")
    subprocess.run([*COMMAND, *options, tmp_path / "one.csv"], check=True, capture_output=True)
    two, one = ((tmp_path / f"{n}.csv").read_text().splitlines() for n in ("two", "one"))
    assert len(one) == 20 * len(UBIQUITIN) + 1, done.stderr
    assert two[0] == one[0]
    for a, b in zip(two[1:], one[1:], strict=True):
        assert a.split(",")[0] == b.split(",")[0]
        assert float(a.split(",")[1]) == pytest.approx(float(b.split(",")[1]), abs=1e-5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.csv", "two.csv"]


def test_stop_while_shards_are_removed_loses_nothing(fasta, folder, tmp_path, monkeypatch):
    """After the file was written, and while its shards are removed."""
    output = tmp_path / "out.npz"

    class Killed(Exception):
        pass

    def kill(*args, **options):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("mlx_esm_hf.runs.outputs.remove_folder", kill)
        with pytest.raises(Killed):
            embed(fasta, folder, output, batch_tokens=256)
    written = output.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("mlx_esm_hf.runtime.files.shutil.rmtree", lambda path, **options: path.exists() and kill())
        with pytest.raises(Killed):
            embed(fasta, folder, output, batch_tokens=256)
    assert output.read_bytes() == written
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.npz.shards.gone", "out.npz"]
    with pytest.raises(ValueError, match=r"out\.npz already exists"):
        embed(fasta, folder, output, batch_tokens=256)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.npz"]
    output.unlink()
    report = embed(fasta, folder, output, batch_tokens=256)
    assert output.read_bytes() == written and len(report.left_out) == 1


def test_file_created_between_two_runs_is_kept(fasta, folder, tmp_path, monkeypatch):
    output = tmp_path / "out.npz"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("mlx_esm_hf.runs.run.shard_bytes", stop)
        embed(fasta, folder, output, batch_tokens=256)
    output.write_text("mine")
    with pytest.raises(ValueError, match="already exists, but .*shards is not finished"):
        embed(fasta, folder, output, batch_tokens=256)
    assert output.read_text() == "mine"


def stop(*arguments):
    raise KeyboardInterrupt


def cut(path):
    path.write_bytes(path.read_bytes()[:100])


def flip(path):
    """Flip a bit of the last element: the file still opens without an error."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


DAMAGE = {"deleted": Path.unlink, "cut": cut, "a bit flipped": flip}


# What is damaged, and how many residues are computed again: ten a shard.
LOOKED_AT = [
    *(("shard-00000002.safetensors", damage, 10) for damage in DAMAGE),
    *(("index.csv", damage, 0) for damage in DAMAGE),
    ("checksums.txt", "deleted", 60),
    ("checksums.txt", "cut", 60),
    ("checksums.txt", "a bit flipped", 10),  # in the last line
]


@pytest.mark.parametrize(("name", "damage", "recomputed"), LOOKED_AT)
def test_damage_to_a_finished_run_is_repaired(name, damage, recomputed, tmp_path):
    """Only what is missing or damaged is computed again."""
    folder = tmp_path / "out"
    compute_run(small_job(), folder, no_progress)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    DAMAGE[damage](folder / name)
    assert (folder / name).exists() is (damage != "deleted")
    reported = []
    run = compute_run(small_job(), folder, reported.append)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [result.number for result in run.results()] == list(range(6))
    assert sum(progress.residues_computed for progress in reported) == recomputed
    again = []
    compute_run(small_job(), folder, again.append)
    assert again == []


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_shard_of_a_stopped_run_is_recomputed(damage, tmp_path):
    folder, whole = tmp_path / "out", tmp_path / "whole"
    job = small_job()

    def stop_at_four(items):
        if items[0].number == 4:
            raise KeyboardInterrupt
        return small_job().compute(items)

    job.compute = stop_at_four
    with pytest.raises(KeyboardInterrupt):
        compute_run(job, folder, no_progress)
    assert len(digests(folder)) == 4
    damage(folder / "shard-00000001.safetensors")
    reported = []
    compute_run(small_job(), folder, reported.append)
    assert [progress.residues_computed for progress in reported if not progress.phase] == [0, 10, 0, 0, 10, 10]
    compute_run(small_job(), whole, no_progress)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {p.name: p.read_bytes() for p in whole.iterdir()}


def job_with_files():
    """Return a job with two files for each item."""
    job = small_job()
    job.items.items = [item(number)._replace(name=f"n{number}") for number in range(6)]
    job.files = lambda item: {f"{item.name}{end}": lambda result: f"{result}".encode() for end in (".a", ".b")}
    job.columns = lambda result: {"files": result.name, "sum": result.arrays["x"].sum()}
    return job


def test_files_of_items(tmp_path):
    folder = tmp_path / "out"
    run = compute_run(job_with_files(), folder, no_progress)
    assert read_manifest(folder)["files"] == 12
    for result in run.results():
        for end in (".a", ".b"):
            assert (folder / f"{result.name}{end}").read_text() == str(result)
    rows = (folder / "index.csv").read_text().splitlines()
    assert rows[0] == "number,id,length,shard,files,sum"
    assert rows[3] == "2,2,10,shard-00000002.safetensors,n2,3"


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_files_are_remade_from_shards(damage, tmp_path):
    """Without computing anything."""
    folder, reported = tmp_path / "out", []
    compute_run(job_with_files(), folder, no_progress)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    damage(folder / "n3.b")
    compute_run(job_with_files(), folder, reported.append)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert sum(progress.residues_computed for progress in reported) == 0
    compute_run(job_with_files(), folder, stop)  # is not reported of anything: all is there


@pytest.mark.parametrize("name", ["n2.a", "n2.b", "index.csv"])
def test_kill_between_two_files(name, tmp_path, monkeypatch):
    folder, whole, add = tmp_path / "out", tmp_path / "whole", Run.add

    def kill(run, added, data):
        if added == name:
            raise KeyboardInterrupt
        add(run, added, data)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "add", kill)
        compute_run(job_with_files(), folder, no_progress)
    reported = []
    compute_run(job_with_files(), folder, reported.append)
    compute_run(job_with_files(), whole, no_progress)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {p.name: p.read_bytes() for p in whole.iterdir()}
    assert [progress.residues_computed for progress in reported][:3] == [0, 0, 0]


def test_checksums_have_the_format_of_sha256sum(tmp_path):
    compute_run(small_job(), tmp_path / "out", no_progress)
    lines = (tmp_path / "out" / "checksums.txt").read_text().splitlines()
    named = dict(reversed(line.split("  ")) for line in lines)
    files = {path.name for path in (tmp_path / "out").iterdir()} - {"checksums.txt", "manifest.json"}
    assert named.keys() == files
    for name, checksum in named.items():
        assert hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest() == checksum


def test_shard_damaged_while_it_is_read(tmp_path):
    run = compute_run(small_job(), tmp_path / "out", no_progress)
    shard = tmp_path / "out" / "shard-00000002.safetensors"
    cut(shard)
    with pytest.raises(ValueError, match="shard-00000002.safetensors is damaged or missing.*to compute it again"):
        list(run.results())
    shard.unlink()
    with pytest.raises(ValueError, match="shard-00000002.safetensors is damaged or missing.*to compute it again"):
        list(run.results())


MEASURE = """
import re, sys
from mlx_esm_hf import embed
embed(sys.argv[1], sys.argv[2], sys.argv[3], long="window")
print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""


@pytest.mark.long
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_does_not_grow_with_the_file(folder, tmp_path):
    """20,000 proteins need the same memory as the first 2,000 of them."""
    lengths = np.random.default_rng(0).lognormal(5.9, 0.7, 20_000).astype(int).clip(20, 5_000)
    peaks = []
    for count in (2_000, 20_000):
        path = tmp_path / f"{count}.fasta"
        with path.open("w") as file:
            for i, length in enumerate(lengths[:count]):
                file.write(f">p{i}\n{'ACDEFGHIKLMNPQRSTVWY' * (length // 20 + 1)}\n")
        arguments = [sys.executable, "-c", MEASURE, path, folder, tmp_path / f"out{count}"]
        done = subprocess.run(arguments, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout))
    assert peaks[1] <= 1.2 * peaks[0], peaks


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("raises", [False, True], ids=["in the result", "before"])
def test_a_result_that_is_not_finite_is_refused_by_name(value, raises):
    """Whether `compute` notices itself or returns the value in any array, of any type and shape."""

    def compute(items):
        if raises and any(item.content for item in items):
            raise NonFiniteError("Noticed.")
        return [{"count": np.arange(3), "x": np.full((2, 2), value if item.content else 0)} for item in items]

    items = [Item(i, f"p{i}", i == 2, 1, 1, 1) for i in range(4)]
    job = Job("test", {}, ItemList(items, {"name": "x"}), compute, 9, cause=lambda content: f"Cause: {content}.")
    with pytest.raises(NonFiniteError, match=r"^The result of 'p2' is NaN or infinite. Cause: True.$"):
        compute_items(job, items)
    assert len(compute_items(job, items[:2])) == 2
