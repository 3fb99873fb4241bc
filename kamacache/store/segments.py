"""The segmented log: append-only segments, their table in the shard, free and closed lists.

*Process*: the shard's worker. *Owns*: segment table and log. *Invariants*: a segment's `used`
covers whole records only, since it is stored after a record's bytes and before the record's index
word; a segment is reused only after every index word into it is zeroed and its generation raised,
in that order, so an index word that still stands always means its record.

What a restarted writer must know is in the table (`adopt`); the open segment of a dead writer is
closed as it stands. Byte counts of a crashed writer may be off by one record, never the index.

Beside the policy's classes there is one more, the last: **mirrors**, other nodes' entries. Its
segments have no tail, so that a share of two segments is one that fills and one that is dropped.
"""

from __future__ import annotations

import heapq
from collections import deque

from kamacache.store.arena import Arena
from kamacache.store.layout import (
    GENERATION_MASK,
    GENERATION_MAX,
    GENERATION_SHIFT,
    H_ORDER,
    NEVER,
    ORDER_SHIFT,
    S_DEAD,
    S_EXPIRY,
    S_STATE,
    S_USED,
    SEGMENT_WORDS,
    STATE_CLOSED,
    STATE_FREE,
    STATE_OPEN,
)

# A record that does not fit the open segment opens another one; the room left behind takes
# smaller records as long as it is at least this share of a segment.
_TAIL_WORTH = 64
_TAIL_SEGMENTS_MAX = 16  # opened since the tail was, before it is closed
# Entries of the expiry heap; above it those of segments that were reused meanwhile are dropped.
_EXPIRING_PER_SEGMENT_MAX = 4


class OpenSegment:
    """Where the next record of one class goes."""

    __slots__ = ("end", "expiry", "position", "segment", "stamp", "start", "table")

    def __init__(self, segment: int, table: int, position: int, end: int, generation: int) -> None:
        self.segment = segment
        self.table = table  # word of its row in the segment table
        self.start = position  # byte of the data file
        self.position = position
        self.end = end
        self.stamp = generation << GENERATION_SHIFT
        self.expiry = -1  # no record yet; 0 would pass for a first record that never expires


class SegmentLog:
    """Segments by state and class; appending, closing, freeing."""

    __slots__ = (
        "_arena",
        "_data",
        "_expiring",
        "_log_offset",
        "_segment_bytes",
        "_table",
        "_tails",
        "_words",
        "closed",
        "dead",
        "first_place",
        "free",
        "live_bytes",
        "mirrors",
        "open",
        "segment_places",
    )

    def __init__(self, arena: Arena, policy_classes: int) -> None:
        sizes = arena.geometry
        self.mirrors = policy_classes  # the mirrors' class
        classes = policy_classes + 1
        self._arena = arena
        self._data = arena.data
        self._words = arena.words
        self._table = sizes.table_word
        self._log_offset = sizes.log_offset
        self._segment_bytes = sizes.segment_bytes
        self.first_place = sizes.log_offset >> 3
        self.segment_places = sizes.segment_bytes >> 3
        # By segment: the bytes of its records that no index word names any more.
        self.dead = self._words[self._table + S_DEAD : self.first_place : SEGMENT_WORDS]
        self.open: list[OpenSegment | None] = [None] * classes
        self._tails: list[OpenSegment | None] = [None] * classes
        self.free: deque[int] = deque()
        self.closed: list[deque[int]] = [deque() for _ in range(classes)]
        self.live_bytes = 0
        self._expiring: list[tuple[int, int, int]] = []  # (latest expiry, segment, generation)
        self._adopt(classes)

    def _adopt(self, classes: int) -> None:
        """Take over what the table says; it is all zero in a new file."""
        words = self._words
        closed: list[tuple[int, int, int]] = []
        for segment in range(self._arena.geometry.segments):
            row = self._table + segment * SEGMENT_WORDS
            state = words[row + S_STATE]
            if state & 0xFF == STATE_FREE:
                self.free.append(segment)
                continue
            segment_class = min(state >> 8 & 0xFF, classes - 1)
            if state & 0xFF == STATE_OPEN:  # its writer died: abandoned as it stands
                words[row + S_STATE] = state & ~0xFF | STATE_CLOSED
            closed.append((state >> ORDER_SHIFT, segment, segment_class))
            self.live_bytes += self.live_of(segment)
            self._note_expiry(segment, words[row + S_EXPIRY])
        for _, segment, segment_class in sorted(closed):
            self.closed[segment_class].append(segment)

    # -- writing ---------------------------------------------------------------------------

    def fits(self, segment_class: int, size: int) -> bool:
        """Tell whether a record of this padded size can be appended without a new segment."""
        for current in (self.open[segment_class], self._tails[segment_class]):
            if current is not None and current.position + size <= current.end:
                return True
        return False

    def append(self, segment_class: int, record: bytes, size: int, expiry_ms: int) -> int:
        """Write a record and return its index word without the tag; nobody sees it yet.

        ``size`` is the padded size. Takes a free segment when none open has room: the caller
        keeps one (IndexError otherwise, a defect).
        """
        current = self.with_room(segment_class, size)
        return self.write(current, record, size, expiry_ms)

    def write(self, current: OpenSegment, record: bytes, size: int, expiry_ms: int) -> int:
        """As `append`, at the end of an open segment that has room for ``size`` bytes.

        ``record`` may be several records of one expiry, each but the last padded.
        """
        position = current.position
        words = self._words
        # Readers may copy these bytes meanwhile only through words of an older generation, which
        # were zeroed before this segment was freed: their re-check of the word fails.
        self._data[position : position + len(record)] = record
        current.position = position + size
        row = current.table
        if expiry_ms != current.expiry != NEVER:
            self.note_expiry(current, expiry_ms)
        # Before the caller stores an index word: whoever walks the segment finds its record.
        words[row + S_USED] = current.position - current.start
        self.live_bytes += size
        return current.stamp | position >> 3

    def note_expiry(self, current: OpenSegment, expiry_ms: int) -> None:
        """Take note that an open segment holds, or is to hold, a record of this expiry."""
        if current.expiry != NEVER:
            latest = max(expiry_ms, current.expiry) if expiry_ms else NEVER
            self._words[current.table + S_EXPIRY] = current.expiry = latest

    def kill(self, place: int, size: int) -> None:
        """Count a record as dead; its index word no longer points at it."""
        self.dead[(place - self.first_place) // self.segment_places] += size
        self.live_bytes -= size

    def with_room(self, segment_class: int, size: int) -> OpenSegment:
        """Return an open segment with room; takes a free one where none has any."""
        for current in (self.open[segment_class], self._tails[segment_class]):
            if current is not None and current.position + size <= current.end:
                return current
        current = self.open[segment_class]
        if current is not None:
            self._retire(segment_class, current)
        segment = self.free.popleft()
        words = self._words
        row = self._table + segment * SEGMENT_WORDS
        generation = words[row + S_STATE] >> 16 & GENERATION_MASK or 1
        start = self._log_offset + segment * self._segment_bytes
        words[row + S_DEAD] = words[row + S_USED] = words[row + S_EXPIRY] = 0
        words[H_ORDER] = order = words[H_ORDER] + 1
        state = segment_class << 8 | STATE_OPEN
        words[row + S_STATE] = order << ORDER_SHIFT | generation << 16 | state
        self.open[segment_class] = opened = OpenSegment(
            segment, row, start, start + self._segment_bytes, generation
        )
        return opened

    def _retire(self, segment_class: int, current: OpenSegment) -> None:
        """Close the open segment, or keep it as the tail if it has more room than the last one.

        A tail stays open, and so is never a victim, until it is replaced, full or old: where no
        record ever fits into it, its own would never be evicted.
        """
        tail = self._tails[segment_class]
        age = 0 if tail is None else self._words[H_ORDER] - self._order_of(tail.segment)
        if tail is not None and age >= _TAIL_SEGMENTS_MAX:
            self._close(segment_class, tail)
            tail = self._tails[segment_class] = None
        room = current.end - current.position
        if (
            segment_class != self.mirrors
            and room * _TAIL_WORTH >= self._segment_bytes
            and (tail is None or room >= tail.end - tail.position)
        ):
            self._tails[segment_class] = current
            current = tail  # type: ignore[assignment]
        if current is not None:
            self._close(segment_class, current)

    def close_mirrors(self) -> None:
        """Close the mirrors' open segment, so that it is counted among those to drop."""
        current = self.open[self.mirrors]
        if current is not None:
            self.open[self.mirrors] = None
            self._close(self.mirrors, current)

    def _close(self, segment_class: int, current: OpenSegment) -> None:
        words = self._words
        state = words[current.table + S_STATE]
        words[current.table + S_STATE] = state & ~0xFF | STATE_CLOSED
        self._note_expiry(current.segment, words[current.table + S_EXPIRY])
        order = self._order_of(current.segment)
        closed = self.closed[segment_class]
        if closed and self._order_of(closed[-1]) > order:
            at = next(i for i, other in enumerate(closed) if self._order_of(other) > order)
            closed.insert(at, current.segment)
        else:
            closed.append(current.segment)

    # -- taking back -----------------------------------------------------------------------

    def span(self, segment: int) -> tuple[int, int, int]:
        """Return first place, end of the used ones, and the generation's part of index words."""
        row = self._table + segment * SEGMENT_WORDS
        first = self.first_place + segment * self.segment_places
        used = self._words[row + S_USED] >> 3
        stamp = (self._words[row + S_STATE] >> 16 & GENERATION_MASK) << GENERATION_SHIFT
        return first, first + min(used, self.segment_places), stamp

    def places(self, segment: int) -> tuple[int, int]:
        """Return the first place of a segment and how many places it has."""
        first = self._log_offset + segment * self._segment_bytes
        return first >> 3, self._segment_bytes >> 3

    def class_of(self, segment: int) -> int:
        """Return the class of a segment in use."""
        return self._words[self._table + segment * SEGMENT_WORDS + S_STATE] >> 8 & 0xFF

    def class_at(self, place: int) -> int:
        """Return the class of the segment that holds a place."""
        segment = ((place << 3) - self._log_offset) // self._segment_bytes
        return self._words[self._table + segment * SEGMENT_WORDS + S_STATE] >> 8 & 0xFF

    def live_of(self, segment: int) -> int:
        """Return the bytes of live records in a segment."""
        row = self._table + segment * SEGMENT_WORDS
        return max(self._words[row + S_USED] - self._words[row + S_DEAD], 0)

    def mirror_bytes(self) -> int:
        """Return the bytes of live mirrors."""
        current = self.open[self.mirrors]
        opened = 0 if current is None else self.live_of(current.segment)
        return opened + sum(map(self.live_of, self.closed[self.mirrors]))

    def _order_of(self, segment: int) -> int:
        return self._words[self._table + segment * SEGMENT_WORDS + S_STATE] >> ORDER_SHIFT

    def emptiest(self) -> int | None:
        """Return the closed segment with the fewest live bytes, or None."""
        return min(
            (segment for closed in self.closed for segment in closed),
            key=self.live_of,
            default=None,
        )

    def room(self, segment_class: int) -> int:
        """Return the bytes that a class's next records can take."""
        opened = (self.open[segment_class], self._tails[segment_class])
        open_bytes = sum(part.end - part.position for part in opened if part is not None)
        return open_bytes + len(self.free) * self._segment_bytes

    def segments_of(self, segment_class: int) -> int:
        """Return how many segments a class holds, its open ones counted."""
        opened = self.open[segment_class] is not None
        tail = self._tails[segment_class] is not None
        return len(self.closed[segment_class]) + opened + tail

    def release(self, segment: int) -> None:
        """Free a closed segment. Every index word into it has been zeroed by now."""
        words = self._words
        row = self._table + segment * SEGMENT_WORDS
        state = words[row + S_STATE]
        self.live_bytes -= self.live_of(segment)
        self.closed[min(state >> 8 & 0xFF, len(self.closed) - 1)].remove(segment)
        generation = (state >> 16 & GENERATION_MASK) % GENERATION_MAX + 1
        # Never fewer live bytes than there are, at whichever store a crash comes.
        words[row + S_DEAD] = 0
        words[row + S_USED] = 0
        # The generation rises only now, after the words: a crash before this line leaves a
        # closed segment without live records, which is freed again later.
        words[row + S_STATE] = generation << 16 | STATE_FREE
        self.free.append(segment)

    def _note_expiry(self, segment: int, latest_ms: int) -> None:
        if 0 < latest_ms < NEVER:
            heap = self._expiring
            row = self._table + segment * SEGMENT_WORDS
            generation = self._words[row + S_STATE] >> 16 & GENERATION_MASK
            heapq.heappush(heap, (latest_ms, segment, generation))
            if len(heap) > _EXPIRING_PER_SEGMENT_MAX * self._arena.geometry.segments:
                # Segments that were evicted long before their time: at most one a segment stays.
                self._expiring = [entry for entry in heap if self._stands(*entry)]
                heapq.heapify(self._expiring)

    def _stands(self, latest_ms: int, segment: int, generation: int) -> bool:
        """Tell whether a heap entry is about what the segment holds now."""
        row = self._table + segment * SEGMENT_WORDS
        state = self._words[row + S_STATE]
        return (
            state >> 16 & GENERATION_MASK == generation
            and state & 0xFF == STATE_CLOSED
            and self._words[row + S_EXPIRY] == latest_ms
        )

    def expired(self, now_ms: int) -> int | None:
        """Return a closed segment whose latest expiry has passed, or None; each one once."""
        heap = self._expiring
        while heap and heap[0][0] <= now_ms:
            entry = heapq.heappop(heap)
            if self._stands(*entry):
                return entry[1]
        return None
