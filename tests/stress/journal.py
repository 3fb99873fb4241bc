"""What a write was to be, what was acknowledged, and which answers a reader may get.

Every key has its own sequence of operations, numbered from 1. What operation n of key k is (set,
negative set or delete; value; time to live) follows from k and n alone, so a reader can check an
answer byte for byte without being told. A file of words, written by the writer alone::

    | stop | reads wanted | attempted, acknowledged: 2 words a key | expiry in ms: 64 a key |

The writer stores *attempted*, does the operation, stores *acknowledged*. A reader loads
*acknowledged*, reads the shard, loads *attempted*: the answer must be that of an operation between
the two. Older is outdated, everything else is foreign or torn. None is always allowed (evicted,
expired, or a reader's miss, which is never authoritative), but not the other way round.
"""

from __future__ import annotations

import mmap
import random
import struct
from pathlib import Path
from typing import Final

from xxhash import xxh3_64_intdigest

from kamacache.store import NEGATIVE, Answer

STOP: Final = 0
EXPIRIES: Final = 64  # remembered a key
_HEAD: Final = 8
BLOB: Final = random.Random(11).randbytes(1 << 20)
_PAIR: Final = struct.Struct("<QQ")


class Operations:
    """What each operation is, for values of up to ``value_bytes_max``."""

    def __init__(self, value_bytes_max: int) -> None:
        self._most = value_bytes_max

    @staticmethod
    def key(k: int) -> bytes:
        return b"key-%d" % k

    def answer(self, k: int, n: int) -> Answer:
        """Return what a read finds after operation n: a value, `NEGATIVE` or None."""
        if n == 0:
            return None
        digest = xxh3_64_intdigest(_PAIR.pack(k, n), 1)
        kind = digest % 10
        if kind == 0:
            return None
        if kind == 1:
            return NEGATIVE
        share = digest >> 8 & 0xFF
        pick = digest >> 16 & 0xFFFFFF
        if share < 150:
            size = 1 + pick % 64
        elif share < 220:
            size = 1 + pick % 1_000
        elif share < 245:
            size = 1 + pick % min(4_096, self._most)
        elif share < 254:
            size = 1 + pick % self._most
        else:
            size = self._most
        start = digest >> 40 & 0xFFFF
        return (digest.to_bytes(8, "little") + BLOB[start : start + size])[:size]

    @classmethod
    def mirror(cls, k: int, n: int) -> bool:
        """Tell whether operation n stores its answer as a mirror."""
        return cls.ttl_ms(k, n) > 0 and n % 2 == 1

    @staticmethod
    def ttl_ms(k: int, n: int) -> int:
        """Return the time to live of operation n; 0 for none."""
        digest = xxh3_64_intdigest(_PAIR.pack(k, n), 2)
        return 1 + digest % 40 if digest >> 32 & 3 == 0 else 0


class Journal:
    """The shared words; see the module."""

    def __init__(self, path: Path, keys: int, *, create: bool = False) -> None:
        size = (2 + keys * (2 + EXPIRIES)) * 8
        if create:
            path.write_bytes(bytes(size))
        with path.open("r+b") as file:
            self.words = memoryview(mmap.mmap(file.fileno(), size)).cast("Q")
        self.keys = keys
        self._expiries = 2 + 2 * keys

    def attempt(self, k: int) -> int:
        return 2 + 2 * k

    def acknowledged(self, k: int) -> int:
        return 3 + 2 * k

    def expiry(self, k: int, n: int) -> int:
        return self._expiries + k * EXPIRIES + n % EXPIRIES

    def judge(
        self, operations: Operations, k: int, answer: Answer, since: int, now_ms: int
    ) -> tuple[int, str]:
        """Return the operation that an answer is of, or what is wrong with it.

        ``since``: operation acknowledged before the read began; ``now_ms``: time before it.
        """
        until = self.words[self.attempt(k)]
        late = ""
        # Two operations in a row can have the same answer ("not found", a byte): any may be it.
        for n in range(until, since - 1, -1):
            if operations.answer(k, n) == answer:
                expiry_ms = self.words[self.expiry(k, n)]
                fresh = self.words[self.attempt(k)] - n < EXPIRIES
                if not fresh or not 0 < expiry_ms <= now_ms:
                    return n, ""
                late = late or f"operation {n} of {until} expired {now_ms - expiry_ms} ms ago"
        if late:
            return 0, late
        for n in range(since - 1, max(since - 1_000, 0), -1):
            if operations.answer(k, n) == answer:
                return n, f"outdated: operation {n}, {since} was acknowledged"
        size = len(answer) if isinstance(answer, bytes) else answer
        return 0, f"torn or foreign: {size} bytes, operations {since} to {until}"
