"""What a server's processes use: CPU seconds during a round, and memory at its end.

*Process*: the parent. *Invariants*: nothing here raises; a process that comes or goes in the middle
of a round is counted as far as it was seen. The kernel counts CPU time in ticks of 10 ms, so rounds
of less than a few seconds say little.
"""

from __future__ import annotations

from collections.abc import Callable

import psutil

from scripts.loadtest.results import NodeUse
from scripts.loadtest.targets.base import ServerProcess

Find = Callable[[], list[ServerProcess]]


class Usage:
    """The processes of one target's server, during one round."""

    def __init__(self, find: Find) -> None:
        """Look at those that ``find`` returns; what they have used before now does not count."""
        self._find = find
        self._processes: dict[psutil.Process, str] = {}
        self._before_s: dict[psutil.Process, float] = {}
        self._last_s: dict[psutil.Process, float] = {}
        self._look(first=True)

    def sample(self) -> None:
        """Look again, so that a process that dies has been seen late in its life."""
        self._look(first=False)

    def end(self) -> list[NodeUse]:
        """Return what each has used since the beginning, by role."""
        self._look(first=False)
        return sorted(
            (self._use(process, role) for process, role in self._processes.items()),
            key=lambda use: (_order(use.role), use.pid),
        )

    def _look(self, *, first: bool) -> None:
        for found in self._find():
            if found.process not in self._processes:
                self._processes[found.process] = found.role
                # One that was started since has used all of its time in this round.
                cpu_s = _cpu_s(found.process) if first else 0.0
                self._before_s[found.process] = cpu_s or 0.0
        for process in self._processes:
            if (cpu_s := _cpu_s(process)) is not None:
                self._last_s[process] = cpu_s

    def _use(self, process: psutil.Process, role: str) -> NodeUse:
        rss = private = 0
        ended = _cpu_s(process) is None
        try:
            if not ended:
                memory = process.memory_full_info()
                rss, private = int(memory.rss), int(memory.uss)
        except psutil.Error:  # another user's: its sizes are told, its pages are not
            try:
                rss = int(process.memory_info().rss)
            except psutil.Error:
                ended = True
        used_s = self._last_s.get(process, 0.0) - self._before_s[process]
        return NodeUse(
            role=role,
            pid=process.pid,
            cpu_s=max(used_s, 0.0),
            rss_bytes=rss,
            private_bytes=private,
            ended=ended,
        )


def _cpu_s(process: psutil.Process) -> float | None:
    """Return the CPU seconds of a process's whole life; None where it has none any more."""
    try:
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            return None
        times = process.cpu_times()
    except psutil.Error:
        return None
    return float(times.user + times.system)


def _order(role: str) -> tuple[str, int]:
    """Return what sorts "worker 10" behind "worker 9"."""
    name, _, index = role.rpartition(" ")
    return (name, int(index)) if name and index.isdigit() else (role, -1)
