"""What a new writer finds out for itself: which slots are taken, what to do with nonsense.

*Process*: the shard's worker. *Invariant*: the index alone is trusted. Access bytes can be written
by every reader, and records are walked only as long as they make sense.
"""

from __future__ import annotations

from typing import Final

from kamacache.store.arena import Arena
from kamacache.store.layout import HEADER_WORDS, PLACE_MASK

_TAKEN: Final = b"\0" + b"\xff" * 255
_MARK: Final = b"\1" + bytes(range(1, 256))  # the low byte of a tag, never 0
_CHUNK_SLOTS: Final = 1 << 17


def adopt_slots(arena: Arena) -> bytearray:
    """Return the marks of `kamacache.store.index`, and zero the access bytes of empty slots.

    A writer that died between the two stores, or a reader whose touch came after a drop, leaves
    such bytes. An entry's generation is never 0, so bytes 4 and 5 of its word tell it from an
    empty slot; strided slices and whole-chunk integers do that at C speed, 3 ns a slot.
    """
    marks = bytearray()
    for first in range(0, arena.geometry.slots, _CHUNK_SLOTS):
        last = min(first + _CHUNK_SLOTS, arena.geometry.slots)
        words = arena.data[(HEADER_WORDS + first) * 8 : (HEADER_WORDS + last) * 8]
        count = last - first
        stamps = int.from_bytes(words[4::8], "little") | int.from_bytes(words[5::8], "little")
        taken = int.from_bytes(stamps.to_bytes(count, "little").translate(_TAKEN), "little")
        tags = int.from_bytes(words[6::8].translate(_MARK), "little")
        marks += (tags & taken).to_bytes(count, "little")
        levels = int.from_bytes(arena.access[first:last], "little")
        kept = levels & taken
        if kept != levels:
            arena.access[first:last] = kept.to_bytes(count, "little")
    return marks


def purge(arena: Arena, first_place: int, places: int) -> int:
    """Empty every slot whose word points into a range of the log; return how many.

    For a segment whose records cannot be walked. Never needed while the invariants hold; were it
    needed and not there, words would stand that point into a reused segment.
    """
    index, access = arena.index, arena.access
    purged = 0
    for slot in range(arena.geometry.slots):
        if index[slot] and first_place <= index[slot] & PLACE_MASK < first_place + places:
            index[slot] = 0
            access[slot] = 0
            purged += 1
    return purged
