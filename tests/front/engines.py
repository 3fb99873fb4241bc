"""An engine for the front's tests: a real shard in this process, and a getter on the test's loop.

It stands where `kamacache.local`'s attachment stands in a node; tests/integration has the real one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from kamacache.clock import boottime_ms
from kamacache.config import GroupSpec
from kamacache.errors import DeadlineExceededError
from kamacache.store import private_shard, touch_of
from kamacache.store.entries import make_entry_lookup
from kamacache.store.served import make_served_reads

Getter = Callable[[bytes], Awaitable[bytes | None]]


class ShardEngine:
    """One group whose worker is the calling process itself."""

    def __init__(self, name: str = "scores", getter: Getter | None = None) -> None:
        self.name = name
        self.getter = getter
        self.writer, plain = private_shard(GroupSpec(name=name, cache_bytes=4 << 20))
        arenas, seed = (self.writer.arena,), self.writer._seed
        self.lookup_many = plain.many
        self.served = make_served_reads(arenas, hash_seed=seed, touch=touch_of("lru"))
        self.lookup_entry = make_entry_lookup(arenas, hash_seed=seed)
        self.loads: list[bytes] = []
        self.deadlines_s: list[float | None] = []

    async def aget(self, key: bytes, deadline_s: float | None) -> bytes | None:
        self.deadlines_s.append(deadline_s)
        if self.getter is None:
            return None
        self.loads.append(key)
        left_s = None if deadline_s is None else deadline_s - time.monotonic()
        try:
            value = await asyncio.wait_for(self.getter(key), left_s)
        except TimeoutError as error:
            raise DeadlineExceededError("too late", group=self.name) from error
        if value is not None:
            self.writer.put(key, value)
        return value

    async def aget_many(
        self, keys: Sequence[bytes], deadline_s: float | None
    ) -> dict[bytes, bytes]:
        found = {key: await self.aget(key, deadline_s) for key in keys}
        return {key: value for key, value in found.items() if value is not None}

    async def aset(
        self, key: bytes, value: bytes, ttl_ms: int | None, deadline_s: float | None
    ) -> None:
        self.deadlines_s.append(deadline_s)
        self.writer.put(key, value, 0 if ttl_ms is None else boottime_ms() + ttl_ms)

    async def aset_many(
        self, items: Mapping[bytes, bytes], ttl_ms: int | None, deadline_s: float | None
    ) -> None:
        for key, value in items.items():
            await self.aset(key, value, ttl_ms, deadline_s)

    async def adelete(self, key: bytes, deadline_s: float | None) -> bool:
        return self.writer.delete(key)

    async def adelete_many(self, keys: Sequence[bytes], deadline_s: float | None) -> int:
        return sum(self.writer.delete(key) for key in keys)

    async def astats(self) -> dict[str, Any]:
        return {"items": self.writer.items, "loads": len(self.loads)}
