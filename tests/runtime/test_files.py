"""Files and folders appear complete, or not at all, and whatever a kill interrupts is finished."""

import os
import shutil
import stat
import threading

import pytest

from mlx_esm_hf.runtime.files import (
    SAVED,
    finish_replacing,
    new_folder,
    remove_folder,
    remove_temporary,
    replace_file,
    replace_files,
    replace_folder,
    temporary_folder,
)
from tests.killing import forked

SHARDED = ("config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.index.json")
OTHER_SHARDS = ("config.json", "model-00001-of-00002.safetensors", "model.index.json")
WHOLE = ("config.json", "model.safetensors")


def content(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def write(folder, names, text):
    for name in names:
        (folder / name).write_text(text)


def hidden(folder):
    return [path for path in folder.rglob("*") if path.name.startswith(".")]


def kills(action, make, folder):
    """Run an action in forked processes, each killed before another file operation. Yield after each.

    Args:
        action: what to run.
        make: makes the folder's first content.
        folder: where the operations are counted.
    """
    number = 0
    while True:
        number += 1
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        make()
        outcome = forked(action, folder, number)
        assert outcome.error is None, outcome.error
        if not outcome.killed:
            assert number > 5
            return
        yield number


def test_files_appear_together(tmp_path):
    target = tmp_path / "new" / "folder"
    with replace_files(target) as folder:
        for name in ("a", "b"):
            (folder / name).write_text(name)
        assert not (target / "a").exists() and folder.parent == target
    assert content(target) == {"a": b"a", "b": b"b"}


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_no_file_changes_after_an_error(error, tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(error), replace_files(tmp_path) as folder:
        (folder / "a").write_text("new")
        raise error
    assert content(tmp_path) == {"a": b"old"}


@pytest.mark.parametrize(("old", "new"), [(SHARDED, WHOLE), (WHOLE, SHARDED), (SHARDED, OTHER_SHARDS), ((), WHOLE)])
def test_a_kill_leaves_the_old_or_the_new_files(old, new, tmp_path):
    target, finished = tmp_path / "target", 0
    before, after = dict.fromkeys(old, b"old"), dict.fromkeys(new, b"new")

    def make():
        write(target, ["mine"], "mine")
        write(target, old, "old")

    def save():
        with replace_files(target, ["model*"]) as folder:
            write(folder, new, "new")

    for _ in kills(save, make, target):
        found = content(target)
        assert found.pop("mine") == b"mine"
        assert len(set(found.values())) < 2  # no reader, not even of another library, finds a mixture
        assert "config.json" not in found or found in (before, after)
        finish_replacing(target)
        assert content(target) in (before | {"mine": b"mine"}, after | {"mine": b"mine"})
        finished += "new" in (target / "config.json").read_text() if (target / "config.json").exists() else 0
        save()
        assert content(target) == after | {"mine": b"mine"} and not hidden(target)
    assert finished > len(new)


@pytest.mark.parametrize("exists", [True, False])
def test_a_kill_leaves_the_old_or_the_new_folder(exists, tmp_path):
    target = tmp_path / "parent" / "target"

    def make():
        if exists:
            (target / "sub").mkdir(parents=True)
            write(target, ["a", "b"], "old")

    def save():
        with replace_folder(target) as folder:
            write(folder, ["b", "c"], "new")

    before, after = {"a": b"old", "b": b"old"} if exists else {}, {"b": b"new", "c": b"new"}
    for _ in kills(save, make, target.parent):
        finish_replacing(target)
        assert not target.exists() or content(target) in (before, after)
        assert exists == (target / "sub").exists() or content(target) == after
        save()
        assert content(target) == after and not hidden(target.parent)


def test_two_processes_never_mix(tmp_path):
    """Both save again and again, while a third one finishes what it finds."""

    def save(names):
        for turn in range(40):
            with replace_files(tmp_path, ["model*"]) as folder:
                write(folder, names, f"{names} {turn}")

    threads = [threading.Thread(target=forked, args=(lambda n=n: save(n), tmp_path)) for n in (SHARDED, WHOLE)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        finish_replacing(tmp_path)
    found = content(tmp_path)
    assert len(set(found.values())) == 1 and tuple(sorted(found)) in (tuple(sorted(SHARDED)), WHOLE)


def test_folder_that_cannot_be_written(tmp_path):
    """Without write permission, an unfinished replacement is an error that names the folder."""
    (tmp_path / SAVED).mkdir()
    (tmp_path / SAVED / "mine").touch()  # root, too, cannot finish what is not a replacement
    with pytest.raises(OSError, match="was being saved when the process was stopped"):
        finish_replacing(tmp_path)
    with pytest.raises(OSError, match="was being saved"), replace_files(tmp_path) as folder:
        (folder / "a").touch()
    assert not (tmp_path / "a").exists()


def test_a_replacement_never_leaves_its_folder(tmp_path):
    """The folder may come from others."""
    (tmp_path / "precious").write_text("mine")
    saved = tmp_path / "model" / SAVED
    saved.mkdir(parents=True)
    (saved / "a").write_text("new")
    (saved / ".plan.json").write_text('{"new": ["../precious", "a"], "stale": ["../precious", "../*"]}')
    finish_replacing(tmp_path / "model")
    assert content(tmp_path / "model") == {"a": b"new"} and (tmp_path / "precious").read_text() == "mine"


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_replace_folder(error, tmp_path):
    target = tmp_path / "parent" / "target"
    for text in ("first", "second"):
        with replace_folder(target) as folder:
            (folder / "file").write_text(text)
        assert content(target) == {"file": text.encode()}
    with pytest.raises(error), replace_folder(target) as folder:
        (folder / "file").write_text("third")
        raise error
    assert content(target) == {"file": b"second"} and os.listdir(target.parent) == ["target"]


def test_new_folder_keeps_an_earlier_one(tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    with new_folder(target) as folder:  # an empty folder may exist
        assert folder.name == "target"
        (folder / "file").write_text("first")
    for path in (target, target / "file"):
        with pytest.raises(FileExistsError, match="already exists. Nothing was written"), new_folder(path):
            pass
    assert content(target) == {"file": b"first"}


def test_new_folder_keeps_one_that_another_process_made(tmp_path):
    with pytest.raises(FileExistsError, match="Nothing was written"), new_folder(tmp_path / "target") as folder:
        (folder / "file").write_text("ours")
        (tmp_path / "target").mkdir()
        (tmp_path / "target" / "file").write_text("theirs")
    assert content(tmp_path / "target") == {"file": b"theirs"} and os.listdir(tmp_path) == ["target"]


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    for name in ("target", "other"):
        (tmp_path / f".{name}.0a1b2c3d.part" / name).mkdir(parents=True)
    (tmp_path / ".target.1a1b2c3d.part").mkdir()
    (tmp_path / ".target.2a1b2c3d.part.npz").touch()
    with temporary_folder(tmp_path / "target") as alive:
        remove_temporary(tmp_path / "target")
        assert sorted(os.listdir(tmp_path)) == sorted([".other.0a1b2c3d.part", alive.name])


def test_leftovers_removed_by_many_while_others_begin(tmp_path):
    """A folder that was just made is never taken for a leftover."""

    def begin():
        for _ in range(100):
            with temporary_folder(tmp_path / "target") as folder:
                (folder / "file").touch()

    threads = [threading.Thread(target=forked, args=(begin, tmp_path)) for _ in range(2)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        remove_temporary(tmp_path / "target")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_modes_follow_the_umask(umask, tmp_path):
    def private(folder):  # as some libraries make files
        os.close(os.open(folder / "private", os.O_CREAT, 0o600))

    earlier = os.umask(umask)
    try:
        with new_folder(tmp_path / "new" / "folder") as folder:
            private(folder)
        with replace_files(tmp_path / "files") as folder:
            private(folder)
        replace_file(tmp_path / "file", b"")
    finally:
        os.umask(earlier)
    for path in tmp_path.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o777 if path.is_dir() else 0o666) & ~umask, path


def test_remove_folder(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / ".folder.gone").mkdir()
    remove_folder(tmp_path / "folder")
    assert not os.listdir(tmp_path)
