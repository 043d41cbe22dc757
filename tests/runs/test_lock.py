"""Two processes with the same output."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from mlx_esm_hf.runs.lock import locked
from mlx_esm_hf.runs.outputs import check_outputs
from tests.jobs.models import UBIQUITIN, write_model
from tests.runs.test_run import COMMAND


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(write_model(tmp_path_factory.mktemp("esm2")))


@pytest.fixture(scope="module")
def fasta(tmp_path_factory):
    path = tmp_path_factory.mktemp("fasta") / "p.fasta"
    path.write_text("".join(f">p{i}\n{UBIQUITIN}\n" for i in range(120)))
    return path


def command(kind, fasta, folder, output):
    options = ["--model", folder, "--output", output, "--batch-tokens", "100"]
    if kind == "score":
        return [*COMMAND, "score", "--sequence", UBIQUITIN[:20], "--method", "pseudo-perplexity", *options]
    return [*COMMAND, "embed", fasta, *options]


@pytest.mark.parametrize("name", ["out", "out.npz", "out.h5", "score.csv"])
def test_second_process_is_refused(name, fasta, folder, tmp_path):
    output = tmp_path / name
    arguments = command(output.stem, fasta, folder, output)
    first = subprocess.Popen(arguments, stderr=subprocess.PIPE)
    try:
        while first.poll() is None and not list(tmp_path.rglob("shard-*")):
            time.sleep(0.01)
        first.send_signal(signal.SIGSTOP)
        second = subprocess.run(arguments, capture_output=True, text=True, check=False)
        assert second.returncode == 1
        assert f"{output} is being written by another process. Wait until it has ended" in second.stderr
    finally:
        first.send_signal(signal.SIGCONT)
    assert first.communicate()[0] is None and first.returncode == 0
    assert [p.name for p in tmp_path.iterdir()] == [name]
    subprocess.run(command(output.stem, fasta, folder, tmp_path / f"alone-{name}"), check=True, capture_output=True)
    for path in [output, *output.rglob("*")]:
        if path.is_file():
            alone = Path(str(path).replace(str(output), str(tmp_path / f"alone-{name}")))
            assert path.read_bytes() == alone.read_bytes()


def test_lock_is_acquired_and_released(tmp_path):
    with locked(tmp_path / "out"):
        with pytest.raises(ValueError, match="is being written by another process"), locked(tmp_path / "out"):
            pass
        with locked(tmp_path / "other"):
            pass
    with locked(tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_leftover_lock_file_does_not_lock(tmp_path):
    (tmp_path / ".out.mlx-esm.lock").touch()
    with locked(tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_leftover_lock_file_of_a_finished_run_is_removed(tmp_path):
    """The next command removes it, although it is refused because the file exists."""
    (tmp_path / "out.npz").touch()
    (tmp_path / ".out.npz.mlx-esm.lock").touch()
    with pytest.raises(ValueError, match="already exists"):
        check_outputs(tmp_path / "out.npz", [".npz"])
    assert [path.name for path in tmp_path.iterdir()] == ["out.npz"]


def test_link_in_place_of_a_lock_file_is_not_followed(tmp_path):
    (tmp_path / ".out.mlx-esm.lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError), locked(tmp_path / "out"):
        pass
    assert not os.path.lexists(tmp_path / "elsewhere")


def test_links_to_a_folder_share_its_lock(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with (
        locked(tmp_path / "real"),
        pytest.raises(ValueError, match="is being written by another process"),
        locked(tmp_path / "link"),
    ):
        pass
