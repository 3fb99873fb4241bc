"""The one writer of a shard: put, get, delete, taking segments back.

*Process*: the shard's worker, on one thread. *Owns*: data file; its access bytes with the readers.
*Order of writes that readers and a crash rely on*: (1) record bytes, (2) the segment's `used`,
(3) the index word. A crash before (3) leaves a record nobody names. A replaced or deleted key is
gone with one aligned store, and never comes back, since nothing is rebuilt from the log.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Final

from xxhash import xxh3_64_intdigest

from kamacache.clock import HybridClock, boottime_ms
from kamacache.errors import ValueTooLargeError
from kamacache.hashing import second_slot
from kamacache.store.arena import Arena
from kamacache.store.eviction import S3FifoPolicy, Verdict, make_policy, touch_of
from kamacache.store.layout import (
    BUCKET_SLOTS,
    CHECKSUM_MASK,
    CHECKSUM_SHIFT,
    COUNTERS,
    EXPIRY_MS_MAX,
    EXPIRY_SHIFT,
    FLAG_EXPIRES,
    FLAG_NEGATIVE,
    H_COUNTERS,
    H_HEARTBEAT,
    H_VERSION,
    HEADER_WORDS,
    KEY_LENGTH_MASK,
    PLACE_MASK,
    RECORD_HEADER,
    RECORD_HEADER_BYTES,
    SLOT_HIGH_MASK,
    SLOT_LOW_MASK,
    TAG_SHIFT,
    VALUE_LENGTH_SHIFT,
)
from kamacache.store.reader import Answer, elsewhere, make_lookup
from kamacache.store.recovery import adopt_slots, purge
from kamacache.store.segments import SegmentLog

log = logging.getLogger("kamacache.store")

# Free segments kept in hand: one for the records that move on while a victim is taken back.
_RESERVE_SEGMENTS: Final = 1
# Below this share of live bytes the log has holes enough: move records together, evict nothing.
_COMPACT_BELOW: Final = 0.85
# Victims whose records nearly all moved on, before the next one is dropped whole.
_VICTIMS_MAX: Final = 16
_MAINTAIN_SEGMENTS_MAX: Final = 64
_WORD_MASK: Final = (1 << TAG_SHIFT) - 1
_NOT_CHOSEN: Final = -1
_DROP_ALL: Final[list[Verdict]] = [None] * 256


class ShardWriter:
    """Writes one shard. Not safe for threads: its owner calls it from one, or holds a lock."""

    def __init__(
        self,
        arena: Arena,
        *,
        group: str,
        eviction: str,
        hash_seed: int,
        clock_ms: Callable[[], int] = boottime_ms,
    ) -> None:
        self.arena = arena
        self.group = group
        self._seed = hash_seed
        self._clock_ms = clock_ms
        self._data = arena.data
        self._words = arena.words
        self._index = arena.index
        self._access = arena.access
        self._slots = arena.geometry.slots
        self._segment_bytes = arena.geometry.segment_bytes
        self._log = SegmentLog(arena, 2 if eviction == "s3fifo" else 1)
        self._policy = make_policy(eviction, arena, self._log)
        self._versions = HybridClock(self._words[H_VERSION])
        self._lookup = make_lookup(
            (arena,),
            hash_seed=hash_seed,
            touch=touch_of(eviction),
            clock_s=lambda: clock_ms() / 1000,
        )
        self._compact_below = int(arena.geometry.log_bytes * _COMPACT_BELOW)
        self.items = adopt_slots(arena)
        self._puts = 0
        self._counts = dict.fromkeys(COUNTERS, 0)

    # -- one key ---------------------------------------------------------------------------

    def get(self, key: bytes) -> Answer:
        """Return the value, `NEGATIVE`, or None; here, and only here, None means it is absent."""
        return self._lookup.get(key)

    def put(
        self,
        key: bytes,
        value: bytes,
        expiry_ms: int = 0,
        *,
        negative: bool = False,
        version: int | None = None,
    ) -> bool:
        """Store a value, replacing the key's entry in one step; return whether it was stored.

        ``expiry_ms`` is absolute, on CLOCK_BOOTTIME; 0 is never. Not stored, with False: a
        ``version`` not above the entry's own, or an expiry that has passed (which removes the
        entry). Raises `ValueTooLargeError`; the old entry then stands.
        """
        key_bytes = len(key)
        size = (RECORD_HEADER_BYTES + key_bytes + len(value) + 7) & ~7
        if size > self._segment_bytes:
            self.check_size(key, value)
        digest = xxh3_64_intdigest(key, self._seed)
        slot, old_word = self._slot_of(key, digest)
        words, segments = self._words, self._log
        if old_word:
            segment_class = segments.class_at(old_word & PLACE_MASK)
            if version is not None and words[(old_word & PLACE_MASK) + 2] >> 8 >= version:
                return False
        else:
            segment_class = self._policy.admit(digest)
        current = segments.open[segment_class]
        if current is None or current.position + size > current.end:
            self._make_room(segment_class, size)
            slot, old_word = self._slot_of(key, digest)  # the entry may have moved or gone
        if expiry_ms:
            if expiry_ms <= self._clock_ms():
                if old_word:
                    self._drop(slot, old_word & PLACE_MASK)
                return False
            expiry_ms = min(expiry_ms, EXPIRY_MS_MAX)
            key_bytes |= FLAG_EXPIRES
        if negative:
            key_bytes |= FLAG_NEGATIVE
        if version is None:
            words[H_VERSION] = version = self._versions.next()
        else:
            self._versions.observe(version)
            words[H_VERSION] = self._versions.last  # a later version may have been seen before
        if slot < 0:
            slot = self._free_slot(digest)
        body = key + value
        record = (
            RECORD_HEADER.pack(
                len(value) << VALUE_LENGTH_SHIFT
                | (xxh3_64_intdigest(body, version) & CHECKSUM_MASK) << CHECKSUM_SHIFT
                | key_bytes,
                expiry_ms << EXPIRY_SHIFT | slot & SLOT_LOW_MASK,
                version << 8 | slot >> 24,
            )
            + body
        )
        word = digest >> TAG_SHIFT << TAG_SHIFT | segments.append(
            segment_class, record, size, expiry_ms
        )
        self._puts += 1
        if old_word:
            # From this store on every reader and near cache sees the new value.
            self._index[slot] = word
            segments.kill(old_word & PLACE_MASK, self._size_at(old_word & PLACE_MASK))
            self._access[slot] = self._policy.touch[self._access[slot]]
        else:
            self._access[slot] = self._policy.fresh
            self._index[slot] = word
            self.items += 1
        return True

    def delete(self, key: bytes) -> bool:
        """Remove a key's entry; return whether a value (unexpired, not a "not found") was there."""
        digest = xxh3_64_intdigest(key, self._seed)
        slot, word = self._slot_of(key, digest)
        if not word:
            return False
        place = word & PLACE_MASK
        head = self._words[place]
        expiry_ms = self._words[place + 1] >> EXPIRY_SHIFT
        alive = not head & FLAG_NEGATIVE and not 0 < expiry_ms <= self._clock_ms()
        self._drop(slot, place)
        self._counts["deletes"] += alive
        return alive

    def expiry_of(self, key: bytes) -> int:
        """Return the absolute expiry in ms of a key's entry; 0 for never, or no entry."""
        _, word = self._slot_of(key, xxh3_64_intdigest(key, self._seed))
        return self._words[(word & PLACE_MASK) + 1] >> EXPIRY_SHIFT if word else 0

    def version_of(self, key: bytes) -> int:
        """Return the version of a key's entry; 0 where there is none."""
        _, word = self._slot_of(key, xxh3_64_intdigest(key, self._seed))
        return self._words[(word & PLACE_MASK) + 2] >> 8 if word else 0

    def check_size(self, key: bytes, value: bytes) -> None:
        """Raise `ValueTooLargeError` where the value can never be stored."""
        limit = self.arena.geometry.value_bytes_max(len(key))
        if len(value) > limit:
            raise ValueTooLargeError(
                f"group {self.group!r}: a value of {len(value)} bytes is above the limit of "
                f"{limit} (one segment of its shard); raise cache_bytes or use fewer workers",
                value_bytes=len(value),
                limit_bytes=limit,
                group=self.group,
            )

    # -- the index -------------------------------------------------------------------------

    def _slot_of(self, key: bytes, digest: int) -> tuple[int, int]:
        """Return ``(slot, word)`` of the key's entry, or ``(a slot for it, 0)``.

        The slot is `_NOT_CHOSEN` where `_free_slot` must find one, at another entry's expense
        perhaps: nothing is evicted for a key that is only asked about.
        """
        index = self._index
        slots = self._slots
        home = (digest & 0xFFFFFFFF) * slots >> 32
        word = index[home]
        if word >> TAG_SHIFT == digest >> TAG_SHIFT:
            place = word & PLACE_MASK
            at = (place << 3) + RECORD_HEADER_BYTES
            end = at + len(key)
            if self._words[place] & KEY_LENGTH_MASK == len(key) and self._data[at:end] == key:
                return home, word
        # A bucket whose bytes do not hold the tag's two bytes does not hold the key.
        tag = (digest >> TAG_SHIFT).to_bytes(2, "little")
        second = second_slot(digest, slots)
        first_byte = (HEADER_WORDS + (home & -BUCKET_SLOTS)) * 8
        second_byte = (HEADER_WORDS + (second & -BUCKET_SLOTS)) * 8
        data = self._data
        if (
            tag in data[first_byte : first_byte + BUCKET_SLOTS * 8]
            or tag in data[second_byte : second_byte + BUCKET_SLOTS * 8]
        ):
            found = elsewhere(data, self._words, index, slots, digest, home, key)
            if found is not None:
                return found[0], found[1]
        if not word:
            return home, 0
        if not index[second]:
            return second, 0
        return _NOT_CHOSEN, 0

    def _free_slot(self, digest: int) -> int:
        """Return an empty slot of a key's two buckets; if none, their stalest entry makes room."""
        home = (digest & 0xFFFFFFFF) * self._slots >> 32
        second = second_slot(digest, self._slots)
        stalest, lowest = home, 256
        for first in (home & -BUCKET_SLOTS, second & -BUCKET_SLOTS):
            for slot in range(first, first + BUCKET_SLOTS):
                if not self._index[slot]:
                    return slot
                level = self._access[slot]
                if level < lowest:
                    stalest, lowest = slot, level
        self._drop(stalest, self._index[stalest] & PLACE_MASK)
        self._counts["index_evictions"] += 1
        self._counts["evictions"] += 1
        return stalest

    def _drop(self, slot: int, place: int) -> None:
        size = self._size_at(place)
        self._index[slot] = 0
        self._access[slot] = 0
        self._log.kill(place, size)
        self.items -= 1

    def _size_at(self, place: int) -> int:
        """Return the padded size of the record at a place."""
        head = self._words[place]
        length = RECORD_HEADER_BYTES + (head & KEY_LENGTH_MASK) + (head >> VALUE_LENGTH_SHIFT)
        return (length + 7) & ~7

    # -- space -----------------------------------------------------------------------------

    def _make_room(self, segment_class: int, size: int) -> None:
        """See to it that a record of this size can be appended to the class.

        Frees segments until there is one more than the reserve. Bounded: after `_VICTIMS_MAX`
        victims whose records nearly all moved on, the next is dropped whole.
        """
        if self._log.fits(segment_class, size):
            return
        self._policy.segment_filled()
        segments = self._log
        compacting = True
        for attempt in range(_VICTIMS_MAX + 1):
            if len(segments.free) > _RESERVE_SEGMENTS:
                return
            now_ms = self._clock_ms()
            if (expired := segments.expired(now_ms)) is not None:
                self._clean(expired, _DROP_ALL, now_ms)
                continue
            if len(segments.free) < _RESERVE_SEGMENTS:
                # The writer before died while it moved records to the reserve: nothing can move.
                self._clean(self._policy.victim(), _DROP_ALL, now_ms)
                continue
            if compacting and attempt < _VICTIMS_MAX and segments.live_bytes < self._compact_below:
                victim = segments.emptiest()
                if victim is not None:
                    segment_class = segments.class_of(victim)
                    room = segments.room(segment_class)
                    self._clean(victim, [(segment_class, level) for level in range(256)], now_ms)
                    # Records too large to share a segment leave the same holes where they go.
                    compacting = segments.room(segment_class) > room
                    continue
            victim = self._policy.victim()
            if attempt < _VICTIMS_MAX:
                verdicts = self._policy.verdicts(segments.class_of(victim))
            else:
                verdicts = _DROP_ALL
            self._clean(victim, verdicts, now_ms)

    def _clean(self, victim: int, verdicts: list[Verdict], now_ms: int) -> None:
        """Move or drop every live record of a closed segment, then free it.

        Readers go on meanwhile: a moved record is named by its new word in one store, and its
        old bytes stay as they are until the segment is freed and reused.
        """
        segments, policy = self._log, self._policy
        words, index, access, data = self._words, self._index, self._access, self._data
        slots = self._slots
        segment_class = segments.class_of(victim)
        remembers = policy.remembers(segment_class)
        moved = dropped = expired = 0
        position, end, stamp = segments.span(victim)
        while position < end:
            place = position >> 3
            head = words[place]
            size = RECORD_HEADER_BYTES + (head & KEY_LENGTH_MASK) + (head >> VALUE_LENGTH_SHIFT)
            size = (size + 7) & ~7
            if position + size > end:
                dropped += self._purge(victim)
                break
            expiry_slot = words[place + 1]
            slot = expiry_slot & SLOT_LOW_MASK | (words[place + 2] & SLOT_HIGH_MASK) << 24
            if slot >= slots:
                dropped += self._purge(victim)
                break
            word = index[slot]
            if word & _WORD_MASK == stamp | place:
                expiry_ms = expiry_slot >> EXPIRY_SHIFT
                verdict = verdicts[access[slot]]
                if 0 < expiry_ms <= now_ms:
                    expired += 1
                    index[slot] = 0
                    access[slot] = 0
                elif verdict is not None:
                    target, level = verdict
                    record = data[position : position + size]
                    new = segments.append(target, record, size, expiry_ms)
                    index[slot] = word & ~_WORD_MASK | new
                    if level != access[slot]:
                        access[slot] = level
                    moved += 1
                else:
                    dropped += 1
                    index[slot] = 0
                    access[slot] = 0
                    if remembers:
                        at = position + RECORD_HEADER_BYTES
                        key = data[at : at + (head & KEY_LENGTH_MASK)]
                        policy.forgotten(xxh3_64_intdigest(key, self._seed))
            position += size
        segments.release(victim)
        self.items -= dropped + expired
        counts = self._counts
        counts["evictions"] += dropped
        counts["expired"] += expired
        counts["records_moved"] += moved
        counts["segments_freed"] += 1

    def _purge(self, segment: int) -> int:
        dropped = purge(self.arena, *self._log.places(segment))
        log.error(
            "group %s: segment %d holds a record that makes no sense; dropped its entries (%d)",
            self.group,
            segment,
            dropped,
        )
        return dropped

    # -- upkeep ----------------------------------------------------------------------------

    def maintain(self) -> None:
        """Free segments whose records have all expired and publish the counters; about 1/s."""
        now_ms = self._clock_ms()
        for _ in range(_MAINTAIN_SEGMENTS_MAX):
            segment = self._log.expired(now_ms)
            if segment is None:
                break
            self._clean(segment, _DROP_ALL, now_ms)
        for at, count in enumerate(self.stats().values()):
            self._words[H_COUNTERS + at] = count
        self._words[H_HEARTBEAT] = now_ms

    def stats(self) -> dict[str, int]:
        """Return the counters of `layout.COUNTERS`, in that order, since this writer began."""
        counts = self._counts
        counts["items"] = self.items
        counts["puts"] = self._puts
        counts["live_bytes"] = self._log.live_bytes
        if isinstance(self._policy, S3FifoPolicy):
            counts["ghost_hits"] = self._policy.ghost_hits
        return dict(counts)

    def walk(self) -> Iterator[tuple[bytes, bytes, int]]:
        """Yield ``(key, value, expiry_ms)`` of every entry, expired ones too; for diagnosis."""
        for slot in range(self._slots):
            word = self._index[slot]
            if word:
                place = word & PLACE_MASK
                head = self._words[place]
                at = (place << 3) + RECORD_HEADER_BYTES
                middle = at + (head & KEY_LENGTH_MASK)
                value = self._data[middle : middle + (head >> VALUE_LENGTH_SHIFT)]
                yield self._data[at:middle], value, self._words[place + 1] >> EXPIRY_SHIFT

    def close(self) -> None:
        """Publish the counters and give up the lock; the files stay."""
        self.maintain()
        self.arena.close()


def published_counters(arena: Arena) -> dict[str, int]:
    """Return the counters that a shard's writer last published; any process may ask."""
    words = arena.words
    return {name: words[H_COUNTERS + at] for at, name in enumerate(COUNTERS)}
