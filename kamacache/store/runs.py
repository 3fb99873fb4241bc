"""Runs: values of several keys stored in one frame, record after record.

*Process*: the shard's worker. What `ShardWriter` does for a key of any kind, here for the plain
kind alone: owned values, numbered by this shard, in a shard whose policy has one class of
segments. *Order of writes*: as in the writer, for each record its bytes, the segment's `used`,
the index word.

A closure with every view and constant bound once, and calls of Python functions spelled out, as in
`kamacache.store.reader`: a call costs as much as the hash. A single set is a run of one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from xxhash import xxh3_64_intdigest as xxh

from kamacache.clock import STAMP_STEP
from kamacache.store.finding import elsewhere
from kamacache.store.layout import (
    BUCKET_SLOTS,
    CHECKSUM_MASK,
    EXPIRY_LOW_MASK,
    EXPIRY_LOW_SHIFT,
    FLAG_EXPIRES,
    H_STAMP,
    KEY_LENGTH_MASK,
    NEVER,
    PLACE_MASK,
    RECORD_HEADER,
    RECORD_HEADER_BYTES,
    S_USED,
    TAG_MASK,
    TAG_SHIFT,
    VALUE_LENGTH_SHIFT,
)
from kamacache.store.space import ShardSpace

PutRun = Callable[[Sequence[tuple[bytes, bytes]], int], None]


def make_put_run(space: ShardSpace) -> PutRun:  # noqa: C901 - see the module
    """Return ``put_run(items, expiry_ms)``, which stores values of distinct keys.

    Each must fit a segment; the expiry is 0 for never, or to come.
    """
    segments, versions, pack = space._log, space._versions, RECORD_HEADER.pack
    data, words, index = space._data, space._words, space._slots
    access, marks, dead = space._access, space._marks, segments.dead
    hottest, fresh, touch = space._hottest, space._fresh, space._policy.touch
    first_place, segment_places = segments.first_place, segments.segment_places
    seed, slots, opened = space._seed, len(index), segments.open

    def put_run(  # noqa: C901 - see the module
        items: Sequence[tuple[bytes, bytes]], expiry_ms: int
    ) -> None:
        flags = expiry_low = expiry_high = 0
        if expiry_ms:
            flags = FLAG_EXPIRES
            expiry_low, expiry_high = expiry_ms & EXPIRY_LOW_MASK, expiry_ms >> EXPIRY_LOW_SHIFT
        stamp = versions.stamps(len(items))
        words[H_STAMP] = versions.stamp
        start = position = end = used = word = live_bytes = added = 0
        current = opened[0]
        if current is not None:
            # Where it is full after all, its records are freed with this expiry: never too early.
            if expiry_ms != current.expiry != NEVER:
                segments.note_expiry(current, expiry_ms)
            start, position, end = current.start, current.position, current.end
            used, word = current.table + S_USED, current.stamp | position >> 3
        try:
            for key, value in items:
                key_bytes, value_bytes = len(key), len(value)
                length = RECORD_HEADER_BYTES + key_bytes + value_bytes
                size = (length + 7) & ~7
                if position + size > end:
                    segments.live_bytes += live_bytes
                    live_bytes = 0
                    space._make_room(0, size)
                    current = segments.with_room(0, size)
                    segments.note_expiry(current, expiry_ms)
                    start, position, end = current.start, current.position, current.end
                    used, word = current.table + S_USED, current.stamp | position >> 3
                # Where the key is: `ShardIndex.find`.
                digest = xxh(key, seed)
                mark = digest >> TAG_SHIFT & 0xFF or 1
                slot = digest % slots
                place, head = -1, 0  # of the record that is replaced
                if marks[slot] == mark:
                    place = index[slot] & PLACE_MASK
                    head = words[place]
                    at = (place << 3) + RECORD_HEADER_BYTES
                    if head & KEY_LENGTH_MASK != key_bytes or data[at : at + key_bytes] != key:
                        place = -1
                if place < 0:
                    second = (digest >> 18 & 0x3FFFFFFF) * slots >> 30
                    home_bucket, second_bucket = slot & -BUCKET_SLOTS, second & -BUCKET_SLOTS
                    if (
                        mark in marks[home_bucket : home_bucket + BUCKET_SLOTS]
                        or mark in marks[second_bucket : second_bucket + BUCKET_SLOTS]
                    ) and (found := elsewhere(data, words, index, slots, digest, slot, key)):
                        slot, _, place, head, _ = found
                    elif marks[slot]:
                        slot = second
                        if marks[slot]:
                            slot = marks.find(0, home_bucket, home_bucket + BUCKET_SLOTS)
                        if slot < 0:
                            slot = marks.find(0, second_bucket, second_bucket + BUCKET_SLOTS)
                        if slot < 0:
                            slot = space._free_slot(digest)
                # The record, counted as used, before the word that names it.
                data[position : position + length] = (
                    pack(
                        flags | key_bytes,
                        xxh(value, digest ^ stamp) & CHECKSUM_MASK,
                        value_bytes,
                        slot,
                        expiry_low,
                        stamp | expiry_high,
                    )
                    + key
                    + value
                )
                stamp += STAMP_STEP
                position += size
                current.position = position  # type: ignore[union-attr] # there is one by now
                words[used] = position - start
                live_bytes += size
                # From the store of the word on every reader and near cache sees the value.
                if place < 0:
                    access[slot] = fresh
                    marks[slot] = mark
                    index[slot] = digest & TAG_MASK | word
                    added += 1
                else:
                    index[slot] = digest & TAG_MASK | word
                    before = RECORD_HEADER_BYTES + key_bytes + (head >> VALUE_LENGTH_SHIFT)
                    before = (before + 7) & ~7
                    dead[(place - first_place) // segment_places] += before
                    live_bytes -= before
                    if access[slot] != hottest:
                        access[slot] = touch[access[slot]]
                word += size >> 3
        finally:
            segments.live_bytes += live_bytes
            space.items += added
        space._puts += len(items)

    return put_run
