"""Log lines on stderr, which must never hold a process up: a line that has no room is dropped.

*Process*: supervisor and roles, each with the stderr that the node was started with. Who started
the node reads the other end, or does not: a pipe whose reader stopped is full after 64 KiB, and a
blocked write would stop a worker's loop, or the supervisor's, whose serve-until all readers need.

*How*: the descriptor is shared with whoever else has it, so it must not be made non-blocking. A
pipe or a terminal is opened once more instead, with flags of our own; a socket (the journal's) has
a flag for each send. Where the pipe is not ours to open, poll(2) is asked before: it can be wrong
when two processes write at the same moment, and one of them then waits. A file is only written to.

*Invariants*: nothing here raises. A piece of at most `LOG_LINE_BYTES_MAX` is written whole or not
at all to a pipe (PIPE_BUF, pipe(7)), so that lines of several processes do not mix.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import stat
from collections.abc import Callable, Iterator
from typing import Final

from kamacache.limits import LOG_LINE_BYTES_MAX

_LOST: Final = "log lines before were lost, since nobody read them"
_UNFORMATTED: Final = "a log line could not be formatted"


class Stderr:
    """A descriptor that lines are written to without waiting."""

    def __init__(self, fd: int = 2) -> None:
        self._torn = False  # a part of a piece is out, without its end
        self.close: Callable[[], None] = lambda: None  # what was opened here, not ``fd``
        self._write: Callable[[bytes], int] = self._open(fd)

    def write(self, text: str) -> bool:
        """Write a line, or several; return whether there was room for all."""
        data = text.encode("utf-8", "backslashreplace")
        try:
            for piece in _pieces(data):
                out = b"\n" + piece if self._torn else piece
                self._torn = False
                written = self._write(out)
                if written < len(out):
                    self._torn = written > 0
                    return False
        except (OSError, ValueError):  # no room, nobody reads, no disk
            return False
        return True

    def _open(self, fd: int) -> Callable[[bytes], int]:
        try:
            mode = os.fstat(fd).st_mode
            if stat.S_ISSOCK(mode):
                end = socket.socket(fileno=os.dup(fd))
                self.close = end.close
                return lambda data: end.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError:  # closed: nobody wants to know
            return len
        if not (stat.S_ISFIFO(mode) or os.isatty(fd)):
            return lambda data: os.write(fd, data)
        flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        with contextlib.suppress(OSError):  # another user's, or no /proc
            own = os.open(f"/proc/self/fd/{fd}", flags)
            self.close = lambda: os.close(own)
            return lambda data: os.write(own, data)
        poll = select.poll()
        poll.register(fd, select.POLLOUT)
        return lambda data: os.write(fd, data) if poll.poll(0) else 0


def _pieces(data: bytes) -> Iterator[bytes]:
    """Cut into whole lines as far as they fit, each piece to be written at once."""
    while len(data) > LOG_LINE_BYTES_MAX:
        cut = data.rfind(b"\n", 0, LOG_LINE_BYTES_MAX) + 1 or LOG_LINE_BYTES_MAX
        yield data[:cut]
        data = data[cut:]
    yield data


class StderrHandler(logging.Handler):
    """The one handler of a node's process. Counts what it drops, and says so when it can."""

    def __init__(self, stderr: Stderr) -> None:
        super().__init__()
        self.stderr = stderr
        self.lost = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record as a line; never blocks, never raises."""
        if not self.stderr.write(self._line(record)):
            self.lost += 1
        elif self.lost:  # after a line that had room: a short one has some where others have not
            note = _record(record.name, _LOST)
            note.lines = self.lost
            if self.stderr.write(self._line(note)):
                self.lost = 0

    def _line(self, record: logging.LogRecord) -> str:
        try:
            return self.format(record) + "\n"
        except Exception as error:  # arguments that do not fit the message, a __repr__ that raises
            told = _record(record.name, _UNFORMATTED)
            told.error = type(error).__name__
            told.place = f"{record.pathname}:{record.lineno}"
            try:
                return self.format(told) + "\n"
            except Exception:  # nothing is left to say it with
                return _UNFORMATTED + "\n"


def _record(name: str, message: str) -> logging.LogRecord:
    return logging.LogRecord(name, logging.WARNING, "", 0, message, None, None)
