"""What a forked role is told: who it is, where things are; and the words of both sides.

*Process*: made by the supervisor before a fork, read by the child. Words are lines on a socket
pair of the two, open as long as the role lives::

    role ──► supervisor    ready | failed <code> <reason> | term | idle
    supervisor ──► worker  drain | end
    supervisor ──► role    reload

``term``: a SIGTERM came; the supervisor decides what follows. ``drain``: begin no load but for
loads that run; ``idle``: none runs any more; ``end``: leave now. A worker without loads waits for
``end``, since another worker's load may still ask it. ``reload``: live.json has changed.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from kamacache.limits import DRAIN_TIMEOUT_S
from kamacache.rundir.description import NodeDescription
from kamacache.rundir.layout import RunDir
from kamacache.rundir.live import LiveSettings

Role = Literal["worker", "front", "agent", "http"]

EXIT_OK: Final = 0
EXIT_USAGE: Final = 2
EXIT_ROLE: Final = 3  # a role could not start
EXIT_APP: Final = 4  # the user's app could not be loaded
EXIT_CONFIG: Final = 78  # EX_CONFIG of sysexits.h

WORD_TERM: Final = "term"
WORD_IDLE: Final = "idle"
WORD_DRAIN: Final = "drain"
WORD_END: Final = "end"
WORD_RELOAD: Final = "reload"

LINE_BYTES_MAX: Final = 4000  # far below a socket's buffer, so that one write is whole
FAILURE_CHARS_MAX: Final = 900  # of up to 4 bytes each
_LINE_BREAK: Final = "\x1f"  # ASCII's unit separator stands for a line break in a word


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
class Unsettled:
    """A warm start in a cluster: nothing is served before the others have told what they wrote."""

    members: tuple[str, ...]  # when the node left, itself included
    left_ms: int  # CLOCK_BOOTTIME at which it began to stop
    discovers: bool = False  # members may have come and gone meanwhile


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
    words_fd: int
    parent_pid: int
    parent_pidfd: int  # readable once the supervisor is dead
    app: str | None = None
    discover: str | None = None  # URL of what knows the peers, for the agent
    weight: int = 1  # of this node on the ring
    groups: tuple[Any, ...] = ()
    run_dir_is_temporary: bool = False  # made for this node alone: goes with it
    socket_gid: int | None = None  # group that may connect; None: the owner alone
    api_fd: int | None = None  # of a socket that listens for HTTP already; None: the role binds one
    drain_timeout_s: float = DRAIN_TIMEOUT_S
    keeps: bool = False  # the next node may be left the shards
    unsettled: Unsettled | None = None  # None: it serves as soon as it is ready
    live: LiveSettings = field(default_factory=LiveSettings)  # when the role was forked

    @property
    def socket_path(self) -> str:
        """Where this worker listens."""
        return self.description.socket_path(self.index)

    def report_ready(self) -> None:
        """Tell the supervisor that this role serves. Call once, or `report_failed` instead."""
        self.tell("ready")

    def report_failed(self, code: int, message: str) -> None:
        """Tell the supervisor why this role cannot start; the caller then exits with ``code``."""
        # Lines of a traceback stay apart for who reads them, and one line for the supervisor.
        kept = message.strip()[-FAILURE_CHARS_MAX:]
        self.tell(f"failed {code} {_LINE_BREAK.join(kept.splitlines())}")

    def tell(self, word: str) -> None:
        """Say a word to the supervisor."""
        # A supervisor that is gone has no use for it; the pidfd ends this process.
        with contextlib.suppress(OSError):
            os.write(self.words_fd, word.encode()[:LINE_BYTES_MAX] + b"\n")

    def hear(self) -> list[str]:
        """Return the supervisor's words, for when the descriptor is readable; none: it is gone."""
        heard = b""
        with contextlib.suppress(OSError):
            heard = os.read(self.words_fd, LINE_BYTES_MAX)
            while heard and not heard.endswith(b"\n"):  # a word is sent whole: its rest is there
                rest = os.read(self.words_fd, LINE_BYTES_MAX)
                if not rest:
                    break
                heard += rest
        return heard.decode(errors="replace").split()
