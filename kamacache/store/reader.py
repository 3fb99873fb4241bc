"""Lock-free reads: the closures behind ``Group.get``.

*Process*: every process that maps the shards. *Proof that a read is whole*: the index word is
read, the record copied, the key compared, and the index word read again. A word that still stands
means its record: the writer zeroes the words into a segment before it raises the segment's
generation and reuses it, and x86-64 keeps loads and stores in that order. The generation is part
of the word, so the second look at the word is the look at the generation too. The place is read by
itself between the two looks, and is that word's, since no word comes back to its slot; but an empty
slot does, so that two looks at one prove nothing. Two failures in a row, or nothing found, is
"ask the owner": a miss here is never authoritative.

The functions are closures over tuples, without attribute access or helper calls on the way of a
hit, since a Python call costs as much as the hash. What a hit costs is its bytecodes, 16
instructions each before they do anything, the ints above 30 bits among them, and two misses of
the processor's cache, at the slot's word and at its access byte. So `kamacache.store.finding` has
views that give small ints and floats; the byte is read right behind the word, where the processor
waits for both at once; and no function here has a parameter by keyword only, for which CPython has
no fast call. Measured by scripts/bench/local_hit.py and scripts/bench/instructions.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from xxhash import xxh3_64_intdigest

from kamacache.clock import boottime_s
from kamacache.limits import NEAR_VALID_MS_MAX, SERVE_UNTIL_BELIEVED_MS
from kamacache.store.arena import Arena
from kamacache.store.finding import (
    EXPIRY,
    HEADERS,
    StructError,
    directory,
    elsewhere,
    is_plain,
    tagged,
)
from kamacache.store.layout import (
    FLAG_EXPIRES,
    FLAG_NEGATIVE,
    TAG_SHIFT,
    VALUE_LENGTH_SHIFT,
    expiry_of,
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
    many: Callable[[Sequence[Any]], list[Answer]]
    """As `get` for several keys, in their order; all must be hashable. A near hit here costs a
    fifth of a hit in memory (1,700 against 8,600 instructions), one by one 2,600."""
    direct: Callable[..., Any] | None
    """A Group's ``get(key, default, timeout)`` in one frame; None without `GetEnds`."""
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
    whenever serve-until is read again, so after a sleep a value may be served past its TTL for
    `SERVE_UNTIL_BELIEVED_MS` of waking time, one in the near cache for at most `NEAR_VALID_MS_MAX`.

    With ``ends`` there is a second function that is a Group's whole ``get``: a method that calls
    a lookup costs a fifth more than a near hit itself.
    """
    # Local names are what makes the closures fast; see the module's docstring.
    shards, shift = directory(arenas)
    workers = len(arenas)
    xxh, seed, headers, hottest = xxh3_64_intdigest, hash_seed, HEADERS, touch[255]
    tick = tick_s or (time.monotonic if clock_s is boottime_s else clock_s)
    near_hits = memory_hits = 0.0  # whole numbers; a float is counted up at half the cost
    negative_hits = 0
    allowed_until_s = near_until_s = 0.0
    ahead_s = 0.0 if tick is clock_s else clock_s() - tick()

    def renew(now: float) -> bool:
        """Look at serve-until, and set the two clocks against each other; are reads allowed?"""
        nonlocal allowed_until_s, ahead_s
        clock_now = now if tick is clock_s else clock_s()
        ahead_s = clock_now - now
        left_s = FOREVER_S if serve_until is None else serve_until[0] / 1000 - clock_now
        allowed_until_s = now + min(left_s, BELIEVED_S)
        if renewed is not None:
            renewed()
        return now < allowed_until_s

    def keep(key: Any, entry: NearEntry, expiry_ms: int, now: float) -> None:
        """Put an entry, whose time is not known yet, into the near cache."""
        nonlocal near_until_s
        # One number for all entries of 100 ms, which stays in the processor's cache: each
        # entry's own would be one more miss on a near hit.
        if near_until_s < now + NEAR_VALID_LEAST_S:
            near_until_s = now + NEAR_VALID_S
        until_s = near_until_s
        if expiry_ms:
            until_s = min(until_s, expiry_ms / 1000 - ahead_s)
        value, index, slot, word, _, access = entry
        near.keep(key, (value, index, slot, word, until_s, access))  # type: ignore[union-attr]

    def reading(  # noqa: C901 - see the module
        slow: Slow, absent: Any
    ) -> Callable[..., Any]:
        def anywhere(key: Any, default: Any, timeout: float | None, tries: int) -> Any:
            """Read a key in whatever slot, shard or kind of record; what `memory` leaves."""
            nonlocal memory_hits, negative_hits
            try:
                kb = key.encode() if isinstance(key, str) else key
            except UnicodeEncodeError:
                kb = None
            if not isinstance(kb, bytes):  # slow says what is wrong with it
                return slow(key, None, default, timeout)
            digest = xxh(kb, seed)
            arena = arenas[(digest >> TAG_SHIFT) * workers >> 16]
            for _ in range(tries):
                home = digest % arena.geometry.slots
                found = elsewhere(
                    arena.data, arena.words, arena.index, arena.geometry.slots, digest, home, kb
                )
                if found is None:
                    break
                slot, word, place, head, at = found
                at += len(kb)
                value = arena.data[at : at + (head >> VALUE_LENGTH_SHIFT)]
                now = tick()
                if now >= allowed_until_s and not renew(now):
                    break
                expiry_ms = expiry_of(arena.words, place)
                stamp = arena.stamps[slot] if is_plain(word) else word
                if arena.index[slot] != word:
                    continue
                if expiry_ms and now >= expiry_ms / 1000 - ahead_s:
                    break
                access = arena.access_map
                if access[slot] != hottest:
                    access[slot] = touch[access[slot]]
                if head & FLAG_NEGATIVE:
                    negative_hits += 1
                    return slow(key, NEGATIVE, default, timeout)
                memory_hits += 1.0
                if near is not None and len(value) <= VALUE_BYTES_MAX:
                    index = arena.stamps if is_plain(word) else arena.index
                    keep(key, (value, index, slot, stamp, 0.0, access), expiry_ms, now)
                return value
            return slow(key, None, default, timeout)

        def memory(  # noqa: C901 - see the module
            key: Any, default: Any = absent, timeout: float | None = None
        ) -> Any:
            nonlocal memory_hits
            try:
                if isinstance(key, str):
                    kb = key.encode()
                elif isinstance(key, bytes):
                    kb = key
                else:
                    raise TypeError  # `anywhere` sees to it
                digest = xxh(kb, seed)
                data, stamps, places, access, slots = shards[digest >> shift]
                slot = digest % slots
                word = stamps[slot]
                level = access[slot]  # here, so that both misses of the processor's cache are one
                length = len(kb)
                plain, size, found = headers[length](data, at := places[slot] << 3)
            except (UnicodeEncodeError, TypeError, IndexError, StructError):
                return anywhere(key, default, timeout, 2)
            if found != kb:
                slot = tagged(data, slots, digest)
                if slot < 0:
                    return slow(key, None, default, timeout)
                word = stamps[slot]
                level = access[slot]
                try:
                    plain, size, found = headers[length](data, at := places[slot] << 3)
                except StructError:
                    found = b""
                if found != kb:
                    return anywhere(key, default, timeout, 2)
            until_s = allowed_until_s
            expiry_ms = 0
            if plain != length:  # it expires, says "not found", or is a longer key's
                if plain - length != FLAG_EXPIRES:
                    return anywhere(key, default, timeout, 2)
                low, high = EXPIRY(data, at)
                expiry_ms = high << 32 | low
                if expiry_ms / 1000 - ahead_s < until_s:
                    until_s = expiry_ms / 1000 - ahead_s
            at += length + 24
            value = data[at : at + size]
            now = tick()
            if now >= until_s:
                if now >= allowed_until_s and not renew(now):
                    return slow(key, None, default, timeout)
                if expiry_ms and now >= expiry_ms / 1000 - ahead_s:
                    return slow(key, None, default, timeout)
            # Everything above was copied from a record that this word named; does it still?
            # A slot that was empty says nothing: it may have been filled and emptied meanwhile.
            if stamps[slot] != word or not word:
                return anywhere(key, default, timeout, 1)
            if level != hottest:
                access[slot] = touch[level]
            memory_hits += 1.0
            if near is not None and size <= VALUE_BYTES_MAX:
                keep(key, (value, stamps, slot, word, 0.0, access), expiry_ms, now)
            return value

        if near is None:
            return memory
        kept = near.entries.get

        def nearest(key: Any, default: Any = absent, timeout: float | None = None) -> Any:
            nonlocal near_hits
            try:
                entry = kept(key)
                if entry is not None:
                    value, index, slot, word, until_s, access = entry
                    if index[slot] == word:
                        if access[slot] != hottest:
                            access[slot] = touch[access[slot]]
                        now = tick()
                        if now < until_s and (now < allowed_until_s or renew(now)):
                            near_hits += 1.0
                            return value
            except TypeError:  # unhashable
                pass
            return memory(key, default, timeout)

        return nearest

    def many(keys: Sequence[Any]) -> list[Answer]:
        nonlocal near_hits
        if near is None:
            return [get(key) for key in keys]
        answers: list[Answer] = []
        append = answers.append
        now = tick()
        allowed = now < allowed_until_s or renew(now)
        others = 0
        for key, entry in zip(keys, map(near.entries.get, keys), strict=True):
            if entry is not None and allowed:
                value, index, slot, word, until_s, access = entry
                if index[slot] == word:
                    if access[slot] != hottest:
                        access[slot] = touch[access[slot]]
                    if now < until_s:
                        append(value)
                        continue
            others += 1
            append(get(key))
        near_hits += len(answers) - others
        return answers

    def counts() -> tuple[int, int, int]:
        return int(near_hits), int(memory_hits), negative_hits

    direct = None if ends is None else reading(ends.slow, ends.absent)
    get = reading(_ANSWER.slow, _ANSWER.absent)
    return Lookup(get, many, direct, counts)
