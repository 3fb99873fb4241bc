"""A role's process as the supervisor sees it, and when it is to be forked again.

*Process*: the supervisor. No clock and no fork of its own: times come in as arguments.

*Invariants*: only deaths before ready count as failures. A worker that dies at work is forked again
at once, however often; one that cannot start waits longer each time, and after `BOOT_FAILURES_MAX`
failures in a row the node ends.
"""

from __future__ import annotations

import os
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
    EXIT_ROLE,
    READY_LINE_BYTES_MAX,
    Role,
    read_report,
)

_TELLING_CODES: Final = (EXIT_APP, EXIT_CONFIG)  # exit codes that say more than "could not start"


@dataclass(slots=True, kw_only=True)
class Child:
    """One place for a process: worker 3 stays worker 3 however often it is forked."""

    role: Role
    index: int
    pid: int = 0  # 0: no process now
    ready: bool = False
    ready_fd: int = -1  # where the process says that it is ready; -1: it said so, or is gone
    boot_deadline_s: float = 0.0
    start_at_s: float | None = 0.0  # when to fork it; None: it runs, or must not run again
    boot_failures: int = 0
    restarts: int = 0
    failure: tuple[int, str] | None = None  # what the process said before it died
    _line: bytes = field(default=b"", repr=False)

    @property
    def name(self) -> str:
        """The role and its number, for people."""
        return f"{self.role} {self.index}"

    def forked(self, pid: int, ready_fd: int, boot_deadline_s: float) -> None:
        """Note the process that now has this place."""
        self.pid, self.ready_fd, self.boot_deadline_s = pid, ready_fd, boot_deadline_s
        self.ready, self.start_at_s, self.failure, self._line = False, None, None, b""

    def hear(self) -> bool:
        """Read what the process says; return whether its descriptor is done with."""
        try:
            part = os.read(self.ready_fd, READY_LINE_BYTES_MAX)
        except BlockingIOError:
            return False
        self._line += part
        if part and not self._line.endswith(b"\n"):
            return len(self._line) > 2 * READY_LINE_BYTES_MAX
        if self._line:
            self.failure = read_report(self._line.decode(errors="replace"))
            self.ready = self.failure is None
            self.boot_failures *= not self.ready
        return True

    def died(self, exit_code: int, now_s: float) -> None:
        """Note the death of the process, and when to fork it again."""
        was_ready, self.pid, self.ready = self.ready, 0, False
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

    @property
    def given_up(self) -> bool:
        """Whether the process failed to start so often that the node must end."""
        return self.boot_failures >= BOOT_FAILURES_MAX

    @property
    def exit_code(self) -> int:
        """What the node exits with because of this process."""
        code = self.failure[0] if self.failure else EXIT_ROLE
        return code if code in _TELLING_CODES else EXIT_ROLE


def backoff_s(failures: int) -> float:
    """Return the wait after this many failures in a row."""
    return min(RESTART_BACKOFF_FIRST_S * 2.0 ** (failures - 1), RESTART_BACKOFF_MAX_S)
