"""What a forked role is told: who it is, where things are, and how to say that it is ready.

*Process*: made by the supervisor before a fork, read by the child.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from typing import Any, Final, Literal

from kamacache.limits import DRAIN_TIMEOUT_S
from kamacache.rundir.description import NodeDescription
from kamacache.rundir.layout import RunDir

Role = Literal["worker", "front"]

EXIT_OK: Final = 0
EXIT_USAGE: Final = 2
EXIT_ROLE: Final = 3  # a role could not start
EXIT_APP: Final = 4  # the user's app could not be loaded
EXIT_CONFIG: Final = 78  # EX_CONFIG of sysexits.h

READY_LINE_BYTES_MAX: Final = 4000  # below PIPE_BUF, so that one write is whole
FAILURE_CHARS_MAX: Final = 900  # of up to 4 bytes each
_LINE_BREAK: Final = "\x1f"  # ASCII's unit separator stands for a line break on the pipe


def read_report(line: str) -> tuple[int, str] | None:
    """Return what a role's line says: None for ready, else the exit code and the reason."""
    word, _, rest = line.strip().partition(" ")
    if word == "ready":
        return None
    code, _, message = rest.partition(" ")
    if word != "failed" or not code.isdecimal():
        return EXIT_ROLE, "it ended in the middle of a word"
    return int(code), message.replace(_LINE_BREAK, "\n")


node_role: str | None = None
"""The role that this process plays in a node; None in an application. Set after the fork."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleContext:
    """One role of one node, as its process finds it after the fork.

    ``groups`` holds the program's or the app's Group objects (see `kamacache.getters.Loadable`);
    groups that only the command line named are in ``description.groups`` alone. Sizes and
    policies of ``description.groups`` rule over those of ``groups``.
    """

    role: Role
    index: int
    run_dir: RunDir
    description: NodeDescription
    ready_fd: int
    parent_pid: int
    parent_pidfd: int  # readable once the supervisor is dead
    app: str | None = None
    groups: tuple[Any, ...] = ()
    run_dir_is_temporary: bool = False  # made for this node alone: goes with it
    socket_gid: int | None = None  # group that may connect; None: the owner alone
    drain_timeout_s: float = DRAIN_TIMEOUT_S

    @property
    def socket_path(self) -> str:
        """Where this worker listens."""
        return self.description.socket_path(self.index)

    def report_ready(self) -> None:
        """Tell the supervisor that this role serves. Call once, or `report_failed` instead."""
        self._report("ready")

    def report_failed(self, code: int, message: str) -> None:
        """Tell the supervisor why this role cannot start; the caller then exits with ``code``."""
        # Lines of a traceback stay apart for who reads them, and one line on the pipe.
        kept = message.strip()[-FAILURE_CHARS_MAX:]
        self._report(f"failed {code} {_LINE_BREAK.join(kept.splitlines())}")

    def _report(self, line: str) -> None:
        # A supervisor that is gone has no use for the line; the pidfd ends this process.
        with contextlib.suppress(OSError):
            os.write(self.ready_fd, line.encode()[:READY_LINE_BYTES_MAX] + b"\n")
            os.close(self.ready_fd)
