"""A role's process as the supervisor sees it, and when it is to be forked again.

*Process*: the supervisor. No clock and no fork of its own: times come in as arguments.

*Invariants*: only deaths before ready count as failures. A role that dies at work is forked again
at once, however often; one that cannot start waits longer each time, and after `BOOT_FAILURES_MAX`
failures in a row the node ends; at once where a setting cannot work. A node that has been ready
goes on without agent and HTTP, and tries them for ever.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from kamacache.limits import (
    BOOT_FAILURES_MAX,
    RESTART_BACKOFF_FIRST_S,
    RESTART_BACKOFF_MAX_S,
)
from kamacache.rundir.context import (
    EXIT_APP,
    EXIT_CONFIG,
    EXIT_OK,
    EXIT_ROLE,
    LINE_BYTES_MAX,
    WORD_IDLE,
    WORD_TERM,
    Role,
    read_report,
)

_TELLING_CODES: Final = (EXIT_APP, EXIT_CONFIG)  # exit codes that say more than "could not start"

_SPARED: Final[tuple[Role, ...]] = ("agent", "http")  # the node serves without them


@dataclass(slots=True, kw_only=True)
class Child:
    """One place for a process: worker 3 stays worker 3 however often it is forked."""

    role: Role
    index: int
    pid: int = 0  # 0: no process now
    ready: bool = False
    idle: bool = False  # a worker that drains has no load any more
    asks_to_end: bool = False  # a SIGTERM came to the process itself
    words_fd: int = -1  # where we and the process tell each other words; -1: it is gone
    boot_deadline_s: float = 0.0
    started_ms: int = 0  # CLOCK_BOOTTIME of the last fork
    cpu_before_s: float = 0.0  # used by the processes that had this place before
    start_at_s: float = 0.0  # when to fork it, where it does not run
    boot_failures: int = 0
    restarts: int = 0
    ended_well: bool = False  # the last process, with exit code 0
    failure: tuple[int, str] | None = None  # what the process said before it died
    _line: bytes = field(default=b"", repr=False)

    @property
    def name(self) -> str:
        """The role and its number, for people."""
        return f"{self.role} {self.index}"

    def forked(self, pid: int, words_fd: int, boot_deadline_s: float, started_ms: int = 0) -> None:
        """Note the process that now has this place."""
        self.started_ms = started_ms
        self.pid, self.words_fd, self.boot_deadline_s = pid, words_fd, boot_deadline_s
        self.ready, self.failure, self._line = False, None, b""
        self.idle = self.asks_to_end = self.ended_well = False

    def hear(self) -> bool:
        """Read what the process says, without waiting; return whether it will say no more."""
        while True:
            try:
                part = os.read(self.words_fd, LINE_BYTES_MAX)
            except BlockingIOError:
                return False
            except OSError:  # ECONNRESET: it died with words of ours unread
                part = b""
            *lines, self._line = (self._line + part).split(b"\n")
            if not part and self._line:
                lines.append(self._line)  # it died in the middle of a word
            for line in lines:
                self._take(line.decode(errors="replace"))
            if not part:
                return True
            if len(self._line) > 2 * LINE_BYTES_MAX:
                self._line = b""

    def _take(self, line: str) -> None:
        if line == WORD_TERM:
            self.asks_to_end = True
        elif line == WORD_IDLE:
            self.idle = True
        elif not self.ready:
            self.failure = read_report(line)
            self.ready = self.failure is None
            self.boot_failures *= not self.ready

    def tell(self, word: str) -> None:
        """Say a word to the process; one that is dying has no use for it."""
        if self.words_fd >= 0:
            with contextlib.suppress(OSError):
                os.write(self.words_fd, word.encode() + b"\n")

    def send(self, number: int) -> None:
        """Send a signal to the process, if there is one."""
        # The pid is ours until waitpid has returned it: it cannot be another process's.
        if self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def died(self, exit_code: int, now_s: float) -> None:
        """Note the death of the process, and when to fork it again."""
        was_ready, self.pid, self.ready = self.ready, 0, False
        self.ended_well = was_ready and exit_code == EXIT_OK
        if was_ready:
            self.restarts += 1
            self.start_at_s = now_s
            return
        self.boot_failures += 1
        if self.failure is None:
            how = f"signal {-exit_code}" if exit_code < 0 else f"exit code {exit_code}"
            code = exit_code if exit_code in _TELLING_CODES else EXIT_ROLE
            self.failure = code, f"it ended with {how} before it was ready"
        self.start_at_s = now_s + backoff_s(self.boot_failures)

    def given_up(self, *, node_was_ready: bool) -> bool:
        """Whether the process failed to start so often that the node must end."""
        if node_was_ready and self.role in _SPARED:
            return False
        if not self.restarts and self.failure and self.failure[0] == EXIT_CONFIG:
            return True
        return self.boot_failures >= BOOT_FAILURES_MAX

    @property
    def exit_code(self) -> int:
        """What the node exits with because of this process."""
        code = self.failure[0] if self.failure else EXIT_ROLE
        return code if code in _TELLING_CODES else EXIT_ROLE


def make_children(workers: int, fronts: int, *, agent: bool, http: bool) -> list[Child]:
    """Return the places of a node's roles; worker i is the i-th."""
    counts: dict[Role, int] = {"worker": workers, "front": fronts, "agent": agent, "http": http}
    return [Child(role=role, index=i) for role, count in counts.items() for i in range(count)]


def kill_all(children: Sequence[Child]) -> None:
    """Leave no child, whatever happened; a killed process cannot refuse."""
    for child in children:
        child.send(signal.SIGKILL)
    for child in children:
        if child.pid:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(child.pid, 0)
            child.pid = 0


def may_start(child: Child, children: Sequence[Child], *, settled: bool = True) -> bool:
    """Tell whether a place that has no process may be given one, when its time has come.

    The agent comes last: what it registers, the other nodes ask, and no front that is not there
    yet; a node that cannot start never registers. A node that is not ``settled`` (see
    `kamacache.worker.settling`) needs the others for that: its workers are not ready before the
    agent is, and HTTP, which reads the shards, must wait.
    """
    if child.pid:
        return False
    if child.role == "http" and not settled:
        return False
    if child.role != "agent" or child.restarts:
        return True
    before = ("worker", "front", "http") if settled else ("front",)
    return all(other.ready or other.restarts for other in children if other.role in before)


def backoff_s(failures: int) -> float:
    """Return the wait after this many failures in a row."""
    return min(RESTART_BACKOFF_FIRST_S * 2.0 ** (failures - 1), RESTART_BACKOFF_MAX_S)
