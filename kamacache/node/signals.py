"""Signals as a queue: handlers only enqueue, the supervisor's loop decides.

*Process*: the supervisor; `reset_in_child` runs in what it forks, `reset_inherited` in a supervisor
that a program forked.
"""

from __future__ import annotations

import contextlib
import signal
import socket
from collections.abc import Iterator
from typing import Final

HANDLED: Final = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGHUP,
    signal.SIGCHLD,
)
# A terminal sends these to the whole process group; the supervisor decides. A role that is ready
# heeds SIGQUIT, by which the supervisor ends it at once.
_IGNORED_IN_CHILDREN: Final = (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP)
SAME_SIGNAL_S: Final = 0.25
_READ_BYTES: Final = 4096


class SignalQueue:
    """The signals that came, readable from a descriptor. One at a time in a process."""

    def __init__(self) -> None:
        self._read, self._write = socket.socketpair()
        self._read.setblocking(False)
        self._write.setblocking(False)
        # A full pipe loses a signal of which hundreds wait already: SIGCHLD is collected by
        # waitpid, the others mean the same twice.
        signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        self._kept: list[int] = []
        for number in HANDLED:
            # The C handler has written the number to the wakeup fd; nothing is left to do. (Not
            # SIG_IGN: the kernel would then throw the signal away.)
            signal.signal(number, _enqueued)

    def fileno(self) -> int:
        """The descriptor that is readable when a signal came."""
        return self._read.fileno()

    @property
    def fds(self) -> tuple[int, int]:
        """Both descriptors, for a forked child to close."""
        return self._read.fileno(), self._write.fileno()

    def take(self) -> list[int]:
        """Return the signals that came since, oldest first; never blocks."""
        kept, self._kept = self._kept, []
        try:
            return [*kept, *self._read.recv(_READ_BYTES)]
        except BlockingIOError:
            return kept

    def keep(self, number: int) -> None:
        """Put back a signal that is not for now: the next `take` returns it, at whatever time."""
        self._kept.append(number)

    def close(self) -> None:
        """Stop queueing; the handlers stay and do nothing."""
        signal.set_wakeup_fd(-1)
        self._read.close()
        self._write.close()


class Repeats:
    """Whether a signal is not the one before once more.

    ``timeout`` sends its signal to us and to our process group; ``make`` passes on what the group
    has got already.
    """

    def __init__(self) -> None:
        self._last_s: dict[int, float] = {}

    def is_new(self, number: int, now_s: float) -> bool:
        """Tell whether a signal that came now means something of its own, and take note of it."""
        if now_s - self._last_s.get(number, -SAME_SIGNAL_S) < SAME_SIGNAL_S:
            return False
        self._last_s[number] = now_s
        return True


def _enqueued(number: int, frame: object) -> None:
    """Do nothing: see SignalQueue."""


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Hold all signals back while forking.

    1. The child is forked with the parent's handlers and wakeup fd.
    2. A SIGTERM to the child alone arrives before `reset_in_child`.
    3. Its C handler writes to the wakeup fd that the *parent* reads: the node would drain.

    With signals held, the child receives it after `reset_in_child` has released them.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def reset_in_child() -> None:
    """Give a forked child default handlers, and release the signals held during the fork."""
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        if number in (signal.SIGKILL, signal.SIGSTOP):
            continue
        if number in _IGNORED_IN_CHILDREN or number == signal.SIGPIPE:
            signal.signal(number, signal.SIG_IGN)
        elif signal.getsignal(number) is not signal.SIG_DFL:
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def reset_inherited() -> None:
    """Undo the handlers of the program that this process was forked from; it then sets its own."""
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, signal.SIGPIPE}:
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
