"""`kamacache.store.served`: reads for others answer as plain ones do, are counted, and touch."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from kamacache.clock import boottime_ms
from kamacache.config import GroupSpec
from kamacache.store import (
    NEGATIVE,
    Geometry,
    Lookup,
    ShardWriter,
    geometry,
    make_lookup,
    private_shard,
    touch_of,
)
from kamacache.store.arena import private_arena
from kamacache.store.entries import Entry, make_entry_lookup
from kamacache.store.served import NO_READS, ServedReads, make_served_reads


class Clock:
    """A clock that stands, or takes a step at its n-th next reading."""

    def __init__(self) -> None:
        self.now_s = float(boottime_ms() // 1000)
        self.steps: list[float] = []

    def __call__(self) -> float:
        if self.steps:
            self.now_s += self.steps.pop(0)
        return self.now_s


def made(eviction: str = "lru", **more: Any) -> tuple[ShardWriter, Lookup, ServedReads, Clock]:
    writer, lookup = private_shard(GroupSpec(name="g", cache_bytes=1 << 20, eviction=eviction))
    clock = Clock()
    reads = make_served_reads(
        (writer.arena,),
        hash_seed=writer._seed,
        touch=touch_of(eviction),
        clock_s=clock,
        **more,
    )
    return writer, lookup, reads, clock


def assert_all_ways_agree(reads: ServedReads, keys: list[bytes], expected: list[Any]) -> None:
    """``expected``: an entry's ``(value, ttl_ms, version)``, NEGATIVE or None for each key."""
    apart = [e if isinstance(e, tuple) else (e, 0, 0) for e in expected]
    assert [reads.told(key) for key in keys] == expected
    assert reads.many_told(keys) == tuple(map(list, zip(*apart, strict=True)))


def test_all_ways_answer_what_the_other_lookups_answer() -> None:
    writer, lookup, reads, clock = made()
    entry = make_entry_lookup((writer.arena,), hash_seed=writer._seed, clock_s=clock)
    draw = random.Random(3)
    keys = [b"key-%d" % i for i in range(6_000)]
    for key in keys:  # more than fit: evicted ones, and ones in their second bucket
        expiry_ms = int(clock.now_s * 1000) + 600_000 if draw.random() < 0.2 else 0
        writer.put(key, key * draw.randrange(9), expiry_ms, negative=draw.random() < 0.1)
    for key in draw.sample(keys, 500):
        writer.delete(key)
    asked = [*keys, b"absent", b"", keys[0], b"x" * 5_000]
    draw.shuffle(asked)
    expected: list[Any] = []
    for key in asked:
        seen = entry(key) if key else None
        assert (seen.value if isinstance(seen, Entry) else seen) == lookup.get(key)
        expected.append((seen[0], seen[1] or 0, seen[2]) if isinstance(seen, Entry) else seen)
    assert_all_ways_agree(reads, asked, expected)
    kinds = [type(answer) for answer in expected]
    assert all(kinds.count(kind) > 50 for kind in (tuple, type(None), type(NEGATIVE)))
    assert any(ttl_ms for told in expected if isinstance(told, tuple) for ttl_ms in told[1:2])
    writer.close()


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_each_shard_answers_for_its_keys(workers: int) -> None:
    sizes: Geometry = geometry((1 << 20) // workers, 128)
    arenas = [private_arena(sizes) for _ in range(workers)]
    writers = [ShardWriter(a, group="g", eviction="lru", hash_seed=9) for a in arenas]
    reads = make_served_reads(arenas, hash_seed=9, touch=touch_of("lru"))
    lookup = make_lookup(arenas, hash_seed=9, touch=touch_of("lru"))
    keys = [b"%d" % i for i in range(300)]
    for i, key in enumerate(keys):
        writers[i % workers].put(key, key)
    # A key is found where the plain lookup looks for it, and nowhere else.
    answers = reads.many_told(keys)[0]
    assert answers == lookup.many(keys)
    assert 300 / workers / 2 < sum(answer is not None for answer in answers) <= 300


def test_an_empty_slot_is_no_entry_whatever_the_header_says() -> None:
    writer, _, reads, _ = made()
    header = bytes(writer.arena.data[24:4096])
    assert_all_ways_agree(reads, [b"", header[:2047], header[:1], header], [None] * 4)
    writer.close()


@pytest.mark.parametrize("flagged", [False, True])
def test_hits_are_counted_once_and_touch(flagged: bool) -> None:
    writer, _, reads, clock = made()
    expiry_ms = int(clock.now_s * 1000) + 9_000 if flagged else 0
    keys = [b"a", b"b", b"c"]
    slots = []
    for key in keys:
        before = bytes(writer.arena.access)
        writer.put(key, b"1", expiry_ms)
        slots += [i for i, byte in enumerate(writer.arena.access) if byte != before[i]]
    writer.put(b"no", b"", negative=True)
    ways: list[Callable[[], object]] = [
        lambda: [reads.told(key) for key in [*keys, b"absent"]],
        lambda: reads.many_told([*keys, b"absent"]),
    ]
    for number, way in enumerate(ways, 1):
        for slot in slots:
            writer.arena.access[slot] = 7
        way()
        assert [writer.arena.access[slot] for slot in slots] == [255] * 3
        assert reads.counts() == (0, 3 * number, 0)
    reads.told(b"no")
    reads.many_told([b"no"])
    assert reads.counts() == (0, 6, 2)
    writer.close()


def test_what_expired_is_no_hit_also_where_it_expires_while_others_are_read() -> None:
    writer, _, reads, clock = made()
    now_ms = int(clock.now_s * 1000)
    writer.put(b"soon", b"1", now_ms + 1_500)
    writer.put(b"later", b"2", now_ms + 60_000)
    writer.put(b"never", b"3")
    keys = [b"soon", b"later", b"never"]
    assert reads.many_told(keys)[:2] == ([b"1", b"2", b"3"], [1_500, 60_000, 0])
    clock.steps = [0, 2]  # between the batch's first look at the clock and its last
    assert reads.many_told(keys)[:2] == ([None, b"2", b"3"], [0, 58_000, 0])
    versions = [writer.version_of(key) for key in keys]
    assert_all_ways_agree(reads, keys, [None, (b"2", 58_000, versions[1]), (b"3", 0, versions[2])])
    clock.now_s = now_ms / 1000 + 59.9999
    told = reads.told(b"later")
    assert isinstance(told, tuple)
    assert told[1] == 1  # less than a millisecond is told as one: 0 would be for ever
    writer.close()


def test_nothing_is_read_past_serve_until() -> None:
    word = memoryview(bytearray(8)).cast("Q")
    writer, _, reads, clock = made(serve_until=word)
    writer.put(b"a", b"1")
    version = writer.version_of(b"a")
    keys = [b"a", b"a"]
    assert_all_ways_agree(reads, keys, [None, None])
    word[0] = int(clock.now_s * 1000) + 1_000
    assert_all_ways_agree(reads, keys, [(b"1", 0, version)] * 2)
    clock.steps = [0, 1.5]  # the node ended while the batch was read
    assert reads.many_told(keys) == ([None, None], [0, 0], [0, 0])
    writer.close()


def test_renewed_is_called_every_tenth_of_a_second_by_who_comes_next() -> None:
    calls: list[int] = []
    writer, _, reads, clock = made(renewed=lambda: calls.append(1))
    writer.put(b"a", b"1")
    for read in (reads.told, lambda key: reads.many_told([key])):
        clock.now_s += 0.2
        before = len(calls)
        read(b"a")
        read(b"a")
        assert len(calls) == before + 1
    writer.close()


class Shifting:
    """Stands for the index: at each second reading of a slot it was changed meanwhile."""

    def __init__(self, index: memoryview, change: Callable[[], None]) -> None:
        self._index, self._change, self._reads = index, change, 0

    def __getitem__(self, slot: int) -> int:
        self._reads += 1
        if self._reads == 2:
            self._change()
        word: int = self._index[slot]
        return word


@pytest.mark.parametrize("way", ["told", "many_told"])
def test_a_record_replaced_while_it_is_copied_is_read_anew(way: str) -> None:
    writer, _ = private_shard(GroupSpec(name="g", cache_bytes=1 << 20))
    writer.put(b"a", b"old")
    arena = writer.arena
    real = arena.index
    arena.index = Shifting(real, lambda: writer_put())  # type: ignore[assignment]

    def writer_put() -> None:
        writer.put(b"a", b"new")

    reads = make_served_reads((arena,), hash_seed=writer._seed, touch=touch_of("lru"))
    arena.index = real
    if way == "told":
        assert reads.told(b"a") == (b"new", 0, writer.version_of(b"a"))
    else:
        assert reads.many_told([b"a"]) == ([b"new"], [0], [writer.version_of(b"a")])
    assert reads.counts() == (0, 1, 0)
    writer.close()


def test_without_memory_every_key_is_the_owners() -> None:
    assert_all_ways_agree(NO_READS, [b"a", b"b"], [None, None])
    assert NO_READS.counts() == (0, 0, 0)
