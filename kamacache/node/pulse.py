"""Is a worker's loop still turning? A ping over its socket now and then, with a generous bound.

*Process*: the supervisor. waitpid tells of death only; a worker whose loop is blocked for good (an
async getter that calls something blocking, a deadlock in an extension) lives and answers nobody.
Killing it is safe at any moment (see the shard), and its successor is there at once.

No wait anywhere: what is sent fits into the socket's buffer, what came is looked for at the next
beat. Any byte is an answer: nothing but pings is asked on this connection.
"""

from __future__ import annotations

import contextlib
import socket
from typing import Final

from kamacache.limits import HUNG_WORKER_S
from kamacache.wire.frames import frame
from kamacache.wire.messages import Ping

_PING: Final = frame(Ping(id=1, budget_ms=int(HUNG_WORKER_S * 1000)))
_RECEIVE_BYTES: Final = 4096


class Pulses:
    """The pulses of the workers that are ready."""

    def __init__(self) -> None:
        self._of: dict[int, Pulse] = {}  # by the worker's index

    def begin(self, index: int, path: str) -> None:
        """Feel a worker's pulse from now on."""
        self._of[index] = Pulse(path)

    def hung(self, now_s: float) -> list[int]:
        """Take answers, ask again, and return who has answered nothing for too long."""
        return [index for index, pulse in self._of.items() if not pulse.beat(now_s)]

    def end(self, index: int) -> None:
        """Let go of a worker that is dead, or was not ready."""
        if index in self._of:
            self._of.pop(index).close()

    def end_all(self) -> None:
        """Let go of all: the node stops, or this is a child of the supervisor's."""
        for index in [*self._of]:
            self.end(index)


class Pulse:
    """The supervisor's connection to one worker."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._link: socket.socket | None = None
        self._asked_s: float | None = None  # when the ping that waits for its answer was due

    def beat(self, now_s: float) -> bool:
        """Take answers and ask again; False when the worker has answered nothing for too long."""
        if self._answered():
            self._asked_s = None
        if self._asked_s is None:
            self._asked_s = now_s
            self._ask()
        elif self._link is None:  # the connection broke, or the backlog was full
            self._ask()
        return now_s - self._asked_s < HUNG_WORKER_S

    def close(self) -> None:
        """Close the connection."""
        if self._link is not None:
            self._link.close()
            self._link = None

    def _answered(self) -> bool:
        if self._link is None:
            return False
        try:
            if self._link.recv(_RECEIVE_BYTES):
                return True
        except BlockingIOError:
            return False
        except OSError:
            pass
        self.close()  # the worker closed it: it turns, or it is dead, which waitpid tells
        return True

    def _ask(self) -> None:
        try:
            if self._link is None:
                link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
                self._link = link
                link.connect(self._path)
            self._link.send(_PING)
        except OSError:  # refused or EAGAIN: asked again at the next beat, the bound runs
            with contextlib.suppress(OSError):
                self.close()
