"""Other nodes' entries in a shard: their class, their share, versions, and what drops entries."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from kamacache.clock import VERSION_MAX, VERSIONS_AHEAD_MAX, HybridClock
from kamacache.config import EVICTIONS
from kamacache.errors import ValueTooLargeError
from kamacache.store import NEGATIVE, Held, ShardWriter, open_writer
from kamacache.store.eviction import classes_of
from kamacache.store.layout import H_STAMP
from tests.store.shards import (
    BOOT_ID,
    SEED,
    Shard,
    check_accounting,
    live_by_segment,
    segments_by_class,
    spec_of,
)

VALUE = b"m" * 200
LATER_MS = 5_000


@pytest.fixture(params=EVICTIONS)
def shard(request: pytest.FixtureRequest) -> Shard:
    return Shard(eviction=request.param)


def mirror(shard: Shard, key: bytes, value: bytes = VALUE, version: int | None = None) -> bool:
    expiry_ms = shard.clock.now_ms + LATER_MS
    return shard.writer.put(key, value, expiry_ms, version=version, mirror=True)


def mirror_segments(shard: Shard) -> int:
    return segments_by_class(shard.arena)[classes_of(shard.eviction)]


def is_mirror(shard: Shard, key: bytes) -> bool:
    held = shard.writer.held(key)
    assert held is not None
    return held.mirror


# -- one key -------------------------------------------------------------------------------


def test_a_mirror_is_found_like_any_entry_and_says_what_it_is(shard: Shard) -> None:
    assert mirror(shard, b"k", b"v", version=77)
    assert shard.writer.get(b"k") == shard.near.get(b"k") == shard.lookup.get(b"k") == b"v"
    assert shard.writer.held(b"k") == Held(b"v", LATER_MS, 77, True)
    stats = shard.writer.stats()
    assert (stats["puts"], stats["mirror_puts"], stats["items"]) == (1, 1, 1)
    assert stats["mirror_bytes"] == stats["live_bytes"] == 32
    check_accounting(shard.writer)


def test_held_tells_of_values_negatives_and_nothing(shard: Shard) -> None:
    writer, now_ms = shard.writer, shard.clock.now_ms
    writer.put(b"owned", b"v", version=5)
    writer.put(b"short", b"", now_ms + 1, version=6)
    writer.put(b"negative", b"", now_ms + 10, negative=True, version=7)
    assert writer.held(b"owned") == Held(b"v", None, 5, False)
    assert writer.held(b"short") == Held(b"", 1, 6, False)
    assert writer.held(b"negative") == Held(None, 10, 7, False)
    assert writer.held(b"absent") is None
    shard.clock.now_ms += 1
    assert writer.held(b"short") is None


def test_held_counts_as_a_use() -> None:
    shard = Shard(eviction="s3fifo")
    shard.writer.put(b"k", b"v")
    slot = next(slot for slot, word in enumerate(shard.arena.index) if word)
    levels = []
    for _ in range(5):
        levels.append(shard.arena.access[slot])
        shard.writer.held(b"k")
    assert levels == [1, 2, 3, 4, 4]


def test_a_mirror_that_never_expires_is_a_defect(shard: Shard) -> None:
    with pytest.raises(ValueError, match="must expire"):
        shard.writer.put(b"k", b"v", mirror=True)


def test_a_negative_mirror_is_one_too(shard: Shard) -> None:
    until_ms = shard.clock.now_ms + 10
    assert shard.writer.put(b"k", b"", until_ms, negative=True, mirror=True, version=9)
    assert shard.writer.get(b"k") is NEGATIVE
    assert shard.writer.held(b"k") == Held(None, 10, 9, True)
    assert shard.writer.drop_older(b"k", 10)
    assert shard.writer.get(b"k") is None


def test_mirror_and_owned_replace_each_other_in_the_other_s_class(shard: Shard) -> None:
    for number in range(6):
        assert mirror(shard, b"k", b"m%d" % number)
        assert shard.near.get(b"k") == b"m%d" % number
        assert is_mirror(shard, b"k")
        assert shard.writer.stats()["mirror_bytes"] == 32
        shard.writer.put(b"k", b"o%d" % number)
        assert shard.near.get(b"k") == b"o%d" % number
        assert not is_mirror(shard, b"k")
        assert shard.writer.stats()["mirror_bytes"] == 0
        check_accounting(shard.writer)
    assert shard.writer.items == 1


def test_put_many_over_mirrors_makes_them_owned(shard: Shard) -> None:
    keys = [b"%d" % number for number in range(100)]
    for key in keys:
        mirror(shard, key)
    shard.writer.put_many([(key, key) for key in keys])
    assert [shard.near.get(key) for key in keys] == keys
    assert not any(is_mirror(shard, key) for key in keys)
    assert shard.writer.stats()["mirror_bytes"] == 0
    check_accounting(shard.writer)


def test_a_version_refuses_only_lower_ones_whatever_the_kind(shard: Shard) -> None:
    writer, later_ms = shard.writer, shard.clock.now_ms + LATER_MS
    assert writer.put(b"k", b"owned 5", version=5)
    assert not mirror(shard, b"k", b"mirror 4", version=4)
    assert writer.held(b"k") == Held(b"owned 5", None, 5, False)
    assert mirror(shard, b"k", b"mirror 5", version=5)
    assert not writer.put(b"k", b"owned 4", version=4)
    assert writer.held(b"k") == Held(b"mirror 5", LATER_MS, 5, True)
    shard.clock.now_ms += 1
    assert mirror(shard, b"k", b"mirror 5", version=5)
    assert writer.expiry_of(b"k") == later_ms + 1


def test_a_mirror_that_expired_on_its_way_removes_the_entry(shard: Shard) -> None:
    shard.writer.put(b"k", b"old", version=3)
    assert not shard.writer.put(b"k", b"new", shard.clock.now_ms, version=4, mirror=True)
    assert shard.writer.held(b"k") is None
    check_accounting(shard.writer)


def test_a_mirror_too_large_is_an_error_and_changes_nothing(shard: Shard) -> None:
    shard.writer.put(b"k", b"old")
    with pytest.raises(ValueTooLargeError):
        mirror(shard, b"k", bytes(shard.geometry.segment_bytes))
    assert shard.writer.get(b"k") == b"old"


@pytest.mark.parametrize("eviction", EVICTIONS)
def test_without_a_share_nothing_is_stored_and_nothing_outdated_stays(eviction: str) -> None:
    shard = Shard(eviction=eviction, mirror_share=0)
    shard.writer.put(b"old", b"v", version=5)
    shard.writer.put(b"newer", b"v", version=7)
    for key in (b"absent", b"old", b"newer"):
        assert not mirror(shard, key, version=6)
    assert shard.writer.get(b"absent") is None
    assert shard.writer.get(b"old") is None
    assert shard.writer.get(b"newer") == b"v"
    assert shard.writer.stats()["mirror_puts"] == 0
    assert mirror_segments(shard) == 0
    check_accounting(shard.writer)


# -- the share -----------------------------------------------------------------------------


@pytest.mark.parametrize("eviction", EVICTIONS)
@pytest.mark.parametrize(("share", "segments"), [(1e-6, 2), (1 / 32, 2), (1 / 8, 8), (0.5, 32)])
@pytest.mark.parametrize("size", [20, 200, 1_500, 2_100, 3_900])
def test_mirrors_stay_within_their_share_and_the_last_ones_live(
    eviction: str, share: float, segments: int, size: int
) -> None:
    shard = Shard(eviction=eviction, mirror_share=share)
    most = 0
    for number in range(3_000):
        if mirror(shard, b"%08d" % number, b"v" * size):
            assert shard.lookup.get(b"%08d" % number) == b"v" * size
        if number % 7 == 0:
            most = max(most, mirror_segments(shard))
    assert most == segments
    stats = shard.writer.stats()
    assert stats["evictions"] == 0
    assert stats["mirror_evictions"] > 0
    assert (
        stats["mirror_bytes"] == stats["live_bytes"] == sum(live_by_segment(shard.arena).values())
    )
    check_accounting(shard.writer)


def test_a_flood_of_mirrors_costs_owned_entries_no_more_than_the_share(shard: Shard) -> None:
    writer = shard.writer
    while not writer.stats()["evictions"]:
        writer.put(b"owned-%d" % writer.items, VALUE)
    owned = writer.items
    for number in range(20_000):
        mirror(shard, b"mirror-%d" % number)
    left = sum(writer.get(b"owned-%d" % number) is not None for number in range(owned + 200))
    assert left >= owned * (1 - 1 / 8) - 60
    assert mirror_segments(shard) == 8
    check_accounting(writer)


def test_small_mirrors_do_not_push_owned_entries_out_of_the_index() -> None:
    shard = Shard(item_bytes_mean=1_000)
    writer = shard.writer
    slots = shard.geometry.slots
    keys = [b"owned-%d" % number for number in range(slots * 7 // 8)]
    first = slots * 5 // 8
    for key in keys[:first]:
        writer.put(key, b"v")
    assert writer.items == first
    for number in range(5_000):
        mirror(shard, b"mirror-%d" % number, b"v")
    assert all(writer.get(key) == b"v" for key in keys[:first])
    assert writer.stats()["evictions"] == 0
    assert writer.stats()["mirror_evictions"] > 0
    # Owned entries take slots from mirrors first.
    assert writer.items > slots * 7 // 8
    for key in keys[first:]:
        writer.put(key, b"v")
    assert sum(writer.get(key) == b"v" for key in keys) >= len(keys) * 0.98
    check_accounting(writer)


def test_a_mirror_is_refused_where_both_buckets_are_owned_entries() -> None:
    shard = Shard(item_bytes_mean=1 << 20)  # 16 slots
    for number in range(200):
        shard.writer.put(b"owned-%d" % number, b"v")
    assert shard.writer.items == 16
    assert not mirror(shard, b"k")
    assert shard.writer.items == 16
    kept = next(key for key, _, _ in shard.writer.walk())
    assert mirror(shard, kept)
    assert mirror(shard, b"k")  # at the other mirror's expense
    assert shard.writer.get(kept) is None
    check_accounting(shard.writer)


@pytest.mark.parametrize("mirrors_first", [True, False])
def test_owned_and_mirrors_in_turn_for_many_rounds_of_the_log(
    shard: Shard, mirrors_first: bool
) -> None:
    for number in range(12_000):
        if number % 2 == mirrors_first:
            mirror(shard, b"%d" % (number % 3_000), b"v" * (number % 2_000))
        else:
            shard.writer.put(b"%d" % (number * 7 % 3_000), b"v" * (number % 900))
        if number % 500 == 0:
            assert mirror_segments(shard) <= 8
            check_accounting(shard.writer)
    stats = shard.writer.stats()
    assert stats["evictions"] > 100
    assert stats["mirror_evictions"] > 100


def test_moving_records_together_keeps_their_class(shard: Shard) -> None:
    # Deletes at random leave holes in all segments, until records are moved together.
    writer, draw = shard.writer, random.Random(4)
    kept: dict[bytes, bool] = {}
    for number in range(16_000):
        key = b"%d" % number
        kept[key] = number % 9 == 0
        if kept[key]:
            mirror(shard, key)
        else:
            writer.put(key, VALUE)
        if len(kept) > 500:
            victim = draw.choice(list(kept))
            writer.delete(victim)
            del kept[victim]
    stats = writer.stats()
    assert stats["records_moved"] > 500
    assert stats["evictions"] == 0
    found = [key for key in kept if writer.get(key) is not None]
    assert len(found) > 150
    assert {is_mirror(shard, key) for key in found} == {True, False}
    assert all(is_mirror(shard, key) is kept[key] for key in found)
    check_accounting(writer)


def test_expired_mirrors_give_their_segments_back(shard: Shard) -> None:
    for number in range(150):
        mirror(shard, b"%d" % number)
    assert mirror_segments(shard) == 8
    shard.clock.now_ms += LATER_MS
    shard.writer.maintain()
    assert mirror_segments(shard) == 1  # the one that is open
    assert shard.writer.stats()["expired"] > 100
    check_accounting(shard.writer)


# -- the policies --------------------------------------------------------------------------


def test_mirrors_leave_no_ghosts_and_are_never_promoted() -> None:
    shard = Shard(eviction="s3fifo")
    for number in range(3_000):
        mirror(shard, b"%d" % number)
        for _ in range(4):
            shard.lookup.get(b"%d" % number)
    for number in range(3_000):
        shard.writer.put(b"%d" % number, VALUE)
    assert shard.writer.stats()["ghost_hits"] == 0


def test_a_mirror_s_hits_do_not_count_for_the_owned_entry_after_it() -> None:
    shard = Shard(eviction="s3fifo")
    mirror(shard, b"k")
    for _ in range(9):
        shard.lookup.get(b"k")
    shard.writer.put(b"k", VALUE)
    slot = next(slot for slot, word in enumerate(shard.arena.index) if word)
    assert shard.arena.access[slot] == 1


def test_the_lru_clock_stands_while_only_mirrors_are_written() -> None:
    shard = Shard()
    shard.writer.put(b"owned", b"v")
    slot = next(slot for slot, word in enumerate(shard.arena.index) if word)
    for number in range(5_000):
        mirror(shard, b"%d" % number)
    assert shard.arena.access[slot] == 255


# -- versions ------------------------------------------------------------------------------


def test_now_rises_and_is_kept_for_the_next_writer(shard: Shard) -> None:
    first, second = shard.writer.now(), shard.writer.now()
    assert 0 < first < second == shard.writer.last_version
    assert shard.arena.words[H_STAMP] >> 8 == second
    shard.writer.put(b"k", b"v")
    assert shard.writer.last_version == shard.writer.version_of(b"k") > second


def test_what_was_observed_is_below_all_that_follows_also_after_a_restart(shard: Shard) -> None:
    ahead = (time.time_ns() >> 8) + (1 << 40)
    shard.writer.observe(ahead)
    shard.writer.observe(5)
    assert shard.writer.last_version == ahead
    successor = shard.open_writer()
    assert successor.last_version == ahead
    assert successor.now() == ahead + 1
    assert shard.open_writer().now() == ahead + 2


def test_a_put_that_stores_nothing_is_a_write_later_than_all_before_it(shard: Shard) -> None:
    shard.mirror_share = 0
    writer = shard.open_writer()
    before = writer.now()
    writer.put(b"k", b"v", shard.clock.now_ms)
    assert before < writer.last_version
    before = writer.last_version
    assert not mirror(shard, b"k")
    assert before < writer.last_version


@pytest.mark.parametrize(
    "version",
    [-1, VERSION_MAX + 1, VERSION_MAX, (time.time_ns() >> 8) + VERSIONS_AHEAD_MAX + (1 << 40)],
    ids=["negative", "too large", "the last", "far ahead"],
)
def test_a_version_that_no_clock_issues_is_refused_and_changes_nothing(
    shard: Shard, version: int
) -> None:
    shard.writer.put(b"k", b"v")
    before = shard.writer.last_version
    for call in (
        lambda: shard.writer.observe(version),
        lambda: shard.writer.put(b"k", b"w", version=version),
        lambda: mirror(shard, b"k", version=version),
        lambda: shard.writer.drop_older(b"k", version),
        lambda: shard.writer.flush_older(version, 0, 100),
    ):
        with pytest.raises(OverflowError):
            call()
    assert shard.writer.get(b"k") == b"v"
    assert shard.writer.last_version == before


def test_the_greatest_version_that_is_taken_leaves_room_for_writes_here_and_elsewhere() -> None:
    wall_ns = [time.time_ns()]
    one, other = (HybridClock(wall_ns=lambda: wall_ns[0]) for _ in range(2))
    greatest = (wall_ns[0] >> 8) + VERSIONS_AHEAD_MAX
    one.observe(greatest)
    with pytest.raises(OverflowError):
        other.observe(one.next())
    wall_ns[0] += 1_000_000  # a thousand writes take a millisecond at least
    for _ in range(1_000):
        other.observe(one.next())
    assert other.next() == greatest + 1_002


def test_a_refused_put_is_observed_all_the_same(shard: Shard) -> None:
    ahead = (time.time_ns() >> 8) + (1 << 40)
    shard.writer.put(b"k", b"v", version=ahead + 1)
    shard.open_writer()
    assert not shard.writer.put(b"k", b"w", version=ahead)
    assert shard.writer.now() == ahead + 2


# -- what drops entries --------------------------------------------------------------------


def test_drop_older_drops_only_what_is_older(shard: Shard) -> None:
    writer = shard.writer
    for version, dropped in ((4, False), (5, False), (6, True)):
        writer.put(b"owned", b"v", version=5)
        mirror(shard, b"mirror", version=5)
        assert writer.drop_older(b"owned", version) is dropped
        assert writer.drop_older(b"mirror", version) is dropped
        assert (writer.get(b"owned") is None) is dropped
        assert (shard.near.get(b"mirror") is None) is dropped
    assert not writer.drop_older(b"absent", 1 << 50)
    assert writer.last_version >= 1 << 50
    assert writer.stats()["invalidated"] == 2
    assert writer.stats()["deletes"] == 0
    check_accounting(writer)


def flush(writer: ShardWriter, version: int, count: int) -> int:
    """Flush in slices; return how many there were."""
    start = slices = 0
    while start >= 0:
        start = writer.flush_older(version, start, count)
        slices += 1
    return slices


def test_a_flush_in_slices_drops_all_that_is_older_and_nothing_else(shard: Shard) -> None:
    writer = shard.writer
    for number in range(200):
        writer.put(b"o%d" % number, b"v", version=number)
        mirror(shard, b"m%d" % number, b"v", number)
        writer.put(b"n%d" % number, b"", negative=True, version=number)
    assert flush(writer, 100, 64) == -(-shard.geometry.slots // 64)
    for number in range(200):
        for kind in (b"o%d", b"m%d", b"n%d"):
            assert (writer.get(kind % number) is None) is (number < 100)
    assert writer.stats()["invalidated"] == 300
    check_accounting(writer)


@pytest.mark.parametrize("count", [1, 7, 10**9])
def test_slices_of_any_length_cover_every_slot(shard: Shard, count: int) -> None:
    for number in range(50):
        shard.writer.put(b"%d" % number, b"v", version=1)
    flush(shard.writer, 2, count)
    assert shard.writer.items == 0


def test_a_sweep_drops_owned_entries_that_are_not_to_be_kept(shard: Shard) -> None:
    writer = shard.writer
    asked: list[bytes] = []

    def keep(key: bytes) -> bool:
        asked.append(key)
        return int(key) % 2 == 0

    for number in range(200):
        if number < 150:
            writer.put(b"%d" % number, b"v" * number)
        else:
            mirror(shard, b"%d" % number)
    start = 0
    while start >= 0:
        start = writer.sweep(keep, start, 100)
    assert sorted(asked, key=int) == [b"%d" % number for number in range(150)]
    for number in range(200):
        assert (writer.get(b"%d" % number) is None) is (number < 150 and number % 2 == 1)
    assert writer.stats()["swept"] == 75
    assert writer.stats()["evictions"] == 0
    check_accounting(writer)


# -- the next writer -----------------------------------------------------------------------


def test_the_next_writer_knows_the_mirrors(shard: Shard) -> None:
    for number in range(120):
        mirror(shard, b"m%d" % number)
        shard.writer.put(b"o%d" % number, VALUE)
    before = shard.writer.stats()["mirror_bytes"]
    successor = shard.open_writer()
    assert successor.stats()["mirror_bytes"] == before > 0
    assert all(is_mirror(shard, b"m%d" % number) for number in range(120))
    assert not any(is_mirror(shard, b"o%d" % number) for number in range(120))
    for number in range(500):
        assert mirror(shard, b"n%d" % number)
        assert mirror_segments(shard) <= 8
    check_accounting(successor)


def test_a_next_writer_with_a_smaller_share_shrinks_to_it(shard: Shard) -> None:
    shard.mirror_share = 0.5
    shard.open_writer()
    for number in range(500):
        mirror(shard, b"%d" % number)
    assert mirror_segments(shard) > 20
    shard.mirror_share = 1 / 8
    shard.open_writer()
    mirror(shard, b"k")
    assert mirror_segments(shard) <= 8
    shard.mirror_share = 0
    writer = shard.open_writer()
    for number in range(5_000):  # works on, and what has expired gives its room back
        writer.put(b"owned-%d" % number, VALUE)
    shard.clock.now_ms += LATER_MS
    for number in range(5_000):
        writer.put(b"owned-%d" % number, VALUE)
    assert mirror_segments(shard) == 0
    check_accounting(writer)


def test_the_files_of_a_group_know_its_share(tmp_path: Path) -> None:
    for share, stored in ((0, False), (1 / 8, True)):
        spec = spec_of(mirror_share=share)
        writer = open_writer(str(tmp_path), spec, 0, 1, SEED, BOOT_ID)
        assert writer.put(b"k", b"v", 1 << 40, mirror=True) is stored
        writer.close()
