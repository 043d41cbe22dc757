"""Atomic files and folders: each appears complete under its name, or not at all.

Everything is first written into a temporary folder, `.<name>.<hex>.part`, which its process keeps locked. A folder of
that name without a lock is what a killed process left.

Several files of a folder are replaced in two steps. The finished temporary folder becomes `.mlx-esm.saved`: from this
moment on the new files count. Then they are moved. If the process is killed in between, the next one that reads or
writes the folder finishes the moves.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import fnmatch
import glob
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mlx_esm_hf.errors import UserError

Write = Callable[[Path], None]

RESUME_HINT = "All finished work is kept; run the same command again to resume."
SAVED = ".mlx-esm.saved"  # complete files on their way into the folder that contains it
PLAN = ".plan.json"  # in each temporary folder: its lock and, in SAVED, which files are new and which ones are removed
ATTEMPTS = 100  # to finish a replacement while other processes begin new ones
OCCUPIED = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)


# Temporary files and folders


@contextmanager
def temporary_file(path: Path) -> Iterator[Path]:
    """Create an empty file next to `path`, to be written and then renamed to it. It is removed when the block ends.

    Its name is new, so no other process writes to it and no link waits under it. It is not locked: the caller locks
    what it writes.
    """
    temporary = temporary_name(path)
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """Create a locked folder next to `path`, empty but for the lock. It is removed when the block ends."""
    temporary, lock = make_locked_folder(path)
    with os.fdopen(lock):
        try:
            yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def make_locked_folder(path: Path) -> tuple[Path, int]:
    """Create a folder next to `path` and return it with the descriptor of its lock."""
    while True:
        temporary = temporary_name(path)
        temporary.mkdir()
        with contextlib.suppress(FileNotFoundError):  # another process took the folder for a leftover
            return temporary, lock_file(temporary / PLAN, os.O_CREAT)


def lock_file(path: Path, flags: int = 0) -> int:
    """Open and lock a file, and return its descriptor. Wait while another process has locked it.

    Raises:
        FileNotFoundError: the file does not exist any more.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | flags, 0o666)
    try:
        with contextlib.suppress(OSError):  # the file system has no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if not os.path.samestat(os.fstat(descriptor), os.stat(path)):
            raise FileNotFoundError(errno.ENOENT, "replaced by another file", str(path))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def temporary_name(path: Path) -> Path:
    """Return a hidden name next to `path` that nothing has yet."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.part{path.suffix}")


def remove_temporary(path: Path) -> None:
    """Remove what a killed process left of `temporary_file` or `temporary_folder` for `path`."""
    remove_all_temporary(path.parent, glob.escape(path.name))


def remove_all_temporary(folder: Path, pattern: str = "*") -> None:
    """Remove what killed processes left in `folder` of temporary files and folders for names that match `pattern`."""
    for name in glob.glob(f".{pattern}.????????.part*", root_dir=folder):
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            remove_if_unlocked(path)
        else:
            path.unlink(missing_ok=True)


def remove_if_unlocked(folder: Path) -> None:
    """Remove a temporary folder unless the process that made it is alive."""
    with contextlib.suppress(OSError):  # it is in use, another process removes it, or the file system has no locks
        if not os.listdir(folder):
            folder.rmdir()  # fails if its process, which has just made it, adds the lock
            return
        try:
            lock = os.open(folder / PLAN, os.O_RDWR | os.O_NOFOLLOW)
        except FileNotFoundError:  # a kill came while the folder was removed
            shutil.rmtree(folder, ignore_errors=True)
            return
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(lock)


# One file


def check_parent(path: str | os.PathLike[str]) -> None:
    """Refuse a path whose folder does not exist and cannot be created, or cannot be written.

    Raises:
        UserError: the message names the folder.
    """
    folder = Path(os.path.abspath(path)).parent
    nearest = next(one for one in [folder, *folder.parents] if os.path.lexists(one))
    if not nearest.is_dir():
        raise UserError(f"{os.fspath(path)} cannot be written: {nearest} is not a folder.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"{os.fspath(path)} cannot be written: no permission to write into {nearest}.")


def make_parent(path: str | os.PathLike[str]) -> None:
    """Create the folder of a path, and its parents.

    Raises:
        UserError: the folder cannot be created.
    """
    folder = os.path.dirname(os.path.abspath(path))
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        reason = f"cannot create folder {folder} ({error.strerror})"
        raise UserError(f"{os.fspath(path)} cannot be written: {reason}.") from error


def flush_to_disk(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, would survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def complete(file: Path) -> None:
    """Flush a finished file to disk and give it the mode that follows from the umask.

    Some libraries make files that only their owner can read. The folder is new, so its mode shows the umask.
    """
    mode = file.parent.stat().st_mode & 0o666
    if file.stat().st_mode & 0o777 != mode:
        file.chmod(mode)
    flush_to_disk(file)


def replace_file(path: Path, data: bytes) -> None:
    """Write a file, replacing an earlier one atomically.

    Raises:
        OSError: the file cannot be written. The message says how to resume.
    """
    try:
        with temporary_file(path) as temporary:
            temporary.write_bytes(data)
            flush_to_disk(temporary)
            os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"{path} cannot be written ({error.strerror or error}). {RESUME_HINT}") from error


def place_file(temporary: Path, path: Path) -> None:
    """Give a finished file its name, without ever replacing another file.

    Raises:
        FileExistsError: a file of this name already exists.
    """
    try:
        os.link(temporary, path)  # unlike renaming, this never replaces a file
    except FileExistsError:
        raise
    except OSError:  # the file system has no hard links
        if os.path.lexists(path):
            raise FileExistsError(str(path)) from None
        os.replace(temporary, path)


# Several files of a folder


@contextmanager
def replace_files(folder: str | os.PathLike[str], stale: Iterable[str] = ()) -> Iterator[Path]:
    """Yield a temporary folder whose files replace those in `folder` when the block ends: all of them, or none.

    If the process is killed, `folder` has the earlier files, or the new ones once `finish_replacing` has moved them.

    Args:
        folder: where the files go; created if necessary.
        stale: shell patterns. Earlier files whose name matches one are removed, unless they are replaced.

    Raises:
        OSError: the files cannot be written, or an earlier replacement cannot be finished.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    remove_temporary(folder / "saving")
    with temporary_folder(folder / "saving") as temporary:
        yield temporary
        complete_all(temporary)
        new = [name for name in os.listdir(temporary) if name != PLAN]
        (temporary / PLAN).write_text(json.dumps({"new": new, "stale": list(stale)}), encoding="utf-8")
        flush_to_disk(temporary / PLAN)
        while True:
            finish_replacing(folder)
            try:
                os.rename(temporary, folder / SAVED)
                break
            except OSError as error:  # another process was faster
                if error.errno not in OCCUPIED:
                    raise
        flush_to_disk(folder)
        move_files(folder / SAVED)


def finish_replacing(folder: str | os.PathLike[str]) -> None:
    """Finish a replacement by `replace_files` that was interrupted by a kill. Usually there is none.

    Raises:
        OSError: it cannot be finished, for example because the folder cannot be written.
    """
    saved = Path(folder, SAVED)
    for _ in range(ATTEMPTS):
        if not saved.is_dir() or saved.is_symlink():
            return
        try:
            lock = lock_file(saved / PLAN)  # waits for a process that is moving the files
        except FileNotFoundError:  # all files were moved
            with contextlib.suppress(OSError):  # another process has removed the folder, or made the next one
                saved.rmdir()
            continue
        except OSError as error:
            raise unfinished(saved, error) from error
        try:
            move_files(saved)
        finally:
            os.close(lock)
    raise unfinished(saved, "it has no plan")


def move_files(saved: Path) -> None:
    """Move the files of a replacement in place of the earlier ones. It can be interrupted and started again.

    All earlier files are removed before the first new one arrives. JSON files, which lead readers to the others, are
    removed first and moved last. So no reader, not even of another library, finds a mixture.
    """
    folder = saved.parent
    try:
        plan = json.loads((saved / PLAN).read_text(encoding="utf-8"))
        new = sorted((name for name in os.listdir(saved) if name != PLAN), key=reading_order)
        stale = [
            name
            for name in os.listdir(folder)
            if name not in plan["new"] and any(fnmatch.fnmatchcase(name, pattern) for pattern in plan["stale"])
        ]
        for name in sorted([*new, *stale], key=reading_order):
            remove(folder / name)
        for name in reversed(new):
            os.rename(saved / name, folder / name)
        (saved / PLAN).unlink()
        saved.rmdir()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise unfinished(saved, error) from error


def reading_order(name: str) -> tuple[bool, bool, str]:
    """Return the key of the order in which readers open files: the config, other JSON files, the rest."""
    return not name.endswith("config.json"), not name.endswith(".json"), name


def unfinished(saved: Path, error: object) -> OSError:
    """Return the error about a replacement that cannot be finished."""
    return OSError(
        f"{saved.parent} was being saved when the process was stopped, and its files cannot be moved out of "
        f"{saved.name} ({error}). Load it once with permission to write there, or save it again."
    )


def complete_all(folder: Path) -> None:
    """Flush a folder's files to disk and give them the mode that follows from the umask."""
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink() and path.name != PLAN:
            complete(path)
    flush_to_disk(folder)


# Folders


def check_new_folder(path: Path) -> None:
    """Refuse a path that already exists and is not an empty folder.

    Raises:
        FileExistsError: it exists.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} already exists. Nothing was written.")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` when the block ends, or is removed if it raises.

    It has the name of `path` already, inside a hidden folder next to it.

    Raises:
        FileExistsError: `path` already exists and is not an empty folder.
    """
    remove_temporary(path)
    check_new_folder(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(path) as temporary:
        folder = temporary / path.name
        folder.mkdir()
        yield folder
        complete_all(folder)
        try:
            os.rename(folder, path)
        except OSError as error:
            if error.errno in OCCUPIED:
                check_new_folder(path)
            raise


@contextmanager
def replace_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that replaces `path` when the block ends, or is removed if it raises."""
    remove_temporary(path)
    if path.is_dir() and any(path.iterdir()):
        with replace_files(path, ["[!.]*"]) as folder:
            yield folder
    else:
        with new_folder(path) as folder:
            yield folder


def remove_folder(path: Path) -> None:
    """Remove a folder, if it exists. It is renamed first, so that a half-removed one never has the name `path`."""
    removed = removed_name(path)
    shutil.rmtree(removed, ignore_errors=True)  # of an earlier process that was killed
    if path.exists():
        os.replace(path, removed)
        shutil.rmtree(removed, ignore_errors=True)


def removed_name(path: Path) -> Path:
    """Return the name that a folder has while it is removed."""
    return path.with_name(f".{path.name}.gone")


def remove(path: Path) -> None:
    """Remove a file, a link or a folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
