"""`kamacache.store.finding`: which shard a hash leads to, and as what its words are read."""

from __future__ import annotations

import struct
from types import SimpleNamespace
from typing import Any

import pytest

from kamacache.getters import key_bytes
from kamacache.hashing import home_slot, second_slot, shard_hash, worker_of
from kamacache.store import Arena, NearCache, finding, make_lookup
from kamacache.store.arena import private_arena
from kamacache.store.eviction import touch_of
from kamacache.store.finding import HEADERS, NOWHERE, directory, is_plain, tagged
from kamacache.store.layout import geometry
from tests.store.shards import SEED, Shard

HASHES = [shard_hash(b"%d" % number, SEED) for number in range(20_000)]


def arenas_of(workers: int) -> list[Arena]:
    return [private_arena(geometry(2048, 128)) for _ in range(workers)]


def keys_of(exponent: int, count: int) -> list[bytes]:
    """Return keys whose index words, read as floats, have this exponent."""
    found: list[bytes] = []
    number = 0
    while len(found) < count:
        key = b"%d" % number
        if shard_hash(key, SEED) >> 52 & 0x7FF == exponent:
            found.append(key)
        number += 1
    return found


@pytest.mark.parametrize("workers", [1, 2, 3, 8, 13, 64, 200, 256])
def test_a_hash_leads_to_its_workers_shard_or_nowhere(workers: int) -> None:
    arenas = arenas_of(workers)
    shards, shift = directory(arenas)
    lost = 0
    for digest in [*HASHES, 0, (1 << 64) - 1]:
        shard = shards[digest >> shift]
        if shard is NOWHERE:
            lost += 1
        else:
            assert shard[0] is arenas[worker_of(digest, workers)].data
    assert lost <= len(HASHES) * (0 if 256 % workers == 0 else workers / 4_096 * 1.2)


def test_words_that_are_no_plain_floats_are_read_as_ints() -> None:
    shards, shift = directory(arenas_of(1))
    for tag in range(1 << 16):
        word = tag << 48 | 1 << 33 | 77
        as_float = struct.unpack("d", struct.pack("Q", word))[0]
        plain = is_plain(word)
        if plain:
            assert as_float == as_float != 0.0
            assert abs(as_float) >= 2.0**-1022  # nothing that a processor may take for zero
        assert plain or shards[word >> shift][1].format == "Q"
    assert sum(shard[1].format == "Q" for shard in shards) == 4
    assert not is_plain(0)


@pytest.mark.parametrize("exponent", [0, 1, 0x7FE, 0x7FF])
def test_keys_whose_words_are_odd_floats_are_hits_near_and_in_memory(exponent: int) -> None:
    shard = Shard()
    for key in keys_of(exponent, 3):
        shard.writer.put(key, b"1")
        assert shard.lookup.get(key) == b"1"
        before = shard.near.counts()
        assert [shard.near.get(key) for _ in range(3)] == [b"1"] * 3
        assert shard.near.counts()[:2] == (before[0] + 2, before[1] + 1)
        shard.writer.put(key, b"2")
        assert shard.lookup.get(key) == shard.near.get(key) == b"2"
        shard.writer.delete(key)
        assert shard.lookup.get(key) is shard.near.get(key) is None


def test_a_key_outside_its_home_slot_is_near_like_any_other() -> None:
    shard = Shard(item_bytes_mean=2_000)
    slots = shard.geometry.slots
    keys = [b"%d" % number for number in range(slots // 2)]
    for key in keys:
        shard.writer.put(key, key)
    for key in keys:
        value = shard.lookup.get(key)
        assert shard.near.get(key) == shard.near.get(key) == value
    words = shard.arena.index
    for asked, entry in shard.near_cache.entries.items():
        digest = _hash(asked)
        assert words[entry[2]] >> 48 == digest >> 48
        assert tagged(shard.arena.data, slots, digest) >= 0
    away = [e for k, e in shard.near_cache.entries.items() if e[2] != home_slot(_hash(k), slots)]
    assert away
    assert shard.near.counts()[0] >= len(shard.near_cache.entries)


def _hash(key: Any) -> int:
    return shard_hash(key_bytes(key), SEED)


def test_a_tag_is_found_in_both_buckets_and_only_where_tags_are() -> None:
    sizes = geometry(2048, 128)
    arena = private_arena(sizes)
    digest = shard_hash(b"k", SEED)
    tag = digest >> 48
    assert tagged(arena.data, sizes.slots, digest) == -1
    second = second_slot(digest, sizes.slots) & -8
    arena.index[second + 7] = tag << 48 | 1
    assert tagged(arena.data, sizes.slots, digest) == second + 7
    first = home_slot(digest, sizes.slots) & -8
    assert first != second
    for slot in range(first, first + 3):  # the tag's bytes, but not in the tag's place
        arena.index[slot] = tag << 16 | tag
    assert tagged(arena.data, sizes.slots, digest) == second + 7
    arena.index[first + 3] = tag << 48
    assert tagged(arena.data, sizes.slots, digest) == first + 3


def test_a_shard_whose_places_need_more_than_32_bits_is_read_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(finding, "_PLACES_MAX", 1)
    shard = Shard()
    assert all(found is NOWHERE for found in directory((shard.arena,))[0])
    shard.writer.put(b"k", b"v", shard.clock.now_ms + 10)
    assert shard.lookup.get(b"k") == shard.near.get(b"k") == shard.near.get("k") == b"v"
    assert shard.near.counts()[:2] == (0, 2)  # one entry for each way to write the key
    assert shard.near.get(b"k") == b"v"
    assert shard.near.counts()[0] == 1
    shard.clock.now_ms += 10
    assert shard.lookup.get(b"k") is shard.near.get(b"k") is None


def test_the_start_of_a_record_is_read_for_every_length_of_key() -> None:
    assert len(HEADERS) == 1_025
    for length in (0, 1, 64, 1_024):
        record = struct.pack("<HHIIIQ", length, 7, 99, 1, 2, 3) + b"k" * length
        assert HEADERS[length](record, 0) == (length, 99, b"k" * length)


def test_a_slot_that_was_empty_at_first_proves_nothing() -> None:
    """Filled after the first look and emptied before the last one: both see an empty slot."""
    shard = Shard()
    stamps = shard.arena.stamps
    digest = shard_hash(b"k", SEED)

    class Looked:
        """The index, whose first look is followed by a put of the key."""

        looks = 0

        def __getitem__(self, slot: int) -> float:
            word = float(stamps[slot])
            Looked.looks += 1
            if Looked.looks == 1:
                assert word == 0.0
                shard.writer.put(b"k", b"v")
            return word

    def clock_s() -> float:  # read between the copy and the last look
        shard.writer.delete(b"k")
        return shard.clock.s()

    parts = {name: getattr(shard.arena, name) for name in Arena.__slots__ if name != "stamps"}
    arena: Any = SimpleNamespace(**parts, stamps=Looked())
    assert is_plain(digest)
    lookup = make_lookup(
        (arena,), hash_seed=SEED, touch=touch_of("lru"), clock_s=clock_s, near=NearCache(9, 999)
    )
    assert lookup.get(b"k") is None
    assert Looked.looks == 2
