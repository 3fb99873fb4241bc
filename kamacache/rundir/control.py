"""The control words of a node: how long readers may trust its memory.

*Process*: the supervisor writes, every attached process reads; word 3 has the writer that
`kamacache.cluster.membership` names. One 4 KiB file of u64 words::

    word 0  magic          word 2  serve_until_ms, CLOCK_BOOTTIME milliseconds
    word 1  format         word 3  number of the membership, 0: none was written
                           4..511  reserved, 0

*Invariants*: words are stored and read aligned, through a view cast to "Q", so that no reader
sees a half-written one (``struct.pack_into`` tears). serve_until_ms is always at most
`SERVE_UNTIL_AHEAD_MS` ahead, so a node that dies in whatever way is read for no longer than that.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from typing import Final

from kamacache.clock import boottime_ms
from kamacache.errors import NodeUnavailableError
from kamacache.limits import SERVE_UNTIL_AHEAD_MS

CONTROL_BYTES: Final = 4096
CONTROL_MAGIC: Final = int.from_bytes(b"KamaCtrl", "little")
CONTROL_FORMAT: Final = 1

MAGIC: Final = 0
FORMAT: Final = 1
SERVE_UNTIL: Final = 2
MEMBERSHIP: Final = 3


class ControlWriter:
    """The supervisor's hold on the control file; the agent's on its word of it."""

    __slots__ = ("_map", "words")

    def __init__(self, path: str | os.PathLike[str], *, mode: int = 0o600) -> None:
        """Make and reserve the file; raises OSError (ENOSPC, EEXIST ...) where that fails."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        try:
            os.fchmod(fd, mode)
            os.posix_fallocate(fd, 0, CONTROL_BYTES)  # else a full tmpfs is a SIGBUS at the store
            self._map = mmap.mmap(fd, CONTROL_BYTES)
        finally:
            os.close(fd)
        self.words = memoryview(self._map).cast("Q")
        self.words[FORMAT] = CONTROL_FORMAT
        self.words[MAGIC] = CONTROL_MAGIC  # last: a file with the magic is complete

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> ControlWriter:
        """Map the words that a supervisor made, for the writer that is told one of them.

        Raises `NodeUnavailableError` where the file is gone or foreign.
        """
        writer = cls.__new__(cls)
        writer._map, writer.words = _map_words(path, writable=True)
        return writer

    def extend(self) -> None:
        """Let readers trust the memory for `SERVE_UNTIL_AHEAD_MS` from now."""
        self.words[SERVE_UNTIL] = boottime_ms() + SERVE_UNTIL_AHEAD_MS

    def end(self) -> None:
        """Have every reader stop at its next read."""
        self.words[SERVE_UNTIL] = 0

    def close(self) -> None:
        """Unmap the file."""
        self.words.release()
        self._map.close()


class ControlReader:
    """An attached process's view; hot paths read ``words[SERVE_UNTIL]`` themselves."""

    __slots__ = ("_map", "words")

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Map the file read-only; raises `NodeUnavailableError` where it is gone or foreign."""
        self._map, self.words = _map_words(path, writable=False)

    @property
    def serving(self) -> bool:
        """Whether the node's memory may be read right now."""
        return boottime_ms() < self.words[SERVE_UNTIL]

    def close(self) -> None:
        """Unmap the file."""
        self.words.release()
        self._map.close()


def _map_words(
    path: str | os.PathLike[str], *, writable: bool
) -> tuple[mmap.mmap, memoryview[int]]:
    try:
        fd = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
        try:
            if os.fstat(fd).st_size < CONTROL_BYTES:
                raise NodeUnavailableError(f"{path} is not a control file: it is too short")
            protection = mmap.PROT_READ | mmap.PROT_WRITE * writable
            mapped = mmap.mmap(fd, CONTROL_BYTES, prot=protection)
        finally:
            os.close(fd)
    except OSError as error:
        raise NodeUnavailableError(
            f"the node's control file {path} cannot be opened: {error.strerror}"
        ) from error
    words = memoryview(mapped).cast("Q")
    if words[MAGIC] != CONTROL_MAGIC or words[FORMAT] != CONTROL_FORMAT:
        words.release()
        mapped.close()
        raise NodeUnavailableError(
            f"{path} is not a control file of format {CONTROL_FORMAT}; "
            "does another version of kamacache run the node?"
        )
    return mapped, words


def end_serving(path: str | os.PathLike[str]) -> None:
    """Set the serve-until of a dead supervisor's control file to 0; a missing file is fine.

    Without it, processes attached to the dead node would read its memory for up to 2 s more,
    beside a successor that already takes writes.
    """
    with contextlib.suppress(OSError, ValueError):
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            if os.fstat(fd).st_size < CONTROL_BYTES:
                return
            with mmap.mmap(fd, CONTROL_BYTES) as mapped, memoryview(mapped).cast("Q") as words:
                if words[MAGIC] == CONTROL_MAGIC:
                    words[SERVE_UNTIL] = 0
        finally:
            os.close(fd)
