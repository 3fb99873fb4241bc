"""What one peer must still be told to drop, in one worker: bounded, and kept until it is answered.

*Process*: worker, in the loop's thread. Pure state: the link sends, and says what became of it::

    add ──► waiting: {group: {key: version}} ──► next ──► under way ──► acknowledged: gone
               ▲           └─ over the bound: the group     │
               │              is to be flushed              │
               └──────────── failed, or the link broke ─────┘

*Invariants*: for each key the highest version is kept. Nothing is forgotten before the peer has
answered it, except for a group that is to be flushed whole. A flush carries the clock of the moment
at which it is sent, so it covers all that was added to its group before. At most `items_max` keys
of together `bytes_max` bytes are held; the group that holds the most of them gives way.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Final

from kamacache.limits import BATCH_KEYS_MAX, INVALIDATION_BYTES_MAX, INVALIDATIONS_MAX
from kamacache.wire.messages import Flush, Invalidate

Told = Invalidate | Flush


class InvalidationQueue:
    """The keys, and groups, that wait for one peer."""

    def __init__(
        self,
        clock: Callable[[], int],
        *,
        items_max: int = INVALIDATIONS_MAX,
        bytes_max: int = INVALIDATION_BYTES_MAX,
        batch_keys_max: int = BATCH_KEYS_MAX,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """``clock`` returns a version that is above all that were added before."""
        self._now_s: Final = now_s
        self._clock: Final = clock
        self._items_max: Final = items_max
        self._bytes_max: Final = bytes_max
        self._batch_keys_max: Final = batch_keys_max
        self._waiting: dict[str, dict[bytes, int]] = {}
        self._to_flush: dict[str, None] = {}  # ordered
        self._whole: set[str] = set()  # of those that are to be flushed
        self._first: deque[Told] = deque()  # since `restart`: before all that is added later
        self._under_way: dict[int, Told] = {}  # by a ticket of the queue's own
        self._first_under_way: set[int] = set()  # tickets of those that were in `_first`
        self._tickets = 0
        self._items = 0
        self._bytes = 0
        self._flushes = 0
        # Since when the oldest of them waits: by group of what waits, by id of what was cut.
        self._since_s: dict[str, float] = {}
        self._cut_since_s: dict[int, float] = {}

    @property
    def lag_s(self) -> float:
        """The age of the oldest that the peer has not answered, 0 where there is none.

        Keys of one group that wait together count as old as the first of them: the age is never
        told too low.
        """
        oldest_s = min(self._since_s.values(), default=None)
        cut_s = min(self._cut_since_s.values(), default=oldest_s)
        if oldest_s is None or cut_s is None:
            return 0.0 if cut_s is None else self._now_s() - cut_s
        return self._now_s() - min(oldest_s, cut_s)

    @property
    def pending(self) -> int:
        """How many keys and flushes the peer has not answered."""
        return self._items + self._flushes

    @property
    def unsent(self) -> bool:
        """Whether `next` has something."""
        return bool(self._first or self._to_flush or self._waiting)

    @property
    def under_way(self) -> int:
        """How many requests the peer has not answered."""
        return len(self._under_way)

    @property
    def caught_up(self) -> bool:
        """Whether all that was there at the last `restart`, and every flush, is acknowledged."""
        return not (self._first or self._first_under_way or self._flushes)

    def add(self, group: str, items: Sequence[tuple[bytes, int]]) -> None:
        """Let the peer drop records of these keys that are older than these versions."""
        if group in self._to_flush:
            return
        waiting = self._waiting.get(group)
        if waiting is None:
            waiting = self._waiting[group] = {}
            self._since_s[group] = self._now_s()
        for key, version in items:
            known = waiting.get(key)
            if known is None:
                self._items += 1
                self._bytes += len(key)
                waiting[key] = version
            elif version > known:
                waiting[key] = version
        if not waiting:
            del self._waiting[group], self._since_s[group]
        while self._items > self._items_max or self._bytes > self._bytes_max:
            self._give_way()

    def flush_all(self) -> None:
        """Let the peer drop all of its records that are older than the flush."""
        self._flush("")

    def flush_whole(self, group: str) -> None:
        """Let the peer drop all that it holds of a group ("": of all), of later versions too."""
        self._whole.add(group)
        self._flush(group)

    def next(self) -> tuple[int, Told] | None:
        """Return what to send next, and the ticket by which to say what became of it."""
        first = bool(self._first)
        told = self._first.popleft() if first else self._cut()
        if told is None:
            return None
        self._tickets += 1
        self._under_way[self._tickets] = told
        if first:
            self._first_under_way.add(self._tickets)
        if type(told) is Flush:
            told.version = self._clock()
            told.whole = told.group in self._whole
            self._whole.discard(told.group)
        return self._tickets, told

    def acknowledged(self, ticket: int) -> None:
        """Forget what the peer answered."""
        self._first_under_way.discard(ticket)
        told = self._under_way.pop(ticket, None)
        if told is not None:
            self._forget(told)

    def failed(self, ticket: int) -> None:
        """Send it again."""
        first = ticket in self._first_under_way
        self._first_under_way.discard(ticket)
        told = self._under_way.pop(ticket, None)
        if told is None:
            return
        if isinstance(told, Flush):
            self._flush_again(told)
        elif first and told.group not in self._to_flush:
            self._first.append(told)
        else:
            self._put_back(told)

    def take_back(self) -> None:
        """Let all that is under way wait again: the connection broke."""
        again = [*self._under_way.values(), *self._first]
        self._under_way.clear()
        self._first_under_way.clear()
        self._first.clear()
        for told in again:
            if type(told) is Flush:
                self._flush_again(told)
        for told in again:
            if type(told) is Invalidate:
                self._put_back(told)

    def restart(self) -> None:
        """Begin with everything anew, on a new connection; what is added later comes behind it."""
        self.take_back()
        while (cut := self._cut()) is not None:
            self._first.append(cut)

    # -- parts -----------------------------------------------------------------------------

    def _cut(self) -> Told | None:
        """Take a flush, or a batch of keys, from what waits."""
        if self._to_flush:
            group = next(iter(self._to_flush))
            del self._to_flush[group]
            return self._noted(Flush(group=group, version=0), self._since_s.pop(group))
        if not self._waiting:
            return None
        group, waiting = next(iter(self._waiting.items()))
        if len(waiting) <= self._batch_keys_max:
            del self._waiting[group]
            told = Invalidate(group=group, items=[*waiting.items()])
            return self._noted(told, self._since_s.pop(group))
        items = [*islice(waiting.items(), self._batch_keys_max)]
        for key, _ in items:
            del waiting[key]
        return self._noted(Invalidate(group=group, items=items), self._since_s[group])

    def _noted(self, told: Told, since_s: float) -> Told:
        self._cut_since_s[id(told)] = since_s  # until `_forget`, or `_put_back`
        return told

    def _flush(self, group: str, since_s: float | None = None) -> None:
        """Let the peer flush the group; its keys need not be told then."""
        if group not in self._to_flush:
            self._to_flush[group] = None
            self._flushes += 1
        self._waits_since(group, self._now_s() if since_s is None else since_s)
        for key in self._waiting.pop(group, ()):
            self._items -= 1
            self._bytes -= len(key)
        for told in self._first:
            if told.group == group:
                self._waits_since(group, self._forget(told))
        self._first = deque(told for told in self._first if told.group != group)

    def _flush_again(self, told: Flush) -> None:
        if told.whole:
            self._whole.add(told.group)
        self._flush(told.group, self._forget(told))

    def _give_way(self) -> None:
        """Flush the group that holds the most keys, instead of telling them."""
        counts = {group: len(keys) for group, keys in self._waiting.items()}
        for told in (*self._first, *self._under_way.values()):
            if type(told) is Invalidate:
                counts[told.group] = counts.get(told.group, 0) + len(told.items)
        group = max(counts, key=counts.__getitem__)
        # What is under way of it is given up, too: the flush comes behind it and covers it.
        for ticket, told in [*self._under_way.items()]:
            if told.group == group and type(told) is Invalidate:
                del self._under_way[ticket]
                self._first_under_way.discard(ticket)
                self._waits_since(group, self._forget(told))
        self._flush(group)

    def _waits_since(self, group: str, since_s: float) -> None:
        self._since_s[group] = min(since_s, self._since_s.get(group, since_s))

    def _forget(self, told: Told) -> float:
        """Count it no more; return since when it waited."""
        if type(told) is Invalidate:
            self._items -= len(told.items)
            self._bytes -= sum([len(key) for key, _ in told.items])
        else:
            self._flushes -= 1
        return self._cut_since_s.pop(id(told))

    def _put_back(self, told: Invalidate) -> None:
        if told.group in self._to_flush:
            self._waits_since(told.group, self._forget(told))
            return
        self._waits_since(told.group, self._cut_since_s.pop(id(told)))
        waiting = self._waiting.setdefault(told.group, {})
        for key, version in told.items:
            known = waiting.get(key)
            if known is None:
                waiting[key] = version
            else:  # it was added again meanwhile
                waiting[key] = max(version, known)
                self._items -= 1
                self._bytes -= len(key)
