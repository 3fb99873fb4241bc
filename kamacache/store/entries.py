"""Reads that tell what a record says of itself: its value with time to live and version.

*Process*: every process that maps the shards; used by the front for replies that carry TTL and
version. *Proof that a read is whole*: as in `kamacache.store.reader`: the index word is read, the
record copied, the key compared, the index word read again.

These reads count nothing and touch no access byte, so a get that asks both ways is one use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from kamacache.clock import STAMP_SHIFT, boottime_s
from kamacache.hashing import home_slot, shard_hash, worker_of
from kamacache.store.arena import Arena
from kamacache.store.finding import elsewhere
from kamacache.store.layout import (
    FLAG_NEGATIVE,
    KEY_LENGTH_MASK,
    PLACE_MASK,
    RECORD_HEADER_BYTES,
    VALUE_LENGTH_SHIFT,
    expiry_of,
)
from kamacache.store.reader import NEGATIVE, Negative


class Entry(NamedTuple):
    """A value, and what its record says of it."""

    value: bytes
    ttl_ms: int | None  # left to live, at least 1; None: does not expire
    version: int  # 0: not numbered


class Held(NamedTuple):
    """An entry as its writer tells it to another node."""

    value: bytes | None  # None: the getter is known not to know the key
    ttl_ms: int | None  # left to live, at least 1; None: does not expire
    version: int
    mirror: bool  # another node's


EntryLookup = Callable[[bytes], Entry | Negative | None]


def make_entry_lookup(
    arenas: Sequence[Arena],
    *,
    hash_seed: int,
    serve_until: memoryview | None = None,
    clock_s: Callable[[], float] = boottime_s,
) -> EntryLookup:
    """Return the entry lookup over a group's shards, ordered by worker; arguments as `make_lookup`.

    The function never blocks, and is safe for threads. None: not in memory, ask the owner.
    """
    shards = tuple(arenas)

    def entry(key: bytes) -> Entry | Negative | None:
        digest = shard_hash(key, hash_seed)
        arena = shards[worker_of(digest, len(shards))]
        data, words, index, slots = arena.data, arena.words, arena.index, arena.geometry.slots
        for _ in range(2):
            slot = home_slot(digest, slots)
            word = index[slot]
            place = word & PLACE_MASK
            head = words[place]
            at = (place << 3) + RECORD_HEADER_BYTES
            # An empty slot's place is 0, where no key's length is found (see layout's MAGIC).
            if head & KEY_LENGTH_MASK != len(key) or data[at : at + len(key)] != key:
                found = elsewhere(data, words, index, slots, digest, slot, key)
                if found is None:
                    return None
                slot, word, place, head, at = found
            start = at + len(key)
            value = bytes(data[start : start + (head >> VALUE_LENGTH_SHIFT)])
            expiry_ms = expiry_of(words, place)
            version = words[place + 2] >> STAMP_SHIFT
            now_ms = clock_s() * 1000
            if serve_until is not None and now_ms >= serve_until[0]:
                return None
            if index[slot] != word:
                continue  # moved or replaced while it was copied
            if expiry_ms and now_ms >= expiry_ms:
                return None
            if head & FLAG_NEGATIVE:
                return NEGATIVE
            ttl_ms = max(1, int(expiry_ms - now_ms)) if expiry_ms else None
            return Entry(value, ttl_ms, version)
        return None

    return entry
