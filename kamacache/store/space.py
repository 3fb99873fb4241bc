"""Room in a shard: slots and segments taken back, mirrors kept to their share, the counters.

*Process*: the shard's worker. *Owns*: when entries are dropped or moved, and the counts of what
became of them; the base of `kamacache.store.writer`, whose order of writes it keeps. *Invariants*:
one segment is in reserve, for records that move on while a victim is taken back; mirrors, other
nodes' entries, never cost an owned one more than their share of the segments, and no slot.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

from xxhash import xxh3_64_intdigest

from kamacache.clock import STAMP_SHIFT, HybridClock
from kamacache.store.arena import Arena
from kamacache.store.eviction import (
    DROP_ALL,
    S3FifoPolicy,
    Verdict,
    classes_of,
    keep_all,
    make_policy,
)
from kamacache.store.index import ShardIndex
from kamacache.store.layout import (
    COUNTERS,
    FLAG_EXPIRES,
    H_COUNTERS,
    H_HEARTBEAT,
    H_STAMP,
    KEY_LENGTH_MASK,
    NEVER,
    PLACE_MASK,
    RECORD_HEADER_BYTES,
    S_USED,
    SLOT_MASK,
    TAG_MASK,
    TAG_SHIFT,
    VALUE_LENGTH_SHIFT,
    expiry_of,
)
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
_HEADER_AND_PAD: Final = RECORD_HEADER_BYTES + 7
_WORD_MASK: Final = (1 << TAG_SHIFT) - 1


class ShardSpace:
    """What the writer knows of its shard, and how it makes room in it."""

    def __init__(
        self,
        arena: Arena,
        *,
        group: str,
        eviction: str,
        hash_seed: int,
        mirror_share: float,
        clock_ms: Callable[[], int],
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
        # Never one, or the segment that fills would be the one to drop.
        mirrors = int(arena.geometry.segments * mirror_share)
        self._mirror_segments = max(mirrors, 2) if mirror_share else 0
        self._one_class = self._policy.classes == 1
        self._fresh, self._hottest = self._policy.fresh, self._policy.touch[255]
        self._versions = HybridClock(self._words[H_STAMP] >> STAMP_SHIFT)
        self._compact_below = int(arena.geometry.log_bytes * _COMPACT_BELOW)
        self.items = len(self._marks) - self._marks.count(0)
        # Those that count go on from where the last writer published them: they never go down.
        words = self._words
        self._counts = {name: words[H_COUNTERS + at] for at, name in enumerate(COUNTERS)}
        self._puts = self._counts["puts"]
        self._ghost_hits_before = self._counts["ghost_hits"]

    # -- slots -----------------------------------------------------------------------------

    def _free_slot(self, digest: int, *, mirror: bool = False) -> int:
        """Return an empty slot for a key, emptied by an eviction if there is none.

        Mirrors go first. `NOT_CHOSEN` where all slots are taken, or are owned entries' and the key
        is to be a mirror: small mirrors could else push out more than their segments' share.
        """
        index = self._index
        slot = index.choose(digest)
        if slot >= 0:
            return slot
        slot, evictions = index.mirror(digest, self._is_mirror), "mirror_evictions"
        if slot < 0 and not mirror:
            slot, evictions = index.stalest(digest), "evictions"
        if slot >= 0:
            self._drop(slot, self._slots[slot] & PLACE_MASK)
            self._counts["index_evictions"] += 1
            self._counts[evictions] += 1
        return slot

    def _is_mirror(self, slot: int) -> bool:
        """Tell whether a slot's entry is a mirror."""
        return self._log.class_at(self._slots[slot] & PLACE_MASK) == self._log.mirrors

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

    # -- segments --------------------------------------------------------------------------

    def _make_room(self, segment_class: int, size: int) -> None:
        """See to it that a record of this size can be appended to the class.

        Frees segments until there is one more than the reserve. Bounded: after `_VICTIMS_MAX`
        victims whose records nearly all moved on, the next is dropped whole.
        """
        if self._log.fits(segment_class, size):
            return
        if segment_class == self._log.mirrors:
            self._limit_mirrors()
        else:
            self._policy.segment_filled()
        segments = self._log
        compacting = True
        for attempt in range(_VICTIMS_MAX + 1):
            if len(segments.free) > _RESERVE_SEGMENTS:
                return
            now_ms = self._clock_ms()
            if (expired := segments.expired(now_ms)) is not None:
                self._clean(expired, DROP_ALL, now_ms)
                continue
            if len(segments.free) < _RESERVE_SEGMENTS:
                # The writer before died while it moved records to the reserve: nothing can move.
                self._clean(self._policy.victim(), DROP_ALL, now_ms)
                continue
            if compacting and attempt < _VICTIMS_MAX and segments.live_bytes < self._compact_below:
                victim = segments.emptiest()
                if victim is not None:
                    segment_class = segments.class_of(victim)
                    room = segments.room(segment_class)
                    self._clean(victim, keep_all(segment_class), now_ms)
                    # Records too large to share a segment leave the same holes where they go.
                    compacting = segments.room(segment_class) > room
                    continue
            victim = self._policy.victim()
            if attempt < _VICTIMS_MAX:
                verdicts = self._policy.verdicts(segments.class_of(victim))
            else:
                verdicts = DROP_ALL
            self._clean(victim, verdicts, now_ms)

    def _limit_mirrors(self) -> None:
        """Drop the oldest mirrors, whole segments, until one more segment is within the share.

        Not the stalest: a mirror lives for seconds, and to move it on would cost more than it is
        worth. There may be more than the share where a writer with a larger one was before.
        """
        segments = self._log
        segments.close_mirrors()
        oldest = segments.closed[segments.mirrors]
        while len(oldest) >= self._mirror_segments:
            self._clean(oldest[0], DROP_ALL, self._clock_ms())

    def _clean(self, victim: int, verdicts: list[Verdict], now_ms: int) -> None:
        """Move or drop every live record of a closed segment, then free it.

        Readers go on meanwhile: a moved record is named by its new word in one store, and its
        old bytes stay as they are until the segment is freed and reused.
        """
        segments, policy = self._log, self._policy
        words, index, access, data = self._words, self._slots, self._access, self._data
        slots, marks, opened = len(index), self._marks, segments.open
        segment_class = segments.class_of(victim)
        mirrors = segment_class == segments.mirrors
        remembers = not mirrors and policy.remembers(segment_class)
        moved = moved_bytes = dropped = expired = 0
        place, end, stamp = segments.span(victim)
        while place < end:
            head = words[place]
            # Its length in places: header, key and value, rounded up.
            places = (head & KEY_LENGTH_MASK) + (head >> VALUE_LENGTH_SHIFT) + _HEADER_AND_PAD >> 3
            slot = words[place + 1] & SLOT_MASK
            if place + places > end or slot >= slots:
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
                    size = places << 3
                    record = data[place << 3 : (place << 3) + size]
                    current = opened[target]
                    if current is None or current.position + size > current.end:
                        current = segments.with_room(target, size)
                    # `SegmentLog.write`, spelled out: as much is moved as is written.
                    if expiry_ms != current.expiry != NEVER:
                        segments.note_expiry(current, expiry_ms)
                    position = current.position
                    data[position : position + size] = record
                    current.position = position + size
                    words[current.table + S_USED] = position + size - current.start
                    moved_bytes += size
                    index[slot] = word & TAG_MASK | current.stamp | position >> 3
                    if level != access[slot]:
                        access[slot] = level
                    moved += 1
                else:
                    dropped += 1
                    index[slot] = 0
                    access[slot] = marks[slot] = 0
                    if remembers:
                        at = (place << 3) + RECORD_HEADER_BYTES
                        key = data[at : at + (head & KEY_LENGTH_MASK)]
                        policy.forgotten(xxh3_64_intdigest(key, self._seed))
            place += places
        segments.live_bytes += moved_bytes
        segments.release(victim)
        self.items -= dropped + expired
        counts = self._counts
        counts["mirror_evictions" if mirrors else "evictions"] += dropped
        counts["expired"] += expired
        counts["records_moved"] += moved
        counts["segments_freed"] += 1

    def _purge(self, segment: int) -> int:
        dropped = purge(self.arena, *self._log.places(segment))
        self._marks[:] = adopt_slots(self.arena)
        log.error(
            "a segment holds a record that makes no sense, its entries are dropped",
            extra={"group": self.group, "segment": segment, "dropped": dropped},
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
            self._clean(segment, DROP_ALL, now_ms)
        for at, count in enumerate(self.stats().values()):
            self._words[H_COUNTERS + at] = count
        self._words[H_HEARTBEAT] = now_ms

    def stats(self) -> dict[str, int]:
        """Return the counters of `layout.COUNTERS`, in that order, since the shard was made.

        What a writer counted in its last second before a SIGKILL is not in them."""
        counts = self._counts
        counts["items"] = self.items
        counts["puts"] = self._puts
        counts["live_bytes"] = self._log.live_bytes
        counts["mirror_bytes"] = self._log.mirror_bytes()
        if isinstance(self._policy, S3FifoPolicy):
            counts["ghost_hits"] = self._ghost_hits_before + self._policy.ghost_hits
        return dict(counts)
