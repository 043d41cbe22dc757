"""The control groups of this process: the limits of its container or scheduler job."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def control_groups(controller: str, root: Path = Path("/")) -> Iterator[tuple[int, Path]]:
    """Yield the folders that may hold the limits of this process's group and its parents, with their cgroup version.

    In a container, /proc may give the group's path on the host. Then only the topmost folder exists, and it is the
    container's own.

    Args:
        controller: "cpu" or "memory".
        root: the folder that holds proc/ and sys/.

    Yields:
        (1 or 2, folder). The folder need not exist.
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
    """Return the lines of a file; none if it does not exist or cannot be read."""
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []
