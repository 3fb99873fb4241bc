"""A process that dies at a chosen store: the shard's mappings, counting what is written to them.

Within one process the memory after `Crash` is what another process would find after SIGKILL: all
stores before it, none after, in the order of the program (x86-64 keeps it for other readers too).
Large copies are split, since a kill can fall into the middle of one.
"""

from __future__ import annotations

from typing import Any

from kamacache.store import Arena


class Crash(BaseException):
    """The writer is dead."""


class Fuse:
    """Burns down by one a store; at the end every store raises `Crash`."""

    def __init__(self, stores: int | None = None) -> None:
        self.left = stores
        self.burnt = 0

    def store(self) -> bool:
        """Count a store; tell whether it may still be done."""
        self.burnt += 1
        if self.left is None:
            return True
        self.left -= 1
        return self.left >= 0


class Fused:
    """A mapping or view that reads through and writes as long as the fuse burns."""

    def __init__(self, target: Any, fuse: Fuse) -> None:
        self._target = target
        self._fuse = fuse

    def __getitem__(self, at: Any) -> Any:
        found = self._target[at]
        # A part of a view is the same memory; a slice of a mapping is a copy.
        return Fused(found, self._fuse) if isinstance(found, memoryview) else found

    def __len__(self) -> int:
        return len(self._target)

    def __bytes__(self) -> bytes:
        return bytes(self._target)

    def __setitem__(self, at: Any, value: Any) -> None:
        if isinstance(at, slice):
            half = len(value) // 2
            if not self._fuse.store():
                raise Crash
            self._target[at.start : at.start + half] = value[:half]
            if not self._fuse.store():
                raise Crash
            self._target[at.start + half : at.stop] = value[half:]
        else:
            if not self._fuse.store():
                raise Crash
            self._target[at] = value


def fused(arena: Arena, fuse: Fuse) -> Arena:
    """Return the arena as a writer that will die sees it."""
    twin: Any = object.__new__(Arena)
    for name in ("data", "words", "index", "access", "access_map"):
        setattr(twin, name, Fused(getattr(arena, name), fuse))
    twin.stamps, twin.places = arena.stamps, arena.places
    twin.geometry, twin.lock_fd, twin.writable = arena.geometry, None, True
    result: Arena = twin
    return result
