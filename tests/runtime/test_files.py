"""Files and folders appear complete, or not at all."""

import os

import pytest

from mlx_esm_hf.runtime.files import new_folder, remove_temporary, replace_files, replace_folder


def content(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


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


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_replace_folder(error, tmp_path):
    target = tmp_path / "parent" / "target"
    for text in ("first", "second"):
        with replace_folder(target) as folder:
            (folder / "file").write_text(text)
            assert folder.name == "target" and (text == "first") != target.exists()
        assert content(target) == {"file": text.encode()}
    with pytest.raises(error), replace_folder(target) as folder:
        (folder / "file").write_text("third")
        raise error
    assert content(target) == {"file": b"second"} and os.listdir(target.parent) == ["target"]


def test_new_folder_keeps_an_earlier_one(tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    with new_folder(target) as folder:  # an empty folder may exist
        (folder / "file").write_text("first")
    for path in (target, target / "file"):
        with pytest.raises(FileExistsError, match="already exists. Nothing was written"), new_folder(path):
            pass
    assert content(target) == {"file": b"first"}


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    for name in ("target", "other"):
        (tmp_path / f".{name}.0a1b2c3d.part" / name).mkdir(parents=True)
    remove_temporary(tmp_path / "target")
    assert os.listdir(tmp_path) == [".other.0a1b2c3d.part"]
