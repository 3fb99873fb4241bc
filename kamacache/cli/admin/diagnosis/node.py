"""Checks of the node of a run directory: does it serve, may one attach, what went wrong in it."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import kamacache
from kamacache.cli.admin.diagnosis import Finding, failed, ok, warning
from kamacache.cli.admin.diagnosis.host import check_files_limit
from kamacache.errors import KamaCacheError, NodeUnavailableError, StorageError
from kamacache.local.mapping import NodeMapping
from kamacache.local.snapshot import NodeSnapshot, RoleInfo
from kamacache.rundir.description import NodeDescription, read_boot_id
from kamacache.rundir.layout import RunDir, SupervisorLock
from kamacache.store import required_bytes
from kamacache.store.layout import H_STAMP

PORT_S: Final = 2.0  # for a port to be connected to
CLOCK_AHEAD_S: Final = 1.0  # of the latest version that was seen, before this host's clock
FILES_SHARE_MAX: Final = 0.8
QUIET_S: Final = 10.0  # since a worker's shards were seen to last

Asked = Iterator[Finding]


def needed_bytes(about: NodeDescription) -> int:
    """Return the shared memory that the node's groups take."""
    return sum([required_bytes(spec, about.workers) for spec in about.groups])


def check_version(about: NodeDescription) -> Finding:
    """Compare the node's version with the library's here."""
    detail = f"the node {about.version}, this library {kamacache.__version__}"
    if about.version != kamacache.__version__:
        return failed(
            "version",
            detail,
            "use one version on both sides: restart the node or the programs with the other one",
        )
    return ok("version", detail)


def check_serving(run_dir: RunDir, about: NodeDescription) -> Finding:
    """Say whether the node that is described lives and serves."""
    if about.boot_id != read_boot_id():
        return failed(
            "node",
            f"{run_dir.description_path} describes a node from before the last boot",
            "start the node; it removes what the old one left",
        )
    try:
        holder = SupervisorLock.holder(run_dir)
    except OSError:  # another user's: whether it serves says enough
        holder = about.pid
    if holder is None:
        return failed(
            "node",
            f"node.json names pid {about.pid}, but no process holds the run directory's lock: the "
            "node was killed",
            "start the node; it removes what the old one left",
        )
    try:
        mapping = NodeMapping(about)
    except NodeUnavailableError as error:
        return failed("node", str(error), "restart the node")
    try:
        if not mapping.serving:
            return failed(
                "node",
                f"the supervisor (pid {about.pid}) has not let memory be read for more than 2 s: "
                "it stands still, or the node is ending",
                "look at its log; if it is stopped (state T in ps) let it go on, or restart it",
            )
        return ok("node", f"{about.name or run_dir.path} serves, pid {about.pid}")
    finally:
        mapping.close()


def check_attaching(about: NodeDescription) -> Asked:
    """Yield whether this user may use the shards and the sockets."""
    try:
        mapping = NodeMapping(about)
        try:
            for spec in about.groups:
                mapping.arenas(spec.name)
        finally:
            mapping.close()
        yield ok("shards", f"{len(about.groups)} groups of {about.workers} shards can be mapped")
    except (StorageError, KamaCacheError, OSError) as error:
        yield failed(
            "shards",
            f"they cannot be mapped: {error}",
            "run as the node's user, or start it with --socket-group and be in that group",
        )
    missing, refused = [], []
    for worker in range(about.workers):
        path = about.socket_path(worker)
        if not os.path.exists(path):
            missing.append(str(worker))
        elif not os.access(path, os.W_OK):
            refused.append(str(worker))
    if missing:
        yield failed(
            "sockets",
            f"no socket of worker {', '.join(missing[:8])} in {about.sockets_dir}",
            "the worker does not run, or something removed it: restart the node",
        )
    elif refused:
        mode = os.stat(about.socket_path(int(refused[0])))
        yield failed(
            "sockets",
            f"this user (uid {os.geteuid()}) may not connect to worker {', '.join(refused[:8])}: "
            f"uid {mode.st_uid}, gid {mode.st_gid}, mode {mode.st_mode & 0o777:04o}",
            "run as the node's user, or start it with --socket-group and be in that group",
        )
    else:
        yield ok("sockets", f"{about.workers} in {about.sockets_dir}")


def snapshot_checks(snapshot: NodeSnapshot) -> Asked:
    """Yield what its processes tell."""
    yield _state(snapshot)
    yield _workers(snapshot)
    restarted = [f"{_name(role)}: {role.restarts}" for role in snapshot.roles if role.restarts]
    if restarted:
        yield warning(
            "restarts",
            f"processes died and were started again: {', '.join(restarted[:8])}",
            "its log says with which exit code (-9 is the kernel's OOM killer, 75 hung getters)",
        )
    else:
        yield ok("restarts", "none")
    hung = sum([worker.getters_hung for worker in snapshot.workers])
    if hung:
        yield warning(
            "getters",
            f"{hung} calls hang beyond load_timeout",
            "give the database calls of the getters a timeout of their own",
        )
    refused = sum([worker.connections_refused for worker in snapshot.workers])
    if refused:
        yield warning(
            "connections",
            f"{refused} were refused, since a worker had all that it takes",
            "fewer threads or event loops that attach, or more --workers",
        )
    yield from _files(snapshot.roles)


def _state(snapshot: NodeSnapshot) -> Finding:
    node = snapshot.node
    detail = f"{node.state}, {node.workers} workers, {node.fronts} fronts"
    if node.state == "ready" and all(role.ready for role in snapshot.roles):
        return ok("roles", detail)
    missing = [_name(role) for role in snapshot.roles if not role.ready]
    return warning(
        "roles",
        f"{detail}; not ready: {', '.join(missing[:8]) or 'none'}",
        "wait for it; if it lasts, its log says what fails",
    )


def _workers(snapshot: NodeSnapshot) -> Finding:
    silent = [str(worker.index) for worker in snapshot.workers if not worker.answered]
    late = [
        str(worker.index)
        for worker in snapshot.workers
        if worker.heartbeat_age_s is not None and worker.heartbeat_age_s > QUIET_S
    ]
    if silent or late:
        which = ", ".join(sorted({*silent, *late})[:8])
        return failed(
            "workers",
            f"worker {which} does not answer: its loop hangs, or it is being started",
            "an async getter that blocks does this; the supervisor replaces a worker that answers "
            "no ping for a minute",
        )
    slowest = max([worker.answer_s for worker in snapshot.workers], default=0.0)
    return ok("workers", f"all answered, the slowest within {slowest * 1000:.0f} ms")


def _files(roles: list[RoleInfo]) -> Asked:
    """Yield how many files the processes have open of those that they may."""
    limits = [(role, limit) for role in roles if (limit := _limit_of(role.pid)) is not None]
    if not limits:
        return
    full = [
        f"{_name(role)}: {role.open_files:,} of {limit:,}"
        for role, limit in limits
        if role.open_files is not None and 0 <= limit * FILES_SHARE_MAX < role.open_files
    ]
    if full:
        yield failed(
            "open files of the node",
            ", ".join(full[:8]),
            "raise it before connections are refused (systemd: LimitNOFILE=)",
        )
        return
    found = check_files_limit(min(limit for _, limit in limits), whose="the node's processes")
    found.check = "open files of the node"
    yield found


def _limit_of(pid: int) -> int | None:
    """Return a process's RLIMIT_NOFILE; None where it cannot be read or has none."""
    try:
        lines = Path(f"/proc/{pid}/limits").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("Max open files"):
            soft = line.split()[3]
            return int(soft) if soft.isdecimal() else None
    return None


def _name(role: RoleInfo) -> str:
    return role.role if role.role == "supervisor" else f"{role.role} {role.index}"


def check_versions_clock(mapping: NodeMapping) -> Finding:
    """Compare the latest version that any shard has seen, from whatever node, with the clock."""
    latest_ns = 0
    for spec in mapping.description.groups:
        for arena in mapping.arenas(spec.name):
            latest_ns = max(latest_ns, arena.words[H_STAMP])
    ahead_s = latest_ns / 1e9 - time.time()
    if ahead_s > CLOCK_AHEAD_S:
        return warning(
            "versions",
            f"the latest write seen is {ahead_s:.1f} s ahead of this host's clock: a node's clock "
            "is ahead, or this one was set back",
            "run NTP on every node; until the clock has come so far, versions only count up",
        )
    return ok("versions", "no write is ahead of this host's clock")


def check_ports(about: NodeDescription) -> Asked:
    """Yield whether what the node listens on can be connected to from this host."""
    for check, address in (("grpc port", about.listen), ("http port", about.api)):
        if address is None:
            continue
        host, _, port = address.rpartition(":")
        host = host.strip("[]")
        target = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        try:
            socket.create_connection((target, int(port)), PORT_S).close()
        except OSError as error:
            yield failed(
                check,
                f"{address} cannot be connected to: {error.strerror or error}",
                "is its process ready? does a firewall drop it?",
            )
        else:
            yield ok(check, f"{address} takes connections")
