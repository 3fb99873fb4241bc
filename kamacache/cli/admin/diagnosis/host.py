"""Checks of the host, which need no node: platform, shared memory, limits, clock, left-overs."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from kamacache.cli.admin.diagnosis import Finding, failed, ok, warning
from kamacache.cluster.environment import GRPC_ENVIRONMENT
from kamacache.errors import NodeUnavailableError
from kamacache.limits import CONNECTIONS_MAX
from kamacache.local.mapping import DIRECT_READS
from kamacache.node.space import cgroup_limits, mib
from kamacache.rundir.control import ControlReader
from kamacache.rundir.kept import read_note
from kamacache.rundir.layout import EPOCH_NAME, RunDir
from kamacache.store.arena import is_tmpfs

DOCKER_SHM_BYTES: Final = 64 << 20  # of /dev/shm in a container that was told nothing
FREE_SHARE_MIN: Final = 0.05
FILES_BESIDE_CONNECTIONS: Final = 256  # that a worker has open
STA_UNSYNC: Final = 0x40  # adjtimex(2)
TIMEX_BYTES: Final = 512  # struct timex and then some

Asked = Iterator[Finding]


def host_checks(shm_root: str, run_dir: RunDir, *, needed_bytes: int = 0) -> Asked:
    """Yield what the host is like; ``needed_bytes`` are those that a start would still need."""
    yield check_platform(sys.platform, platform.machine())
    yield check_shared_memory(shm_root, needed_bytes)
    yield check_memory_limit(needed_bytes)
    yield check_files_limit(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    yield check_run_dir(run_dir)
    yield check_grpc_environment(os.environ)
    yield check_time_service()
    yield from check_left_overs(Path(shm_root), run_dir)


def check_platform(system: str, machine: str) -> Finding:
    """Say whether a node runs here, and whether memory may be read directly."""
    detail = f"{system} {platform.release()}, {machine}, Python {platform.python_version()}"
    if system != "linux":
        return failed("platform", detail, "a node runs on Linux alone; use the remote client here")
    if not DIRECT_READS or machine not in ("x86_64", "AMD64"):
        return warning(
            "platform",
            f"{detail}: its memory order is not known to be enough, every get asks a worker",
            "use x86-64 where hits must be read from shared memory",
        )
    return ok("platform", detail)


def check_shared_memory(shm_root: str, needed_bytes: int) -> Finding:
    """Say what the folder of the shards is, and whether it has room."""
    try:
        found = os.statvfs(shm_root)
    except OSError as error:
        return failed(
            "shared memory",
            f"{shm_root} cannot be used: {error.strerror}",
            "mount a tmpfs there, or give the node another folder with --shm-dir",
        )
    free, total = found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize
    detail = f"{shm_root}: {mib(free)} free of {mib(total)}"
    if needed_bytes:
        detail += f", {mib(needed_bytes)} needed"
    larger = f"mount -o remount,size=SIZE {shm_root} (Docker: --shm-size, compose: shm_size)"
    if needed_bytes > free:
        return failed("shared memory", detail, f"make it larger: {larger}")
    if not is_tmpfs(shm_root):
        return warning(
            "shared memory",
            f"{detail}; it is not on tmpfs, so that pages are written to a disk",
            "use a folder on tmpfs, such as /dev/shm",
        )
    if total == DOCKER_SHM_BYTES:
        return warning(
            "shared memory",
            f"{detail}: what a container has by default",
            f"groups of more need it larger: {larger}; Kubernetes: an emptyDir of medium Memory",
        )
    if free < total * FREE_SHARE_MIN:
        return warning("shared memory", detail, f"it is nearly full; make it larger: {larger}")
    return ok("shared memory", detail)


def check_memory_limit(needed_bytes: int, proc: Path = Path("/proc")) -> Finding:
    """Say what bounds of memory there are above this process; shards count against them."""
    limits = list(cgroup_limits(proc))
    if not limits:
        return ok("memory limit", "no cgroup of this process limits memory")
    least = min(limits, key=lambda limit: limit.limit_bytes - limit.used_bytes)
    left = max(0, least.limit_bytes - least.used_bytes)
    detail = f"{mib(left)} left of {mib(least.limit_bytes)} in {least.folder}"
    remedy = "raise it (Docker: --memory, systemd: MemoryMax=, Kubernetes: limits.memory)"
    if needed_bytes > left:
        return failed("memory limit", f"{detail}, {mib(needed_bytes)} needed", remedy)
    if left < least.limit_bytes * FREE_SHARE_MIN:
        return warning("memory limit", detail, f"shards count against it: {remedy}")
    return ok("memory limit", detail)


def check_files_limit(soft: int, *, whose: str = "this shell") -> Finding:
    """Compare RLIMIT_NOFILE with the connections that a worker takes."""
    wanted = CONNECTIONS_MAX + FILES_BESIDE_CONNECTIONS
    detail = f"{whose}: {'no limit' if soft < 0 else f'{soft:,}'} open files"
    if 0 <= soft < wanted:
        return warning(
            "open files",
            f"{detail}; a worker takes {CONNECTIONS_MAX:,} connections",
            f"raise it to {wanted:,} or more (systemd: LimitNOFILE=, shells: ulimit -n), unless "
            "few processes attach",
        )
    return ok("open files", detail)


def check_run_dir(run_dir: RunDir) -> Finding:
    """Say whose the run directory is, and who may enter it."""
    path = run_dir.path
    try:
        about = os.stat(path)
    except FileNotFoundError:
        return ok("run directory", f"{path} is not there yet; a node makes it")
    except OSError as error:
        return failed(
            "run directory",
            f"{path} cannot be looked at: {error.strerror}",
            "run this as the node's user, or as one of its --socket-group",
        )
    mode = about.st_mode & 0o777
    detail = f"{path}: uid {about.st_uid}, gid {about.st_gid}, mode {mode:04o}"
    if mode & 0o007:
        return failed(
            "run directory", f"{detail}: every user of the host may enter it", f"chmod o= {path}"
        )
    if mode & 0o020:
        return failed(
            "run directory", f"{detail}: its group may replace its files", f"chmod g-w {path}"
        )
    if not os.access(path, os.R_OK | os.X_OK):
        return failed(
            "run directory",
            f"{detail}: this user (uid {os.geteuid()}) may not enter it",
            "run as the node's user, or start the node with --socket-group and be in that group",
        )
    return ok("run directory", detail)


def check_grpc_environment(environment: Mapping[str, str], *, check: str = "grpc") -> Finding:
    """Say whether grpc is set as it was measured to be fastest."""
    name = "GRPC_EXPERIMENTS"
    found = environment.get(name)
    if found is None or found == GRPC_ENVIRONMENT[name]:
        return ok(check, f"{name}={GRPC_ENVIRONMENT[name]}, as KamaCache sets it")
    return warning(
        check,
        f"{name}={found!r} is set in the environment and left as it is",
        f"unset it, unless it is meant; measured fastest: {GRPC_ENVIRONMENT[name]}",
    )


def check_time_service() -> Finding:
    """Say whether the kernel's clock is kept right, and for how long the host slept."""
    slept_s = time.clock_gettime(time.CLOCK_BOOTTIME) - time.clock_gettime(time.CLOCK_MONOTONIC)
    slept = f"; the host slept for {slept_s:.0f} s since its boot" if slept_s > 1 else ""
    synchronized = _clock_synchronized()
    if synchronized is None:
        return ok("clock", f"whether it is synchronized cannot be read here{slept}")
    if synchronized:
        return ok("clock", f"the kernel's clock is synchronized{slept}")
    return warning(
        "clock",
        f"nothing keeps the kernel's clock synchronized{slept}",
        "run an NTP client (chrony, systemd-timesyncd) on every node of a cluster: the write of "
        "the later clock wins",
    )


def _clock_synchronized() -> bool | None:
    """Ask adjtimex(2), which changes nothing where no mode is set; None: it does not say."""
    timex = ctypes.create_string_buffer(TIMEX_BYTES)
    try:
        state = ctypes.CDLL(None, use_errno=True).adjtimex(timex)
    except (OSError, AttributeError):
        return None
    if state < 0:
        return None
    # unsigned modes, then offset, freq, maxerror, esterror as longs, then int status
    at = 5 * ctypes.sizeof(ctypes.c_long)
    status = int.from_bytes(timex.raw[at : at + 4], sys.byteorder)
    return not status & STA_UNSYNC


def check_left_overs(shm_root: Path, run_dir: RunDir) -> Asked:
    """Yield what lies in shared memory though no node serves it."""
    bases = sorted(shm_root.glob(f"kamacache-{os.geteuid()}-*"))
    own = run_dir.shm_base(shm_root)
    kept, stale = [], []
    for base in bases:
        for folder in sorted(base.glob("*")):
            if not EPOCH_NAME.fullmatch(folder.name) or _serves(folder):
                continue
            about = f"{folder} ({mib(_bytes_of(folder))})"
            note = read_note(folder)
            if note is None:
                stale.append(about)
            elif base == own:
                kept.append(f"{about}, of {note.name or 'a node'}, kept for its next start")
            else:
                kept.append(about)
    if stale:
        yield warning(
            "left-overs",
            f"of nodes that crashed: {', '.join(stale[:4])}"
            + f" and {len(stale) - 4} more" * (len(stale) > 4),
            "start a node with that run directory, which removes it; or remove the folder",
        )
    if kept:
        yield warning(
            "kept shards",
            f"of nodes that stopped: {', '.join(kept[:4])}"
            + f" and {len(kept) - 4} more" * (len(kept) > 4),
            "start the node again; if it is not to come back, remove the folder",
        )
    if not stale and not kept:
        yield ok("left-overs", f"none in {shm_root}")


def _serves(folder: Path) -> bool:
    try:
        control = ControlReader(folder / "control")
    except NodeUnavailableError:
        return False
    try:
        return control.serving
    finally:
        control.close()


def _bytes_of(folder: Path) -> int:
    total = 0
    try:
        for entry in os.scandir(folder):
            total += entry.stat(follow_symlinks=False).st_blocks * 512
    except OSError:
        return total
    return total
