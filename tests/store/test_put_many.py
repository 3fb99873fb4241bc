"""`ShardWriter.put_many`: the same as put after put, in one run of records."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kamacache.errors import ValueTooLargeError
from kamacache.store.layout import H_STAMP
from tests.store.shards import Shard, check_accounting

BATCHES = st.lists(
    st.dictionaries(
        st.binary(min_size=1, max_size=20), st.binary(max_size=300), min_size=1, max_size=60
    ),
    min_size=1,
    max_size=12,
)


@pytest.mark.parametrize("eviction", ["lru", "s3fifo"])
def test_many_are_read_back_and_replace_one_another(eviction: str) -> None:
    shard = Shard(eviction=eviction, cache_bytes=1 << 20)

    @settings(max_examples=40, deadline=None)
    @given(BATCHES)
    def check(batches: list[dict[bytes, bytes]]) -> None:
        for batch in batches:
            shard.writer.put_many(list(batch.items()))
            for key, value in batch.items():
                assert shard.lookup.get(key) == value
        check_accounting(shard.writer)

    check()


@pytest.mark.parametrize("eviction", ["lru", "s3fifo"])
def test_runs_through_a_full_log_keep_the_accounts_right(eviction: str) -> None:
    shard = Shard(eviction=eviction)
    draw = random.Random(7)
    written: dict[bytes, bytes] = {}
    for _ in range(400):
        batch = {
            b"%d" % draw.randrange(3_000): draw.randbytes(draw.randrange(900)) for _ in range(40)
        }
        shard.writer.put_many(list(batch.items()))
        written |= batch
    for key, value in written.items():
        assert shard.lookup.get(key) in (None, value)
    assert shard.writer.stats()["evictions"] > 0
    assert shard.writer.stats()["puts"] == 400 * 40 - _repeats(7)
    check_accounting(shard.writer)
    successor = shard.open_writer()
    assert successor.items == shard.writer.items
    check_accounting(successor)


def _repeats(seed: int) -> int:
    """Return how many keys of the run above were drawn twice for one batch."""
    draw = random.Random(seed)
    repeats = 0
    for _ in range(400):
        keys = []
        for _ in range(40):
            keys.append(draw.randrange(3_000))
            draw.randbytes(draw.randrange(900))
        repeats += 40 - len(set(keys))
    return repeats


def test_keys_that_crowd_two_buckets_find_places_or_make_room() -> None:
    shard = Shard(item_bytes_mean=1 << 20)  # 16 slots
    keys = [b"%d" % number for number in range(40)]
    shard.writer.put_many([(key, key) for key in keys])
    found = [key for key in keys if shard.lookup.get(key) == key]
    assert 8 <= len(found) == shard.writer.items <= 16
    assert all(shard.lookup.get(key) in (None, key) for key in keys)
    check_accounting(shard.writer)


def test_a_value_too_large_is_an_error_before_anything_is_stored() -> None:
    shard = Shard()
    too_large = bytes(shard.geometry.segment_bytes)
    with pytest.raises(ValueTooLargeError):
        shard.writer.put_many([(b"a", b"1"), (b"b", too_large), (b"c", b"3")])
    assert shard.writer.items == 0
    largest = too_large[: shard.geometry.value_bytes_beside(1024)]
    shard.writer.put_many([(b"a", b"1"), (b"k" * 1024, largest)])
    assert shard.lookup.get(b"k" * 1024) == largest


def test_a_common_expiry_holds_for_all() -> None:
    shard = Shard()
    until_ms = shard.clock.now_ms + 500
    shard.writer.put_many([(b"%d" % number, b"v") for number in range(100)], until_ms)
    assert all(shard.writer.expiry_of(b"%d" % number) == until_ms for number in range(100))
    shard.clock.now_ms += 500
    assert not any(shard.lookup.get(b"%d" % number) for number in range(100))
    shard.writer.put_many([(b"late", b"v")], until_ms)
    assert shard.lookup.get(b"late") is None


def test_versions_of_a_run_rise_and_are_the_high_water_mark() -> None:
    shard = Shard()
    shard.writer.put(b"first", b"v")
    shard.writer.put_many([(b"%d" % number, b"v") for number in range(50)])
    versions = [shard.writer.version_of(b"%d" % number) for number in range(50)]
    assert versions == sorted(set(versions))
    assert shard.writer.version_of(b"first") < versions[0]
    assert shard.arena.words[H_STAMP] >> 8 == versions[-1]
    shard.writer.put(b"0", b"w")
    assert shard.writer.version_of(b"0") > versions[-1]
