#!/usr/bin/env python3
"""What an item costs beyond its key and value, in the shard's files and in the worker's own memory.

The first two are counted against all bytes that the group takes (index, table, log and access
bytes), in one shard, sampled while keys go on being inserted into a cache that is full.

- Overhead an item, where items are as large as `item_bytes_mean` says: bytes of the files over
  items, less key and value. Target: at most 48 bytes.
- Share of live records, values of 50 B to 4 KiB mixed, each inserted once. Target: at least 90 %
  (asked of the log; held here against the whole files, which is a little stricter).
- Private memory of the worker, a million items in one shard: what is its own by /proc/PID/smaps
  (private pages, those of files in shared memory left out), less the same of a worker whose shard
  has the least size and took sets, too, an item. So what is allocated at the start counts in:
  a byte for each slot and, with `s3fifo`, the ghosts. Taken when the shard is full, and again when
  a quarter as many keys more have pushed others out. Target: at most 64 bytes an item.

    scripts/bench/memory.py [--quick] [--json FILE] [--check]
"""

from __future__ import annotations

import itertools
import json
import math
import random
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import _cpu
import _harness as harness

import kamacache

KEY_BYTES = 12
VALUE_BYTES_LEAST, VALUE_BYTES_MOST = 50, 4096
ITEM_BYTES_MEAN = 128
OVERHEAD_BYTES_MAX = 48
LIVE_SHARE_MIN = 0.90
BATCH = 256
EVICTIONS = ("lru", "s3fifo")

ITEMS = 1_000_000
ITEMS_QUICK = 30_000
FILE_BYTES_AN_ITEM = 176  # of an item of `ITEM_BYTES_MEAN`: a million fill the shard
PRIVATE_BYTES_MAX = 64
GROUP = "memory"

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


# -- the worker's own memory -------------------------------------------------------------------


def fill(run_dir: str, first: int, count: int) -> None:
    """Be the application that sets so many new keys; print the group's stats."""
    kamacache.attach(run_dir)
    group = kamacache.Group(GROUP, cache_bytes=1, near_cache_items=0)
    value = bytes(ITEM_BYTES_MEAN - KEY_BYTES)
    for at in range(first, first + count, BATCH):
        numbers = range(at, min(at + BATCH, first + count))
        group.set_many({f"k{number:011d}": value for number in numbers})
    print(json.dumps(group.stats()))


def private_bytes(smaps: Iterable[str]) -> int:
    """Return the private bytes of a process, from its /proc/PID/smaps.

    Pages of a shard that no other process has mapped yet are "private" to Linux: mappings of
    files in /dev/shm are left out.
    """
    total = 0
    own = True
    for line in smaps:
        name, *rest = line.split()
        if not name.endswith(":"):  # a mapping: addresses, rights, offset, device, inode, path
            own = not (len(rest) >= 5 and rest[4].startswith("/dev/shm/"))
        elif own and name in ("Private_Clean:", "Private_Dirty:"):
            total += int(rest[0]) << 10
    return total


@dataclass(frozen=True)
class Grown:
    """A worker's private bytes: as it started, with the shard full, and after evictions."""

    started: int
    full: int
    churned: int
    items: int


def grown(eviction: str, cache_bytes: int, items: int) -> Grown:
    """Run a node of one worker, fill its shard, go on setting, and look at the worker."""
    with harness.workspace() as folder:
        config = folder / "node.toml"
        config.write_text(
            f'[groups.{GROUP}]\ncache_bytes = {cache_bytes}\neviction = "{eviction}"\n'
            f"item_bytes_mean = {ITEM_BYTES_MEAN}\n"
        )
        with harness.running_node(folder, f"--config={config}", "--fronts=0", workers=1) as node:
            (worker,) = _cpu.NodeProcesses(node.pid).pids("worker")

            def look() -> int:
                with Path(f"/proc/{worker}/smaps").open() as smaps:
                    return private_bytes(smaps)

            def set_keys(first: int, count: int) -> int:
                done = subprocess.run(
                    [sys.executable, __file__, "--fill", node.run_dir, str(first), str(count)],
                    stdout=subprocess.PIPE,
                    check=True,
                    text=True,
                    env=harness.clean_environment(),
                )
                held: int = json.loads(done.stdout)["items"]
                return held

            started = look()
            set_keys(0, items)
            full = look()
            return Grown(started, full, items=set_keys(items, items // 4), churned=look())


def worker_memory(report: harness.Report, items: int) -> None:
    """Hold the growth under both policies against that of a worker with hardly any items."""
    least = grown("lru", 1, items // 4)
    for eviction in EVICTIONS:
        large = grown(eviction, items * FILE_BYTES_AN_ITEM, items)
        report.measured(
            f"private bytes of a worker, {eviction}",
            {
                name: {"started": one.started, "full": one.full, "churned": one.churned}
                for name, one in (("least shard", least), (f"{large.items} items", large))
            },
        )
        for state, more in (
            ("shard full", large.full - least.full),
            ("after a quarter as many keys again", large.churned - least.churned),
        ):
            report.target(
                f"private bytes of a worker an item, {large.items:,} items, {eviction}, {state}",
                [more / large.items],
                at_most=PRIVATE_BYTES_MAX,
            )


def main() -> None:
    """Fill caches of two sizes under both policies, then look at workers."""
    if sys.argv[1:2] == ["--fill"]:
        fill(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
        return
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
    worker_memory(report, ITEMS_QUICK if args.quick else ITEMS)
    report.finish()


if __name__ == "__main__":
    main()
