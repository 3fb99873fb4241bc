"""What a worker owes to nodes that it cannot reach, kept where its successor finds it.

*Process*: worker, in the loop's thread. A write that this node takes for an owner that is away must
reach that owner before it is asked again. The link's queue has it; but the queue dies with the
worker, and the owner would then serve what the write replaced. So what is added for a link that is
down is appended to a file beside the shards, too, which outlives the worker::

    word 0  magic      word 2  bytes of names  ─► at 512: nodes to flush whole, one a line
    word 1  format     word 3  bytes of entries ─► behind: length, msgpack; length, msgpack; ...
                       word 4  not 0: every node is to be flushed, the rest is being rewritten

*Invariants*: bytes first, then the word that counts them, so a worker that dies in between leaves
what is whole. A write is answered only when its entry is there. What does not fit any more becomes
a flush of the nodes that it was for, as in the queue itself. Nothing is taken out singly: `settle`
empties the file when no node is behind.

Not for links that are up: what a worker then has not sent yet is as old as one turn of its loop,
and mirrors that it leaves behind live for `mirror_ttl` at most. Rejected: to log every write, which
costs each set more than the rest of what it does for peers.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from typing import Final

import msgspec

from kamacache.limits import OWED_FILE_BYTES, OWED_HEAD_BYTES, OWED_NAMES_BYTES

MAGIC: Final = int.from_bytes(b"KamaOwed", "little")
FORMAT: Final = 1
ENTRIES_AT: Final = OWED_HEAD_BYTES + OWED_NAMES_BYTES
NAMES: Final = 2  # words
ENTRIES: Final = 3
EVERY: Final = 4
LENGTH_BYTES: Final = 4


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """Keys that some nodes must drop where their records are older."""

    addresses: tuple[str, ...]
    group: str
    items: list[tuple[bytes, int]]


class OwedFile:
    """One worker's file."""

    __slots__ = ("_entry_bytes", "_flush", "_map", "_words")

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open what a former worker left, or make it; raises OSError (ENOSPC ...)."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, OWED_FILE_BYTES)  # else a full tmpfs is a SIGBUS at a store
            self._map: Final = mmap.mmap(fd, OWED_FILE_BYTES)
        finally:
            os.close(fd)
        self._words: Final = memoryview(self._map)[:OWED_HEAD_BYTES].cast("Q")
        if self._words[0] != MAGIC or self._words[1] != FORMAT:
            self._words[NAMES] = self._words[ENTRIES] = self._words[EVERY] = 0
            self._words[1] = FORMAT
            self._words[0] = MAGIC
        self._entry_bytes: int = self._words[ENTRIES]
        names = bytes(self._map[OWED_HEAD_BYTES : OWED_HEAD_BYTES + self._words[NAMES]])
        self._flush = set(names.decode().split())

    @property
    def to_flush(self) -> frozenset[str] | None:
        """The nodes that are to drop all that is older than when they hear it; None: every one."""
        return None if self._words[EVERY] else frozenset(self._flush)

    def entries(self) -> Iterator[Entry]:
        """Return what is owed key by key."""
        at, end = ENTRIES_AT, ENTRIES_AT + self._entry_bytes
        while at < end:
            start = at + LENGTH_BYTES
            at = start + int.from_bytes(self._map[start - LENGTH_BYTES : start], "little")
            yield msgspec.msgpack.decode(self._map[start:at], type=Entry)

    def add(self, addresses: Sequence[str], group: str, items: Sequence[tuple[bytes, int]]) -> None:
        """Keep what these nodes are to be told."""
        left = tuple([address for address in addresses if address not in self._flush])
        if not left or self._words[EVERY]:
            return
        data = msgspec.msgpack.encode(Entry(left, group, list(items)))
        end = self._entry_bytes + LENGTH_BYTES + len(data)
        if ENTRIES_AT + end > OWED_FILE_BYTES:
            self.add_flush(left)
            return
        start = ENTRIES_AT + self._entry_bytes
        self._map[start : ENTRIES_AT + end] = len(data).to_bytes(LENGTH_BYTES, "little") + data
        self._entry_bytes = self._words[ENTRIES] = end

    def add_flush(self, addresses: Iterable[str]) -> None:
        """Keep that these nodes are to drop all."""
        for address in addresses:
            if address in self._flush or self._words[EVERY]:
                continue
            line = f"{address}\n".encode()
            start = OWED_HEAD_BYTES + self._words[NAMES]
            if start + len(line) > ENTRIES_AT:
                self._words[EVERY] = 1
                return
            self._map[start : start + len(line)] = line
            self._words[NAMES] += len(line)
            self._flush.add(address)

    def settle(self, behind: AbstractSet[str]) -> None:
        """Forget what was kept for nodes that are not behind any more."""
        if behind and not self._words[EVERY] and self._flush <= behind:
            return  # at most some entries too many
        if not (self._entry_bytes or self._flush or self._words[EVERY]):
            return
        self._words[EVERY] = 1 if behind else 0  # until the names stand again
        self._entry_bytes = self._words[ENTRIES] = self._words[NAMES] = 0
        self._flush.clear()
        names = "".join([f"{address}\n" for address in behind]).encode()
        if OWED_HEAD_BYTES + len(names) <= ENTRIES_AT:
            self._map[OWED_HEAD_BYTES : OWED_HEAD_BYTES + len(names)] = names
            self._words[NAMES] = len(names)
            self._flush.update(behind)
            self._words[EVERY] = 0

    def close(self) -> None:
        """Unmap it."""
        self._words.release()
        self._map.close()
