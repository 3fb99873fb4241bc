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
    ) -> None:
        """``clock`` returns a version that is above all that were added before."""
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
        waiting = self._waiting.setdefault(group, {})
        for key, version in items:
            known = waiting.get(key)
            if known is None:
                self._items += 1
                self._bytes += len(key)
                waiting[key] = version
            elif version > known:
                waiting[key] = version
        if not waiting:
            del self._waiting[group]
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
            return Flush(group=group, version=0)
        if not self._waiting:
            return None
        group, waiting = next(iter(self._waiting.items()))
        if len(waiting) <= self._batch_keys_max:
            del self._waiting[group]
            return Invalidate(group=group, items=[*waiting.items()])
        items = [*islice(waiting.items(), self._batch_keys_max)]
        for key, _ in items:
            del waiting[key]
        return Invalidate(group=group, items=items)

    def _flush(self, group: str) -> None:
        """Let the peer flush the group; its keys need not be told then."""
        if group not in self._to_flush:
            self._to_flush[group] = None
            self._flushes += 1
        for key in self._waiting.pop(group, ()):
            self._items -= 1
            self._bytes -= len(key)
        for told in self._first:
            if told.group == group:
                self._forget(told)
        self._first = deque(told for told in self._first if told.group != group)

    def _flush_again(self, told: Flush) -> None:
        if told.whole:
            self._whole.add(told.group)
        self._forget(told)
        self._flush(told.group)

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
                self._forget(told)
        self._flush(group)

    def _forget(self, told: Told) -> None:
        if type(told) is Invalidate:
            self._items -= len(told.items)
            self._bytes -= sum([len(key) for key, _ in told.items])
        else:
            self._flushes -= 1

    def _put_back(self, told: Invalidate) -> None:
        if told.group in self._to_flush:
            self._forget(told)
            return
        waiting = self._waiting.setdefault(told.group, {})
        for key, version in told.items:
            known = waiting.get(key)
            if known is None:
                waiting[key] = version
            else:  # it was added again meanwhile
                waiting[key] = max(version, known)
                self._items -= 1
                self._bytes -= len(key)
