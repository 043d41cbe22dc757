"""Checksums of the files in a folder."""

import shutil
import subprocess

import pytest

from mlx_esm_hf.training.checksums import check_files, write_checksums


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "tokens.bin").write_bytes(b"tokens")
    (tmp_path / "ends.npy").write_bytes(b"ends")
    write_checksums(tmp_path)
    return tmp_path


def test_sha256sum_reads_the_checksums(folder):
    assert check_files(folder, ["tokens.bin"], "Help.").keys() == {"tokens.bin", "ends.npy"}
    subprocess.run(["sha256sum", "-c", "checksums.txt"], cwd=folder, check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("name", ["tokens.bin", "ends.npy", "checksums.txt"])
@pytest.mark.parametrize("damage", ["empty", "truncate", "flip", "remove", "folder"])
def test_damage_is_an_error_that_names_the_file(name, damage, folder):
    path = folder / name
    data = path.read_bytes()
    if damage == "empty":
        path.write_bytes(b"")
    elif damage == "truncate":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "flip":
        path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    elif damage == "remove":
        path.unlink()
    else:
        path.unlink()
        path.mkdir()
    with pytest.raises(ValueError, match=r"(not found|damaged).* Help\.") as error:
        check_files(folder, ["tokens.bin", "ends.npy"], "Help.")
    assert str(folder) in str(error.value)
    shutil.rmtree(folder)
