"""What the tests of the store share: shards with a fixed seed, a clock that stands, accounting.

*Invariant*: nothing here is random, so that a failure comes again.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kamacache.config import GroupSpec
from kamacache.store import Arena, Lookup, NearCache, ShardIdentity, ShardWriter, make_lookup
from kamacache.store.arena import private_arena
from kamacache.store.eviction import touch_of
from kamacache.store.layout import (
    PLACE_MASK,
    S_DEAD,
    S_USED,
    SEGMENT_WORDS,
    STATE_FREE,
    Geometry,
    geometry,
)

SEED = 0x5EED
BOOT_ID = "4c1b0b3e-0000-4000-8000-000000000001"


@dataclass
class Clock:
    """CLOCK_BOOTTIME as the test says."""

    now_ms: int = 1_000_000

    def ms(self) -> int:
        return self.now_ms

    def s(self) -> float:
        return self.now_ms / 1000


def spec_of(**settings: Any) -> GroupSpec:
    return GroupSpec(**{"name": "g", "cache_bytes": 2048, **settings})


def identity_of(*, seed: int = SEED, boot_id: str = BOOT_ID, **settings: Any) -> ShardIdentity:
    return ShardIdentity(spec_of(**settings), 0, 1, seed, boot_id)


@dataclass
class Shard:
    """One private shard: writer, lookups with and without near cache, one clock for all."""

    cache_bytes: int = 2048
    item_bytes_mean: int = 128
    eviction: str = "lru"
    mirror_share: float = 1 / 8
    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        self.arena = private_arena(geometry(self.cache_bytes, self.item_bytes_mean))
        self.near_cache = NearCache(1_000, 1 << 20)
        self.writer = self.open_writer()
        self.lookup = self.open_lookup()
        self.near = self.open_lookup(self.near_cache)

    def open_writer(self, arena: Arena | None = None) -> ShardWriter:
        """Open as a new writer would, after the last one died or closed."""
        self.writer = ShardWriter(
            arena or self.arena,
            group="g",
            eviction=self.eviction,
            hash_seed=SEED,
            mirror_share=self.mirror_share,
            clock_ms=self.clock.ms,
        )
        return self.writer

    def open_lookup(self, near: NearCache | None = None, **more: Any) -> Lookup:
        return make_lookup(
            (self.arena,),
            hash_seed=SEED,
            touch=touch_of(self.eviction),
            near=near,
            clock_s=self.clock.s,
            **more,
        )

    @property
    def geometry(self) -> Geometry:
        return self.arena.geometry

    @property
    def value_bytes_max(self) -> int:
        return self.geometry.value_bytes_max


def live_by_segment(arena: Arena) -> dict[int, int]:
    """Return the padded bytes of the records that the index names, by segment."""
    sizes = arena.geometry
    live = dict.fromkeys(range(sizes.segments), 0)
    for word in arena.index.tolist():
        if word:
            place = word & PLACE_MASK
            head = arena.words[place]
            size = (24 + (head & 0x7FF) + (head >> 32) + 7) & ~7
            live[((place << 3) - sizes.log_offset) // sizes.segment_bytes] += size
    return live


def counted_by_segment(arena: Arena) -> dict[int, int]:
    """Return the live bytes that the segment table claims, by segment."""
    sizes = arena.geometry
    return {
        segment: arena.words[row + S_USED] - arena.words[row + S_DEAD]
        for segment in range(sizes.segments)
        for row in (sizes.table_word + segment * SEGMENT_WORDS,)
    }


def segments_by_class(arena: Arena) -> Counter[int]:
    """Return how many segments in use each class has, from the segment table."""
    sizes = arena.geometry
    rows = (arena.words[sizes.table_word + n * SEGMENT_WORDS] for n in range(sizes.segments))
    return Counter(row >> 8 & 0xFF for row in rows if row & 0xFF != STATE_FREE)


def check_accounting(writer: ShardWriter, *, crashed: bool = False) -> None:
    """Hold the writer's counts against a walk over the index.

    After a crash in the middle of an operation live bytes may be counted that are dead, never the
    other way round; the number of items is exact always.
    """
    arena = writer.arena
    live, counted = live_by_segment(arena), counted_by_segment(arena)
    stats = writer.stats()
    assert stats["items"] == sum(1 for word in arena.index.tolist() if word)
    assert stats["live_bytes"] == sum(counted.values())
    if crashed:
        assert all(live[segment] <= counted[segment] for segment in live)
    else:
        assert live == counted
    assert stats["live_bytes"] <= arena.geometry.log_bytes
    for slot, word in enumerate(arena.index.tolist()):
        assert not word or arena.access[slot], f"entry without an access byte at {slot}"


def shm_path(root: Path, name: str) -> Path:
    path = root / name
    path.mkdir()
    return path
