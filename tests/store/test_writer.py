"""`kamacache.store.writer`: one key, the index, space, and death at every store."""

from __future__ import annotations

import itertools
import logging
import random
import time
from collections.abc import Callable

import pytest

from kamacache.clock import STAMP_SHIFT
from kamacache.config import EVICTIONS
from kamacache.errors import ValueTooLargeError
from kamacache.hashing import home_slot, second_slot, shard_hash
from kamacache.limits import KEY_BYTES_MAX
from kamacache.store import NEGATIVE, ShardWriter, published_counters
from kamacache.store.layout import (
    COUNTERS,
    EXPIRY_MS_MAX,
    GENERATION_MAX,
    GENERATION_SHIFT,
    H_STAMP,
    PLACE_MASK,
    S_STATE,
    SEGMENT_WORDS,
    STATE_FREE,
)
from tests.store.crashing import Crash, Fuse, fused
from tests.store.shards import SEED, Shard, check_accounting, live_by_segment

LATER_MS = 1 << 39


@pytest.fixture(params=EVICTIONS)
def shard(request: pytest.FixtureRequest) -> Shard:
    return Shard(eviction=request.param)


# -- one key -------------------------------------------------------------------------------


@pytest.mark.parametrize("key_bytes", [1, 7, 8, 9, 255, 256, KEY_BYTES_MAX])
def test_values_of_every_size_around_word_borders_come_back(shard: Shard, key_bytes: int) -> None:
    key = b"k" * key_bytes
    most = shard.geometry.value_bytes_beside(key_bytes)
    for value_bytes in {0, 1, 7, 8, 9, 100, most - 1, most}:
        value = bytes(range(256)) * (value_bytes // 256 + 1)
        shard.writer.put(key, value[:value_bytes])
        assert shard.writer.get(key) == shard.lookup.get(key) == value[:value_bytes]
    check_accounting(shard.writer)
    assert shard.writer.items == 1


def test_every_value_size_up_to_the_largest_comes_back(shard: Shard) -> None:
    data = random.Random(1).randbytes(shard.geometry.segment_bytes)
    for value_bytes in range(shard.value_bytes_max + 1):
        shard.writer.put(b"%08d" % (value_bytes % 50), data[:value_bytes])
        assert shard.near.get(b"%08d" % (value_bytes % 50)) == data[:value_bytes]
    check_accounting(shard.writer)


def test_a_value_too_large_raises_and_leaves_the_old_one(shard: Shard) -> None:
    shard.writer.put(b"k", b"old")
    limit = shard.geometry.value_bytes_max
    with pytest.raises(ValueTooLargeError) as caught:
        shard.writer.put(b"k", b"x" * (limit + 1))
    assert (caught.value.value_bytes, caught.value.limit_bytes) == (limit + 1, limit)
    assert shard.writer.get(b"k") == b"old"
    assert shard.writer.put(b"k", b"x" * limit)


def test_empty_absent_negative_and_deleted_are_four_things(shard: Shard) -> None:
    writer = shard.writer
    assert writer.get(b"k") is None
    writer.put(b"k", b"")
    assert writer.get(b"k") == b""
    writer.put(b"k", b"", negative=True)
    assert writer.get(b"k") is NEGATIVE
    assert writer.delete(b"k") is False
    assert writer.get(b"k") is None
    writer.put(b"k", b"v")
    assert writer.delete(b"k") is True
    assert writer.delete(b"k") is False
    check_accounting(writer)
    assert writer.items == 0


def test_an_entry_ends_at_its_expiry_and_not_before(shard: Shard) -> None:
    end = shard.clock.now_ms + 5
    shard.writer.put(b"k", b"v", end)
    shard.clock.now_ms = end - 1
    assert shard.writer.get(b"k") == b"v"
    assert shard.writer.expiry_of(b"k") == end
    shard.clock.now_ms = end
    assert shard.writer.get(b"k") is None
    assert shard.writer.delete(b"k") is False


def test_a_put_that_has_expired_already_removes_the_entry(shard: Shard) -> None:
    shard.writer.put(b"k", b"old")
    assert shard.writer.put(b"k", b"new", shard.clock.now_ms) is False
    assert shard.writer.get(b"k") is None
    check_accounting(shard.writer)


def test_an_expiry_beyond_40_bits_is_cut_to_them(shard: Shard) -> None:
    shard.writer.put(b"k", b"v", EXPIRY_MS_MAX + 99)
    assert shard.writer.expiry_of(b"k") == EXPIRY_MS_MAX
    assert shard.writer.get(b"k") == b"v"


def test_only_a_lower_version_is_refused(shard: Shard) -> None:
    writer = shard.writer
    assert writer.put(b"k", b"5", version=5)
    assert not writer.put(b"k", b"4", version=4)
    assert writer.get(b"k") == b"5"
    assert writer.put(b"k", b"5", shard.clock.now_ms + 9, version=5)
    assert writer.expiry_of(b"k") == shard.clock.now_ms + 9
    assert writer.put(b"k", b"6", version=6)
    assert writer.version_of(b"k") == 6
    assert writer.put(b"k", b"7")
    assert writer.version_of(b"k") > 1 << 40  # the clock's own


def test_the_high_water_mark_of_versions_never_goes_back(shard: Shard) -> None:
    ahead = (time.time_ns() >> 8) + (1 << 50)
    shard.writer.put(b"a", b"v", version=ahead)
    shard.writer.put(b"b", b"v", version=7)
    assert shard.arena.words[H_STAMP] >> STAMP_SHIFT == ahead
    successor = shard.open_writer()
    successor.put(b"a", b"w")
    assert successor.version_of(b"a") == ahead + 1


def test_a_key_overwritten_for_ever_stays_one_entry(shard: Shard) -> None:
    for number in range(20_000):
        shard.writer.put(b"k", b"%d" % number)
    assert shard.writer.get(b"k") == b"19999"
    assert shard.writer.items == 1
    check_accounting(shard.writer)


# -- the index -----------------------------------------------------------------------------


def crowd(shard: Shard, count: int) -> list[bytes]:
    """Return keys that all have the same two buckets."""
    slots = shard.geometry.slots
    found: list[bytes] = []
    wanted: set[int] = set()
    for number in itertools.count():
        key = b"%d" % number
        digest = shard_hash(key, SEED)
        buckets = {home_slot(digest, slots) & -8, second_slot(digest, slots) & -8}
        if not wanted and len(buckets) == 2:
            wanted = buckets
        if wanted and buckets == wanted:
            found.append(key)
        if len(found) == count:
            return found
    raise AssertionError


def test_with_both_buckets_full_the_stalest_entry_makes_room() -> None:
    shard = Shard(item_bytes_mean=1 << 20)  # 16 slots
    keys = crowd(shard, 20)
    for key in keys[:16]:
        shard.writer.put(key, key)
    stalest = next(slot for slot, word in enumerate(shard.arena.index) if word)
    shard.arena.access[stalest] = 1
    shard.writer.put(keys[16], b"new")
    assert shard.writer.get(keys[16]) == b"new"
    assert shard.writer.items == 16
    assert shard.writer.stats()["index_evictions"] == 1
    assert sum(shard.writer.get(key) is None for key in keys[:16]) == 1
    check_accounting(shard.writer)


@pytest.mark.parametrize(
    "question",
    [
        ShardWriter.get,
        ShardWriter.delete,
        ShardWriter.expiry_of,
        ShardWriter.version_of,
        lambda writer, key: writer.put(key, b"", 1),
        pytest.param(lambda writer, key: writer.version_of(key * 100), id="long key"),
    ],
)
def test_no_question_evicts_though_both_buckets_are_full(
    question: Callable[[ShardWriter, bytes], object],
) -> None:
    shard = Shard(item_bytes_mean=1 << 20)
    keys = crowd(shard, 40)
    for key in keys[:16]:
        shard.writer.put(key, key)
    for key in keys[16:]:
        assert not question(shard.writer, key)
    assert [shard.writer.get(key) for key in keys[:16]] == keys[:16]


def test_an_index_far_too_small_works(shard: Shard) -> None:
    small = Shard(item_bytes_mean=1 << 24, eviction=shard.eviction)
    for number in range(5_000):
        small.writer.put(b"%d" % (number * 7 % 1_000), b"%d" % number)
        assert small.writer.get(b"%d" % (number * 7 % 1_000)) == b"%d" % number
    assert small.writer.items == small.geometry.slots
    check_accounting(small.writer)


# -- space ---------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.01, 0.26, 0.34, 0.51, 0.9, 1.0])
def test_values_of_any_share_of_a_segment_go_round(shard: Shard, share: float) -> None:
    value = b"x" * int(shard.value_bytes_max * share)
    for number in range(2_000):
        shard.writer.put(b"%08d" % number, value)
        assert shard.writer.get(b"%08d" % number) == value
    check_accounting(shard.writer)
    # Nothing is copied round and round where that makes no room.
    assert shard.writer.stats()["records_moved"] <= 3 * 2_000


def test_mixed_sizes_leave_at_least_90_percent_of_the_log_live(shard: Shard) -> None:
    full = Shard(cache_bytes=8 << 20, item_bytes_mean=2_000, eviction=shard.eviction)
    numbers = random.Random(3)
    for number in range(12_000):
        full.writer.put(b"%08d" % number, b"v" * numbers.randint(50, 4096))
    assert full.writer.stats()["evictions"] > 3_000
    assert sum(live_by_segment(full.arena).values()) >= 0.9 * full.geometry.log_bytes


def test_deleted_space_is_used_again_without_eviction(shard: Shard) -> None:
    value = b"x" * 500
    for number in range(20_000):
        shard.writer.put(b"%d" % number, value)
        if number >= 200:
            assert shard.writer.delete(b"%d" % (number - 200))
    assert shard.writer.stats()["evictions"] == 0
    assert all(shard.writer.get(b"%d" % n) == value for n in range(19_800, 20_000))
    check_accounting(shard.writer)


def test_expired_segments_are_freed_whole_and_others_stay(shard: Shard) -> None:
    writer, clock = shard.writer, shard.clock
    writer.put(b"for ever", b"v")
    for number in range(100):
        writer.put(b"soon-%d" % number, b"x" * 1_000, clock.now_ms + 10)
    writer.put(b"later", b"v", clock.now_ms + 1_000)
    for number in range(40):
        writer.put(b"fill-%d" % number, b"x" * 1_000)
    clock.now_ms += 500
    writer.maintain()
    assert writer.stats()["expired"] >= 80
    assert writer.get(b"for ever") == writer.get(b"later") == b"v"
    assert all(writer.get(b"fill-%d" % number) for number in range(40))
    check_accounting(writer)


def test_a_first_record_without_expiry_outlives_those_after_it(shard: Shard) -> None:
    writer, clock = shard.writer, shard.clock
    for number in range(12):  # the first record of its segment, then one that expires: full
        writer.put(b"for ever %d" % number, b"v" * 2_000)
        writer.put(b"soon %d" % number, b"v" * 2_000, clock.now_ms + 10)
    clock.now_ms += 100
    writer.maintain()
    assert writer.stats()["expired"] == 0  # no segment has expired as a whole
    assert all(writer.get(b"for ever %d" % number) for number in range(12))


def test_generations_wrap_and_reads_stay_right(shard: Shard) -> None:
    words, sizes = shard.arena.words, shard.geometry
    for segment in range(sizes.segments):
        row = sizes.table_word + segment * SEGMENT_WORDS
        words[row + S_STATE] = GENERATION_MAX - 1 << 16 | STATE_FREE
    writer = shard.open_writer()
    seen = set()
    for number in range(5_000):
        key = b"%08d" % (number % 700)
        writer.put(key, b"%d" % number * 60)
        assert shard.near.get(key) == b"%d" % number * 60
        seen |= {word >> GENERATION_SHIFT & GENERATION_MAX for word in shard.arena.index if word}
    assert {GENERATION_MAX - 1, GENERATION_MAX, 1, 2} <= seen
    assert 0 not in seen
    check_accounting(writer)


@pytest.mark.parametrize(
    ("at", "word"),
    [
        *((0, word) for word in (0, (1 << 64) - 1, 1 << 40 | 5, 0x7FF, 99 << 40 | 9)),
        (1, (1 << 64) - 1),  # a slot that does not exist
    ],
)
def test_a_record_that_makes_no_sense_is_purged(
    shard: Shard, caplog: pytest.LogCaptureFixture, at: int, word: int
) -> None:
    writer = shard.writer
    for number in range(30):
        writer.put(b"%08d" % number, b"x" * 300)
    first = min(value & PLACE_MASK for value in shard.arena.index if value)
    shard.arena.words[first + at] = word
    with caplog.at_level(logging.ERROR):
        for number in range(3_000):
            writer.put(b"new-%d" % number, b"y" * 300)
    assert len(caplog.records) <= 1
    if word:
        assert len(caplog.records) == 1, "the walk of that segment must have ended"
    sizes = shard.geometry
    for slot, value in enumerate(shard.arena.index.tolist()):
        if value:
            place = value & PLACE_MASK
            segment = ((place << 3) - sizes.log_offset) // sizes.segment_bytes
            row = sizes.table_word + segment * SEGMENT_WORDS
            assert (
                shard.arena.words[row + S_STATE] >> 16 & 0xFFFF == value >> 33 & GENERATION_MAX
            ), slot
    assert writer.get(b"new-2999") == b"y" * 300


# -- counters ------------------------------------------------------------------------------


def test_maintain_publishes_the_counters(shard: Shard) -> None:
    for number in range(100):
        shard.writer.put(b"%d" % number, b"v")
    shard.writer.delete(b"5")
    shard.writer.maintain()
    published = published_counters(shard.arena)
    assert tuple(published) == COUNTERS
    assert published == shard.writer.stats()
    assert (published["items"], published["puts"], published["deletes"]) == (99, 100, 1)


def test_a_successor_counts_on_from_what_was_published(shard: Shard) -> None:
    for number in range(100):
        shard.writer.put(b"%d" % number, b"v")
    shard.writer.delete(b"5")
    shard.writer.maintain()
    before = published_counters(shard.arena)
    shard.writer.put(b"lost", b"v")  # it is killed before it publishes again
    successor = shard.open_writer()
    assert successor.stats()["items"] == 100
    successor.put(b"5", b"w")
    successor.delete(b"6")
    successor.maintain()
    after = published_counters(shard.arena)
    assert (after["puts"], after["deletes"]) == (101, 2)
    counted = [name for name in COUNTERS if name not in ("items", "live_bytes", "mirror_bytes")]
    assert all(after[name] >= before[name] for name in counted)


def test_access_bytes_that_a_reader_zeroed_harm_no_count(shard: Shard) -> None:
    for number in range(100):
        shard.writer.put(b"%d" % number, b"v")
    shard.arena.access[:] = bytes(shard.geometry.slots)
    successor = shard.open_writer()
    assert successor.items == 100
    for number in range(100):
        assert successor.delete(b"%d" % number)
    successor.maintain()
    assert published_counters(shard.arena)["items"] == 0


def test_access_bytes_of_empty_slots_are_zeroed_by_the_next_writer(shard: Shard) -> None:
    shard.writer.put(b"k", b"v")
    shard.arena.access[:] = b"\x05" * shard.geometry.slots
    assert shard.open_writer().items == 1
    assert bytes(shard.arena.access).count(0) == shard.geometry.slots - 1


# -- death at every store ------------------------------------------------------------------


def prepared(eviction: str, puts: int) -> Shard:
    shard = Shard(eviction=eviction)
    for number in range(puts):
        shard.writer.put(b"%08d" % (number % 400), b"%d-" % number * (number % 90))
        if number % 7 == 0:
            shard.writer.delete(b"%08d" % (number % 400 - 3))
        if number % 3 == 0:
            shard.writer.get(b"%08d" % (number % 50))
    for number in range(500):  # the mirrors' share is full
        shard.writer.put(b"mirror-%d" % number, b"m" * 700, LATER_MS, mirror=True)
    return shard


@pytest.mark.parametrize("eviction", EVICTIONS)
@pytest.mark.parametrize(
    "operation",
    [
        "put new",
        "put over",
        "put many",
        "mirror over",
        "put over mirror",
        "delete",
        "drop",
        "roll",
        "mirrors",
    ],
)
def test_death_at_every_store_leaves_the_old_or_the_new_and_nothing_else(
    eviction: str, operation: str
) -> None:
    shard = prepared(eviction, 6_000)
    data, access = bytes(shard.arena.data), bytes(shard.arena.access)
    before = {key: value for key, value, _ in shard.writer.walk()}
    chosen = next(key for key in before if key.startswith(b"0"))
    if operation in ("put over mirror", "drop"):
        chosen = next(key for key in before if key.startswith(b"mirror-"))
    later = shard.writer.last_version + 1
    steps: dict[str, Callable[[ShardWriter], object]] = {
        "put new": lambda writer: writer.put(b"new", b"n" * 200),
        "put over": lambda writer: writer.put(chosen, b"n" * 200),
        "put many": lambda writer: writer.put_many(
            [(b"new", b"n" * 200), (chosen, b"n" * 200)]
            + [(b"roll-%d" % n, b"n" * 900) for n in range(6)]
        ),
        "mirror over": lambda writer: writer.put(chosen, b"n" * 200, LATER_MS, mirror=True),
        "put over mirror": lambda writer: writer.put(chosen, b"n" * 200),
        "delete": lambda writer: writer.delete(chosen),
        "drop": lambda writer: writer.drop_older(chosen, later),
        # Fills a segment, so that victims are cleaned and their records moved.
        "roll": lambda writer: [writer.put(b"roll-%d" % n, b"n" * 900) for n in range(6)],
        "mirrors": lambda writer: [
            writer.put(b"roll-%d" % n, b"n" * 900, LATER_MS, mirror=True) for n in range(6)
        ],
    }
    for stores in itertools.count():
        shard.arena.data[:] = data
        shard.arena.access[:] = access
        fuse = Fuse()
        writer = shard.open_writer(fused(shard.arena, fuse))
        fuse.left, fuse.burnt = stores, 0
        try:
            steps[operation](writer)
            finished = True
        except Crash:
            finished = False
        successor = shard.open_writer()
        check_accounting(successor, crashed=True)
        for key, value, _ in successor.walk():
            new = "put" in operation or operation == "mirror over"
            new &= key in (b"new", chosen)
            allowed = {before.get(key), b"n" * 200 if new else None}
            if key.startswith(b"roll-"):
                allowed = {b"n" * 900}
            assert value in allowed
            assert shard.lookup.get(key) == value
        lost = [key for key in before if successor.get(key) is None]
        if operation in ("delete", "drop"):
            assert set(lost) <= {chosen}
            assert not finished or lost == [chosen]
        elif finished and "over" in operation:
            assert successor.get(chosen) == b"n" * 200
        # The next writer works on for more than a whole round of the log.
        if stores % 5 == 0:
            for number in range(600):
                successor.put(b"after-%d" % number, b"a" * 900)
                assert successor.get(b"after-%d" % number) == b"a" * 900
            check_accounting(successor, crashed=True)
        if finished:
            assert stores == fuse.burnt > 0
            return


def put_for_ever(writer: ShardWriter, numbers: random.Random) -> None:
    while True:
        key = b"%08d" % numbers.randrange(500)
        writer.put(key, key * numbers.randrange(1, 375))


@pytest.mark.parametrize("eviction", EVICTIONS)
def test_a_thousand_deaths_do_not_use_the_shard_up(eviction: str) -> None:
    shard = Shard(eviction=eviction)
    numbers = random.Random(5)
    for death in range(1_000):
        fuse = Fuse()
        writer = shard.open_writer(fused(shard.arena, fuse))
        fuse.left = numbers.randrange(60)
        with pytest.raises(Crash):
            put_for_ever(writer, numbers)
        if death % 50 == 0:
            check_accounting(shard.open_writer(), crashed=True)
    successor = shard.open_writer()
    check_accounting(successor, crashed=True)
    for key, value, _ in successor.walk():
        assert value == key * (len(value) // 8)
    # What the dead ones miscounted is gone after some rounds of the log.
    for number in range(20_000):
        successor.put(b"%08d" % number, b"x" * 100)
    drift = successor.stats()["live_bytes"] - sum(live_by_segment(shard.arena).values())
    assert 0 <= drift <= 4 * shard.geometry.segment_bytes
    assert successor.stats()["live_bytes"] >= 0.8 * shard.geometry.log_bytes
