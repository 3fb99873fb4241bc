"""Is there room for the shared memory? Asked before any of it is reserved.

*Process*: the supervisor. `posix_fallocate` alone is not enough: on tmpfs it charges the pages to
the cgroup at once, and a memory.max below the size gets the node killed by the kernel instead of
a sentence. Both versions of cgroups are read, with all parents, as far as they are mounted here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from kamacache.node.exits import NodeEndError, bad_config
from kamacache.rundir.context import EXIT_ROLE


class CgroupLimit(NamedTuple):
    """The memory bound of one cgroup: its folder, the bound, and what cannot be reclaimed of it."""

    folder: Path
    limit_bytes: int
    used_bytes: int


def check_space(shm_root: Path, required_bytes: int, *, proc: Path = Path("/proc")) -> None:
    """Raise `NodeEndError` with the remedy where the bytes do not fit under ``shm_root``."""
    try:
        found = os.statvfs(shm_root)
    except OSError as error:
        raise bad_config(
            f"the shared-memory folder {shm_root} cannot be used: {error.strerror}; "
            "mount a tmpfs there, or name another with --shm-dir",
        ) from error
    free = found.f_bavail * found.f_frsize
    if required_bytes > free:
        raise NodeEndError(
            EXIT_ROLE,
            f"the groups need {mib(required_bytes)} of shared memory, and {shm_root} has "
            f"{mib(free)} free of {mib(found.f_blocks * found.f_frsize)}; make the groups smaller "
            "or the folder larger (Docker: --shm-size=1g; otherwise: mount -o remount,size=1g "
            f"{shm_root}), or name another folder with --shm-dir",
        )
    for limit in cgroup_limits(proc):
        if required_bytes > limit.limit_bytes - limit.used_bytes:
            raise NodeEndError(
                EXIT_ROLE,
                f"the groups need {mib(required_bytes)} of shared memory, and the memory limit of "
                f"this process's cgroup leaves {mib(max(limit.limit_bytes - limit.used_bytes, 0))} "
                f"({mib(limit.limit_bytes)} in {limit.folder}); make the groups smaller or the "
                "limit larger (Docker: --memory, systemd: MemoryMax=, Kubernetes: limits.memory)",
            )


def mib(count: int) -> str:
    """Return bytes as text for people."""
    if count < 1 << 20:
        return f"{count / 1024:.1f} KiB"
    return f"{count / (1 << 20):.1f} MiB" if count < 1 << 30 else f"{count / (1 << 30):.2f} GiB"


def cgroup_limits(proc: Path = Path("/proc")) -> Iterator[CgroupLimit]:
    """Yield every memory bound that this process stands under."""
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        return
    mounts = list(_mounts(proc))
    for line in lines:
        _, controllers, path = line.split(":", 2)
        for mount in mounts:
            if controllers == "" and mount.kind == "cgroup2":
                names = ("memory.max", ("anon", "shmem"))
            elif (
                "memory" in controllers.split(",")
                and mount.kind == "cgroup"
                and "memory" in mount.options
            ):
                names = ("memory.limit_in_bytes", ("total_rss", "total_shmem"))
            else:
                continue
            yield from _limits_upwards(mount, path, *names)


class _Mount(NamedTuple):
    root: str
    point: str
    kind: str
    options: list[str]


def _mounts(proc: Path) -> Iterator[_Mount]:
    """Yield /proc/self/mountinfo: see proc_pid_mountinfo(5)."""
    try:
        text = (proc / "self/mountinfo").read_text()
    except OSError:
        return
    for line in text.splitlines():
        before, _, after = line.partition(" - ")
        root, point = before.split()[3:5]
        kind, _, options = after.split(" ", 2)
        yield _Mount(root, point.replace("\\040", " "), kind, options.split(","))


def _limits_upwards(
    mount: _Mount, path: str, limit_name: str, used_names: tuple[str, ...]
) -> Iterator[CgroupLimit]:
    # In a container without a cgroup namespace the path counts from the host's root, and the
    # mount shows the container's own cgroup as its root.
    inside = path.removeprefix(mount.root) if mount.root != "/" else path
    folder = Path(mount.point + "/" + inside.strip("/"))
    if not folder.is_dir():
        folder = Path(mount.point)
    top = Path(mount.point)
    while True:
        limit = _number(folder / limit_name)
        if limit is not None:
            yield CgroupLimit(folder, limit, _used(folder / "memory.stat", used_names))
        if folder == top or top not in folder.parents:
            return
        folder = folder.parent


def _number(path: Path) -> int | None:
    """Return the bound in a file; None for "max", for a missing file, and for v1's "unlimited"."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() and int(text) < 1 << 62 else None


def _used(path: Path, names: tuple[str, ...]) -> int:
    """Return the memory that the kernel cannot drop: not the page cache of files."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    values = dict(line.split(" ", 1) for line in lines if " " in line)
    return sum(int(values.get(name, 0)) for name in names)
