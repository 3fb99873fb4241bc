#!/usr/bin/env python3
"""What a get and a set cost in a shard of ten million items, against one of 100,000.

Two shards of one worker each, made in a folder of /dev/shm that is removed at the end, are filled
with values of 100 B; every page is touched by this process before anything is timed. Keys are
uniform: each slice draws new ones, so that hardly any line or page of the large shard is in the
processor's caches. A get is the reader's, near cache off, as in an attached process; a set is the
writer's `put` of a new value to a key that is there, the shard's part of a set. Sets begin when
the log has been filled once: both shards then take segments back as they go, and a slice is long
enough for several. Targets: each at most 1.8 times what it costs in the small shard. Times are the
thread's CPU time, which waits for memory count in and other processes do not.

What the difference is made of is measured with two more pairs:

- one word read at random from the mapping, and one from a table as large as the small shard: what
  a single line that is in no cache costs, page table walk included;
- the same reads from private memory with and without MADV_HUGEPAGE: how much of it is the walk
  (in a virtual machine the host's pages count as much, and the two may come out alike).
  Whether the shards' own files can have huge pages is up to
  /sys/kernel/mm/transparent_hugepage/shmem_enabled, which is printed; where it allows them, the
  large shard's gets are timed with MADV_HUGEPAGE too.

    scripts/bench/big_shard.py [--items N] [--quick] [--rounds N] [--json FILE] [--check]

With --quick the large shard has a million items. Ten million take 1.8 GiB of /dev/shm and as much
again, twice, of RAM for the comparison; where they are not free it says so and ends.
"""

from __future__ import annotations

import mmap
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import _harness as harness
import psutil

from kamacache.config import GroupSpec
from kamacache.store import (
    Arena,
    Lookup,
    ShardIdentity,
    ShardPaths,
    ShardWriter,
    create_shard,
    make_lookup,
    open_for_reading,
    open_writer,
    required_bytes,
    touch_of,
)

ITEMS_SMALL = 100_000
ITEMS_LARGE = 10_000_000
ITEMS_QUICK = 1_000_000
VALUE_BYTES = 100
KEY_BYTES = 12
BYTES_AN_ITEM = 175  # of both files, with some room: nothing is to be evicted
GETS = 2_000  # a slice
SETS = 20_000
FILL_BATCH = 10_000
SEGMENTS_FREED = 3  # the log was filled, and what is written now takes segments back
RATIO_MAX = 1.8
SEED = 0x5EED
SHM = Path("/dev/shm")
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")
PAGE = mmap.PAGESIZE


def key_of(number: int) -> bytes:
    """Return a key of `KEY_BYTES`."""
    return b"k%011d" % number


def spec_of(items: int) -> GroupSpec:
    """Return a group whose one shard holds so many items."""
    return GroupSpec(
        name=f"items-{items}",
        cache_bytes=items * BYTES_AN_ITEM,
        item_bytes_mean=KEY_BYTES + VALUE_BYTES,
    )


class Big:
    """One filled shard, and the slices that are measured on it."""

    def __init__(self, folder: Path, items: int) -> None:
        self._items = items
        self._draw = random.Random(items)
        self._value = self._draw.randbytes(VALUE_BYTES)
        spec = self._spec = spec_of(items)
        self._folder = folder
        create_shard(str(folder), spec, 0, 1, SEED, "bench")
        self.writer: ShardWriter = open_writer(str(folder), spec, 0, 1, SEED, "bench")
        self.reader: Arena = self.open_reader()
        for first in range(0, items, FILL_BATCH):
            numbers = range(first, min(first + FILL_BATCH, items))
            self.writer.put_many([(key_of(number), self._value) for number in numbers])
        held = self.writer.stats()
        if held["items"] < items * 0.995:  # two full buckets cost one key in a thousand its place
            raise RuntimeError(f"of {items} items {held['items']} are held; is there no room?")
        while self.writer.stats()["segments_freed"] < SEGMENTS_FREED:
            for key in self.some_keys(SETS):
                self.writer.put(key, self._value)
        self._before = self.writer.stats()
        self.lookup: Lookup = self.lookup_of(self.reader)
        for arena in (self.writer.arena, self.reader):
            touch_pages(arena.data)
            sum(arena.access[::PAGE])

    def open_reader(self) -> Arena:
        """Map the shard as an attached process does."""
        identity = ShardIdentity(self._spec, 0, 1, SEED, "bench")
        return open_for_reading(ShardPaths.of(self._folder, self._spec.name, 0), identity)

    def lookup_of(self, arena: Arena) -> Lookup:
        """Return the lookup that a group without a near cache has."""
        return make_lookup((arena,), hash_seed=SEED, touch=touch_of(self._spec.eviction))

    def some_keys(self, count: int) -> list[bytes]:
        """Draw keys for a slice; they are made before the clock runs."""
        return [key_of(number) for number in self._draw.choices(range(self._items), k=count)]

    def get(self, lookup: Lookup | None = None) -> float:
        """Return the seconds of a get."""
        keys, get = self.some_keys(GETS), (lookup or self.lookup).get
        start = time.thread_time()
        for key in keys:
            get(key)
        return (time.thread_time() - start) / GETS

    def put(self) -> float:
        """Return the seconds of a set."""
        keys, put = self.some_keys(SETS), self.writer.put
        value = self._draw.randbytes(VALUE_BYTES)
        start = time.thread_time()
        for key in keys:
            put(key, value)
        return (time.thread_time() - start) / SETS

    def moved(self) -> float:
        """Return how many records were moved for a set, since the shard was filled."""
        now, before = self.writer.stats(), self._before
        return (now["records_moved"] - before["records_moved"]) / (now["puts"] - before["puts"])

    def close(self) -> None:
        """Give the writer's lock back; the files go with the folder."""
        self.writer.close()


def touch_pages(data: mmap.mmap) -> None:
    """Read a byte of every page, so that it is in this process's page table."""
    for start in range(0, len(data), 1 << 24):
        sum(data[start : start + (1 << 24) : PAGE])


def words(count_bytes: int, *, huge: bool = False) -> memoryview[int]:
    """Return private memory, written once, in huge pages if told so."""
    memory = mmap.mmap(-1, count_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
    chunk = b"\1" * (1 << 20)
    for start in range(0, count_bytes, len(chunk)):
        memory[start : start + len(chunk)] = chunk[: count_bytes - start]
    return memoryview(memory)[: count_bytes & ~7].cast("Q")


def reading(table: memoryview[int]) -> Callable[[], float]:
    """Return a slice: the seconds of one word read at random, the loop included."""
    draw = random.Random(1)

    def run() -> float:
        places = draw.choices(range(len(table)), k=GETS)
        start = time.thread_time()
        for place in places:
            table[place]
        return (time.thread_time() - start) / GETS

    return run


@contextmanager
def shared_folder() -> Iterator[Path]:
    """A folder in shared memory that is gone after the block."""
    folder = Path(tempfile.mkdtemp(prefix="kcb-big-", dir=SHM))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def room_for(items: int) -> str | None:
    """Return why the shards and the memory of the comparison do not fit, or None."""
    need = required_bytes(spec_of(items), 1) + required_bytes(spec_of(ITEMS_SMALL), 1)
    if not SHM.is_dir():
        return f"there is no {SHM}"
    space = os.statvfs(SHM)
    if (free := space.f_bavail * space.f_frsize) < need * 1.1:
        return f"{SHM} has {free >> 20} MiB free, {need >> 20} MiB are needed"
    # Its pages, those of the two private tables, and page tables for both mappings.
    if (free := psutil.virtual_memory().available) < need * 3.5:
        return f"{free >> 20} MiB of memory are available, {int(need * 3.5) >> 20} MiB are needed"
    return None


def huge_pages_of(kind: str) -> str:
    """Return the chosen word of a transparent_hugepage setting."""
    try:
        text = (HUGE_PAGES / kind).read_text()
    except OSError:
        return "not there"
    return text.partition("[")[2].partition("]")[0]


def main() -> None:
    """Fill both shards, let them take turns, and say what the difference is made of."""
    args = harness.arguments(
        __doc__, items={"type": int, "help": f"of the large shard (default {ITEMS_LARGE})"}
    )
    report = harness.Report("big_shard", args, ("xxhash",))
    items = args.items or (ITEMS_QUICK if args.quick else ITEMS_LARGE)
    if (why := room_for(items)) is not None:
        report.skip(f"a shard of {items:,} items", why)
        report.finish()
    rounds = args.rounds or (4 if args.quick else 40)
    kinds = {kind: huge_pages_of(kind) for kind in ("enabled", "shmem_enabled")}
    for kind, chosen in kinds.items():
        report.version(f"transparent_hugepage/{kind}", chosen)
    with ExitStack() as stack:
        folder = stack.enter_context(shared_folder())
        shards = {count: Big(folder, count) for count in (ITEMS_SMALL, items)}
        for shard in shards.values():
            stack.callback(shard.close)
        sides: dict[str, Callable[[], float]] = {}
        for count, shard in shards.items():
            sides[f"get, {count:,} items"] = shard.get
            sides[f"set, {count:,} items"] = shard.put
        large = shards[items]
        can = kinds["shmem_enabled"] in ("always", "within_size", "advise", "force")
        if can:
            advised = large.open_reader()
            advised.data.madvise(mmap.MADV_HUGEPAGE)
            touch_pages(advised.data)
            lookup = large.lookup_of(advised)
            sides["get, MADV_HUGEPAGE on the mapping"] = lambda: large.get(lookup)
        size = large.reader.geometry.data_bytes
        sides["a word, shard of 100,000"] = reading(shards[ITEMS_SMALL].reader.words)
        sides["a word, large shard"] = reading(large.reader.words)
        sides["a word, private memory"] = reading(words(size))
        sides["a word, private memory, huge pages"] = reading(words(size, huge=True))
        samples = harness.interleave(sides, rounds, warm_up=2)
        moved = {count: shard.moved() for count, shard in shards.items()}
    report.samples(samples)
    for count, records in moved.items():
        print(f"  records moved for a set, {count:,} items: {records:.2f}")
        report.measured(f"records moved for a set, {count:,} items", records)
    tell(report, samples, items, can=can)
    report.finish()


def tell(report: harness.Report, samples: harness.Samples, items: int, *, can: bool) -> None:
    """Print the targets, and the shares of the difference."""
    for what in ("get", "set"):
        report.target(
            f"{what} in a shard of {items:,} / {ITEMS_SMALL:,} items",
            harness.ratios(samples[f"{what}, {items:,} items"], samples[f"{what}, 100,000 items"]),
            at_most=RATIO_MAX,
        )
    small = samples["a word, shard of 100,000"]
    line = [far - near for far, near in zip(samples["a word, large shard"], small, strict=True)]
    walk = [
        small_page - huge_page
        for small_page, huge_page in zip(
            samples["a word, private memory"],
            samples["a word, private memory, huge pages"],
            strict=True,
        )
    ]
    differences = {
        what: [
            far - near
            for far, near in zip(
                samples[f"{what}, {items:,} items"],
                samples[f"{what}, 100,000 items"],
                strict=True,
            )
        ]
        for what in ("get", "set")
    }
    report.samples(
        {
            "one far word costs more by": line,
            "of that, with pages of 4 KiB": walk,
            **{f"a {what} costs more by": more for what, more in differences.items()},
        }
    )
    for what, more in differences.items():
        middle = harness.spread(line)[1]
        if middle > 0:
            report.ratio(f"far words that make up for a {what}", [each / middle for each in more])
    if can:
        report.ratio(
            "get with MADV_HUGEPAGE on the mapping / without",
            harness.ratios(
                samples["get, MADV_HUGEPAGE on the mapping"], samples[f"get, {items:,} items"]
            ),
        )
    else:
        report.skip(
            "MADV_HUGEPAGE on the shards' mapping", "shmem_enabled does not allow it on this host"
        )
        report.missed.pop()  # no target speaks of it


if __name__ == "__main__":
    main()
