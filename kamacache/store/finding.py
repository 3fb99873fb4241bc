"""From a key's hash to its record, without attribute access on the way of a hit.

*Process*: every process that maps the shards. The reader looks at a key's home slot first, through
the views below; what is not there is searched for in the key's two buckets, by the writer too.

The views show the index in other types than its words have, since a read would else consist of
calculations with large ints. Instructions in CPython 3.11: to read a word as an int 380, as a float
280; to take the place out of an int 340, where the low half can be read by itself; to take three
fields out of a record's header and to compare its key 1,800, by one `struct` call 850.

*Invariant*: two equal floats, neither of them zero, are equal words. That holds but for numbers
whose exponent is all zeros (a processor may be set to take these for zero) or all ones (not equal
to themselves). The exponent lies within the tag, so keys of such tags, one in 1,024, are read as
ints; both kinds of view are used alike.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeAlias

from kamacache.hashing import second_slot
from kamacache.limits import KEY_BYTES_MAX
from kamacache.store.arena import Arena
from kamacache.store.layout import (
    BUCKET_SLOTS,
    HEADER_WORDS,
    KEY_LENGTH_MASK,
    PLACE_MASK,
    RECORD_HEADER_BYTES,
    TAG_SHIFT,
)

# Strings, since no memoryview[...] exists at run time.
Stamps: TypeAlias = "memoryview[float] | memoryview[int]"  # index words, only to be compared
Levels: TypeAlias = mmap.mmap | bytearray  # access bytes
Shard: TypeAlias = "tuple[mmap.mmap | bytes, Stamps, memoryview[int], Levels, int]"
"""``(data, stamps, places, access bytes, slots)``."""

RecordStart = tuple[int, int, bytes]  # (key length and flags, value length, key)
HEADERS: Final[list[Callable[[Any, int], RecordStart]]] = [
    struct.Struct(f"@HxxI16x{length}s").unpack_from for length in range(KEY_BYTES_MAX + 1)
]
"""By a key's length: reads the start of a record, one call for what would be two reads, two
shifts and a slice. Raises `StructError` where the data ends before."""
StructError = struct.error
EXPIRY: Final[Callable[[Any, int], tuple[int, int]]] = struct.Struct("@12xIB").unpack_from
"""Reads low and high bits of a record's expiry in ms."""

_INDEX_BYTE: Final = HEADER_WORDS * 8
_TAG: Final = struct.Struct("<H").pack
_TAG_BITS: Final = 64 - TAG_SHIFT
_EXPONENT_SHIFT: Final = 52
_EXPONENT_MAX: Final = 0x7FF
_PLACES_MAX: Final = 1 << 32  # that the low half of a word can name: a shard of 32 GiB
_BITS: Final = 8  # of the hash that the directory is for
_BITS_UNEVEN: Final = 12  # where the workers do not share 256 evenly

NOWHERE: Final[Shard] = (
    b"",
    memoryview(bytes(8)).cast("d"),
    memoryview(bytes(4)).cast("I"),
    bytearray(1),
    1,
)
"""Has no record: reading one is a `StructError`."""


def directory(arenas: Sequence[Arena]) -> tuple[tuple[Shard, ...], int]:
    """Return the shards by the first bits of a key's hash, and by how much to shift it for these.

    One lookup says which worker's shard it is and as what its words can be read. `NOWHERE` where
    these bits do not decide that.
    """
    workers = len(arenas)
    bits = _BITS if (1 << _BITS) % workers == 0 else _BITS_UNEVEN
    tags = 1 << _TAG_BITS - bits  # of one place in the directory
    shards: list[tuple[Shard, Shard]] = []
    for arena in arenas:
        data, slots = arena.data, arena.geometry.slots
        if len(data) >> 3 > _PLACES_MAX:
            shards.append((NOWHERE, NOWHERE))
        else:
            access = arena.access_map
            floats: Shard = (data, arena.stamps, arena.places, access, slots)
            shards.append((floats, (data, arena.index, arena.places, access, slots)))
    found: list[Shard] = []
    for first in range(0, 1 << _TAG_BITS, tags):
        last = first + tags - 1
        worker = first * workers >> _TAG_BITS
        if worker != last * workers >> _TAG_BITS:
            found.append(NOWHERE)
        else:
            plain = is_plain(first << TAG_SHIFT) and is_plain(last << TAG_SHIFT)
            found.append(shards[worker][0 if plain else 1])
    return tuple(found), 64 - bits


def is_plain(word: int) -> bool:
    """Tell whether a word, as a float, is equal to itself and to no other, and never zero."""
    return 0 < (word >> _EXPONENT_SHIFT & _EXPONENT_MAX) < _EXPONENT_MAX


def tagged(data: mmap.mmap | bytes, slots: int, digest: int) -> int:
    """Return a slot of a key's two buckets with the tag of its hash, or -1.

    A whole bucket is copied as bytes and searched for the two bytes of the tag, which is faster
    than eight word reads.
    """
    tag = _TAG(digest >> TAG_SHIFT)
    for slot in (digest % slots, (digest >> 18 & 0x3FFFFFFF) * slots >> 30):
        start = ((slot & -BUCKET_SLOTS) << 3) + _INDEX_BYTE
        bucket = data[start : start + BUCKET_SLOTS * 8]
        found = bucket.find(tag)
        while found >= 0:
            if found & 7 == 6:
                return (slot & -BUCKET_SLOTS) + (found >> 3)
            found = bucket.find(tag, found + 1)
    return -1


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

    Returns ``(slot, word, place, head, key's byte)`` or None. The words are read aligned: whole.
    """
    tag = _TAG(digest >> TAG_SHIFT)
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
