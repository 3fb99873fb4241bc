"""The one writer of a shard: put, get, delete, and what other nodes make of its entries.

*Process*: the shard's worker, on one thread. *Owns*: data file; its access bytes with the readers.
*Order of writes that readers and a crash rely on*: (1) record bytes, (2) the segment's `used`,
(3) the index word. A crash before (3) leaves a record nobody names. A replaced or deleted key is
gone with one aligned store, and never comes back, since nothing is rebuilt from the log.

An entry is owned, or a **mirror**: another node's, kept for a short time. Both kinds have one index
and one lookup; what tells them apart is the class of the segment that holds the record.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from operator import itemgetter
from typing import Final

from xxhash import xxh3_64_intdigest

from kamacache.clock import STAMP_SHIFT, boottime_ms
from kamacache.errors import ValueTooLargeError
from kamacache.limits import KEY_BYTES_MAX
from kamacache.store.arena import Arena
from kamacache.store.entries import Held
from kamacache.store.eviction import touch_of
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
    TAG_SHIFT,
    VALUE_LENGTH_SHIFT,
    Geometry,
    expiry_of,
)
from kamacache.store.reader import Answer, make_lookup
from kamacache.store.runs import make_put_run
from kamacache.store.space import ShardSpace

_VALUE_OF: Final = itemgetter(1)


class ShardWriter(ShardSpace):
    """Writes one shard. Not safe for threads: its owner calls it from one, or holds a lock."""

    def __init__(
        self,
        arena: Arena,
        *,
        group: str,
        eviction: str,
        hash_seed: int,
        mirror_share: float = 0,
        clock_ms: Callable[[], int] = boottime_ms,
    ) -> None:
        super().__init__(
            arena,
            group=group,
            eviction=eviction,
            hash_seed=hash_seed,
            mirror_share=mirror_share,
            clock_ms=clock_ms,
        )
        self._value_bytes_sure = arena.geometry.value_bytes_beside(KEY_BYTES_MAX)
        self._put_run = make_put_run(self)
        self._lookup = make_lookup(
            (arena,),
            hash_seed=hash_seed,
            touch=touch_of(eviction),
            clock_s=lambda: clock_ms() / 1000,
        )

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
        mirror: bool = False,
    ) -> bool:
        """Store a value, replacing the key's entry in one step; return whether it was stored.

        ``expiry_ms`` is absolute, on CLOCK_BOOTTIME; 0 is never, and not for a ``mirror``, another
        node's entry. Not stored, with False: a ``version`` below the entry's own; an expiry that
        has passed (which removes the entry); a mirror where mirrors have no share (which removes
        it too) or no slot. Whatever is not refused for its version is later than all before it:
        `last_version` tells. Raises `ValueTooLargeError`; the old entry then stands.
        """
        if len(value) > self._value_bytes_sure:
            self.check_size(key, value)
        plain = self._one_class and version is None and not (negative or mirror)
        if plain and (not expiry_ms or expiry_ms > self._clock_ms()):
            self._put_run(((key, value),), min(expiry_ms, EXPIRY_MS_MAX))
            return True
        if mirror and not expiry_ms:
            raise ValueError("a mirror must expire: it may have missed an invalidation")
        return self._put(key, value, expiry_ms, negative, version, mirror)

    def _put(
        self,
        key: bytes,
        value: bytes,
        expiry_ms: int,
        negative: bool,
        version: int | None,
        mirror: bool,
    ) -> bool:
        """Do as `put` says, for any kind of entry; `make_put_run` is this for the plain kind."""
        key_bytes, value_bytes = len(key), len(value)
        size = (RECORD_HEADER_BYTES + key_bytes + value_bytes + 7) & ~7
        digest = xxh3_64_intdigest(key, self._seed)
        slot, old_word = self._index.find(key, digest)
        words, segments = self._words, self._log
        if version is not None:
            self._versions.observe(version)
            words[H_STAMP] = self._versions.stamp
            if old_word and words[(old_word & PLACE_MASK) + 2] >> STAMP_SHIFT > version:
                return False
        if self._one_class and not mirror:
            segment_class = 0
        else:
            segment_class, old_word = self._class_for(slot, digest, old_word, mirror)
            if segment_class < 0:
                return False
        current = segments.open[segment_class]
        if current is None or current.position + size > current.end:
            self._make_room(segment_class, size)
            current = segments.with_room(segment_class, size)
            slot, old_word = self._index.find(key, digest)  # the entry may have moved or gone
        flags = key_bytes | FLAG_NEGATIVE if negative else key_bytes
        expiry_low = expiry_high = 0
        if expiry_ms:
            if expiry_ms <= self._clock_ms():
                return self._remove(slot, old_word)
            expiry_ms = min(expiry_ms, EXPIRY_MS_MAX)
            flags |= FLAG_EXPIRES
            expiry_low, expiry_high = expiry_ms & EXPIRY_LOW_MASK, expiry_ms >> EXPIRY_LOW_SHIFT
        if version is None:
            words[H_STAMP] = stamp = self._versions.stamps(1)
        else:
            stamp = version << STAMP_SHIFT
        if slot < 0 and (slot := self._free_slot(digest, mirror=mirror)) < 0:
            return False
        header = RECORD_HEADER.pack(
            flags,
            xxh3_64_intdigest(value, digest ^ stamp) & CHECKSUM_MASK,
            value_bytes,
            slot,
            expiry_low,
            stamp | expiry_high,
        )
        word = segments.write(current, header + key + value, size, expiry_ms)
        self._publish(slot, digest >> TAG_SHIFT, word, old_word)
        if mirror:
            self._index.note_mirror(slot)
            self._counts["mirror_puts"] += 1
        return True

    def _class_for(self, slot: int, digest: int, old_word: int, mirror: bool) -> tuple[int, int]:
        """Return the class of segment for a record, or -1, and the entry that it replaces.

        It is the entry's own class, or what the policy admits a new key to.
        """
        mirrors = self._log.mirrors
        if mirror and self._mirror_segments:
            return mirrors, old_word
        if old_word and not mirror:
            segment_class = self._log.class_at(old_word & PLACE_MASK)
            if segment_class != mirrors:
                return segment_class, old_word
        if mirror:
            self._remove(slot, old_word)
            return -1, 0
        if old_word:  # a mirror, whose hits promote nothing: to the policy the key is new
            self._drop(slot, old_word & PLACE_MASK)
        return self._policy.admit(digest), 0

    def _remove(self, slot: int, old_word: int) -> bool:
        """Drop the entry that a put replaces by nothing; return False, for nothing is stored.

        It is outdated all the same, and this write too is after all before it.
        """
        if old_word:
            self._drop(slot, old_word & PLACE_MASK)
        self.now()
        return False

    def put_many(self, items: Sequence[tuple[bytes, bytes]], expiry_ms: int = 0) -> None:
        """Store values of distinct keys, as `put` does one by one, at about half its cost.

        Raises `ValueTooLargeError` before anything is stored.
        """
        if max(map(len, map(_VALUE_OF, items)), default=0) > self._value_bytes_sure:
            for key, value in items:
                self.check_size(key, value)
        if not self._one_class or 0 < expiry_ms <= self._clock_ms():
            for key, value in items:
                self.put(key, value, expiry_ms)
        elif items:
            self._put_run(items, min(expiry_ms, EXPIRY_MS_MAX))

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

    # -- what other nodes know -----------------------------------------------------------------

    @property
    def last_version(self) -> int:
        """The greatest version issued or observed, by this writer or one before."""
        return self._versions.last

    def now(self) -> int:
        """Return a version greater than every one before, also for the writers to come."""
        self._words[H_STAMP] = stamp = self._versions.stamps(1)
        return stamp >> STAMP_SHIFT

    def observe(self, version: int) -> None:
        """Take note of a version from elsewhere; later ones are greater. Raises OverflowError."""
        self._versions.observe(version)
        self._words[H_STAMP] = self._versions.stamp

    def held(self, key: bytes) -> Held | None:
        """Return the key's entry for another node, which counts as a use; None where none lives."""
        words, access = self._words, self._access
        slot, word = self._index.find(key, xxh3_64_intdigest(key, self._seed))
        if not word:
            return None
        place = word & PLACE_MASK
        head = words[place]
        expiry_ms = expiry_of(words, place)
        left_ms = expiry_ms - self._clock_ms() if expiry_ms else None
        if left_ms is not None and left_ms <= 0:
            return None
        if access[slot] != self._hottest:
            access[slot] = self._policy.touch[access[slot]]
        start = (place << 3) + RECORD_HEADER_BYTES + len(key)
        value = self._data[start : start + (head >> VALUE_LENGTH_SHIFT)]
        return Held(
            None if head & FLAG_NEGATIVE else value,
            left_ms,
            words[place + 2] >> STAMP_SHIFT,
            self._is_mirror(slot),
        )

    def drop_older(self, key: bytes, version: int) -> bool:
        """Drop the key's entry, whatever it is, if its version is lower; return whether it was."""
        self.observe(version)
        slot, word = self._index.find(key, xxh3_64_intdigest(key, self._seed))
        place = word & PLACE_MASK
        if not word or self._words[place + 2] >> STAMP_SHIFT >= version:
            return False
        self._drop(slot, place)
        self._counts["invalidated"] += 1
        return True

    def flush_older(self, version: int, start: int, count: int) -> int:
        """Drop the entries of a lower version in ``count`` slots from ``start``, all kinds.

        Returns the next slice's start, -1 at the end. What is stored between two slices is not
        looked at where its slot was passed: the caller stores nothing older meanwhile.
        """
        self.observe(version)
        words = self._words
        for slot, word in self._entries(start, count):
            place = word & PLACE_MASK
            if words[place + 2] >> STAMP_SHIFT < version:
                self._drop(slot, place)
                self._counts["invalidated"] += 1
        return start + count if start + count < len(self._slots) else -1

    def sweep(self, keep: Callable[[bytes], bool], start: int, count: int) -> int:
        """Drop the owned entries whose key ``keep`` refuses in ``count`` slots from ``start``.

        Returns the next slice's start, -1 at the end. ``keep`` must not touch this shard.
        """
        for slot, word in self._entries(start, count):
            if self._is_mirror(slot):
                continue
            place = word & PLACE_MASK
            at = (place << 3) + RECORD_HEADER_BYTES
            if not keep(self._data[at : at + (self._words[place] & KEY_LENGTH_MASK)]):
                self._drop(slot, place)
                self._counts["swept"] += 1
        return start + count if start + count < len(self._slots) else -1

    def _entries(self, start: int, count: int) -> list[tuple[int, int]]:
        """Return ``(slot, word)`` of the entries in a slice of the index."""
        slots = enumerate(self._slots[start : start + count].tolist(), start)
        return [(slot, word) for slot, word in slots if word]

    # -- upkeep ----------------------------------------------------------------------------

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


def last_maintained_ms(arena: Arena) -> int:
    """Return the CLOCK_BOOTTIME ms of the writer's last upkeep, 0: none; any process may ask."""
    return arena.words[H_HEARTBEAT]
