"""`kamacache.store.batches`: many keys at once answer as one by one."""

from __future__ import annotations

import random
from typing import Any

from kamacache.clock import boottime_ms
from kamacache.config import GroupSpec
from kamacache.store import NEGATIVE, private_shard, touch_of
from kamacache.store.batches import make_batch_lookup


def made(serve_until: memoryview | None = None, **settings: Any) -> tuple[Any, Any, Any]:
    spec = GroupSpec(name="g", cache_bytes=1 << 20, **settings)
    writer, lookup = private_shard(spec)
    batch = make_batch_lookup(
        (writer.arena,),
        hash_seed=writer._seed,
        touch=touch_of(spec.eviction),
        one=lookup.get,
        serve_until=serve_until,
    )
    return writer, lookup, batch


def test_a_batch_answers_what_single_lookups_answer() -> None:
    writer, lookup, batch = made()
    draw = random.Random(3)
    keys = [b"key-%d" % i for i in range(6_000)]
    for key in keys:  # more than fit: evicted ones, and ones in their second bucket
        expiry_ms = boottime_ms() + 600_000 if draw.random() < 0.2 else 0
        writer.put(key, key * draw.randrange(9), expiry_ms, negative=draw.random() < 0.1)
    for key in draw.sample(keys, 500):
        writer.delete(key)
    asked = [*keys, b"absent", b"", keys[0]]
    expected = [lookup.get(key) for key in asked]
    assert batch.get(asked) == expected
    kinds = [type(answer) for answer in expected]
    assert all(kinds.count(kind) > 50 for kind in (bytes, type(None), type(NEGATIVE)))
    writer.close()


def test_hits_are_counted_once() -> None:
    writer, lookup, batch = made()
    writer.put(b"plain", b"1")
    writer.put(b"expires", b"2", boottime_ms() + 600_000)
    batch.get([b"plain", b"plain", b"expires", b"absent"])
    assert batch.hits() + sum(lookup.counts()) == 3
    writer.close()


def test_a_hit_is_noted_for_eviction() -> None:
    writer, _, batch = made(eviction="s3fifo")
    writer.put(b"k", b"v")
    before = bytes(writer.arena.access)
    batch.get([b"k"])
    assert bytes(writer.arena.access) != before
    writer.close()


def test_nothing_is_read_past_serve_until() -> None:
    word = memoryview(bytearray(8)).cast("Q")
    writer, _, batch = made(word)
    writer.put(b"k", b"v")
    assert batch.get([b"k", b"absent"]) == [None, None]
    assert batch.hits() == 0
    word[0] = boottime_ms() + 60_000
    assert batch.get([b"k"]) == [b"v"]
    writer.close()
