"""Output files are written atomically and never overwrite others."""

import os
import shutil

import numpy as np
import pytest

from mlx_esm_hf import contacts, embed, fill_mask, generate, perplexity, score
from mlx_esm_hf.runtime.files import place_file, remove_temporary, replace_file, temporary_file
from tests.jobs.models import UBIQUITIN, write_model

WILD = UBIQUITIN[:10]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(write_model(tmp_path_factory.mktemp("esm2")))


@pytest.fixture
def fasta(tmp_path):
    path = tmp_path / "in.fasta"
    path.write_text(f">a\n{WILD}<mask>\n")
    return path


def call(job, fasta, folder, files):
    """Run a job with all files that it can write, given by their suffixes."""
    if job == "embed":
        return embed(fasta, folder, files[".npz"])
    if job == "fill_mask":
        return fill_mask(fasta, folder, files[".csv"])
    if job == "perplexity":
        return perplexity(fasta, folder, files[".csv"])
    if job == "generate":
        return generate(fasta, folder, files[".fasta"])
    if job == "score":
        return score(None, WILD, folder, files[".csv"], picture=files[".png"])
    if job == "score without an output":
        return score(None, WILD, folder, picture=files[".png"])
    return contacts(fasta, folder, files[".npz"], top=files[".csv"], picture=files[".png"])


FILES = {
    "embed": [".npz"],
    "fill_mask": [".csv"],
    "perplexity": [".csv"],
    "generate": [".fasta"],
    "score": [".csv", ".png"],
    "score without an output": [".png"],
    "contacts": [".npz", ".csv", ".png"],
}
EACH = [(job, suffix) for job, suffixes in FILES.items() for suffix in suffixes]


@pytest.fixture
def files(tmp_path):
    return {suffix: tmp_path / f"out{suffix}" for suffix in (".npz", ".csv", ".fasta", ".png")}


@pytest.mark.parametrize(("job", "suffix"), EACH)
@pytest.mark.parametrize("kind", ["file", "link to nowhere"])
def test_existing_file_is_kept(job, suffix, kind, fasta, folder, files, tmp_path):
    if kind == "file":
        files[suffix].write_text("mine")
    else:
        files[suffix].symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=f"out{suffix} already exists. Choose another output, or remove it"):
        call(job, fasta, folder, files)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.fasta", f"out{suffix}"]
    if kind == "file":
        assert files[suffix].read_text() == "mine"


@pytest.mark.parametrize(("job", "suffix"), [("embed", ".npz"), ("score", ".csv")])
def test_link_in_place_of_shards_is_refused(job, suffix, fasta, folder, files, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / f"out{suffix}.shards").symlink_to("mine")
    with pytest.raises(ValueError, match="shards is a link"):
        call(job, fasta, folder, files)
    assert not files[suffix].exists() and not list((tmp_path / "mine").iterdir())


class Killed(BaseException):
    pass


def kill(*args, **kwargs):
    raise Killed


@pytest.mark.parametrize(("job", "suffix"), [(job, s) for job, s in EACH if job != "score without an output"])
def test_file_created_after_a_stop_is_kept(job, suffix, fasta, folder, files, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("mlx_esm_hf.runs.outputs.write_new", kill)
        call(job, fasta, folder, files)
    files[suffix].write_text("mine")
    with pytest.raises(
        ValueError, match=f"out{suffix} already exists, but .*shards is not finished. Move the file away"
    ):
        call(job, fasta, folder, files)
    assert files[suffix].read_text() == "mine"
    files[suffix].unlink()
    call(job, fasta, folder, files)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["in.fasta", *(f"out{s}" for s in FILES[job])])


@pytest.mark.parametrize("job", ["score", "contacts"])
@pytest.mark.parametrize("after", [1, 2])
def test_stop_between_two_files_is_resumed(job, after, fasta, folder, files, tmp_path, monkeypatch):
    """Files that the stopped run wrote are accepted and not written again."""
    from mlx_esm_hf.runs import outputs

    def place_and_die(part, path):
        place_file(part, path)
        if sum(files[suffix].exists() for suffix in FILES[job]) == after:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(outputs, "place_file", place_and_die)
        call(job, fasta, folder, files)
    there = {path: path.stat().st_ino for path in files.values() if path.exists()}
    assert len(there) == after
    call(job, fasta, folder, files)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["in.fasta", *(f"out{s}" for s in FILES[job])])
    assert {path: path.stat().st_ino for path in there} == there


def test_file_created_during_the_work_is_kept(fasta, folder, tmp_path, monkeypatch):
    output = tmp_path / "out.npz"
    embeddings = "mlx_esm_hf.runs.run.compute_run"
    from mlx_esm_hf.runs.run import compute_run

    def slow(*args):
        run = compute_run(*args)
        output.write_text("mine")
        return run

    monkeypatch.setattr(embeddings, slow)
    with pytest.raises(ValueError, match="out.npz was created while this command ran. Move it away and run again"):
        embed(fasta, folder, output)
    monkeypatch.undo()
    assert output.read_text() == "mine"
    output.unlink()
    embed(fasta, folder, output)
    with np.load(output) as file:
        assert file["ids"].tolist() == ["a"]


def test_same_path_for_two_files_is_refused(fasta, folder, tmp_path):
    with pytest.raises(ValueError, match="out.npz would be written twice"):
        contacts(fasta, folder, tmp_path / "out.npz", top=tmp_path / "out.npz")


def test_temporary_files_have_unique_names(tmp_path):
    """A link in place of the file is replaced and never followed."""
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "out.npz").symlink_to(tmp_path / "precious")
    replace_file(tmp_path / "out.npz", b"ours")
    assert (tmp_path / "precious").read_text() == "mine"
    assert not (tmp_path / "out.npz").is_symlink() and (tmp_path / "out.npz").read_bytes() == b"ours"
    with temporary_file(tmp_path / "out.npz") as one, temporary_file(tmp_path / "out.npz") as two:
        assert one != two
    with temporary_file(tmp_path / "out.npz") as left:
        os.link(left, tmp_path / "killed")
    (tmp_path / "killed").rename(left)
    remove_temporary(tmp_path / "out.npz")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.npz", "precious"]


def test_kill_after_a_file_got_its_name_leaves_nothing(fasta, folder, tmp_path, monkeypatch):
    """Until its temporary name is removed, the file has two names."""
    output, rmtree = tmp_path / "out.npz", shutil.rmtree

    def kill(path, **options):
        if ".part" in path.name and output.exists():
            raise KeyboardInterrupt
        rmtree(path, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", kill)
        embed(fasta, folder, output)
    written = output.read_bytes()
    assert len([path for path in tmp_path.iterdir() if ".part" in path.name]) == 1
    embed(fasta, folder, output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.fasta", "out.npz"]
    assert output.read_bytes() == written


def test_placing_a_file_never_replaces_another(tmp_path, monkeypatch):
    def no_links(*args):  # as on a file system without hard links
        raise PermissionError(1, "Operation not permitted")

    (tmp_path / "out").write_text("mine")
    (tmp_path / "part").write_text("ours")
    for _ in range(2):
        with pytest.raises(FileExistsError):
            place_file(tmp_path / "part", tmp_path / "out")
        monkeypatch.setattr(os, "link", no_links)
    (tmp_path / "out").unlink()
    place_file(tmp_path / "part", tmp_path / "out")
    assert (tmp_path / "out").read_text() == "ours"
