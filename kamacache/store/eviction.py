"""Which records live on when a segment is taken back: `lru` and `s3fifo`.

*Process*: the shard's worker. A policy never sees single hits. Readers store into an entry's
access byte (through the policy's `touch` table, and only if that changes it); the writer asks the
policy for a victim segment and for a verdict on each of the 256 levels an access byte can have.
Mirrors, other nodes' entries, are no policy's: their class comes after the policy's own, and the
writer asks nothing about it.

**lru**: the byte is a coarse clock. A hit stores 255; each time 1/64 of the log has been
written, the writer lowers every byte by one (a table over the whole file: about 1 ns a slot), so
the levels order entries by last access. The oldest segment is the victim; of its records those
among the stalest `_LRU_STALE_SHARE` of all entries are dropped, judged by a sample of access
bytes, and the others move to the end of the log. Rejected: CLOCK (a reference bit), which moves
every record that was ever hit again, and evicting exactly the stalest entries wherever they lie,
which leaves holes in all segments and moves far more bytes.

**s3fifo** (Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023): the byte
counts hits up to 3. New keys enter a small queue of a tenth of the log, move on to the main queue
if hit more than once there, and leave a ghost otherwise; a key with a ghost enters main at once.
Main gives a record one more round for each hit it had.
"""

from __future__ import annotations

import random
from array import array
from typing import Final, Protocol

from kamacache.store.arena import Arena
from kamacache.store.layout import INDEX_LOAD
from kamacache.store.segments import SegmentLog

Verdict = tuple[int, int] | None  # (class, level) to move on with; None: drop

_UP_TO: Final = bytes(range(256))
DROP_ALL: Final[list[Verdict]] = [None] * 256
_KEEP_LRU: Final[list[Verdict]] = [(0, level) for level in range(256)]
_AGED: Final = bytes((0, 1)) + bytes(range(1, 255))  # level n becomes n - 1, but 0 and 1 stay
_AGE_CHUNK_BYTES: Final = 1 << 16
_LRU_STEPS: Final = 64  # clock steps while the log is written once
_LRU_STALE_SHARE: Final = 0.2
_SAMPLE_SLOTS: Final = 4_096

_SMALL: Final = 0
_MAIN: Final = 1
_SMALL_SHARE: Final = 0.1
_FREQUENCY_MAX: Final = 3
_GHOST_WAYS: Final = 16
_PROMOTE_AT: Final = 2  # hits in the small queue; the paper's "more than once"


class Policy(Protocol):
    """What the writer asks of an eviction policy."""

    classes: int  # of segments
    touch: bytes  # access byte after a hit, by access byte before
    fresh: int  # access byte of a new entry; never 0, which marks an empty slot

    def admit(self, digest: int) -> int:
        """Return the class of segment that a new key's record goes to."""

    def victim(self) -> int:
        """Return the closed segment to take back next; the policy has at least one."""

    def verdicts(self, segment_class: int) -> list[Verdict]:
        """Return what becomes of a victim's records, by access byte."""

    def remembers(self, segment_class: int) -> bool:
        """Tell whether `forgotten` wants the hashes of records dropped from this class."""

    def forgotten(self, digest: int) -> None:
        """Take note of a dropped key's hash."""

    def segment_filled(self) -> None:
        """Take note that new records have filled a segment: the clock of this store."""


class LruPolicy:
    """Least recently used, by access bytes that age."""

    classes = 1
    touch = bytes((255,)) * 256
    fresh = 255

    def __init__(self, arena: Arena, log: SegmentLog) -> None:
        self._access = arena.access
        self._log = log
        self._step_segments = max(arena.geometry.segments // _LRU_STEPS, 1)
        self._filled = 0
        self._random = random.Random(arena.geometry.slots)

    def admit(self, digest: int) -> int:
        return 0

    def victim(self) -> int:
        return self._log.closed[0][0]

    def verdicts(self, segment_class: int) -> list[Verdict]:
        dropped = self._stale_level() + 1
        return DROP_ALL[:dropped] + _KEEP_LRU[dropped:]

    def remembers(self, segment_class: int) -> bool:
        return False

    def forgotten(self, digest: int) -> None:
        raise AssertionError("lru keeps no ghosts")

    def segment_filled(self) -> None:
        self._filled += 1
        if self._filled >= self._step_segments:
            self._filled = 0
            access = self._access
            for start in range(0, len(access), _AGE_CHUNK_BYTES):
                # A reader that stores between this read and this write loses its touch: the
                # entry looks one step older than it is until its next hit.
                chunk = bytes(access[start : start + _AGE_CHUNK_BYTES])
                access[start : start + len(chunk)] = chunk.translate(_AGED)

    def _stale_level(self) -> int:
        """Return the level at or below which an entry is among the stalest share."""
        slots = len(self._access)
        start = self._random.randrange(max(slots - _SAMPLE_SLOTS, 0) + 1)
        # Slots are hash order, so a window is a fair sample.
        levels = bytes(self._access[start : start + _SAMPLE_SLOTS]).translate(None, b"\0")
        if not levels:
            return 255
        return level_at(levels, int(len(levels) * _LRU_STALE_SHARE))


def level_at(levels: bytes, rank: int) -> int:
    """Return what stands at ``rank``, 0 for the first, were the bytes sorted.

    By halves, each counted by one pass at C speed: a tenth of what sorting the sample costs.
    """
    low, high = 0, 255
    while low < high:
        middle = (low + high) // 2
        above = levels.translate(None, _UP_TO[: middle + 1])
        if len(levels) - len(above) > rank:
            high = middle
        else:
            low = middle + 1
    return low


class Ghosts:
    """Hashes of keys that left the small queue, about as many as the main queue has entries.

    Buckets of 16 hashes of 32 bits, each a ring that forgets its oldest: 4.1 bytes a ghost, and
    one C-speed search a question. Rejected: a direct-mapped table, which had lost a third of the
    ghosts to collisions before their time, and a dict, at 100 bytes a ghost.
    """

    __slots__ = ("_buckets", "_next", "_table")

    def __init__(self, ghosts: int) -> None:
        self._buckets = max(ghosts // _GHOST_WAYS, 1)
        self._table = array("I", bytes(4 * _GHOST_WAYS * self._buckets))
        self._next = bytearray(self._buckets)

    def add(self, digest: int) -> None:
        """Remember a key's hash."""
        bucket = (digest & 0xFFFFFFFF) * self._buckets >> 32
        way = self._next[bucket]
        self._table[bucket * _GHOST_WAYS + way] = digest >> 32 or 1
        self._next[bucket] = (way + 1) % _GHOST_WAYS

    def take(self, digest: int) -> bool:
        """Tell whether the key's ghost is here, and forget it."""
        first = ((digest & 0xFFFFFFFF) * self._buckets >> 32) * _GHOST_WAYS
        ghosts = self._table[first : first + _GHOST_WAYS]
        mark = digest >> 32 or 1
        if mark not in ghosts:
            return False
        self._table[first + ghosts.index(mark)] = 0
        return True


class S3FifoPolicy:
    """Small, main and ghost queues over segments of two classes."""

    classes = 2
    # Level 0 is an empty slot; level n has had n - 1 hits.
    touch = bytes(min(level + 1, _FREQUENCY_MAX + 1) for level in range(256))
    fresh = 1

    def __init__(self, arena: Arena, log: SegmentLog) -> None:
        self._log = log
        self._small_segments = max(round(arena.geometry.segments * _SMALL_SHARE), 1)
        self.ghosts = Ghosts(int(arena.geometry.slots * INDEX_LOAD * (1 - _SMALL_SHARE)))
        self.ghost_hits = 0
        self._filling = bool(log.free)  # until the first victim is asked for

    def admit(self, digest: int) -> int:
        if self.ghosts.take(digest):
            self.ghost_hits += 1
            return _MAIN
        if self._filling and self._log.segments_of(_SMALL) > self._small_segments:
            return _MAIN  # nothing was evicted yet: main is empty room
        return _SMALL

    def victim(self) -> int:
        self._filling = False
        small, main = self._log.closed[_SMALL], self._log.closed[_MAIN]
        if small and (self._log.segments_of(_SMALL) > self._small_segments or not main):
            return small[0]
        return main[0] if main else small[0]

    def verdicts(self, segment_class: int) -> list[Verdict]:
        if segment_class == _SMALL:
            promoted: Verdict = (_MAIN, self.fresh)
            return [promoted if level - 1 >= _PROMOTE_AT else None for level in range(256)]
        return [(_MAIN, level - 1) if level > self.fresh else None for level in range(256)]

    def remembers(self, segment_class: int) -> bool:
        return segment_class == _SMALL

    def forgotten(self, digest: int) -> None:
        self.ghosts.add(digest)

    def segment_filled(self) -> None:
        pass


def keep_all(segment_class: int) -> list[Verdict]:
    """Return the verdicts that move every record on within its class, as it is."""
    return [(segment_class, level) for level in range(256)]


def make_policy(eviction: str, arena: Arena, log: SegmentLog) -> Policy:
    """Return the policy of a group's `eviction` setting."""
    return S3FifoPolicy(arena, log) if eviction == "s3fifo" else LruPolicy(arena, log)


def classes_of(eviction: str) -> int:
    """Return how many classes of segments a policy uses."""
    return S3FifoPolicy.classes if eviction == "s3fifo" else LruPolicy.classes


def touch_of(eviction: str) -> bytes:
    """Return the table by which readers of a group store into access bytes."""
    return S3FifoPolicy.touch if eviction == "s3fifo" else LruPolicy.touch
