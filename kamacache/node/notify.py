"""The service manager is told how the node does: sd_notify's protocol, written by hand.

*Process*: the supervisor alone; nothing here blocks. One datagram each, of lines ``NAME=value``
(sd_notify(3), sd_watchdog_enabled(3))::

    start     EXTEND_TIMEOUT_USEC, for as long as roles boot; READY=1 when all are ready
    running   STATUS= at changes, WATCHDOG=1 at half the interval
    HUP       RELOADING=1 and when, READY=1 when it is done
    stop      STOPPING=1, then EXTEND_TIMEOUT_USEC, for as long as roles drain

*Invariants*: a manager that is not there, or does not listen, never ends or delays the node. What
could not be sent for want of room is sent at the loop's next turns, in its order, within bounds.
The variables are taken out of the environment: no child may speak for the node by mistake.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections import deque
from collections.abc import MutableMapping
from typing import Final, Self

import structlog

from kamacache.limits import (
    NOTIFY_AGAIN_S,
    NOTIFY_EXTEND_EVERY_S,
    NOTIFY_EXTEND_S,
    NOTIFY_STATUS_CHARS_MAX,
    NOTIFY_UNSENT_MAX,
    NOTIFY_WATCHDOG_S_MIN,
)

_VARIABLES: Final = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
_NEVER_S: Final = float("inf")

log = structlog.get_logger("kamacache.node")


class Notifier:
    """The way to the service manager; without one, each call does nothing."""

    def __init__(self, address: str | None = None, *, watchdog_s: float = 0.0) -> None:
        """``address`` is a path, or ``@`` and an abstract name; ``watchdog_s`` 0: no watchdog."""
        self._watchdog_every_s = (
            max(watchdog_s / 2, NOTIFY_WATCHDOG_S_MIN) if address and watchdog_s else 0.0
        )
        self._next_watchdog_s = self._next_extend_s = 0.0
        self._unsent: deque[bytes] = deque(maxlen=NOTIFY_UNSENT_MAX)
        self._failed = False
        self._address = "\0" + address[1:] if address and address[0] == "@" else address
        self._socket: socket.socket | None = None
        if address:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._socket.setblocking(False)

    @classmethod
    def from_environment(
        cls, environment: MutableMapping[str, str] = os.environ, *, embedded: bool = False
    ) -> Self:
        """Return the way that the environment names, and take its variables out of there.

        A node that a program ``embedded`` speaks to nobody: the service is the program.
        """
        found = {name: environment.pop(name, "") for name in _VARIABLES}
        address = found["NOTIFY_SOCKET"]
        if embedded or not address:
            return cls()
        if address[0] not in "/@" or len(address) == 1:
            log.warning("NOTIFY_SOCKET is neither a path nor an abstract name, not used")
            return cls()
        watchdog_s = 0.0
        if found["WATCHDOG_PID"] in ("", str(os.getpid())):
            with contextlib.suppress(ValueError):
                watchdog_s = max(0.0, int(found["WATCHDOG_USEC"] or 0) / 1e6)
        try:
            return cls(address, watchdog_s=watchdog_s)
        except OSError as error:  # no descriptors are left, or no such sockets
            log.warning("the service manager cannot be told", why=str(error))
            return cls()

    @property
    def fds(self) -> tuple[int, ...]:
        """The descriptors, for a forked child to close."""
        return () if self._socket is None else (self._socket.fileno(),)

    def ready(self, status: str) -> None:
        """Say that the node serves, and who the main process is."""
        # Process 1 of a container means another process where the manager runs.
        main = (f"MAINPID={os.getpid()}",) if os.getpid() != 1 else ()
        self._send("READY=1", _status(status), *main)

    def status(self, text: str) -> None:
        """Say in a few words how the node does."""
        self._send(_status(text))

    def reloading(self) -> None:
        """Say that a reload has begun; `reloaded` must follow, also where it was refused."""
        self._send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def reloaded(self) -> None:
        """Say that a reload is over; how it went is a status of its own, where that has changed."""
        self._send("READY=1")

    def stopping(self) -> None:
        """Say that the node ends."""
        self._send("STOPPING=1", _status("stopping"))

    def watchdog(self, now_s: float) -> float:
        """Give a sign of life where it is due; return when to come again (time.monotonic).

        Sends what waits, too, so it is for every turn of the loop.
        """
        again_s = now_s + NOTIFY_AGAIN_S if self._unsent and not self._flush() else _NEVER_S
        if not self._watchdog_every_s:
            return again_s
        if now_s >= self._next_watchdog_s:
            self._next_watchdog_s = now_s + self._watchdog_every_s
            self._send("WATCHDOG=1", keep=False)
        return min(again_s, self._next_watchdog_s)

    def extend(self, now_s: float, seconds: float = NOTIFY_EXTEND_S) -> None:
        """Ask for more time to start or to end, not more often than is needed.

        The bounds are the node's own: a role that boots or drains too long is killed.
        """
        if now_s >= self._next_extend_s:
            self._next_extend_s = now_s + NOTIFY_EXTEND_EVERY_S
            self._send(f"EXTEND_TIMEOUT_USEC={round(seconds * 1e6)}", keep=False)

    def close(self) -> None:
        """Say no more."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _send(self, *lines: str, keep: bool = True) -> None:
        """Send what waits and then this; keep for later what does not fit, where that has use."""
        if self._socket is None or not (self._flush() or keep):
            return
        if self._unsent and self._unsent[-1].startswith(b"STATUS="):
            self._unsent.pop()  # nobody has seen it, and it is out of date
        # A path in a reason may be no UTF-8.
        self._unsent.append("\n".join(lines).encode(errors="replace"))
        if not self._flush() and not keep:
            self._unsent.pop()

    def _flush(self) -> bool:
        """Send what waits; return whether nothing does any more."""
        while self._unsent and self._socket is not None:
            try:
                self._socket.sendto(self._unsent[0], self._address or "")
            except BlockingIOError:  # the manager's queue is full
                return False
            except OSError as error:  # it is gone, or we may not: later is no better
                if not self._failed:
                    log.warning("the service manager cannot be told", why=str(error))
                self._failed = True
                self._unsent.clear()
                return True
            self._failed = False
            self._unsent.popleft()
        return True


def _status(text: str) -> str:
    # A line break would begin another variable.
    return "STATUS=" + " ".join(text.split())[:NOTIFY_STATUS_CHARS_MAX]
