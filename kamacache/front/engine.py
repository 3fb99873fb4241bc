"""What a front needs of a group: memory first, then the workers. `kamacache.local` provides it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from kamacache.store import Answer
from kamacache.store.entries import EntryLookup
from kamacache.store.served import ServedReads


class Engine(Protocol):
    """One group of the node, as the front's own attachment sees it.

    ``deadline_s`` is a time.monotonic(), None where the caller named none: the group's load
    timeout then holds. Raises `KamaCacheError` only. A caller that is cancelled harms nobody else.
    """

    @property
    def served(self) -> ServedReads:
        """Read memory, with TTL and version; never block. None: ask a worker."""

    @property
    def lookup_many(self) -> Callable[[Sequence[bytes]], list[Answer]]:
        """Reads near cache and memory; never blocks. One answer a key, in order."""

    @property
    def lookup_entry(self) -> EntryLookup:
        """Reads memory, with TTL and version; counts nothing, touches nothing."""

    async def aget(self, key: bytes, deadline_s: float | None) -> bytes | None:
        """Return the value, loaded where needed; None: not found."""

    async def aget_many(
        self, keys: Sequence[bytes], deadline_s: float | None
    ) -> dict[bytes, bytes]:
        """Return the values of those found."""

    async def aset(
        self, key: bytes, value: bytes, ttl_ms: int | None, deadline_s: float | None
    ) -> None:
        """Store; ``ttl_ms`` None is the group's default."""

    async def aset_many(
        self, items: Mapping[bytes, bytes], ttl_ms: int | None, deadline_s: float | None
    ) -> None:
        """Store them all."""

    async def adelete(self, key: bytes, deadline_s: float | None) -> bool:
        """Remove; return whether it was there."""

    async def adelete_many(self, keys: Sequence[bytes], deadline_s: float | None) -> int:
        """Remove them all; return how many were there."""

    async def astats(self) -> dict[str, Any]:
        """Return the group's counters and sizes over the whole node."""
