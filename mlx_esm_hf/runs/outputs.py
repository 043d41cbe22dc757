"""The output files of a job: checked before the work, made from shards when it is done."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlx_esm_hf.checks import suggestion
from mlx_esm_hf.errors import UserError
from mlx_esm_hf.runs.lock import locked
from mlx_esm_hf.runs.manifest import MANIFEST, manifest_of, read_manifest, refuse_another
from mlx_esm_hf.runtime import distributed
from mlx_esm_hf.runtime.files import (
    Write,
    check_parent,
    complete,
    make_parent,
    place_file,
    remove_folder,
    remove_temporary,
    removed_name,
    replace_file,
    temporary_folder,
)

PICTURES = (".png", ".svg", ".pdf")
# {suffix: the library that writes such files, and the extra that installs it}
LIBRARIES = {
    ".h5": ("h5py", "hdf5"),
    ".parquet": ("pyarrow", "parquet"),
    **dict.fromkeys(PICTURES, ("matplotlib", "plots")),
    ".cif": ("modelcif", "fold"),
}

WRITTEN = "written.json"  # in the folder of shards: the files that were made from them, and their identity


def check_outputs(
    output: str | os.PathLike[str] | None, suffixes: Iterable[str], *others: str | os.PathLike[str] | None
) -> None:
    """Refuse outputs that cannot be written, before a model is loaded.

    Args:
        output: a file, or a folder of shards; None for none.
        suffixes: the suffixes that the job can write; "" is a folder of shards.
        others: files to write besides the output.

    Raises:
        UserError: the suffix is unknown, a library is not installed, a folder cannot be created or written, a file
            already exists, the folder of shards contains something else, or another process is writing it.
    """
    paths = [Path(other) for other in others if other is not None]
    if output is not None:
        path = Path(output)
        if path.suffix not in suffixes:
            *known, last = (suffix for suffix in suffixes if suffix)
            choices = f"{', '.join(known)} or {last}" if known else last
            folder = ", or a name without a suffix for a folder" if "" in suffixes else ""
            what = f"`{path.suffix}`" if path.suffix else "a folder"
            hint = suggestion(path.suffix, known + [last]) if path.suffix else ""
            raise UserError(f"Can't write {what}. Use {choices}{folder}.{hint}")
        check_writable(path)
        with locked(path):  # also removes the lock file of a process that was killed at its end
            remove_gone(shards_of(path))
        if "" in suffixes:  # otherwise the folder of shards contains a run for each model
            distributed.on_rank_0(lambda: refuse_occupied(shards_of(path) if path.suffix else path))
        if path.suffix:
            paths.append(path)
    for path in paths:
        check_writable(path)
        if paths.count(path) > 1:
            raise UserError(f"{path} would be written twice. Choose another name for one of the files.")
    refuse_existing(paths, None if output is None else shards_of(output))


def refuse_existing(paths: Iterable[Path], shards: Path | None) -> None:
    """Refuse paths that already exist, so that nothing is ever overwritten.

    Args:
        paths: the files to be made.
        shards: the shards that they are made from. Files that an earlier process made from them are accepted.

    Raises:
        UserError: a path already exists, or the folder of shards is a link.
    """
    if shards is not None and shards.is_symlink():
        raise UserError(f"{shards} is a link, but must be a folder. Remove it.")
    written = {} if shards is None else read_written(shards)
    for path in paths:
        if os.path.lexists(path) and not is_written(path, written):
            if shards is not None and shards.exists():
                raise UserError(
                    f"{path} already exists, but {shards} is not finished. Move the file away and run again."
                )
            raise UserError(f"{path} already exists. Choose another output, or remove it.")


def refuse_occupied(folder: Path) -> None:
    """Refuse a folder of shards that contains something else.

    Raises:
        UserError: the path is a file, or a folder without a manifest in which there is anything but temporary files.
    """
    if not folder.exists() or (folder / MANIFEST).exists():
        return
    if not folder.is_dir() or any(".part" not in name for name in os.listdir(folder)):
        raise UserError(f"{folder} already exists and is not a run. Choose another output, or remove it.")


@contextmanager
def claimed(output: Path | None, others: Iterable[Path] = ()) -> Iterator[None]:
    """Lock these outputs for the duration of the block.

    Args:
        output: a file, or a folder of shards; None for none.
        others: files to write besides the output.

    Raises:
        UserError: another process is writing them, or has just written them.
    """
    if output is None:
        yield
        return
    paths = [*others, output] if output.suffix else []
    with locked(output):
        distributed.on_rank_0(lambda: refuse_existing(paths, shards_of(output)))
        yield


def check_picture(path: str | os.PathLike[str] | None) -> None:
    """Refuse a picture whose suffix is unknown.

    Raises:
        UserError: the suffix is not one of `PICTURES`.
    """
    suffix = "" if path is None else os.path.splitext(path)[1]
    if path is not None and suffix not in PICTURES:
        *known, last = PICTURES
        raise UserError(
            f"{os.fspath(path)}: can't draw {f'`{suffix}`' if suffix else 'a picture without a suffix'}. "
            f"Use {', '.join(known)} or {last}.{suggestion(suffix, PICTURES)}"
        )


def check_writable(path: str | os.PathLike[str]) -> None:
    """Refuse a path that cannot be written, or whose format needs a library that is not installed.

    Raises:
        UserError: the folder cannot be created or written, or the library is not installed.
    """
    check_parent(path)
    check_library(path)


def check_library(path: str | os.PathLike[str]) -> None:
    """Refuse a path whose format needs a library that is not installed.

    Raises:
        UserError: the library is not installed.
    """
    module, extra = LIBRARIES.get(os.path.splitext(path)[1], ("", ""))
    if module and importlib.util.find_spec(module) is None:
        raise UserError(f"{os.fspath(path)} needs {module}: pip install 'mlx-esm-hf[{extra}]'.")


def shards_of(output: str | os.PathLike[str]) -> Path:
    """Return the folder of the shards that a file is made from."""
    return Path(f"{os.fspath(output)}.shards")


def earlier_settings(output: str | os.PathLike[str] | None) -> dict[str, Any]:
    """Return the settings of a run that was started on this output; empty if there is none."""
    if output is None:
        return {}
    for folder in (Path(output), shards_of(output)):
        if (folder / MANIFEST).exists():
            return read_manifest(folder)["settings"]
    return {}


def refuse_other_run(
    output: str | os.PathLike[str] | None, command: str, settings: dict[str, Any], source: dict[str, str]
) -> None:
    """Refuse an output on which a run with other settings or input was started, before the model is loaded.

    Args:
        output: a file, or a folder of shards; None for none.
        command: name of the job.
        settings: the settings that are known so far.
        source: the description of the input.

    Raises:
        UserError: see `refuse_another`.
    """
    if output is None:
        return
    folder = shards_of(output) if Path(output).suffix else Path(output)
    if (folder / MANIFEST).exists():
        refuse_another(folder, read_manifest(folder), manifest_of(command, settings, source))


def write_files(files: Mapping[Path, Write], shards: Path) -> None:
    """Write the files that do not exist yet, then remove the shards that they are made from.

    Args:
        files: {path: function that writes it}.
        shards: the folder of shards.

    Raises:
        UserError: another file of this name has appeared in the meantime.
        OSError: a file cannot be written.
    """
    written = read_written(shards)

    def remember(path: Path, part: Path) -> None:
        written[os.path.abspath(path)] = identity(part)
        replace_file(shards / WRITTEN, json.dumps(written).encode())

    for path, write in files.items():
        if is_written(path, written):
            remove_temporary(path)  # left, as a second link to this file, if a kill came right after `place_file`
        else:
            write_new(path, write, remember)
    remove_folder(shards)


def write_new(path: Path, write: Write, remember: Callable[[Path, Path], None] | None = None) -> None:
    """Write a file that does not exist yet, atomically.

    Args:
        path: the file.
        write: writes it. The file exists, and is empty.
        remember: called with the path and the finished temporary file, before it gets its name.

    Raises:
        UserError: a file of this name already exists.
        OSError: the file cannot be written.
    """
    make_parent(path)
    remove_temporary(path)
    try:
        with temporary_folder(path) as folder:
            part = folder / path.name
            part.touch()
            write(part)
            complete(part)
            if remember is not None:
                remember(path, part)
            place_file(part, path)
    except FileExistsError:
        raise UserError(f"{path} was created while this command ran. Move it away and run again.") from None
    except OSError as error:
        raise OSError(f"{path} cannot be written ({error}). Run the same command again to continue.") from error


def read_written(shards: Path) -> dict[str, list[int]]:
    """Read {path: identity} of the files that were made from these shards."""
    try:
        written = json.loads((shards / WRITTEN).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    return written if isinstance(written, dict) else {}


def is_written(path: Path, written: Mapping[str, list[int]]) -> bool:
    """Return whether the file at a path is the one that was made from the shards."""
    return path.exists() and identity(path) == written.get(os.path.abspath(path))


def identity(path: Path) -> list[int]:
    """Return what identifies a file, even after it is renamed."""
    found = path.stat()
    return [found.st_ino, found.st_size, found.st_mtime_ns]


def remove_gone(shards: Path) -> None:
    """Remove what a killed process left of a folder of shards that it was removing."""
    shutil.rmtree(removed_name(shards), ignore_errors=True)
