#!/usr/bin/env python3
"""What an item costs beyond its key and value, and how much of a full cache is live records.

Both are counted against all bytes that the group takes (index, table, log and access bytes),
in one shard, sampled while keys go on being inserted into a cache that is full.

- Overhead an item, where items are as large as `item_bytes_mean` says: bytes of the files over
  items, less key and value. Target: at most 48 bytes.
- Share of live records, values of 50 B to 4 KiB mixed, each inserted once. Target: at least 90 %
  (asked of the log; held here against the whole files, which is a little stricter).

    scripts/bench/memory.py [--quick] [--json FILE] [--check]
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator

import _harness as harness

import kamacache

KEY_BYTES = 12
VALUE_BYTES_LEAST, VALUE_BYTES_MOST = 50, 4096
ITEM_BYTES_MEAN = 128
OVERHEAD_BYTES_MAX = 48
LIVE_SHARE_MIN = 0.90
BATCH = 256
EVICTIONS = ("lru", "s3fifo")

Sizes = Callable[[], int]


def filled(
    cache_bytes: int, eviction: str, item_bytes_mean: int, value_bytes: Sizes, times: float
) -> Iterator[dict[str, int]]:
    """Insert new keys, ``times`` what fits; yield stats now and then once the cache is full."""
    group = kamacache.Group(
        "memory",
        cache_bytes=cache_bytes,
        eviction=eviction,
        item_bytes_mean=item_bytes_mean,
        near_cache_items=0,
    )
    numbers = itertools.count()
    given = 0
    full_at = 1.5 * cache_bytes
    next_sample = full_at
    while given < times * cache_bytes:
        batch = {f"k{next(numbers):011d}": bytes(value_bytes()) for _ in range(BATCH)}
        group.set_many(batch)
        given += sum(map(len, batch.values())) + KEY_BYTES * BATCH
        if given >= next_sample:
            next_sample += 0.05 * cache_bytes
            yield group.stats()


def mixes() -> dict[str, tuple[Sizes, int]]:
    """Return ways to draw sizes of values from 50 B to 4 KiB, each with the mean of an item."""
    draw = random.Random(4)
    low, high = VALUE_BYTES_LEAST, VALUE_BYTES_MOST
    log_mean = (high - low) / math.log(high / low)
    return {
        "uniform": (lambda: draw.randint(low, high), KEY_BYTES + (low + high) // 2),
        "log-uniform": (
            lambda: round(math.exp(draw.uniform(math.log(low), math.log(high)))),
            KEY_BYTES + round(log_mean),
        ),
    }


def main() -> None:
    """Fill caches of two sizes under both policies."""
    args = harness.arguments(__doc__)
    report = harness.Report("memory", args)
    sizes = {"8 MiB": 8 << 20} if args.quick else {"8 MiB": 8 << 20, "64 MiB": 64 << 20}
    times = 2.0 if args.quick else 3.0
    for (label, cache_bytes), eviction in itertools.product(sizes.items(), EVICTIONS):
        samples = [
            stats["capacity_bytes"] / stats["items"] - ITEM_BYTES_MEAN
            for stats in filled(
                cache_bytes,
                eviction,
                ITEM_BYTES_MEAN,
                lambda: ITEM_BYTES_MEAN - KEY_BYTES,
                times,
            )
        ]
        report.target(
            f"overhead an item of {ITEM_BYTES_MEAN} B, in bytes, {label}, {eviction}",
            samples,
            at_most=OVERHEAD_BYTES_MAX,
        )
    for (label, cache_bytes), eviction in itertools.product(sizes.items(), EVICTIONS):
        for mix, (value_bytes, mean) in mixes().items():
            shares = [
                stats["live_bytes"] / stats["capacity_bytes"]
                for stats in filled(cache_bytes, eviction, mean, value_bytes, times)
            ]
            report.target(
                f"share of live records, values {mix}, {label}, {eviction}",
                shares,
                at_least=LIVE_SHARE_MIN,
            )
    report.finish()


if __name__ == "__main__":
    main()
