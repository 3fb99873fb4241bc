"""`kamacache.store.reader`: hits, misses, and words that change in the middle of a read."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from kamacache.config import EVICTIONS
from kamacache.hashing import home_slot, second_slot, shard_hash, worker_of
from kamacache.limits import NEAR_VALID_MS_MAX, SERVE_UNTIL_BELIEVED_MS
from kamacache.store import NEGATIVE, Answer, Lookup, NearCache, make_lookup
from kamacache.store.arena import private_arena
from kamacache.store.eviction import touch_of
from kamacache.store.layout import geometry
from kamacache.store.writer import ShardWriter
from tests.store.shards import SEED, Clock, Shard


@pytest.fixture(params=EVICTIONS)
def shard(request: pytest.FixtureRequest) -> Shard:
    return Shard(eviction=request.param)


def interfered(shard: Shard, act: Callable[[], object], *, near: bool = False) -> Lookup:
    """Return a lookup whose clock, read between copy and second look, lets the writer act."""
    acts = [act]

    def clock_s() -> float:
        if acts:
            acts.pop()()
        return shard.clock.s()

    return make_lookup(
        (shard.arena,),
        hash_seed=SEED,
        touch=touch_of(shard.eviction),
        near=NearCache(10, 10_000) if near else None,
        clock_s=clock_s,
    )


def test_text_and_bytes_are_one_key(shard: Shard) -> None:
    shard.writer.put("schlüssel".encode(), b"v")
    for lookup in (shard.lookup, shard.near):
        assert lookup.get("schlüssel") == lookup.get("schlüssel".encode()) == b"v"
    assert shard.lookup.get("schlussel") is None


@pytest.mark.parametrize("near", [False, True])
@pytest.mark.parametrize("key_bytes", [1, 1_024])
def test_a_value_replaced_while_it_is_copied_is_read_anew(
    shard: Shard, near: bool, key_bytes: int
) -> None:
    key = b"k" * key_bytes
    shard.writer.put(key, b"old")
    lookup = interfered(shard, lambda: shard.writer.put(key, b"new value"), near=near)
    assert lookup.get(key) == b"new value"
    assert lookup.get(key) == b"new value"


def test_a_value_deleted_while_it_is_copied_is_absent(shard: Shard) -> None:
    shard.writer.put(b"k", b"v")
    assert interfered(shard, lambda: shard.writer.delete(b"k")).get(b"k") is None


def test_a_record_whose_segment_is_reused_while_it_is_copied_is_not_returned(shard: Shard) -> None:
    shard.writer.put(b"k", b"v" * 300)

    def churn() -> None:
        for number in range(5_000):
            shard.writer.put(b"%d" % number, b"x" * 300)

    assert interfered(shard, churn).get(b"k") is None


def test_two_failures_in_a_row_ask_the_owner(shard: Shard) -> None:
    shard.writer.put(b"k", b"0")
    calls: list[int] = []

    def clock_s() -> float:
        calls.append(1)
        shard.writer.put(b"k", b"%d" % len(calls))
        return shard.clock.s()

    lookup = make_lookup(
        (shard.arena,), hash_seed=SEED, touch=touch_of(shard.eviction), clock_s=clock_s
    )
    assert lookup.get(b"k") is None
    assert len(calls) == 2


def test_a_near_hit_is_served_only_while_the_word_stands(shard: Shard) -> None:
    changes: tuple[Callable[[], object], ...] = (
        lambda: shard.writer.put(b"k", b"2"),
        lambda: shard.writer.put(b"k", b"", negative=True),
        lambda: shard.writer.delete(b"k"),
    )
    for change in changes:
        shard.writer.put(b"k", b"1")
        assert shard.near.get(b"k") == shard.near.get(b"k") == b"1"
        change()
        assert shard.near.get(b"k") == shard.writer.get(b"k") != b"1"


def test_a_near_hit_survives_a_move_of_its_record(shard: Shard) -> None:
    shard.writer.put(b"k", b"v")
    for number in range(5_000):
        shard.writer.put(b"%d" % number, b"x" * 300)
        assert shard.near.get(b"k") == b"v"
    assert shard.writer.stats()["records_moved"] > 0


def test_a_near_entry_ends_with_its_expiry_and_after_5_seconds(shard: Shard) -> None:
    shard.writer.put(b"short", b"v", shard.clock.now_ms + 100)
    shard.writer.put(b"long", b"v")
    for key in (b"short", b"long"):
        assert shard.near.get(key) == b"v"
    shard.clock.now_ms += 99
    assert shard.near.get(b"short") == b"v"
    shard.clock.now_ms += 1
    assert shard.near.get(b"short") is None
    shard.clock.now_ms += NEAR_VALID_MS_MAX - 101
    before = shard.near.counts()
    assert shard.near.get(b"long") == b"v"
    assert shard.near.counts()[0] == before[0] + 1
    shard.clock.now_ms += 1
    assert shard.near.get(b"long") == b"v"
    assert shard.near.counts()[1] == before[1] + 1


def test_nothing_is_read_past_serve_until(shard: Shard) -> None:
    until = memoryview(bytearray(8)).cast("Q")
    until[0] = shard.clock.now_ms + 1_000
    lookup = shard.open_lookup(serve_until=until)
    near = shard.open_lookup(NearCache(10, 1_000), serve_until=until)
    shard.writer.put(b"k", b"v")
    assert lookup.get(b"k") == near.get(b"k") == b"v"
    shard.clock.now_ms += 999
    assert lookup.get(b"k") == near.get(b"k") == b"v"
    shard.clock.now_ms += 1
    assert lookup.get(b"k") is near.get(b"k") is None
    until[0] += 2_000
    assert lookup.get(b"k") == near.get(b"k") == b"v"
    until[0] = 0  # the node stopped: noticed when what was seen runs out, at most 2 s later
    shard.clock.now_ms += 2_000
    assert lookup.get(b"k") is near.get(b"k") is None


def test_a_batch_reads_nothing_past_serve_until_near_or_not(shard: Shard) -> None:
    until = memoryview(bytearray(8)).cast("Q")
    until[0] = shard.clock.now_ms + 1_000
    near = shard.open_lookup(NearCache(10, 1_000), serve_until=until)
    shard.writer.put(b"k", b"v")
    assert near.many([b"k", b"k"]) == near.many([b"k", b"k"]) == [b"v", b"v"]
    assert near.counts()[:2] == (3, 1)
    shard.clock.now_ms += 1_000
    assert near.many([b"k", b"k"]) == [None, None]
    until[0] += 2_000
    assert near.many([b"k", b"k"]) == [b"v", b"v"]


@pytest.mark.parametrize("near", [False, True])
def test_after_a_sleep_of_the_machine_values_expire_within_100_ms_awake(
    shard: Shard, near: bool
) -> None:
    awake_s = 50.0  # a clock that stands while the machine sleeps
    lookup = make_lookup(
        (shard.arena,),
        hash_seed=SEED,
        touch=touch_of(shard.eviction),
        near=NearCache(10, 10_000) if near else None,
        clock_s=shard.clock.s,
        tick_s=lambda: awake_s,
    )
    shard.writer.put(b"k", b"v", shard.clock.now_ms + 1_000)
    shard.writer.put(b"forever", b"v")
    assert lookup.get(b"k") == lookup.get(b"k") == lookup.get(b"forever") == b"v"
    shard.clock.now_ms += 999
    awake_s += 0.999
    assert lookup.get(b"k") == b"v"
    shard.clock.now_ms += 1
    awake_s += 0.001
    assert lookup.get(b"k") is None
    shard.writer.put(b"k", b"v", shard.clock.now_ms + 60_000)
    assert lookup.get(b"k") == b"v"
    shard.clock.now_ms += 3_600_000
    awake_s += NEAR_VALID_MS_MAX / 1000 if near else SERVE_UNTIL_BELIEVED_MS / 1000
    assert lookup.get(b"k") is None
    assert lookup.get(b"forever") == b"v"


@pytest.mark.parametrize("key_bytes", [1, 63, 64, 65, 1_024])
@pytest.mark.parametrize("kind", ["plain", "expires", "negative", "expires, negative"])
def test_every_kind_of_record_is_read_under_every_length_of_key(
    shard: Shard, key_bytes: int, kind: str
) -> None:
    key = b"k" * key_bytes
    expiry_ms = shard.clock.now_ms + 1_000 if "expires" in kind else 0
    shard.writer.put(key, b"value", expiry_ms, negative="negative" in kind)
    expected: Answer = NEGATIVE if "negative" in kind else b"value"
    for lookup in (shard.lookup, shard.near, shard.near):
        assert lookup.get(key) == lookup.get(key.decode()) == expected
        assert lookup.get(key[:-1]) is lookup.get(key + b"k") is None
    shard.clock.now_ms += 1_000
    expected = None if expiry_ms else expected
    for lookup in (shard.lookup, shard.near):
        assert lookup.get(key) == expected


def test_a_key_that_another_one_begins_with_is_not_taken_for_it() -> None:
    shard = Shard()
    shard.writer.put(b"long key", b"v")
    slot = next(slot for slot, word in enumerate(shard.arena.index) if word)
    digest = shard_hash(b"long", SEED)
    home = home_slot(digest, shard.geometry.slots)
    shard.arena.index[home] = digest >> 48 << 48 | shard.arena.index[slot] & (1 << 48) - 1
    assert shard.lookup.get(b"long") is shard.near.get(b"long") is None


def test_absent_keys_longer_than_what_follows_a_record_are_absent() -> None:
    shard = Shard()
    number = 0
    while shard.writer.stats()["evictions"] == 0:  # up to the last byte of the file
        shard.writer.put(b"%d" % number, b"v" * 40)
        number += 1
    for number in range(3_000):
        assert shard.lookup.get(b"%d" % number + b"k" * 1_000) is None


@pytest.mark.parametrize("key", [None, 5, bytearray(b"k"), memoryview(b"k"), [], "\ud800", "", b""])
def test_what_is_no_key_is_left_to_the_owner(shard: Shard, key: object) -> None:
    shard.writer.put(b"k", b"v")
    assert shard.lookup.get(key) is shard.near.get(key) is None
    assert shard.lookup.get(b"k" * 1_025) is None


def test_not_found_is_told_from_absent_and_never_kept_near(shard: Shard) -> None:
    shard.writer.put(b"k", b"", negative=True)
    shard.writer.put(b"t", b"", shard.clock.now_ms + 10, negative=True)
    assert shard.near.get(b"k") is shard.near.get(b"t") is NEGATIVE
    assert not shard.near_cache.entries
    assert shard.near.counts() == (0, 0, 2)
    shard.clock.now_ms += 10
    assert shard.near.get(b"k") is NEGATIVE
    assert shard.near.get(b"t") is None


def test_keys_are_found_in_every_slot_of_both_buckets() -> None:
    shard = Shard(item_bytes_mean=2_000)
    slots = shard.geometry.slots
    at_home = elsewhere = 0
    keys = [b"%d" % number for number in range(int(slots * 0.75))]
    for key in keys:
        shard.writer.put(key, key)
    for slot, word in enumerate(shard.arena.index.tolist()):
        if word:
            place = word & (1 << 33) - 1
            length = shard.arena.words[place] & 0x7FF
            key = shard.arena.data[place * 8 + 24 : place * 8 + 24 + length]
            digest = shard_hash(key, SEED)
            home, second = home_slot(digest, slots), second_slot(digest, slots)
            assert slot & -8 in (home & -8, second & -8)
            at_home += slot == home
            elsewhere += slot not in (home, second)
    assert at_home
    assert elsewhere
    crowded_out = shard.writer.stats()["index_evictions"]
    assert crowded_out <= len(keys) // 100
    assert sum(shard.lookup.get(key) != key for key in keys) == crowded_out


def test_absent_keys_are_absent_whatever_their_tag() -> None:
    shard = Shard()
    for number in range(1_500):
        shard.writer.put(b"%d" % number, b"v")
    for number in range(200_000, 300_000):
        assert shard.lookup.get(b"%d" % number) is None
    # A tag of 0, which is also that of an empty slot.
    zero = [b"%d" % n for n in range(400_000) if shard_hash(b"%d" % n, SEED) >> 48 == 0]
    assert zero
    for key in zero:
        assert key in (b"%d" % n for n in range(1_500)) or shard.lookup.get(key) is None
        shard.writer.put(key, key)
        assert shard.lookup.get(key) == key
        shard.writer.delete(key)
        assert shard.lookup.get(key) is None


def test_keys_go_to_the_shard_of_their_worker() -> None:
    clock = Clock()
    arenas = [private_arena(geometry(2048, 128)) for _ in range(5)]
    writers = [
        ShardWriter(arena, group="g", eviction="lru", hash_seed=SEED, clock_ms=clock.ms)
        for arena in arenas
    ]
    lookup = make_lookup(arenas, hash_seed=SEED, touch=touch_of("lru"), clock_s=clock.s)
    for number in range(500):
        key = b"%d" % number
        writers[worker_of(shard_hash(key, SEED), 5)].put(key, key)
        assert lookup.get(key) == key
    assert all(70 <= writer.items <= 130 for writer in writers)


def test_a_hit_touches_its_entry_and_no_other(shard: Shard) -> None:
    shard.writer.put(b"a", b"v")
    shard.writer.put(b"b", b"v")
    before = bytes(shard.arena.access)
    shard.arena.access[:] = bytes(1 if level else 0 for level in before)
    shard.lookup.get(b"a")
    touched = [level for level in bytes(shard.arena.access) if level]
    assert sorted(touched) == [1, touch_of(shard.eviction)[1]]


def test_a_touch_after_a_drop_leaves_no_entry(shard: Shard) -> None:
    shard.writer.put(b"k", b"v")
    slot = next(slot for slot, word in enumerate(shard.arena.index) if word)
    shard.writer.delete(b"k")
    shard.arena.access[slot] = 255  # a reader that was late
    assert shard.lookup.get(b"k") is None
    assert shard.writer.items == 0
    shard.writer.put(b"k", b"v")
    assert shard.lookup.get(b"k") == b"v"


FORK = """
import os, sys
from tests.store.shards import Shard
shard = Shard(eviction=sys.argv[1])
shard.writer.put(b"k", b"parent")
assert shard.near.get(b"k") == b"parent"
pid = os.fork()
if pid == 0:
    shard.writer.put(b"k", b"child")
    shard.writer.put(b"new", b"child")
    right = shard.near.get(b"k") == shard.lookup.get(b"new") == b"child"
    os._exit(0 if right else 1)
assert os.waitpid(pid, 0)[1] == 0
assert shard.near.get(b"k") == b"parent"
assert shard.lookup.get(b"new") is None
"""


def test_a_private_shard_is_copied_by_a_fork_not_shared(shard: Shard) -> None:
    # In a process of its own: this one may have threads, which a fork does not take along.
    subprocess.run(
        [sys.executable, "-c", FORK, shard.eviction],
        cwd=Path(__file__).parents[2],
        timeout=30,
        check=True,
    )


def test_threads_that_read_while_one_writes_see_whole_values(shard: Shard) -> None:
    stop = threading.Event()
    wrong: list[object] = []

    def read() -> None:
        while not stop.is_set():
            for number in range(50):
                value = shard.near.get(b"%d" % number)
                if isinstance(value, bytes) and value != value[:1] * len(value):
                    wrong.append(value)

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for number in range(6_000):
            value = bytes((number % 256,)) * (number * 37 % 3_000)
            shard.writer.put(b"%d" % (number % 50), value)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not wrong
