"""Reads for whoever answers others: value, time to live and version, by one look at the record.

*Process*: front. As `kamacache.store.reader`'s, and proven whole as they are, but without a near
cache: what a near cache keeps tells no version. One such read costs half of what a lookup, which
counts and touches, and an entry lookup behind it cost.

*Invariants*: each hit is counted once and noted in its access byte. Expiry and serve-until are
compared with a clock that is read after the last value was copied.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from xxhash import xxh3_64_intdigest

from kamacache.clock import STAMP_SHIFT, boottime_s
from kamacache.limits import SERVE_UNTIL_BELIEVED_MS
from kamacache.store.arena import Arena
from kamacache.store.finding import elsewhere
from kamacache.store.layout import (
    FLAG_EXPIRES,
    FLAG_NEGATIVE,
    KEY_LENGTH_MASK,
    PLACE_MASK,
    PLAIN_MASK,
    RECORD_HEADER_BYTES,
    TAG_SHIFT,
    VALUE_LENGTH_SHIFT,
    expiry_of,
)
from kamacache.store.reader import NEGATIVE, Answer, Negative

Told = tuple[bytes, int, int]
"""Value, ms left to live (at least 1; 0: does not expire), version. A plain tuple: a NamedTuple
costs 0.3 us more to make, a fifth of the read."""

FOREVER_MS: Final = float("inf")
NO_END: Final = memoryview(b"\xff" * 8).cast("Q")  # a serve-until that never comes
RENEW_S: Final = SERVE_UNTIL_BELIEVED_MS / 1000
NEVER_EXPIRING_MASK: Final = PLAIN_MASK & ~FLAG_EXPIRES  # key length, and flags that say more


@dataclass(frozen=True, slots=True)
class ServedReads:
    """The functions, and their counts. None of them blocks or raises. None: ask the owner."""

    told: Callable[[bytes], Told | Negative | None]
    """One key, with what its record says of it."""
    many_told: Callable[[Sequence[bytes]], tuple[list[Answer], list[int], list[int]]]
    """Answers, ms left to live, versions, as in `Told`; 0 beside an answer without value."""
    counts: Callable[[], tuple[int, int, int]]
    """(0, memory hits, negative hits) since it was made, as `Lookup.counts`."""


def make_served_reads(  # noqa: C901 - closures, as in kamacache.store.reader
    arenas: Sequence[Arena],
    *,
    hash_seed: int,
    touch: bytes,
    serve_until: memoryview[int] | None = None,
    renewed: Callable[[], None] | None = None,
    clock_s: Callable[[], float] = boottime_s,
) -> ServedReads:
    """Return the reads over a group's shards, ordered by worker; arguments as `make_lookup`.

    serve-until is looked at by every call, and ``renewed`` is called by the first one that comes
    more than `SERVE_UNTIL_BELIEVED_MS` after the last time.
    """
    # Local names are what makes the closures fast. The loop repeats what `told` does, since a
    # call and a look at the clock for each key cost a third of its read.
    shards = tuple((a.data, a.words, a.index, a.access, a.geometry.slots) for a in arenas)
    workers = len(shards)
    serve_word = NO_END if serve_until is None else serve_until
    xxh, tag_shift, place_mask, clock = xxh3_64_intdigest, TAG_SHIFT, PLACE_MASK, clock_s
    header_bytes, plain_mask, value_shift = RECORD_HEADER_BYTES, PLAIN_MASK, VALUE_LENGTH_SHIFT
    endless_mask, key_mask, stamp_shift = NEVER_EXPIRING_MASK, KEY_LENGTH_MASK, STAMP_SHIFT
    seed, hottest = hash_seed, touch[255]
    memory_hits = negative_hits = 0
    renew_s = 0.0

    def renew(now_s: float) -> None:
        nonlocal renew_s
        renew_s = now_s + RENEW_S
        if renewed is not None:
            renewed()

    def told(key: bytes, _retry: bool = True) -> Told | Negative | None:
        nonlocal memory_hits, negative_hits
        digest = xxh(key, seed)
        data, words, index, access, slots = shards[(digest >> tag_shift) * workers >> 16]
        slot = digest % slots
        word = index[slot]
        head = words[place := word & place_mask]
        length = len(key)
        at = (place << 3) + header_bytes
        end = at + length
        # An empty slot's place is 0, the file's header, which a key might spell.
        if head & key_mask != length or data[at:end] != key or not word:
            found = elsewhere(data, words, index, slots, digest, slot, key)
            if found is None:
                return None
            slot, word, place, head, at = found
            end = at + length
        value = data[end : end + (head >> value_shift)]
        version = words[place + 2] >> stamp_shift
        expiry_ms = 0 if head & plain_mask == length else expiry_of(words, place)
        now_s = clock()
        if now_s >= renew_s:
            renew(now_s)
        if now_s * 1000 >= serve_word[0]:
            return None
        if index[slot] != word:  # moved or replaced while it was copied
            return told(key, False) if _retry else None
        ttl_ms = 0
        if expiry_ms:
            ttl_ms = int(expiry_ms - now_s * 1000) or 1
            if expiry_ms <= now_s * 1000:
                return None
        if access[slot] != hottest:
            access[slot] = touch[access[slot]]
        if head & FLAG_NEGATIVE:
            negative_hits += 1
            return NEGATIVE
        memory_hits += 1
        return value, ttl_ms, version

    def many_told(keys: Sequence[bytes]) -> tuple[list[Answer], list[int], list[int]]:
        nonlocal memory_hits
        answers: list[Answer] = []
        append = answers.append
        ttls: list[int] = []
        versions: list[int] = []
        append_ttl, append_version = ttls.append, versions.append
        now_ms = clock() * 1000
        soonest_ms = FOREVER_MS
        others = 0
        for key in keys:
            digest = xxh(key, seed)
            data, words, index, access, slots = shards[(digest >> tag_shift) * workers >> 16]
            slot = digest % slots
            word = index[slot]
            head = words[place := word & place_mask]
            length = len(key)
            at = (place << 3) + header_bytes
            end = at + length
            ttl_ms = 0
            if head & plain_mask != length or data[at:end] != key or not word:
                if head & key_mask != length or data[at:end] != key or not word:
                    found = elsewhere(data, words, index, slots, digest, slot, key)
                    if found is None:
                        others += 1
                        append(None)
                        append_ttl(0)
                        append_version(0)
                        continue
                    slot, word, place, head, at = found
                    end = at + length
                if head & plain_mask != length:
                    expiry_ms = expiry_of(words, place)
                    if head & endless_mask != length or expiry_ms <= now_ms:
                        others += 1
                        answer, ttl_ms, version = apart(told(key))
                        append(answer)
                        append_ttl(ttl_ms)
                        append_version(version)
                        continue
                    if expiry_ms < soonest_ms:
                        soonest_ms = expiry_ms
                    ttl_ms = int(expiry_ms - now_ms) or 1
            value = data[end : end + (head >> value_shift)]
            version = words[place + 2] >> stamp_shift
            if index[slot] != word:
                others += 1
                answer, ttl_ms, version = apart(told(key))
                append(answer)
                append_ttl(ttl_ms)
                append_version(version)
                continue
            if access[slot] != hottest:
                access[slot] = touch[access[slot]]
            append(value)
            append_ttl(ttl_ms)
            append_version(version)
        now_s = clock()
        if now_s >= renew_s:
            renew(now_s)
        if now_s * 1000 >= serve_word[0]:
            return [None] * len(answers), [0] * len(answers), [0] * len(answers)
        if now_s * 1000 >= soonest_ms:
            # One of them expired meanwhile.
            again = [apart(told(key)) for key in keys]
            return [a for a, _, _ in again], [t for _, t, _ in again], [v for _, _, v in again]
        memory_hits += len(answers) - others
        return answers, ttls, versions

    def counts() -> tuple[int, int, int]:
        return 0, memory_hits, negative_hits

    return ServedReads(told, many_told, counts)


def apart(found: Told | Negative | None) -> tuple[Answer, int, int]:
    """Return the answer, and the 0 that is told beside one without value."""
    return found if isinstance(found, tuple) else (found, 0, 0)


NO_READS: Final = ServedReads(
    lambda key: None,
    lambda keys: ([None] * len(keys), [0] * len(keys), [0] * len(keys)),
    lambda: (0, 0, 0),
)
"""Where memory cannot be read: everyone asks the owner."""
