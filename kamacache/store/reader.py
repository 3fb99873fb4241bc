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
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from xxhash import xxh3_64_intdigest

from kamacache.clock import boottime_s
from kamacache.hashing import second_slot
from kamacache.limits import NEAR_VALID_MS_MAX, SERVE_UNTIL_BELIEVED_MS
from kamacache.store.arena import Arena
from kamacache.store.layout import (
    BUCKET_SLOTS,
    FLAG_NEGATIVE,
    HEADER_WORDS,
    KEY_LENGTH_MASK,
    PLACE_MASK,
    PLAIN_MASK,
    RECORD_HEADER_BYTES,
    TAG_SHIFT,
    VALUE_LENGTH_SHIFT,
    expiry_of,
)
from kamacache.store.near import VALUE_BYTES_MAX, NearCache


class Negative:
    """The type of `NEGATIVE`."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "NEGATIVE"


NEGATIVE: Final = Negative()
"""A read's answer for a key that the getter is known not to know."""

Answer = bytes | Negative | None
FOREVER_S: Final = float("inf")
NEAR_VALID_S: Final = NEAR_VALID_MS_MAX / 1000
NEAR_VALID_LEAST_S: Final = NEAR_VALID_S - 0.1
BELIEVED_S: Final = SERVE_UNTIL_BELIEVED_MS / 1000


Slow = Callable[[Any, Answer, Any, float | None], Any]


@dataclass(frozen=True, slots=True)
class GetEnds:
    """How a Group's own ``get`` ends where memory has no value for it."""

    slow: Slow  # (key, None or NEGATIVE, default, timeout) -> what get returns
    absent: Any  # the default's default


@dataclass(frozen=True, slots=True)
class Lookup:
    """The functions that read a group's memory, and their counts. All are safe for threads."""

    get: Callable[[Any], Answer]
    """The value, `NEGATIVE`, or None: ask the owner. Never blocks, never raises."""
    many: Callable[[Iterable[Any]], list[Answer]]
    """As `get` for several keys, in their order; all must be hashable. A near hit here costs an
    eighth of a hit in memory (1,800 against 13,000 instructions), one by one a quarter."""
    direct: Callable[..., Any] | None
    """A Group's ``get(key, default, *, timeout)`` in one frame; None without `GetEnds`."""
    counts: Callable[[], tuple[int, int, int]]
    """(near hits, memory hits, negative hits) since it was made."""


def _seen(key: object, answer: Answer, default: object, timeout: object) -> Answer:
    return answer


_ANSWER = GetEnds(_seen, None)


def make_lookup(  # noqa: C901 - see the module
    arenas: Sequence[Arena],
    *,
    hash_seed: int,
    touch: bytes,
    near: NearCache | None = None,
    serve_until: memoryview[int] | None = None,
    renewed: Callable[[], None] | None = None,
    clock_s: Callable[[], float] = boottime_s,
    tick_s: Callable[[], float] | None = None,
    ends: GetEnds | None = None,
) -> Lookup:
    """Return the lookup over a group's shards, ordered by worker.

    ``serve_until`` is a one-word view, in ms of CLOCK_BOOTTIME, up to which reads are allowed;
    without it they always are. The word is read again, and ``renewed`` called, which must not
    raise, by the first read that comes more than `SERVE_UNTIL_BELIEVED_MS` after the last time:
    a node that stops sets the word to 0, and no successor is ready sooner than that.

    ``clock_s`` is CLOCK_BOOTTIME, on which records expire. How long an answer holds is looked up
    on ``tick_s``, by default time.monotonic, which costs half as much (48 against 87 ns) and
    differs only in standing still while the machine sleeps: the two are set against each other
    whenever serve-until is read again, so after a sleep a near value may be served past its TTL
    for at most `NEAR_VALID_MS_MAX` of waking time.

    With ``ends`` there is a second function that is a Group's whole ``get``: a method that calls
    a lookup costs a fifth more than a near hit itself.
    """
    # Local names are what makes the closures fast; see the module's docstring.
    shards = tuple((a.data, a.words, a.index, a.access, a.geometry.slots) for a in arenas)
    workers = len(shards)
    xxh, clock, tag_shift, place_mask = xxh3_64_intdigest, clock_s, TAG_SHIFT, PLACE_MASK
    header_bytes, plain_mask, value_shift = RECORD_HEADER_BYTES, PLAIN_MASK, VALUE_LENGTH_SHIFT
    key_mask, seed, hottest = KEY_LENGTH_MASK, hash_seed, touch[255]
    if tick_s is None:
        tick_s = time.monotonic if clock_s is boottime_s else clock_s
    tick, same_clock = tick_s, tick_s is clock_s
    near_hits = memory_hits = negative_hits = 0
    allowed_until_s = FOREVER_S if serve_until is None else 0.0
    near_until_s = 0.0

    def reading(  # noqa: C901 - see the module
        slow: Slow, absent: Any
    ) -> Callable[..., Any]:
        def memory(  # noqa: C901 - see the module
            key: Any, default: Any = absent, *, timeout: float | None = None, _retry: bool = True
        ) -> Any:
            nonlocal memory_hits, negative_hits, allowed_until_s, near_until_s
            if isinstance(key, str):
                try:
                    kb = key.encode()
                except UnicodeEncodeError:
                    return slow(key, None, default, timeout)
            elif isinstance(key, bytes):
                kb = key
            else:  # slow says what is wrong with it
                return slow(key, None, default, timeout)
            digest = xxh(kb, seed)
            tag = digest >> tag_shift
            data, words, index, access, slots = shards[tag * workers >> 16]
            slot = digest % slots
            length = len(kb)
            word = index[slot]
            if (
                word >> tag_shift != tag
                or (head := words[place := word & place_mask]) & key_mask != length
                or data[(at := (place << 3) + header_bytes) : at + length] != kb
            ):
                other = elsewhere(data, words, index, slots, digest, slot, kb)
                if other is None:
                    return slow(key, None, default, timeout)
                slot, word, place, head, at = other
            at += length
            value = data[at : at + (head >> value_shift)]
            now = tick()
            if now >= allowed_until_s:
                if serve_until is not None:
                    left_s = serve_until[0] / 1000 - (now if same_clock else clock())
                    allowed_until_s = now + min(left_s, BELIEVED_S)
                if renewed is not None:
                    renewed()
                if now >= allowed_until_s:
                    return slow(key, None, default, timeout)
            until_s = FOREVER_S
            if head & plain_mask != length:  # it expires, or says "not found"
                expiry_ms = expiry_of(words, place)
                if expiry_ms:
                    until_s = expiry_ms / 1000
                    if not same_clock:
                        until_s -= clock() - now
            # Everything above was copied from a record that this word named; does it still?
            if index[slot] != word:
                if _retry:
                    return memory(key, default, timeout=timeout, _retry=False)
                return slow(key, None, default, timeout)
            if now >= until_s:
                return slow(key, None, default, timeout)
            if access[slot] != hottest:
                access[slot] = touch[access[slot]]
            if head & FLAG_NEGATIVE:
                negative_hits += 1
                return slow(key, NEGATIVE, default, timeout)
            memory_hits += 1
            if near is not None and len(value) <= VALUE_BYTES_MAX:
                # One number for all entries of 100 ms, which stays in the processor's cache: each
                # entry's own would be one more miss on a near hit.
                if near_until_s < now + NEAR_VALID_LEAST_S:
                    near_until_s = now + NEAR_VALID_S
                if until_s > near_until_s:
                    until_s = near_until_s
                near.keep(key, (value, index, slot, word, until_s, access))
            return value

        if near is None:
            return memory
        kept = near.entries.get

        def nearest(key: Any, default: Any = absent, *, timeout: float | None = None) -> Any:
            nonlocal near_hits
            try:
                entry = kept(key)
            except TypeError:  # unhashable
                return slow(key, None, default, timeout)
            if entry is not None:
                value, index, slot, word, until_s, access = entry
                if index[slot] == word and (now := tick()) < until_s and now < allowed_until_s:
                    if access[slot] != hottest:
                        access[slot] = touch[access[slot]]
                    near_hits += 1
                    return value
            return memory(key, default, timeout=timeout)

        return nearest

    def many(keys: Iterable[bytes]) -> list[Answer]:
        nonlocal near_hits
        if near is None:
            return [get(key) for key in keys]
        answers: list[Answer] = []
        append = answers.append
        kept = near.entries.get
        now = tick()
        for key in keys:
            entry = kept(key)
            if entry is not None:
                value, index, slot, word, until_s, access = entry
                if index[slot] == word and now < until_s and now < allowed_until_s:
                    if access[slot] != hottest:
                        access[slot] = touch[access[slot]]
                    near_hits += 1
                    append(value)
                    continue
            append(get(key))
        return answers

    def counts() -> tuple[int, int, int]:
        return near_hits, memory_hits, negative_hits

    direct = None if ends is None else reading(ends.slow, ends.absent)
    get = reading(_ANSWER.slow, _ANSWER.absent)
    return Lookup(get, many, direct, counts)


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
