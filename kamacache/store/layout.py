"""The bytes of a shard: file layout, bit fields, and the geometry that follows from a size.

*Process*: all that map a shard. *Owns*: nothing; this is the format, and `FORMAT` its version.

Two files a shard. **Data**, written by its worker alone, mapped read-only by everyone else::

    +--------+-----------------------+------------------+---------------------------------+
    | header | index: 8 B a slot     | segment table    | log: segments of equal size     |
    | 512 B  | buckets of 8 slots    | 32 B a segment   | records, append-only            |
    +--------+-----------------------+------------------+---------------------------------+

**Access bytes**, one a slot, stored into by readers too; nothing but eviction depends on them.

An index word; 0 is an empty slot, and no entry's word is 0 since generations begin at 1::

    63       48 47            33 32                               0
    +----------+----------------+----------------------------------+
    | tag (16) | generation(15) | record's place in the data file, |
    | of hash  | of the segment | in units of 8 bytes (33)         |
    +----------+----------------+----------------------------------+

A record: three words, then key and value, the whole padded to 8 bytes::

    word 0   value length (32) | checksum (16) | flags (5) | key length (11)
    word 1   low bits of the expiry (32) | slot (32)
    word 2   version (56) | high bits of the expiry (8)

The expiry is in ms of CLOCK_BOOTTIME, 0 for never. Fields lie where `struct` packs them without
arithmetic on numbers above 30 bits. The checksum (of the value, seeded with the key's hash and the
version) is for machines whose memory order does not prove reads whole; x86-64 needs none.

The record names its slot so that eviction needs no hash and no probe; a key keeps its slot for
as long as it is in the shard. With no flag set, word 0's low 16 bits are the key's length: the
readers' one comparison for the plain case.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from kamacache.errors import ConfigError
from kamacache.limits import VALUE_BYTES_CEILING

FORMAT: Final = 3  # 1 had no class of mirrors, 2 another home slot
# Word 0 of the file. An empty index word names place 0 and may match a tag of 0: the low bits are
# those of no key length, so a reader that follows it finds no record there.
MAGIC: Final = int.from_bytes(b"\xff\xffKSHARD", "little")

# Header words.
H_MAGIC: Final = 0
H_FORMAT: Final = 1
H_IDENTITY: Final = 2  # hash of group, boot, geometry, seed, policy: see `Geometry.identity`
H_STAMP: Final = 3  # high-water mark of the hybrid logical clock, as a stamp
H_ORDER: Final = 4  # order number of the newest segment
H_HEARTBEAT: Final = 5  # CLOCK_BOOTTIME ms of the writer's last maintenance
H_COUNTERS: Final = 16  # first of the counters below
COUNTERS: Final = (
    "items",
    "live_bytes",
    "puts",
    "deletes",
    "evictions",
    "expired",
    "segments_freed",
    "records_moved",
    "index_evictions",
    "ghost_hits",
    "mirror_bytes",  # of live mirrors; also in live_bytes
    "mirror_puts",  # also in puts
    "mirror_evictions",  # dropped for room; not in evictions
    "swept",  # owned entries that another node owns now
    "invalidated",  # entries dropped because a later version is known of
)
HEADER_WORDS: Final = 64

# Index words.
TAG_SHIFT: Final = 48
TAG_MASK: Final = 0xFFFF << TAG_SHIFT
GENERATION_SHIFT: Final = 33
GENERATION_MAX: Final = (1 << 15) - 1
PLACE_MASK: Final = (1 << 33) - 1
BUCKET_SLOTS: Final = 8
SHARD_BYTES_MAX: Final = (PLACE_MASK + 1) * 8  # 64 GiB: what a place can name

# Records.
RECORD_HEADER: Final = struct.Struct("<HHIIIQ")  # of six fields, lowest first
RECORD_HEADER_BYTES: Final = 24
FLAG_EXPIRES: Final = 1 << 11
FLAG_NEGATIVE: Final = 1 << 12
KEY_LENGTH_MASK: Final = (1 << 11) - 1
PLAIN_MASK: Final = 0xFFFF  # key length and flags together
CHECKSUM_MASK: Final = 0xFFFF
VALUE_LENGTH_SHIFT: Final = 32
SLOT_MASK: Final = 0xFFFFFFFF
EXPIRY_LOW_SHIFT: Final = 32
EXPIRY_LOW_MASK: Final = 0xFFFFFFFF
EXPIRY_HIGH_MASK: Final = 0xFF
EXPIRY_MS_MAX: Final = (1 << 40) - 1

# Segment table: four words a segment.
SEGMENT_WORDS: Final = 4
S_STATE: Final = 0  # order (32) | generation (16) | class (8) | state (8)
S_USED: Final = 1  # bytes of records, from the segment's first
S_DEAD: Final = 2  # of these, bytes of records that no index word names any more
S_EXPIRY: Final = 3  # latest expiry in ms; NEVER when any record has none
ORDER_SHIFT: Final = 32
GENERATION_MASK: Final = 0xFFFF
NEVER: Final = (1 << 64) - 1
STATE_FREE: Final = 0
STATE_OPEN: Final = 1
STATE_CLOSED: Final = 2

SEGMENTS_MIN: Final = 64
# From a log of 1 MiB on. With 64, what open and spare segments waste makes the overhead of s3fifo
# 49 bytes an item of 128 bytes (scripts/bench/memory.py); more make the largest value smaller.
SEGMENTS_USUAL: Final = 96
SEGMENT_BYTES_MIN: Final = 4096
KEY_BYTES_USUAL: Final = 64
SEGMENT_BYTES_GROW: Final = 1 << 20  # larger shards get more segments, not larger ones ...
SEGMENTS_MAX: Final = 16_384  # ... up to this many
# Two choices of 8-slot buckets fail 0.02 % of inserts at load 0.8 (DESIGN.md section 4); 0.75
# leaves room for items a little smaller than their mean.
INDEX_LOAD: Final = 0.75
LOG_LIVE_SHARE: Final = 0.97  # of the log; the rest is the open segment's tail and the reserve
PADDING_BYTES_MEAN: Final = 3.5


def expiry_of(words: memoryview[int], place: int) -> int:
    """Return the expiry in ms of the record at a place; 0 for never."""
    high = words[place + 2] & EXPIRY_HIGH_MASK
    return words[place + 1] >> EXPIRY_LOW_SHIFT | high << EXPIRY_LOW_SHIFT


def padded(count: int) -> int:
    """Round a byte count up to the 8-byte unit of places in the log."""
    return (count + 7) & ~7


@dataclass(frozen=True, slots=True)
class Geometry:
    """Sizes of one shard's two files; equal inputs give equal geometry in every process."""

    slots: int
    segments: int
    segment_bytes: int
    data_bytes: int
    access_bytes: int

    @property
    def table_word(self) -> int:
        """Word of the data file at which the segment table begins."""
        return HEADER_WORDS + self.slots

    @property
    def log_offset(self) -> int:
        """Byte of the data file at which the log begins."""
        return (self.table_word + self.segments * SEGMENT_WORDS) * 8

    @property
    def log_bytes(self) -> int:
        """Bytes of all segments together."""
        return self.segments * self.segment_bytes

    @property
    def total_bytes(self) -> int:
        """Bytes of both files."""
        return self.data_bytes + self.access_bytes

    @property
    def value_bytes_max(self) -> int:
        """The largest value: what fits one segment beside a key of up to 64 bytes."""
        return self.value_bytes_beside(0)

    def value_bytes_beside(self, key_bytes: int) -> int:
        """Return the largest value beside a key of this length: less for one above 64 bytes."""
        room = self.segment_bytes - RECORD_HEADER_BYTES - max(key_bytes, KEY_BYTES_USUAL)
        return min(room, VALUE_BYTES_CEILING)


def _segments_for(log_bytes: int) -> int:
    least = SEGMENTS_USUAL if log_bytes >= SEGMENT_BYTES_GROW else SEGMENTS_MIN
    return min(max(log_bytes // SEGMENT_BYTES_GROW, least), SEGMENTS_MAX)


def geometry(cache_bytes: int, item_bytes_mean: int) -> Geometry:
    """Return the geometry of one shard of ``cache_bytes``, both files counted.

    Below the least size (64 segments of 4 KiB and their index) it is the least size; otherwise
    the two files together are exactly ``cache_bytes``, rounded down to whole words.
    """
    if item_bytes_mean < 1:
        raise ConfigError(
            f"item_bytes_mean is {item_bytes_mean}; it must be at least 1",
            setting="item_bytes_mean",
        )
    if cache_bytes > SHARD_BYTES_MAX:
        raise ConfigError(
            f"cache_bytes gives each shard {cache_bytes >> 30} GiB, and one holds at most "
            f"{SHARD_BYTES_MAX >> 30}: use more workers, "
            f"{cache_bytes // SHARD_BYTES_MAX + 1} times as many, or a smaller group",
            setting="cache_bytes",
            value=str(cache_bytes),
        )
    record_bytes = (RECORD_HEADER_BYTES + PADDING_BYTES_MEAN + item_bytes_mean) / LOG_LIVE_SHARE
    index_bytes = 9 / INDEX_LOAD

    def slots_for(items: float) -> int:
        return max(int(items / INDEX_LOAD) // BUCKET_SLOTS, 2) * BUCKET_SLOTS

    least_log = SEGMENTS_MIN * SEGMENT_BYTES_MIN
    least_slots = slots_for(least_log / record_bytes)
    least = HEADER_WORDS * 8 + least_slots * 9 + SEGMENTS_MIN * SEGMENT_WORDS * 8 + least_log
    total = max(cache_bytes & ~7, padded(least))
    segments = _segments_for(total - total // 8)
    fixed = HEADER_WORDS * 8 + segments * SEGMENT_WORDS * 8
    slots = slots_for((total - fixed) / (record_bytes + index_bytes))
    segment_bytes = (total - fixed - slots * 9) // segments & ~7
    if segment_bytes < SEGMENT_BYTES_MIN:  # rounding at the least size
        segment_bytes = SEGMENT_BYTES_MIN
        total = fixed + slots * 9 + segments * segment_bytes
    return Geometry(
        slots=slots,
        segments=segments,
        segment_bytes=segment_bytes,
        data_bytes=total - slots,
        access_bytes=slots,
    )
