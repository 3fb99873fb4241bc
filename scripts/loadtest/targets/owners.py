"""Which processes of this machine are a server: by its pid, or by the port it listens on.

*Process*: the parent. *Invariant*: nothing here raises; a server elsewhere, or another user's, has
no processes that could be measured, and the results then say nothing of its CPU.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable

import psutil

from scripts.loadtest.targets.base import ServerProcess

NODE_TITLE = "kamacache-node"


def node_processes(pid: int) -> list[ServerProcess]:
    """Return a node's supervisor and its roles."""
    try:
        supervisor = psutil.Process(pid)
        return [
            ServerProcess(_role(process), process)
            for process in (supervisor, *supervisor.children(recursive=True))
        ]
    except psutil.Error:
        return []


def server_process(pid: int, role: str, words: Iterable[str]) -> list[ServerProcess]:
    """Return the process of this pid, if its name has one of these words.

    A server of another machine, or pid namespace, tells a pid that is someone else's here.
    """
    try:
        process = psutil.Process(pid)
        name = process.name()
    except (psutil.Error, ValueError):
        return []
    return [ServerProcess(role, process)] if any(word in name for word in words) else []


def listeners(addresses: Iterable[tuple[str, int]]) -> list[ServerProcess]:
    """Return the nodes (all their processes) that listen on these addresses of this machine."""
    ports = {port for host, port in addresses if _is_here(host)}
    if not ports:
        return []
    try:
        connections = psutil.net_connections(kind="tcp")
    except (psutil.Error, OSError):
        return []
    pids = {
        connection.pid
        for connection in connections
        if connection.status == psutil.CONN_LISTEN
        and connection.laddr
        and connection.laddr.port in ports
        and connection.pid
    }
    found: dict[int, ServerProcess] = {}
    for pid in pids:
        for process in node_processes(_top_of_node(pid)):
            found[process.process.pid] = process
    return sorted(found.values(), key=lambda one: (one.role, one.process.pid))


def _top_of_node(pid: int) -> int:
    """Return the supervisor of the node that a process belongs to; itself where it is of none."""
    try:
        process = psutil.Process(pid)
        while (parent := process.parent()) is not None and _is_of_node(parent):
            process = parent
    except psutil.Error:
        return pid
    return process.pid


def _is_of_node(process: psutil.Process) -> bool:
    return process.cmdline()[:1] != [] and process.cmdline()[0].startswith(NODE_TITLE)


def _role(process: psutil.Process) -> str:
    """Return what a process of a node calls itself: supervisor, worker 0, front 0, http 0."""
    try:
        title = (process.cmdline() or [process.name()])[0]
    except psutil.Error:
        return "ended"
    if not title.startswith(NODE_TITLE):
        return process.name()
    return title.removeprefix(f"{NODE_TITLE}:").strip().partition(" [")[0] or "node"


def _is_here(host: str) -> bool:
    try:
        addresses = {info[4][0] for info in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    own = {
        address.address.partition("%")[0]
        for several in psutil.net_if_addrs().values()
        for address in several
    }
    return any(
        ipaddress.ip_address(str(address).partition("%")[0]).is_loopback or address in own
        for address in addresses
    )
