"""The one writer of a shard: put, get, delete, taking segments back.

*Process*: the shard's worker, on one thread. *Owns*: data file; its access bytes with the readers.
*Order of writes that readers and a crash rely on*: (1) record bytes, (2) the segment's `used`,
(3) the index word. A crash before (3) leaves a record nobody names. A replaced or deleted key is
gone with one aligned store, and never comes back, since nothing is rebuilt from the log.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Final

from xxhash import xxh3_64_intdigest

from kamacache.clock import STAMP_SHIFT, HybridClock, boottime_ms
from kamacache.errors import ValueTooLargeError
from kamacache.store.arena import Arena
from kamacache.store.eviction import S3FifoPolicy, Verdict, classes_of, make_policy, touch_of
from kamacache.store.index import ShardIndex
from kamacache.store.layout import (
    CHECKSUM_MASK,
    COUNTERS,
    EXPIRY_LOW_MASK,
    EXPIRY_LOW_SHIFT,
    EXPIRY_MS_MAX,
    FLAG_EXPIRES,
    FLAG_NEGATIVE,
    H_COUNTERS,
    H_HEARTBEAT,
    H_STAMP,
    KEY_LENGTH_MASK,
    PLACE_MASK,
    RECORD_HEADER,
    RECORD_HEADER_BYTES,
    SLOT_MASK,
    TAG_SHIFT,
    VALUE_LENGTH_SHIFT,
    Geometry,
    expiry_of,
)
from kamacache.store.reader import Answer, make_lookup
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
_RUN_SHARE: Final = 8  # a run of put_many takes at most this part of a segment
_PADDING: Final = tuple(bytes(count) for count in range(8))
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
        self._slots = arena.index
        self._marks = adopt_slots(arena)
        self._index = ShardIndex(arena, self._marks)
        self._access = arena.access
        self._segment_bytes = arena.geometry.segment_bytes
        self._value_bytes_max = arena.geometry.value_bytes_max
        self._log = SegmentLog(arena, classes_of(eviction))
        self._policy = make_policy(eviction, arena, self._log)
        self._one_class = self._policy.classes == 1
        self._fresh, self._hottest = self._policy.fresh, self._policy.touch[255]
        self._run_bytes_max = self._segment_bytes // _RUN_SHARE
        self._versions = HybridClock(self._words[H_STAMP] >> STAMP_SHIFT)
        self._lookup = make_lookup(
            (arena,),
            hash_seed=hash_seed,
            touch=touch_of(eviction),
            clock_s=lambda: clock_ms() / 1000,
        )
        self._compact_below = int(arena.geometry.log_bytes * _COMPACT_BELOW)
        self.items = len(self._marks) - self._marks.count(0)
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
        if len(value) > self._value_bytes_max or size > self._segment_bytes:
            self.check_size(key, value)
        digest = xxh3_64_intdigest(key, self._seed)
        slot, old_word = self._index.find(key, digest)
        words, segments = self._words, self._log
        if (
            version is not None
            and old_word
            and words[(old_word & PLACE_MASK) + 2] >> STAMP_SHIFT >= version
        ):
            return False
        segment_class = 0 if self._one_class else self._class_for(digest, old_word)
        current = segments.open[segment_class]
        if current is None or current.position + size > current.end:
            self._make_room(segment_class, size)
            current = segments.with_room(segment_class, size)
            slot, old_word = self._index.find(key, digest)  # the entry may have moved or gone
        flags = key_bytes
        if expiry_ms:
            if expiry_ms <= self._clock_ms():
                if old_word:
                    self._drop(slot, old_word & PLACE_MASK)
                return False
            expiry_ms = min(expiry_ms, EXPIRY_MS_MAX)
            flags |= FLAG_EXPIRES
        if negative:
            flags |= FLAG_NEGATIVE
        if version is None:
            words[H_STAMP] = stamp = self._versions.stamps(1)
        else:
            self._versions.observe(version)
            stamp = version << STAMP_SHIFT
            words[H_STAMP] = self._versions.stamp  # a later version may have been seen before
        if slot < 0:
            slot = self._free_slot(digest)
        header = RECORD_HEADER.pack(
            flags,
            xxh3_64_intdigest(value, digest ^ stamp) & CHECKSUM_MASK,
            len(value),
            slot,
            expiry_ms & EXPIRY_LOW_MASK,
            stamp | expiry_ms >> EXPIRY_LOW_SHIFT,
        )
        word = segments.write(current, header + key + value, size, expiry_ms)
        self._publish(slot, digest >> TAG_SHIFT, word, old_word)
        return True

    def put_many(self, items: Sequence[tuple[bytes, bytes]], expiry_ms: int = 0) -> None:
        """Store values of distinct keys, as `put` does one by one, at about half its cost.

        Records of one run are written together and published after that, one word each. Raises
        `ValueTooLargeError` before anything is stored.
        """
        sizes = [(RECORD_HEADER_BYTES + len(key) + len(value) + 7) & ~7 for key, value in items]
        if max(sizes, default=0) > self._value_bytes_max:
            for key, value in items:
                self.check_size(key, value)
        if not self._one_class or 0 < expiry_ms <= self._clock_ms():
            for key, value in items:
                self.put(key, value, expiry_ms)
            return
        expiry_ms = min(expiry_ms, EXPIRY_MS_MAX)
        first = run_bytes = 0
        limit = self._run_limit()
        for last, size in enumerate(sizes):
            if run_bytes + size > limit and run_bytes:
                self._put_run(items[first:last], run_bytes, expiry_ms)
                first, run_bytes = last, 0
                limit = self._run_limit()
            run_bytes += size
        if run_bytes:
            self._put_run(items[first:], run_bytes, expiry_ms)

    def _run_limit(self) -> int:
        """Return how long a run may be: no longer than fits, or a segment's end is wasted."""
        current = self._log.open[0]
        room = 0 if current is None else current.end - current.position
        return min(room, self._run_bytes_max) or self._run_bytes_max

    def _put_run(
        self, items: Sequence[tuple[bytes, bytes]], run_bytes: int, expiry_ms: int
    ) -> None:
        """Write a run's records with one copy, then publish their words."""
        segments, find, seed, xxh = self._log, self._index.find, self._seed, xxh3_64_intdigest
        pack = RECORD_HEADER.pack
        current = segments.open[0]
        if current is None or current.position + run_bytes > current.end:
            self._make_room(0, run_bytes)
            current = segments.with_room(0, run_bytes)
        place = current.position >> 3
        stamp = self._versions.stamps(len(items))
        flags = FLAG_EXPIRES if expiry_ms else 0
        expiry_low, expiry_high = expiry_ms & EXPIRY_LOW_MASK, expiry_ms >> EXPIRY_LOW_SHIFT
        records: list[bytes] = []
        published: list[tuple[int, int, int, int]] = []
        taken: set[int] = set()  # slots of this run, not to be seen in the index yet
        left: list[tuple[bytes, bytes]] = []
        for item in items:
            key, value = item
            digest = xxh(key, seed)
            slot, old_word = find(key, digest)
            if slot < 0 or slot in taken:
                slot = self._free_slot(digest, taken)
                if slot < 0:
                    left.append(item)
                    continue
            taken.add(slot)
            length = RECORD_HEADER_BYTES + len(key) + len(value)
            checksum = xxh(value, digest ^ stamp) & CHECKSUM_MASK
            header = pack(
                flags | len(key), checksum, len(value), slot, expiry_low, stamp | expiry_high
            )
            records += (header, key, value, _PADDING[-length & 7])
            published.append((slot, digest >> TAG_SHIFT, place, old_word))
            place += (length + 7) >> 3
            stamp += 1 << STAMP_SHIFT
        run = b"".join(records)
        if run:
            segments.write(current, run, len(run), expiry_ms)
            self._words[H_STAMP] = self._versions.stamp
            publish, stamp = self._publish, current.stamp
            for slot, tag, place, old_word in published:
                publish(slot, tag, stamp | place, old_word)
        for key, value in left:
            self.put(key, value, expiry_ms)

    def _publish(self, slot: int, tag: int, word: int, old_word: int) -> None:
        """Let an index word name its record, which is written whole and counted as used."""
        access = self._access
        if old_word:
            place = old_word & PLACE_MASK
            head = self._words[place]
            # From this store on every reader and near cache sees the new value.
            self._slots[slot] = tag << TAG_SHIFT | word
            length = RECORD_HEADER_BYTES + (head & KEY_LENGTH_MASK) + (head >> VALUE_LENGTH_SHIFT)
            self._log.kill(place, (length + 7) & ~7)
            if access[slot] != self._hottest:
                access[slot] = self._policy.touch[access[slot]]
        else:
            access[slot] = self._fresh
            self._marks[slot] = tag & 0xFF or 1
            self._slots[slot] = tag << TAG_SHIFT | word
            self.items += 1
        self._puts += 1

    def delete(self, key: bytes) -> bool:
        """Remove a key's entry; return whether a value (unexpired, not a "not found") was there."""
        digest = xxh3_64_intdigest(key, self._seed)
        slot, word = self._index.find(key, digest)
        if not word:
            return False
        place = word & PLACE_MASK
        head = self._words[place]
        expiry_ms = expiry_of(self._words, place)
        alive = not head & FLAG_NEGATIVE and not 0 < expiry_ms <= self._clock_ms()
        self._drop(slot, place)
        self._counts["deletes"] += alive
        return alive

    def expiry_of(self, key: bytes) -> int:
        """Return the absolute expiry in ms of a key's entry; 0 for never, or no entry."""
        _, word = self._index.find(key, xxh3_64_intdigest(key, self._seed))
        return expiry_of(self._words, word & PLACE_MASK) if word else 0

    def version_of(self, key: bytes) -> int:
        """Return the version of a key's entry; 0 where there is none."""
        _, word = self._index.find(key, xxh3_64_intdigest(key, self._seed))
        return self._words[(word & PLACE_MASK) + 2] >> STAMP_SHIFT if word else 0

    def check_size(self, key: bytes, value: bytes) -> None:
        """Raise `ValueTooLargeError` where the value can never be stored."""
        check_value_size(self.group, self.arena.geometry, key, value)

    # -- entries ---------------------------------------------------------------------------

    def _class_for(self, digest: int, old_word: int) -> int:
        """Return the class of segment for a record: its entry's, or what the policy admits to."""
        if old_word:
            return self._log.class_at(old_word & PLACE_MASK)
        return self._policy.admit(digest)

    def _free_slot(self, digest: int, taken: Collection[int] = ()) -> int:
        """Return an empty slot for a key, emptied by an eviction if there is none."""
        slot, empty = self._index.choose(digest, taken)
        if not empty and slot >= 0:
            self._drop(slot, self._slots[slot] & PLACE_MASK)
            self._counts["index_evictions"] += 1
            self._counts["evictions"] += 1
        return slot

    def _drop(self, slot: int, place: int) -> None:
        size = self._size_at(place)
        self._slots[slot] = 0
        self._access[slot] = 0
        self._marks[slot] = 0
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
        words, index, access, data = self._words, self._slots, self._access, self._data
        slots, marks = len(index), self._marks
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
            slot = words[place + 1] & SLOT_MASK
            if slot >= slots:
                dropped += self._purge(victim)
                break
            word = index[slot]
            if word & _WORD_MASK == stamp | place:
                expiry_ms = expiry_of(words, place) if head & FLAG_EXPIRES else 0
                verdict = verdicts[access[slot]]
                if 0 < expiry_ms <= now_ms:
                    expired += 1
                    index[slot] = 0
                    access[slot] = marks[slot] = 0
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
                    access[slot] = marks[slot] = 0
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
        self._marks[:] = adopt_slots(self.arena)
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
        for word in self._slots:
            if word:
                place = word & PLACE_MASK
                head = self._words[place]
                at = (place << 3) + RECORD_HEADER_BYTES
                middle = at + (head & KEY_LENGTH_MASK)
                value = self._data[middle : middle + (head >> VALUE_LENGTH_SHIFT)]
                yield self._data[at:middle], value, expiry_of(self._words, place)

    def close(self) -> None:
        """Publish the counters and give up the lock; the files stay."""
        self.maintain()
        self.arena.close()


def check_value_size(group: str, sizes: Geometry, key: bytes, value: bytes) -> None:
    """Raise `ValueTooLargeError` where a value is too large for shards of this geometry."""
    limit = sizes.value_bytes_beside(len(key))
    if len(value) > limit:
        raise ValueTooLargeError(
            f"group {group!r}: a value of {len(value)} bytes is above the limit of {limit} (one "
            "segment of its shard); raise cache_bytes or use fewer workers",
            value_bytes=len(value),
            limit_bytes=limit,
            group=group,
        )


def published_counters(arena: Arena) -> dict[str, int]:
    """Return the counters that a shard's writer last published; any process may ask."""
    words = arena.words
    return {name: words[H_COUNTERS + at] for at, name in enumerate(COUNTERS)}
