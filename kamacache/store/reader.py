"""Lock-free reads: the closures behind ``Group.get``.

*Process*: every process that maps the shards. *Proof that a read is whole*: the index word is
read, the record copied, the key compared, and the index word read again. A word that still stands
means its record: the writer zeroes the words into a segment before it raises the segment's
generation and reuses it, and x86-64 keeps loads and stores in that order. The generation is part
of the word, so the second look at the word is the look at the generation too. Two failures in a
row, or nothing found, is "ask the owner": a miss here is never authoritative.

The functions are closures over tuples, without attribute access or helper calls on the way of a
hit, since a Python call costs as much as the hash (measured by scripts/bench/local_hit.py).
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from xxhash import xxh3_64_intdigest

from kamacache.clock import boottime_s
from kamacache.hashing import second_slot
from kamacache.limits import NEAR_VALID_MS_MAX
from kamacache.store.arena import Arena
from kamacache.store.layout import (
    BUCKET_SLOTS,
    EXPIRY_SHIFT,
    FLAG_NEGATIVE,
    HEADER_WORDS,
    KEY_LENGTH_MASK,
    PLACE_MASK,
    PLAIN_MASK,
    RECORD_HEADER_BYTES,
    TAG_SHIFT,
    VALUE_LENGTH_SHIFT,
)
from kamacache.store.near import VALUE_BYTES_MAX, NearCache, NearEntry


class Negative:
    """The type of `NEGATIVE`."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "NEGATIVE"


NEGATIVE: Final = Negative()
"""A read's answer for a key that the getter is known not to know."""

Answer = bytes | Negative | None
FOREVER_S: Final = float("inf")


@dataclass(frozen=True, slots=True)
class Lookup:
    """A lookup function and its private counts."""

    get: Callable[[str | bytes], Answer]
    """Near cache and memory only; never blocks. None: ask the owner. Safe for threads."""
    counts: Callable[[], tuple[int, int, int]]
    """(near hits, memory hits, negative hits) since it was made."""


def make_lookup(  # noqa: C901 - the hot path, spelled out; see the module
    arenas: Sequence[Arena],
    *,
    hash_seed: int,
    touch: bytes,
    near: NearCache | None = None,
    serve_until: memoryview[int] | None = None,
    renewed: Callable[[], None] | None = None,
    clock_s: Callable[[], float] = boottime_s,
) -> Lookup:
    """Return the lookup over a group's shards, ordered by worker.

    ``serve_until`` is a one-word view, in ms of CLOCK_BOOTTIME, up to which reads are allowed;
    without it they always are. ``renewed`` is called when the word is read again, which a
    process that reads at all does at least every `SERVE_UNTIL_AHEAD_MS`; it must not raise.
    """
    # Local names are what makes the closures fast; see the module's docstring.
    shards = tuple((a.data, a.words, a.index, a.access, a.geometry.slots) for a in arenas)
    workers = len(shards)
    xxh, clock, tag_shift, place_mask = xxh3_64_intdigest, clock_s, TAG_SHIFT, PLACE_MASK
    header_bytes, plain_mask, value_shift = RECORD_HEADER_BYTES, PLAIN_MASK, VALUE_LENGTH_SHIFT
    seed = hash_seed
    near_hits = memory_hits = negative_hits = 0
    allowed_until_s = FOREVER_S if serve_until is None else 0.0

    def memory(key: str | bytes, retry: bool = True) -> Answer:
        nonlocal memory_hits, negative_hits, allowed_until_s
        kb = key.encode() if isinstance(key, str) else key
        digest = xxh(kb, seed)
        data, words, index, access, slots = shards[(digest >> 32 & 0xFFFF) * workers >> 16]
        slot = (digest & 0xFFFFFFFF) * slots >> 32
        length = len(kb)
        word = index[slot]
        if (
            word >> tag_shift != digest >> tag_shift
            or (head := words[place := word & place_mask]) & KEY_LENGTH_MASK != length
            or data[(at := (place << 3) + header_bytes) : at + length] != kb
        ):
            other = elsewhere(data, words, index, slots, digest, slot, kb)
            if other is None:
                return None
            slot, word, place, head, at = other
        at += length
        value = data[at : at + (head >> value_shift)]
        now = clock()
        if now >= allowed_until_s:
            allowed_until_s = FOREVER_S if serve_until is None else serve_until[0] / 1000
            if renewed is not None:
                renewed()
            if now >= allowed_until_s:
                return None
        expiry_s = FOREVER_S
        if head & plain_mask != length:  # it expires, or says "not found"
            expiry_ms = words[place + 1] >> EXPIRY_SHIFT
            if expiry_ms:
                expiry_s = expiry_ms / 1000
        # Everything above was copied from a record that this word named; does it still?
        if index[slot] != word:
            return memory(key, False) if retry else None
        if now >= expiry_s:
            return None
        level = access[slot]
        touched = touch[level]
        if level != touched:
            access[slot] = touched
        if head & FLAG_NEGATIVE:
            negative_hits += 1
            return NEGATIVE
        memory_hits += 1
        if near is not None and len(value) <= VALUE_BYTES_MAX:
            until_s = min(now + NEAR_VALID_MS_MAX / 1000, allowed_until_s, expiry_s)
            near.keep(key, NearEntry(value, index, slot, word, until_s, access))
        return value

    def counts() -> tuple[int, int, int]:
        return near_hits, memory_hits, negative_hits

    if near is None:
        return Lookup(memory, counts)
    kept = near.entries.get

    def nearest(key: str | bytes) -> Answer:
        nonlocal near_hits
        entry = kept(key)
        if entry is not None:
            value, index, slot, word, until_s, access = entry
            if index[slot] == word and clock() < until_s:
                level = access[slot]
                touched = touch[level]
                if level != touched:
                    access[slot] = touched
                near_hits += 1
                return value
        return memory(key)

    return Lookup(nearest, counts)


def elsewhere(
    data: mmap.mmap,
    words: memoryview[int],
    index: memoryview[int],
    slots: int,
    digest: int,
    home: int,
    key: bytes,
) -> tuple[int, int, int, int, int] | None:
    """Look for a key in all slots of its two buckets.

    Returns ``(slot, word, place, head, key's byte)`` or None. A whole bucket is copied as bytes
    and searched for the two bytes of the tag, which is faster than eight word reads; the word
    itself is then read aligned.
    """
    tag = (digest >> TAG_SHIFT).to_bytes(2, "little")
    for first in (home & -BUCKET_SLOTS, second_slot(digest, slots) & -BUCKET_SLOTS):
        start = (HEADER_WORDS + first) * 8
        bucket = data[start : start + BUCKET_SLOTS * 8]
        found = bucket.find(tag)
        while found >= 0:
            if found & 7 == 6:
                slot = first + (found >> 3)
                word = index[slot]
                if word >> TAG_SHIFT == digest >> TAG_SHIFT:
                    place = word & PLACE_MASK
                    head = words[place]
                    at = (place << 3) + RECORD_HEADER_BYTES
                    end = at + len(key)
                    if head & KEY_LENGTH_MASK == len(key) and data[at:end] == key:
                        return slot, word, place, head, at
            found = bucket.find(tag, found + 1)
    return None
