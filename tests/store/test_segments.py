"""`kamacache.store.segments`: where records go, what is counted, what expires."""

from __future__ import annotations

import pytest

from kamacache.store.arena import private_arena
from kamacache.store.layout import (
    GENERATION_MAX,
    NEVER,
    PLACE_MASK,
    S_EXPIRY,
    S_STATE,
    SEGMENT_WORDS,
    STATE_CLOSED,
    STATE_FREE,
    STATE_OPEN,
    geometry,
)
from kamacache.store.segments import _TAIL_SEGMENTS_MAX, SegmentLog
from tests.store.shards import Shard

SIZES = geometry(2048, 128)
SEGMENT = SIZES.segment_bytes


class Log:
    """A segment log of one class over an empty arena."""

    def __init__(self) -> None:
        self.arena = private_arena(SIZES)
        self.log = SegmentLog(self.arena, 1)

    def append(self, size: int, expiry_ms: int = 0) -> int:
        """Append a record; return the segment that took it."""
        word = self.log.append(0, bytes(size), size, expiry_ms)
        return ((word & PLACE_MASK) * 8 - SIZES.log_offset) // SEGMENT

    def row(self, segment: int, word: int) -> int:
        return self.arena.words[SIZES.table_word + segment * SEGMENT_WORDS + word]


@pytest.fixture
def log() -> Log:
    return Log()


def test_records_fill_a_segment_to_its_last_byte(log: Log) -> None:
    assert {log.append(SEGMENT // 4) for _ in range(4)} == {0}
    assert log.append(SEGMENT) == 1
    assert log.log.span(0)[1] - log.log.span(0)[0] == SEGMENT >> 3
    assert log.log.live_of(0) == log.log.live_of(1) == SEGMENT
    assert log.log.live_bytes == 2 * SEGMENT


def test_the_room_a_large_record_leaves_takes_smaller_ones(log: Log) -> None:
    assert log.append(SEGMENT // 2) == 0
    assert log.append(SEGMENT - 8) == 1
    assert log.append(SEGMENT // 4) == 0
    assert log.append(SEGMENT // 4) == 0
    assert log.append(8) == 1
    assert len(log.log.free) == SIZES.segments - 2


def test_a_tail_into_which_nothing_fits_is_closed_in_the_end(log: Log) -> None:
    assert log.append(SEGMENT // 4) == 0
    for _ in range(_TAIL_SEGMENTS_MAX + 3):
        log.append(SEGMENT // 2 + SEGMENT // 3)  # more than a tail has room for
    assert log.row(0, S_STATE) & 0xFF == STATE_CLOSED
    assert log.log.closed[0][0] == 0  # the oldest, though closed late
    orders = [log.row(segment, 1) for segment in log.log.closed[0]]
    assert orders == sorted(orders)


def test_mirrors_have_a_class_after_the_policy_s_and_leave_no_tail(log: Log) -> None:
    mirrors = log.log.mirrors
    assert mirrors == 1
    log.log.append(mirrors, bytes(SEGMENT // 2), SEGMENT // 2, 50)
    log.log.append(mirrors, bytes(SEGMENT - 8), SEGMENT - 8, 50)
    assert list(log.log.closed[mirrors]) == [0]
    assert log.log.segments_of(mirrors) == 2
    assert log.log.mirror_bytes() == SEGMENT // 2 + SEGMENT - 8
    log.log.close_mirrors()
    log.log.close_mirrors()
    assert list(log.log.closed[mirrors]) == [0, 1]
    assert log.log.segments_of(mirrors) == 2
    assert log.log.segments_of(0) == 0
    assert log.log.class_of(1) == mirrors
    assert [log.log.expired(50) for _ in range(3)] == [0, 1, None]


def test_kill_takes_a_record_from_its_own_segment(log: Log) -> None:
    word = log.log.append(0, bytes(800), 800, 0)
    log.append(1_600)
    log.log.kill(word & PLACE_MASK, 800)
    assert log.log.live_of(0) == log.log.live_bytes == 1_600


def test_release_raises_the_generation_and_wraps_past_zero(log: Log) -> None:
    log.append(SEGMENT)
    log.append(SEGMENT)
    assert log.row(0, S_STATE) >> 16 & 0xFFFF == 1
    log.log.release(0)
    assert log.row(0, S_STATE) == 2 << 16 | STATE_FREE
    log.append(SEGMENT)
    log.arena.words[SIZES.table_word + SEGMENT_WORDS + S_STATE] = (
        GENERATION_MAX << 16 | STATE_CLOSED
    )
    log.log.release(1)
    assert log.row(1, S_STATE) >> 16 == 1
    assert log.log.live_bytes == SEGMENT


def test_the_latest_expiry_is_that_of_all_records_and_never_wins(log: Log) -> None:
    expected = ((5,), 5), ((9, 5), 9), ((5, 9), 9), ((0,), NEVER), ((0, 5), NEVER), ((5, 0), NEVER)
    for segment, (expiries, latest) in enumerate(expected):
        for expiry_ms in expiries:
            assert log.append(SEGMENT // len(expiries), expiry_ms) == segment
        assert log.row(segment, S_EXPIRY) == latest


def test_expired_segments_are_found_once_and_in_order(log: Log) -> None:
    for expiry_ms in (30, 10, 0, 20, 40):
        log.append(SEGMENT, expiry_ms)
    log.append(8)  # closes the last
    assert log.log.expired(9) is None
    assert [log.log.expired(35) for _ in range(4)] == [1, 3, 0, None]
    assert log.log.expired(40) == 4
    assert log.log.expired(1 << 50) is None


def test_a_segment_in_use_again_is_not_expired_by_its_past(log: Log) -> None:
    log.append(SEGMENT, 10)
    log.append(SEGMENT)
    log.log.release(0)
    while log.append(SEGMENT, 1_000) != 0:
        pass
    log.append(8) if log.log.free else log.log._retire(0, log.log.open[0])  # type: ignore[arg-type]
    assert log.log.expired(500) is None


def test_the_expiry_heap_is_bounded() -> None:
    shard = Shard()
    for number in range(30_000):
        shard.writer.put(b"%d" % number, b"v" * 500, shard.clock.now_ms + 10**9 + number)
    assert shard.writer.stats()["segments_freed"] > 1_000
    assert len(shard.writer._log._expiring) <= 4 * shard.geometry.segments
    shard.clock.now_ms += 2 * 10**9
    for _ in range(10):
        shard.writer.maintain()
    assert shard.writer.items < 20  # what is in open segments


def test_a_new_log_takes_over_order_classes_and_counts() -> None:
    shard = Shard(eviction="s3fifo")
    for number in range(3_000):
        shard.writer.put(b"%d" % (number % 900), b"v" * (number % 700))
        shard.writer.get(b"%d" % (number % 50))
        shard.writer.get(b"%d" % (number % 50))
    old = shard.writer._log
    orders = {
        s: shard.arena.words[SIZES.table_word + s * 4 + S_STATE] >> 32
        for s in range(SIZES.segments)
    }
    new = SegmentLog(shard.arena, 2)
    assert new.live_bytes == old.live_bytes
    assert set(new.free) == set(old.free)
    assert new.open == [None, None, None]
    for segment_class in (0, 1):
        closed = list(new.closed[segment_class])
        assert set(old.closed[segment_class]) <= set(closed)
        assert [orders[segment] for segment in closed] == sorted(orders[s] for s in closed)
        assert all(new.class_of(segment) == segment_class for segment in closed)
    states = [
        shard.arena.words[SIZES.table_word + s * 4 + S_STATE] & 0xFF for s in range(SIZES.segments)
    ]
    assert STATE_OPEN not in states
    assert states.count(STATE_FREE) == len(new.free)
