"""The order in which a node's roles end; real processes and sockets, the clock is the test's."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator

import pytest

from kamacache.limits import DRAIN_TIMEOUT_S
from kamacache.node.children import Child
from kamacache.node.stopping import AT_ONCE_GRACE_S, DRAIN_MARGIN_S, LEAVE_TIMEOUT_S, Stopping
from kamacache.rundir.context import Role


class Roles:
    """Children whose processes sleep, and the roles' ends of their words."""

    def __init__(self) -> None:
        self.children: list[Child] = []
        self.ends: dict[str, socket.socket] = {}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def add(self, role: Role, index: int) -> Child:
        ours, its = socket.socketpair()
        ours.setblocking(False)
        its.setblocking(False)
        child = Child(role=role, index=index)
        process = subprocess.Popen(["sleep", "60"])
        child.forked(process.pid, ours.detach(), 60.0)
        child.ready = True
        self.children.append(child)
        self.ends[child.name], self.processes[child.name] = its, process
        return child

    def words(self, name: str) -> list[str]:
        try:
            return self.ends[name].recv(100).decode().split()
        except BlockingIOError:
            return []

    def say(self, name: str, word: str) -> None:
        self.ends[name].send(word.encode() + b"\n")
        next(child for child in self.children if child.name == name).hear()

    def ended(self, name: str) -> int:
        """Reap a process that was sent a signal; return which."""
        child = next(child for child in self.children if child.name == name)
        child.pid = 0
        return -self.processes[name].wait(10)

    def alive(self, name: str) -> bool:
        return self.processes[name].poll() is None


@pytest.fixture
def roles() -> Iterator[Roles]:
    found = Roles()
    for index in range(2):
        found.add("worker", index)
    found.add("front", 0)
    yield found
    for process in found.processes.values():
        process.kill()
        process.wait()
    for child in found.children:
        os.close(child.words_fd)
        found.ends[child.name].close()


def test_workers_drain_when_the_fronts_are_gone_and_end_when_all_are_idle(roles: Roles) -> None:
    stopping = Stopping(roles.children, "drain", 100.0)
    stopping.tick(100.0)
    assert roles.words("worker 0") == roles.words("worker 1") == []
    assert roles.ended("front 0") == 15
    stopping.tick(100.1)
    assert roles.words("worker 0") == roles.words("worker 1") == ["drain"]
    roles.say("worker 0", "idle")
    stopping.tick(100.2)
    assert roles.words("worker 0") == roles.words("worker 1") == []
    roles.say("worker 1", "idle")
    stopping.tick(100.3)
    assert roles.words("worker 0") == roles.words("worker 1") == ["end"]
    assert roles.alive("worker 0")
    assert roles.alive("worker 1")


def test_drain_is_bounded(roles: Roles) -> None:
    stopping = Stopping(roles.children, "drain", 100.0)
    roles.ended("front 0")
    wake_s = stopping.tick(100.0)
    assert wake_s == 100.0 + DRAIN_TIMEOUT_S
    roles.say("worker 0", "idle")
    wake_s = stopping.tick(wake_s)
    assert roles.words("worker 1") == ["drain", "end"]
    assert wake_s == 100.0 + DRAIN_TIMEOUT_S + DRAIN_MARGIN_S
    stopping.tick(wake_s)
    assert roles.ended("worker 1") == 9


def test_front_that_does_not_end_holds_the_workers_up_no_longer_than_the_drain(
    roles: Roles,
) -> None:
    stopping = Stopping(roles.children, "drain", 100.0)
    stopping.tick(100.0 + DRAIN_TIMEOUT_S)
    assert roles.words("worker 0") == ["drain", "end"]


def test_at_once_is_a_signal_to_all_and_then_a_kill(roles: Roles) -> None:
    roles.add("worker", 2).ready = False
    stopping = Stopping(roles.children, "at once", 100.0)
    assert roles.ended("front 0") == roles.ended("worker 0") == roles.ended("worker 1") == 3
    assert roles.words("worker 2") == ["end"]  # its own signals may not be set up yet
    assert roles.ended("worker 2") == 15
    roles.add("worker", 3)
    assert stopping.tick(100.0) == 100.0 + AT_ONCE_GRACE_S
    assert roles.alive("worker 3")
    stopping.hasten(100.5)  # told again
    stopping.tick(100.5)
    assert roles.ended("worker 3") == 9


def test_interrupt_hastens_a_drain(roles: Roles) -> None:
    stopping = Stopping(roles.children, "drain", 100.0)
    roles.ended("front 0")
    stopping.tick(100.0)
    stopping.hasten(101.0)
    assert roles.ended("worker 0") == roles.ended("worker 1") == 3
    assert stopping.tick(101.0) == 101.0 + AT_ONCE_GRACE_S


def test_agent_leaves_before_fronts_and_http_end(roles: Roles) -> None:
    roles.add("agent", 0)
    roles.add("http", 0)
    stopping = Stopping(roles.children, "drain", 100.0)
    assert roles.ended("agent 0") == 15
    assert roles.alive("front 0")
    assert roles.alive("http 0")
    assert stopping.tick(100.1) == 100.0 + DRAIN_TIMEOUT_S
    assert roles.ended("front 0") == 15
    stopping.tick(100.2)
    assert roles.words("worker 0") == []  # HTTP has calls in flight, too
    assert roles.ended("http 0") == 15
    stopping.tick(100.3)
    assert roles.words("worker 0") == roles.words("worker 1") == ["drain"]


def test_agent_that_does_not_leave_holds_the_node_up_for_a_moment_only(roles: Roles) -> None:
    roles.add("agent", 0)
    stopping = Stopping(roles.children, "drain", 100.0)
    roles.processes["agent 0"].wait(10)  # sleep has no handler: take it for one that stays
    wake_s = stopping.tick(100.1)
    assert wake_s == 100.0 + LEAVE_TIMEOUT_S
    assert roles.alive("front 0")
    assert stopping.tick(wake_s) == 100.0 + DRAIN_TIMEOUT_S
    assert roles.ended("front 0") == 15


def test_at_once_is_for_agent_and_http_too(roles: Roles) -> None:
    roles.add("agent", 0)
    roles.add("http", 0)
    stopping = Stopping(roles.children, "drain", 100.0)
    stopping.hasten(100.1)
    assert roles.ended("front 0") == roles.ended("http 0") == 3
    assert roles.ended("agent 0") in (15, 3)
