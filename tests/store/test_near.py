"""`kamacache.store.near`: bounds in items and bytes."""

from __future__ import annotations

import random
import threading

from kamacache.store import NearCache
from kamacache.store.near import VALUE_BYTES_MAX, NearEntry
from tests.store.shards import Shard


def entry(size: int) -> NearEntry:
    return b"v" * size, memoryview(bytes(8)).cast("Q"), 0, 0, 0.0, bytearray(1)


def kept_bytes(near: NearCache) -> int:
    return sum(len(key) + len(kept[0]) for key, kept in near.entries.items())


def test_items_are_bounded_and_the_oldest_goes() -> None:
    near = NearCache(3, 1_000)
    for key in ("a", "b", "c", "a", "d"):
        near.keep(key, entry(1))
    assert list(near.entries) == ["c", "a", "d"]
    assert near.bytes == kept_bytes(near) == 6


def test_bytes_are_bounded_and_counted_right_on_replacement() -> None:
    near = NearCache(1_000, 500)
    numbers = random.Random(3)
    for _ in range(5_000):
        near.keep(f"k{numbers.randrange(30)}", entry(numbers.randrange(200)))
        assert near.bytes == kept_bytes(near) <= 500


def test_a_value_above_the_whole_bound_is_not_kept() -> None:
    near = NearCache(10, 100)
    near.keep("a", entry(50))
    near.keep("b", entry(500))
    assert near.bytes == kept_bytes(near) <= 100
    assert "b" not in near.entries


def test_values_over_4_kib_are_read_from_memory_each_time() -> None:
    shard = Shard(cache_bytes=4 << 20)
    for size in (VALUE_BYTES_MAX, VALUE_BYTES_MAX + 1):
        shard.writer.put(b"%d" % size, b"v" * size)
        assert shard.near.get(b"%d" % size) == shard.near.get(b"%d" % size) == b"v" * size
    assert list(shard.near_cache.entries) == [b"%d" % VALUE_BYTES_MAX]
    assert shard.near.counts()[:2] == (1, 3)


def test_clear_forgets_all_and_frees_a_lock_held_at_a_fork() -> None:
    near = NearCache(10, 100)
    near.keep("a", entry(5))
    near._lock.acquire()  # as by a thread that does not exist in the child
    near.clear()
    assert near.bytes == 0
    assert not near.entries
    near.keep("b", entry(5))
    assert near.bytes == 6


def test_counts_hold_with_threads() -> None:
    near = NearCache(50, 2_000)

    def work(seed: int) -> None:
        numbers = random.Random(seed)
        for _ in range(5_000):
            near.keep(f"k{numbers.randrange(100)}", entry(numbers.randrange(100)))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert near.bytes == kept_bytes(near) <= 2_000
    assert len(near.entries) <= 50
