"""Latencies of any number of requests in little memory: an HDR histogram that takes many at once.

*Process*: load processes record, the parent merges. The format is HdrHistogram's (V2, compressed,
base64), so what is written with ``--json`` opens in its other tools; values are nanoseconds, three
digits, up to an hour. `HdrHistogram.record_value` takes 1.5 us of Python for each value, several
times a local hit: `record` does the same arithmetic for a block of values in numpy, at 0.05 us.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt
from hdrh.histogram import HdrHistogram

from scripts.loadtest.limits import LATENCY_DIGITS, LATENCY_NS_MAX

LOWEST_NS: Final = 1


class Histogram:
    """Counts of latencies. Recorded in nanoseconds, told in microseconds."""

    __slots__ = ("_counts", "_half", "_half_magnitude", "_hdr", "_mask")

    def __init__(self, *, _hdr: Any = None) -> None:
        self._hdr = (
            HdrHistogram(LOWEST_NS, LATENCY_NS_MAX, LATENCY_DIGITS) if _hdr is None else _hdr
        )
        self._counts: npt.NDArray[np.uint64] = np.frombuffer(self._hdr.counts, dtype=np.uint64)
        self._half_magnitude: int = self._hdr.sub_bucket_half_count_magnitude
        self._half: int = self._hdr.sub_bucket_half_count
        self._mask: int = self._hdr.sub_bucket_mask

    @classmethod
    def decode(cls, text: str) -> Self:
        """Return the histogram that `encode` wrote; raises ValueError."""
        try:
            read = HdrHistogram.decode(text.encode("ascii"))
        except Exception as error:  # zlib's, base64's, ctypes' and its own
            raise ValueError(f"not an HDR histogram: {error}") from error
        return cls(_hdr=read) if read.counts_len == len(read.counts) else cls.merged([text])

    @classmethod
    def merged(cls, texts: Iterable[str]) -> Self:
        """Return the sum of encoded histograms; of none, an empty one."""
        total = cls()
        for text in texts:
            if text:
                total._hdr.decode_and_add(text.encode("ascii"))
        return total

    def encode(self) -> str:
        """Return the histogram as ASCII text."""
        text: bytes = self._hdr.encode()
        return text.decode("ascii")

    @property
    def count(self) -> int:
        """How many latencies were recorded."""
        return int(self._hdr.total_count)

    def record(self, latencies_ns: Sequence[int] | npt.NDArray[np.int64]) -> None:
        """Add latencies in nanoseconds; what is out of range counts as the end of the range."""
        values = np.asarray(latencies_ns, dtype=np.int64)
        if not values.size:
            return
        values = np.clip(values, 0, LATENCY_NS_MAX)
        # frexp's exponent is the bit length, exact below 2**53.
        bits = np.frexp((values | self._mask).astype(np.float64))[1].astype(np.int64)
        bucket = bits - (self._half_magnitude + 1)
        places = ((bucket + 1) << self._half_magnitude) + (values >> bucket) - self._half
        np.add.at(self._counts, places, np.uint64(1))
        hdr = self._hdr
        hdr.total_count += values.size
        hdr.min_value = min(hdr.min_value, int(values.min()))
        hdr.max_value = max(hdr.max_value, int(values.max()))

    def pack(self) -> bytes:
        """Return the counts in a form that costs a load process little to make; for `add_packed`.

        `encode` compresses: up to 3 ms, which an open loop would show as latency twice a second.
        """
        places = np.flatnonzero(self._counts)
        pairs = np.empty((2, places.size), dtype="<u8")
        pairs[0] = places
        pairs[1] = self._counts[places]
        return pairs.tobytes()

    def add_packed(self, packed: bytes) -> None:
        """Add what `pack` returned; raises ValueError for anything else."""
        pairs = np.frombuffer(packed, dtype="<u8")
        if pairs.size % 2:
            raise ValueError(f"a packed histogram of {len(packed)} bytes is cut")
        places, counts = pairs.reshape(2, -1)
        if not places.size:
            return
        if int(places.max()) >= self._counts.size:
            raise ValueError("a packed histogram has another range")
        self._counts[places] += counts
        hdr = self._hdr
        least, most = int(places.min()), int(places.max())
        hdr.total_count += int(counts.sum())
        hdr.min_value = min(hdr.min_value, hdr.get_value_from_index(least))
        greatest = hdr.get_highest_equivalent_value(hdr.get_value_from_index(most))
        hdr.max_value = max(hdr.max_value, greatest)

    def clear(self) -> None:
        """Forget all."""
        self._counts.fill(0)
        self._hdr.total_count = 0
        self._hdr.min_value = sys.maxsize
        self._hdr.max_value = 0

    def add(self, other: Histogram) -> None:
        """Add the counts of another one."""
        if other.count:
            self._hdr.add(other._hdr)

    def percentiles_us(self, percentiles: Sequence[float]) -> list[float]:
        """Return the latency, in microseconds, that this percentage of requests did not exceed.

        In the order given; all 0 where nothing was recorded.
        """
        total = self.count
        if not total:
            return [0.0] * len(percentiles)
        sums = np.cumsum(self._counts)
        wanted = [max(int(min(p, 100.0) * total / 100 + 0.5), 1) for p in percentiles]
        places = np.searchsorted(sums, np.array(wanted, dtype=np.uint64))
        hdr = self._hdr
        return [
            hdr.get_highest_equivalent_value(hdr.get_value_from_index(int(place))) / 1000
            for place in places
        ]

    @property
    def max_us(self) -> float:
        """The greatest latency in microseconds, within the histogram's precision; 0 of none."""
        return float(self._hdr.get_max_value()) / 1000

    @property
    def mean_us(self) -> float:
        """The mean latency in microseconds; 0 of none."""
        if not self.count:
            return 0.0
        places = np.flatnonzero(self._counts)
        hdr = self._hdr
        middles = np.array(
            [hdr._hdr_median_equiv_value(hdr.get_value_from_index(int(place))) for place in places],
            dtype=np.float64,
        )
        return float((middles * self._counts[places]).sum()) / self.count / 1000
