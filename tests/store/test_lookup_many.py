"""`Lookup.many`: several keys at once answer as one by one, with and without a near cache."""

from __future__ import annotations

import random

import pytest

from kamacache.clock import boottime_ms
from kamacache.config import GroupSpec
from kamacache.store import NEGATIVE, Lookup, NearCache, ShardWriter, private_shard

NEAR = pytest.mark.parametrize("near", [None, 100, 10_000])


def made(near: int | None, eviction: str = "lru") -> tuple[ShardWriter, Lookup]:
    cache = None if near is None else NearCache(near, 1 << 20)
    spec = GroupSpec(name="g", cache_bytes=1 << 20, eviction=eviction)
    return private_shard(spec, near=cache)


@NEAR
def test_many_answer_what_single_lookups_answer(near: int | None) -> None:
    writer, lookup = made(near)
    draw = random.Random(3)
    keys = [b"key-%d" % i for i in range(6_000)]
    for key in keys:  # more than fit: evicted ones, and ones in their second bucket
        expiry_ms = boottime_ms() + 600_000 if draw.random() < 0.2 else 0
        writer.put(key, key * draw.randrange(9), expiry_ms, negative=draw.random() < 0.1)
    for key in draw.sample(keys, 500):
        writer.delete(key)
    asked = [*keys, b"absent", b"", keys[0]]
    expected = [lookup.get(key) for key in asked]
    assert lookup.many(asked) == lookup.many(asked) == expected
    kinds = [type(answer) for answer in expected]
    assert all(kinds.count(kind) > 50 for kind in (bytes, type(None), type(NEGATIVE)))


@NEAR
def test_a_change_is_seen_by_the_next_batch(near: int | None) -> None:
    writer, lookup = made(near)
    keys = [b"%d" % number for number in range(300)]
    writer.put_many([(key, b"old") for key in keys])
    assert lookup.many(keys) == lookup.many(keys) == [b"old"] * 300
    writer.put_many([(key, b"new") for key in keys[:100]])
    for key in keys[100:200]:
        writer.delete(key)
    assert lookup.many(keys) == [b"new"] * 100 + [None] * 100 + [b"old"] * 100


@NEAR
def test_hits_are_counted_once(near: int | None) -> None:
    writer, lookup = made(near)
    writer.put(b"plain", b"1")
    writer.put(b"expires", b"2", boottime_ms() + 600_000)
    lookup.many([b"plain", b"plain", b"expires", b"absent"])
    assert sum(lookup.counts()) == 3


@NEAR
def test_a_hit_is_noted_for_eviction(near: int | None) -> None:
    writer, lookup = made(near, "s3fifo")
    writer.put(b"k", b"v")
    before = bytes(writer.arena.access)
    lookup.many([b"k"])
    first = bytes(writer.arena.access)
    assert first != before
    lookup.many([b"k"])
    assert bytes(writer.arena.access) != first
