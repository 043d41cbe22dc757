"""The control groups of this process: what a container or a job of a scheduler may use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def control_groups(controller: str, root: Path = Path("/")) -> Iterator[tuple[int, Path]]:
    """The folders that may hold the limits of this process's group and of those above it, each with its version, 1 or
    2.

    In a container the path of its group may be one of the host; what can then be seen is the topmost folder, which is
    the container's own.

    Args:
        controller: "cpu" or "memory".
        root: the folder that has proc/ and sys/.
    """
    for line in lines_of(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        parts = PurePosixPath(path).parts[1:]
        if not controllers:
            version, mounts = 2, [root / "sys/fs/cgroup", root / "sys/fs/cgroup/unified"]
        elif controller in controllers.split(","):
            version, mounts = 1, [root / "sys/fs/cgroup" / name for name in dict.fromkeys((controllers, controller))]
        else:
            continue
        for mount in mounts:
            yield from ((version, mount.joinpath(*parts[:n])) for n in range(len(parts) + 1))


def lines_of(path: Path) -> list[str]:
    """The lines of a file; none where it is missing or must not be read."""
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []
