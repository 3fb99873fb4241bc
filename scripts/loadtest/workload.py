"""The requests of one load process: kinds and keys, drawn a block ahead.

*Process*: load processes. *Invariants*: seed, round and process number decide everything that is
drawn, whatever the target, so that the targets of a comparison get the same requests; a block is
at most `BLOCK_OPERATIONS_MAX` requests and, at the pace so far, about `BLOCK_S` long, so that a hot
set that moves is seen in time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from kamacache.limits import KEY_BYTES_MAX
from scripts.loadtest.limits import BLOCK_OPERATIONS_MAX, BLOCK_OPERATIONS_MIN, BLOCK_S
from scripts.loadtest.operations import READ, Keys, Mix
from scripts.loadtest.popularity import Popularity

Operation = tuple[int, Keys]
DIGITS: Final = 10
_HALF: Final = 100_000
_KEY_DRAWS_MAX: Final = 1 << 13  # of one block: batches make blocks of fewer operations


class KeyNames:
    """Names of keys: a prefix and ten digits, made for a block at once.

    Two lookups in a table of five digits and one call that makes the bytes objects: 0.05 us a
    key, a third of what ``b"%010d" % number`` takes.
    """

    def __init__(self, prefix: bytes) -> None:
        if len(prefix) + DIGITS > KEY_BYTES_MAX:
            raise ValueError(
                f"the keys' prefix has {len(prefix)} bytes, the limit is {KEY_BYTES_MAX - DIGITS}"
            )
        digits = "".join(f"{number:05d}" for number in range(_HALF)).encode()
        self._table = np.frombuffer(digits, dtype=np.uint8).reshape(_HALF, 5)
        self._prefix = np.frombuffer(prefix, dtype=np.uint8)

    def names(self, numbers: npt.NDArray[np.int64]) -> list[bytes]:
        """Return the keys with these numbers, 0 to 10**10 - 1."""
        width = self._prefix.size
        text = np.empty((numbers.size, width + DIGITS), dtype=np.uint8)
        text[:, :width] = self._prefix
        high, low = np.divmod(numbers, _HALF)
        text[:, width : width + 5] = self._table[high]
        text[:, width + 5 :] = self._table[low]
        # A numpy string ends before its trailing zero bytes; these end with a digit.
        names: list[bytes] = text.view(f"S{width + DIGITS}").ravel().tolist()
        return names


class Source:
    """Where a workload's keys come from."""

    def take(self, count: int, at_s: float) -> list[bytes]:
        """Return the next keys; fewer, and at last none, where they end."""
        raise NotImplementedError


class Drawn(Source):
    """Keys drawn from a distribution; they do not end."""

    def __init__(self, popularity: Popularity, names: KeyNames) -> None:
        self._popularity = popularity
        self._names = names

    def take(self, count: int, at_s: float) -> list[bytes]:
        """Return the next keys."""
        return self._names.names(self._popularity.draw(count, at_s))


class Traced(Source):
    """Keys of a trace in its order, once or over and over."""

    def __init__(self, keys: Sequence[bytes], prefix: bytes, *, again: bool) -> None:
        self._keys = keys
        self._prefix = prefix
        self._again = again
        self._next = 0

    def take(self, count: int, at_s: float) -> list[bytes]:
        """Return the next keys."""
        taken = list(self._keys[self._next : self._next + count])
        self._next += len(taken)
        if self._next >= len(self._keys) and self._again and self._keys:
            self._next = 0
        return [self._prefix + key for key in taken] if self._prefix else taken


class Workload:
    """An endless, or a trace's, row of requests. Threads may take turns."""

    def __init__(
        self,
        source: Source,
        mix: Mix,
        batch: int,
        random: np.random.Generator,
        most: int = BLOCK_OPERATIONS_MAX,
    ) -> None:
        """``most``: requests in one block."""
        self._source = source
        self._batch = batch
        self._reads, self._writes = mix.shares()
        self._random = random
        self._lock = threading.Lock()
        self._most = max(1, min(most, _KEY_DRAWS_MAX // batch))
        self._count = BLOCK_OPERATIONS_MIN
        self._last_s: float | None = None

    def block(self, at_s: float) -> list[Operation]:
        """Return the next requests, to be made ``at_s`` seconds after the start; [] at the end."""
        count = self._pace(at_s)
        keys = self._source.take(count * self._batch, at_s)
        if not keys:
            return []
        asked: list[Keys]
        if self._batch > 1:
            step = self._batch
            # A key twice in one batch is asked for once, as every client does.
            asked = [
                list(dict.fromkeys(keys[first : first + step]))
                for first in range(0, len(keys), step)
            ]
        else:
            asked = list(keys)
        if self._reads >= 1.0:
            kinds = [READ] * len(asked)
        else:
            drawn = self._random.random(len(asked))
            counted = (drawn >= self._reads).astype(np.int64) + (drawn >= self._writes)
            kinds = counted.tolist()
        return list(zip(kinds, asked, strict=True))

    def operations(self, at_s: Callable[[], float]) -> Iterator[Operation]:
        """Return an iterator that any number of threads or tasks share."""
        return _Shared(self, at_s, self._lock)

    def _pace(self, at_s: float) -> int:
        """Return how many requests the next block should have."""
        if self._last_s is not None:
            took_s = at_s - self._last_s
            if took_s < BLOCK_S / 2:
                self._count *= 2
            elif took_s > BLOCK_S * 2:
                self._count //= 2
        self._last_s = at_s
        least = min(BLOCK_OPERATIONS_MIN, self._most)
        self._count = max(min(self._count, self._most), least)
        return self._count


class _Shared(Iterator[Operation]):
    """Takes one request at a time, in order, whoever asks."""

    def __init__(self, workload: Workload, at_s: Callable[[], float], lock: threading.Lock) -> None:
        self._workload = workload
        self._at_s = at_s
        self._lock = lock
        self._block: Iterator[Operation] = iter(())

    def __next__(self) -> Operation:
        try:
            return next(self._block)  # a list's iterator: whole under the GIL
        except StopIteration:
            pass
        with self._lock:
            for operation in self._block:  # another thread may have drawn meanwhile
                return operation
            self._block = iter(self._workload.block(self._at_s()))
            return next(self._block)
