"""`kamacache.store.eviction`: what lives on, and the ghosts of what does not."""

from __future__ import annotations

import random

import pytest

from kamacache.store.eviction import (
    Ghosts,
    LruPolicy,
    S3FifoPolicy,
    classes_of,
    make_policy,
    touch_of,
)
from kamacache.store.segments import SegmentLog
from tests.store.shards import Shard, check_accounting

VALUE = b"v" * 200


def fill(shard: Shard, prefix: bytes, count: int) -> None:
    for number in range(count):
        shard.writer.put(prefix + b"%d" % number, VALUE)


@pytest.mark.parametrize("eviction", ["lru", "s3fifo"])
def test_what_is_read_again_and_again_survives_a_scan(eviction: str) -> None:
    shard = Shard(eviction=eviction)
    fill(shard, b"hot-", 50)
    for number in range(20_000):
        shard.writer.put(b"scan-%d" % number, VALUE)
        assert shard.lookup.get(b"hot-%d" % (number % 50)) == VALUE
    assert shard.writer.stats()["evictions"] > 15_000
    check_accounting(shard.writer)


@pytest.mark.parametrize("eviction", ["lru", "s3fifo"])
def test_near_hits_count_as_use(eviction: str) -> None:
    shard = Shard(eviction=eviction)
    fill(shard, b"hot-", 50)
    for number in range(20_000):
        shard.writer.put(b"scan-%d" % number, VALUE)
        assert shard.near.get(b"hot-%d" % (number % 50)) == VALUE
    assert shard.near.counts()[0] > 15_000


def test_lru_evicts_what_was_not_used_for_longest() -> None:
    shard = Shard()
    fill(shard, b"old-", 300)
    fill(shard, b"kept-", 300)
    numbers = random.Random(2)
    for number in range(900):
        shard.writer.put(b"new-%d" % number, VALUE)
        for _ in range(3):
            shard.lookup.get(b"kept-%d" % numbers.randrange(300))
    old = sum(shard.lookup.get(b"old-%d" % number) is not None for number in range(300))
    kept = sum(shard.lookup.get(b"kept-%d" % number) is not None for number in range(300))
    assert kept >= 270
    assert old <= 30


def test_the_lru_clock_never_makes_an_entry_look_like_an_empty_slot() -> None:
    shard = Shard()
    fill(shard, b"", 400)
    policy = shard.writer._policy
    for _ in range(600):
        policy.segment_filled()
    levels = bytes(shard.arena.access)
    assert levels.count(1) == 400
    assert levels.count(0) == shard.geometry.slots - 400


def test_lru_with_nothing_but_fresh_entries_still_evicts() -> None:
    shard = Shard()
    for number in range(5_000):
        shard.writer.put(b"%d" % number, VALUE)
        shard.arena.access[:] = bytes(255 if level else 0 for level in bytes(shard.arena.access))
    assert shard.lookup.get(b"4999") == VALUE
    check_accounting(shard.writer)


def test_a_key_with_a_ghost_enters_the_main_queue() -> None:
    shard = Shard(eviction="s3fifo")
    fill(shard, b"", 5_000)
    gone = next(n for n in range(4_999, 0, -1) if shard.writer.get(b"%d" % n) is None)
    shard.writer.put(b"%d" % gone, VALUE)
    assert shard.writer.stats()["ghost_hits"] == 1
    # It outlives what came with it in the small queue.
    fill(shard, b"more-", 400)
    assert shard.writer.get(b"%d" % gone) == VALUE


def test_a_key_hit_once_in_the_small_queue_is_dropped_and_hit_twice_promoted() -> None:
    for hits, survives in ((0, False), (1, False), (2, True), (9, True)):
        shard = Shard(eviction="s3fifo")
        fill(shard, b"fill-", 3_000)
        shard.writer.put(b"k", VALUE)
        for _ in range(hits):
            assert shard.lookup.get(b"k") == VALUE
        fill(shard, b"more-", 400)
        assert (shard.lookup.get(b"k") is not None) is survives, hits


@pytest.mark.parametrize("eviction", ["lru", "s3fifo"])
def test_every_access_byte_has_a_verdict_and_a_touch_that_marks_no_empty_slot(
    eviction: str,
) -> None:
    shard = Shard(eviction=eviction)
    fill(shard, b"", 100)
    classes = classes_of(eviction)
    policy = make_policy(eviction, shard.arena, SegmentLog(shard.arena, classes))
    assert len(touch_of(eviction)) == 256
    assert 0 not in touch_of(eviction)
    for segment_class in range(classes):
        verdicts = policy.verdicts(segment_class)
        assert len(verdicts) == 256
        # Level 0 is an empty slot's, and no record is named by one.
        for verdict in verdicts[1:]:
            assert verdict is None or (verdict[0] < classes and verdict[1] > 0)


def test_ghosts_are_found_once_and_the_oldest_of_a_bucket_goes() -> None:
    ghosts = Ghosts(16)  # one bucket
    digests = [number << 32 | number for number in range(1, 18)]
    for digest in digests:
        ghosts.add(digest)
    assert not ghosts.take(digests[0])
    assert all(ghosts.take(digest) for digest in digests[1:])
    assert not any(ghosts.take(digest) for digest in digests)


def test_a_ghost_of_no_high_bits_is_one_too() -> None:
    ghosts = Ghosts(1)
    assert not ghosts.take(5)
    ghosts.add(5)
    assert ghosts.take(5)
    assert not ghosts.take(5)


def test_the_policies_say_what_they_are() -> None:
    assert (classes_of("lru"), classes_of("s3fifo")) == (LruPolicy.classes, S3FifoPolicy.classes)
    assert LruPolicy.fresh
    assert S3FifoPolicy.fresh
