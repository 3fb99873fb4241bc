"""The near cache: values a process has read already, checked against one shared word a hit.

*Process*: every attached process, each for itself. *Invariants*: an entry is served only while
its slot still holds the word under which it was read and its time is not over. The word names
generation and place of a record, so it never comes back for another one; a set, delete or move of
the key changes it before the write is acknowledged. That is the whole of the coherence argument.

Entries leave in the order in which they came; the ones in use come anew whenever their time is
over, at most 5 s after. Lookups take no lock (one dict lookup); changes take one, since the byte
count must not drift.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Final

from kamacache.store.finding import Levels, Stamps

VALUE_BYTES_MAX: Final = 4_096  # a larger value costs more to keep twice than to copy again
NEAR_CACHE_ITEMS: Final = 32_768
NEAR_CACHE_BYTES: Final = 32 << 20


NearEntry = tuple[bytes, Stamps, int, float, float, Levels]
"""One kept value and what proves it current: ``(value, index of its shard, slot, word, until_s on
the reader's ticks, access bytes of its shard)``; the word is a float or an int, as in the index
given. A plain tuple: one of a subclass, such as a NamedTuple, is unpacked through an iterator,
which costs a third of a hit."""


class NearCache:
    """A bounded map from key, as the caller gave it, to `NearEntry`."""

    __slots__ = ("_bytes", "_lock", "bytes_max", "entries", "items_max")

    def __init__(self, items_max: int, bytes_max: int) -> None:
        self.items_max = items_max
        self.bytes_max = bytes_max
        self.entries: OrderedDict[str | bytes, NearEntry] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def keep(self, key: str | bytes, entry: NearEntry) -> None:
        """Put an entry in, and the oldest out while there are too many items or bytes."""
        entries = self.entries
        with self._lock:
            old = entries.get(key)
            if old is not None:
                self._bytes += len(entry[0]) - len(old[0])
                entries[key] = entry
                entries.move_to_end(key)
            else:
                entries[key] = entry
                self._bytes += len(key) + len(entry[0])
            while len(entries) > self.items_max or self._bytes > self.bytes_max:
                gone, dropped = entries.popitem(last=False)
                self._bytes -= len(gone) + len(dropped[0])

    def clear(self) -> None:
        """Forget everything; also after a fork, when another thread may have held the lock."""
        self._lock = threading.Lock()
        self.entries.clear()
        self._bytes = 0

    @property
    def bytes(self) -> int:
        """Bytes of the keys and values kept."""
        return self._bytes
