"""CPU time of a node's processes, by role, to the nanosecond.

Linux tells any process's CPU clock to everyone: `clock_getcpuclockid(3)` is the arithmetic below.
psutil reads /proc/PID/stat, whose ticks of 10 ms are as long as a slice of a benchmark.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from typing import Final

import psutil

_SCHED: Final = 2  # CPUCLOCK_SCHED of <linux/posix-timers.h>: what the scheduler counts
TITLE: Final = "kamacache-node: "


def cpu_s(pid: int) -> float:
    """Return the CPU seconds that a process has used, all of its threads counted."""
    return time.clock_gettime(~pid << 3 | _SCHED)


class NodeProcesses:
    """The processes of a running node, each with the role that it names itself by."""

    def __init__(self, supervisor_pid: int) -> None:
        self.roles: dict[int, str] = {supervisor_pid: "supervisor"}
        for child in psutil.Process(supervisor_pid).children(recursive=True):
            title = " ".join(child.cmdline())
            self.roles[child.pid] = title.removeprefix(TITLE).partition(" ")[0]

    def pids(self, role: str) -> list[int]:
        """Return the processes of a role."""
        return [pid for pid, own in self.roles.items() if own == role]

    def read(self) -> Counter[str]:
        """Return the CPU seconds used so far, by role."""
        used: Counter[str] = Counter()
        for pid, role in self.roles.items():
            used[role] += cpu_s(pid)  # type: ignore[assignment] # typeshed: counts are int
        return used


def between(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """Return what was used between two readings."""
    return {role: after[role] - before.get(role, 0.0) for role in after}
