"""Two clocks: CLOCK_BOOTTIME for expiry on this host, and a hybrid logical clock for versions.

*Process*: all. Expiry uses CLOCK_BOOTTIME because every process of a host reads the same value,
no one can set it back, and it goes on while the machine sleeps; CLOCK_MONOTONIC would stop then
and serve a value past its time. Cost from Python is the same as ``time.monotonic``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Final

if hasattr(time, "CLOCK_BOOTTIME"):
    boottime_s: Callable[[], float] = partial(time.clock_gettime, time.CLOCK_BOOTTIME)
else:  # not Linux: single-instance mode and the remote client only
    boottime_s = time.monotonic

VERSION_COUNTER_BITS: Final = 12
VERSION_BITS: Final = 56  # 44 bits of wall-clock milliseconds (to the year 2527), 12 of counter
VERSION_MAX: Final = (1 << VERSION_BITS) - 1


def boottime_ms() -> int:
    """Return CLOCK_BOOTTIME in whole milliseconds."""
    return int(boottime_s() * 1000)


class HybridClock:
    """Issues versions that never go back: wall-clock milliseconds, then a counter.

    Source: Kulkarni et al., "Logical Physical Clocks", 2014. Not safe for threads; the single
    writer of a shard owns it.
    """

    __slots__ = ("_wall_s", "last")

    def __init__(self, last: int = 0, *, wall_s: Callable[[], float] = time.time) -> None:
        self.last = last
        self._wall_s = wall_s

    def next(self) -> int:
        """Return a version greater than every one issued or observed before."""
        now = int(self._wall_s() * 1000) << VERSION_COUNTER_BITS
        last = self.last
        self.last = version = now if now > last else last + 1
        return version

    def observe(self, version: int) -> None:
        """Take note of a version from elsewhere, so that later ones are greater."""
        if version > self.last:
            self.last = version
