"""Single-instance mode: the same shard in private memory of this process, its getters run here.

*Process*: any program without a node. *Owns*: one shard per group, mapped MAP_PRIVATE, so that a
preloaded server that forks has copies and never a memory shared by accident: its writers would not
know of each other. *Invariants*: the shard's writer is for one thread at a time and is called
with the lock of the group's `FlightTable` held; lookups take no lock, as in any attached process.
Because a set or delete is applied and the key's flight taken out under one hold of that lock, no
load that began before it is kept after it.

Calls that cannot wait (set, delete, stats) hold the lock for microseconds; their async twins do
the same and need no executor. A group must not be called from a signal handler or a ``__del__``,
which may interrupt the thread that holds it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kamacache.clock import boottime_ms
from kamacache.errors import ValueTooLargeError
from kamacache.getters import Loaded
from kamacache.limits import MAINTAIN_EVERY_S
from kamacache.local.engine import EngineUser
from kamacache.local.loads import Loads
from kamacache.store import Answer, NearCache, Negative, private_shard


class SingleEngine:
    """Answers one group from this process's own memory."""

    def __init__(self, group: EngineUser) -> None:
        self._group = group
        self._spec = group.spec
        self._near: NearCache | None = None
        if group.near_cache_items:
            self._near = NearCache(group.near_cache_items, group.near_cache_bytes)
        self._writer, self._lookup = private_shard(self._spec, near=self._near, ends=group.get_ends)
        self._maintained_s = time.monotonic()
        self._begin_counts()
        self._loads = _SingleLoads(group, self)
        self._table = self._loads.table
        self._lock = self._table.lock

    @property
    def lookup(self) -> Callable[[str | bytes], Answer]:
        """Near cache and memory only, never blocks; None: ask by `get`."""
        return self._lookup.get

    def lookup_many(self, keys: Sequence[str | bytes]) -> list[Answer]:
        """Look several keys up in memory, in their order."""
        return self._lookup.many(keys)

    @property
    def direct(self) -> Callable[..., Any] | None:
        """The group's own ``get`` in one frame, where it has one."""
        return self._lookup.direct

    # -- keeping, for the loads -----------------------------------------------------------------

    def find(self, key: bytes) -> Answer:
        """Return what is kept. Lock held."""
        found = self._writer.get(key)
        if found is None:
            self._counts["misses"] += 1
        elif isinstance(found, Negative):
            self._counts["negative_hits"] += 1
        else:
            self._counts["memory_hits"] += 1
        return found

    def keep(self, key: bytes, loaded: Loaded) -> None:
        """Keep a loaded value, or for ``negative_ttl`` that there is none. Lock held."""
        if loaded is None:
            if self._spec.negative_ttl_ms:
                expiry_ms = boottime_ms() + self._spec.negative_ttl_ms
                self._writer.put(key, b"", expiry_ms, negative=True)
        else:
            try:
                self._writer.put(key, loaded, self._expiry_ms(None))
            except ValueTooLargeError:  # its askers get it, the next one loads it again
                self._counts["loads_not_kept"] += 1
        self._maintain()

    # -- calls ----------------------------------------------------------------------------------

    def get(self, key: bytes, deadline_s: float | None) -> bytes | None:
        """Return the value, loaded if need be; None: not found."""
        return self._loads.get(key, deadline_s)

    def get_many(self, keys: Sequence[bytes], deadline_s: float | None) -> dict[bytes, bytes]:
        """Return the values of those found."""
        return self._loads.get_many(keys, deadline_s)

    def set(self, key: bytes, value: bytes, ttl_ms: int | None, deadline_s: float | None) -> None:
        """Keep a value; raises `ValueTooLargeError`, and then nothing has changed."""
        with self._lock:
            self._put(key, value, self._expiry_ms(ttl_ms))
            self._maintain()

    def set_many(
        self, items: Mapping[bytes, bytes], ttl_ms: int | None, deadline_s: float | None
    ) -> None:
        """Keep several values; one that is too large raises before any is kept."""
        with self._lock:
            self._writer.put_many(list(items.items()), self._expiry_ms(ttl_ms))
            for key in items:
                self._table.detach(key)
            self._counts["sets"] += len(items)
            self._maintain()

    def delete(self, key: bytes, deadline_s: float | None) -> bool:
        """Drop a key; tell whether a value was there."""
        with self._lock:
            self._maintain()
            return self._drop(key)

    def delete_many(self, keys: Sequence[bytes], deadline_s: float | None) -> int:
        """Drop several keys; return how many had a value."""
        with self._lock:
            self._maintain()
            return sum([self._drop(key) for key in keys])

    def stats(self, deadline_s: float | None = None) -> dict[str, Any]:
        """Return what happened in this process since it began, or since its fork."""
        with self._lock:
            self._maintain()
            counts = dict(self._counts)
            kept = self._writer.stats()
            loads = dict(self._table.counts)
            loading = len(self._table)
        near, memory, negative = self._reads()
        near_hits = near
        memory_hits = counts["memory_hits"] + memory
        negative_hits = counts["negative_hits"] + negative
        gets = near_hits + memory_hits + negative_hits + counts["misses"]
        return {
            "mode": "single",
            "gets": gets,
            "hits": near_hits + memory_hits,
            "near_hits": near_hits,
            "memory_hits": memory_hits,
            "negative_hits": negative_hits,
            "misses": counts["misses"],
            **loads,
            "loads_not_kept": counts["loads_not_kept"],
            "loading": loading,
            "sets": counts["sets"],
            "deletes": counts["deletes"],
            "items": kept["items"],
            "live_bytes": kept["live_bytes"],
            "capacity_bytes": self._writer.arena.geometry.total_bytes,
            "evictions": kept["evictions"] - self._store_base["evictions"],
            "expired": kept["expired"] - self._store_base["expired"],
            "near_items": len(self._near.entries) if self._near else 0,
            "near_bytes": self._near.bytes if self._near else 0,
        }

    async def aget(self, key: bytes, deadline_s: float | None) -> bytes | None:
        """As `get`, without blocking the loop."""
        return await self._loads.aget(key, deadline_s)

    async def aget_many(
        self, keys: Sequence[bytes], deadline_s: float | None
    ) -> dict[bytes, bytes]:
        """As `get_many`, without blocking the loop."""
        return await self._loads.aget_many(keys, deadline_s)

    async def aset(
        self, key: bytes, value: bytes, ttl_ms: int | None, deadline_s: float | None
    ) -> None:
        """As `set`."""
        self.set(key, value, ttl_ms, deadline_s)

    async def aset_many(
        self, items: Mapping[bytes, bytes], ttl_ms: int | None, deadline_s: float | None
    ) -> None:
        """As `set_many`."""
        self.set_many(items, ttl_ms, deadline_s)

    async def adelete(self, key: bytes, deadline_s: float | None) -> bool:
        """As `delete`."""
        return self.delete(key, deadline_s)

    async def adelete_many(self, keys: Sequence[bytes], deadline_s: float | None) -> int:
        """As `delete_many`."""
        return self.delete_many(keys, deadline_s)

    async def astats(self, deadline_s: float | None = None) -> dict[str, Any]:
        """As `stats`."""
        return self.stats()

    def close(self) -> None:
        """Do nothing: the memory goes with the last reference, which a load may hold."""

    def after_fork(self) -> None:
        """Begin the statistics anew in the child; its memory is a copy. Lock held."""
        if self._near is not None:
            self._near.clear()
        self._begin_counts()

    # -- with the lock held ---------------------------------------------------------------------

    def _begin_counts(self) -> None:
        self._counts = dict.fromkeys(
            ("misses", "memory_hits", "negative_hits", "loads_not_kept", "sets", "deletes"), 0
        )
        self._reads_base = self._lookup.counts()
        self._store_base = self._writer.stats()

    def _reads(self) -> tuple[int, int, int]:
        near, memory, negative = self._lookup.counts()
        near_base, memory_base, negative_base = self._reads_base
        return near - near_base, memory - memory_base, negative - negative_base

    def _expiry_ms(self, ttl_ms: int | None) -> int:
        ttl_ms = self._spec.ttl_ms if ttl_ms is None else ttl_ms
        return 0 if ttl_ms is None else boottime_ms() + ttl_ms

    def _put(self, key: bytes, value: bytes, expiry_ms: int) -> None:
        self._writer.put(key, value, expiry_ms)
        self._table.detach(key)
        self._counts["sets"] += 1

    def _drop(self, key: bytes) -> bool:
        self._table.detach(key)
        self._counts["deletes"] += 1
        return self._writer.delete(key)

    def _maintain(self) -> None:
        now_s = time.monotonic()
        if now_s - self._maintained_s >= MAINTAIN_EVERY_S:
            self._maintained_s = now_s
            self._writer.maintain()


class _SingleLoads(Loads):
    """The loads of a `SingleEngine`, which tells it of forks."""

    def __init__(self, group: EngineUser, engine: SingleEngine) -> None:
        self._engine = engine
        super().__init__(group, engine)

    def after_fork(self) -> None:
        """Begin anew in the child."""
        super().after_fork()
        self._engine.after_fork()
