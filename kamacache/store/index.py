"""The index as its writer works on it: finding a key's slot, choosing one for a new key.

*Process*: the shard's worker. *Owns*: the choice of slots, and `marks`, a private byte a slot: 0
for an empty one, else low bits of its tag. A key has two buckets of 8 slots; its home slot and
its second slot are tried first, since a reader finds those without a search. That a key is in
neither bucket, the usual answer for a new one, is seen from the marks with two short searches,
where the shared words would take sixteen reads. The words themselves are stored by the writer,
whose order of writes they end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from kamacache.store.arena import Arena
from kamacache.store.finding import elsewhere
from kamacache.store.layout import (
    BUCKET_SLOTS,
    KEY_LENGTH_MASK,
    PLACE_MASK,
    RECORD_HEADER_BYTES,
    TAG_SHIFT,
)

NOT_CHOSEN: Final = -1


class ShardIndex:
    """Answers where a key is, and where a new one can go."""

    __slots__ = ("_access", "_data", "_mirrors", "_slots", "_words", "marks", "words")

    def __init__(self, arena: Arena, marks: bytearray) -> None:
        self._data = arena.data
        self._words = arena.words
        self._access = arena.access
        self._slots = arena.geometry.slots
        self.words = arena.index
        self.marks = marks
        self._mirrors = bytearray()  # a byte a slot once there is a mirror

    def find(self, key: bytes, digest: int) -> tuple[int, int]:
        """Return ``(slot, word)`` of the key's entry, or ``(a slot for it, 0)``.

        The slot is `NOT_CHOSEN` where `choose` must find one, at another entry's expense perhaps:
        nothing is evicted for a key that is only asked about.
        """
        # The slots as in `kamacache.hashing`, spelled out.
        tag = digest >> TAG_SHIFT
        slots = self._slots
        home = digest % slots
        word = self.words[home]
        if word >> TAG_SHIFT == tag:
            place = word & PLACE_MASK
            at = (place << 3) + RECORD_HEADER_BYTES
            if (
                self._words[place] & KEY_LENGTH_MASK == len(key)
                and self._data[at : at + len(key)] == key
            ):
                return home, word
        second = (digest >> 18 & 0x3FFFFFFF) * slots >> 30
        mark = tag & 0xFF or 1
        marks = self.marks
        first_bucket, second_bucket = home & -BUCKET_SLOTS, second & -BUCKET_SLOTS
        if (
            mark in marks[first_bucket : first_bucket + BUCKET_SLOTS]
            or mark in marks[second_bucket : second_bucket + BUCKET_SLOTS]
        ):
            found = elsewhere(self._data, self._words, self.words, slots, digest, home, key)
            if found is not None:
                return found[0], found[1]
        if not marks[home]:
            return home, 0
        if not marks[second]:
            return second, 0
        return NOT_CHOSEN, 0

    def choose(self, digest: int) -> int:
        """Return an empty slot of a key's two buckets, or `NOT_CHOSEN`."""
        for first in self._buckets(digest):
            slot = self.marks.find(0, first, first + BUCKET_SLOTS)
            if slot >= 0:
                return slot
        return NOT_CHOSEN

    def note_mirror(self, slot: int) -> None:
        """Take note that a slot was given to a mirror."""
        if not self._mirrors:
            self._mirrors = bytearray(self._slots)
        self._mirrors[slot] = 1

    def mirror(self, digest: int, is_mirror: Callable[[int], bool]) -> int:
        """Return the slot of a mirror in a key's full buckets, or `NOT_CHOSEN`.

        Slots that were a mirror's once are asked about: no other write keeps these notes, and they
        begin anew with each writer, for a mirror lives for seconds.
        """
        noted = self._mirrors
        for first in self._buckets(digest):
            slot = noted.find(1, first, first + BUCKET_SLOTS)
            while slot >= 0:
                if is_mirror(slot):
                    return slot
                noted[slot] = 0
                slot = noted.find(1, slot + 1, first + BUCKET_SLOTS)
        return NOT_CHOSEN

    def stalest(self, digest: int) -> int:
        """Return the slot of a key's full buckets that was not used for longest."""
        first, second = self._buckets(digest)
        levels = bytes(self._access[first : first + BUCKET_SLOTS])
        others = bytes(self._access[second : second + BUCKET_SLOTS])
        lowest = min(levels)
        if min(others) < lowest:
            return second + others.index(min(others))
        return first + levels.index(lowest)

    def _buckets(self, digest: int) -> tuple[int, int]:
        """Return the first slots of a key's two buckets."""
        home = digest % self._slots
        second = (digest >> 18 & 0x3FFFFFFF) * self._slots >> 30
        return home & -BUCKET_SLOTS, second & -BUCKET_SLOTS
