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

VERSION_BITS: Final = 56  # units of 256 ns since 1970: to the year 2554
VERSION_MAX: Final = (1 << VERSION_BITS) - 1
# What is taken from elsewhere is at most so far ahead of the wall clock: 100 years, so that a host
# whose clock starts in 1970 takes all there is. Were `VERSION_MAX` taken, no shard could be written
# to any more; and of a bound that stood still, who had been set to it could tell no one else.
VERSIONS_AHEAD_MAX: Final = 100 * 365 * 86_400 * 1_000_000_000 >> 8
STAMP_SHIFT: Final = 8
STAMP_STEP: Final = 1 << STAMP_SHIFT
_STAMP_MASK: Final = -STAMP_STEP


def boottime_ms() -> int:
    """Return CLOCK_BOOTTIME in whole milliseconds."""
    return int(boottime_s() * 1000)


class HybridClock:
    """Issues versions that never go back: the wall clock in units of 256 ns, or the last plus one.

    Source: Kulkarni et al., "Logical Physical Clocks", 2014; one field serves as time and counter,
    which is finer than a writer can write. A *stamp* is a version as records hold it, shifted left
    by `STAMP_SHIFT`: nanoseconds with 8 low bits of zero. Not safe for threads; the single writer
    of a shard owns it.
    """

    __slots__ = ("_believed_max", "_wall_ns", "stamp")

    def __init__(self, last: int = 0, *, wall_ns: Callable[[], int] = time.time_ns) -> None:
        self.stamp = last << STAMP_SHIFT
        self._wall_ns = wall_ns
        self._believed_max = 0  # looked at again when a version is above

    @property
    def last(self) -> int:
        """The greatest version issued or observed."""
        return self.stamp >> STAMP_SHIFT

    def next(self) -> int:
        """Return a version greater than every one issued or observed before."""
        return self.stamps(1) >> STAMP_SHIFT

    def stamps(self, count: int) -> int:
        """Return the first of ``count`` stamps in a row, all greater than those before."""
        first = self._wall_ns() & _STAMP_MASK
        if first <= self.stamp:
            first = self.stamp + STAMP_STEP
        self.stamp = first + (count - 1) * STAMP_STEP if count > 1 else first
        return first

    def observe(self, version: int) -> None:
        """Take note of a version from elsewhere, so that later ones are greater.

        Raises OverflowError for one further ahead of the wall clock than `VERSIONS_AHEAD_MAX`: it
        might leave no room for later ones.
        """
        if not 0 <= version <= self._believed_max:
            self._believed_max = (self._wall_ns() >> STAMP_SHIFT) + VERSIONS_AHEAD_MAX
            if not 0 <= version <= min(self._believed_max, VERSION_MAX):
                raise OverflowError(f"version {version} is 100 years ahead of this host's clock")
        if version > self.last:
            self.stamp = version << STAMP_SHIFT
