#!/usr/bin/env python3
"""What a restart costs a node of 8 workers with 1 GiB: until it is ready, and what is there then.

A node is filled, drained (SIGTERM) and started again, a few times; beside each warm start a cold
one, of a node whose memory has to be reserved first. All times are from the start of the command to
its ready line, so they have the interpreter's start and the imports in them. At the end every key
that was there before the first restart is asked for. Targets: warm, ready within 1 s; at least
99.9 % of the items, from memory, with the value that was set.

    scripts/bench/warm_restart.py [--quick] [--rounds N] [--item-bytes N] [--json FILE] [--check]
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import _harness as harness
from startup import room_for

import kamacache
from kamacache.local.attach import attach, detach

GIB = 1 << 30
BATCH = 2_000
FILL = 0.8  # of the group's bytes: nothing is evicted
SHM = Path("/dev/shm")


@contextmanager
def shared_folder() -> Iterator[Path]:
    """A folder on tmpfs, gone at the end with what a node has left there."""
    path = Path(tempfile.mkdtemp(prefix="kamacache-bench-", dir=SHM))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def value_of(number: int, count: int) -> bytes:
    """Return the value of a key, other than that of every other."""
    return b"%08d" % number * (count // 8)


class Restarts:
    """One run directory, its nodes one after the other, and what is put into them."""

    def __init__(self, folder: Path, shm: Path, size: int, item_bytes: int) -> None:
        self.folder, self.shm = folder, shm
        self.size, self.item_bytes = size, item_bytes
        self.group = f"scores:{size},item_bytes_mean={item_bytes}"
        self.items = int(size * FILL) // (item_bytes + 48)  # what an item costs beside itself
        self.ready_s: list[float] = []

    @contextmanager
    def node(self, *, warm: bool = True) -> Iterator[kamacache.Group]:
        """Run the next node, and attach to it; one that is not warm leaves nothing."""
        downtime = f"--warm-restart-max-downtime={60 * warm}"
        flags = (f"--shm-dir={self.shm}", downtime)
        with harness.running_node(self.folder, *flags, groups=(self.group,)) as node:
            self.ready_s.append(node.ready_s)
            attach(node.run_dir)
            try:
                yield kamacache.Group("scores", cache_bytes=1, fallback="error", near_cache_items=0)
            finally:
                detach()

    def fill(self, group: kamacache.Group) -> int:
        """Set every key, and return how many are there then."""
        for numbers in self._batches():
            group.set_many({f"k{n:09d}": value_of(n, self.item_bytes - 10) for n in numbers})
        return self.count(group)

    def count(self, group: kamacache.Group) -> int:
        """Return how many keys have the value that was set."""
        right = 0
        for numbers in self._batches():
            found = group.get_many([f"k{n:09d}" for n in numbers])
            right += sum(
                found.get(f"k{n:09d}") == value_of(n, self.item_bytes - 10) for n in numbers
            )
        return right

    def _batches(self) -> Iterator[range]:
        for first in range(0, self.items, BATCH):
            yield range(first, min(first + BATCH, self.items))


def main() -> None:
    """Fill, restart, count."""
    args = harness.arguments(
        __doc__, item_bytes={"type": int, "default": 1024, "help": "key and value of an item"}
    )
    report = harness.Report("warm_restart", args)
    size = GIB // 16 if args.quick else GIB
    shown = f"{size / GIB:g} GiB"
    if not room_for(3 * size):
        report.skip(f"node of 8 workers, {shown}, ready warm, in s", "/dev/shm is too small")
        report.finish()
    rounds = args.rounds or (2 if args.quick else 7)
    cold_s: list[float] = []
    after = 0
    with harness.workspace() as folder, shared_folder() as shm:
        restarts = Restarts(folder, shm, size, args.item_bytes)
        with restarts.node() as group:
            before = restarts.fill(group)
        restarts.ready_s.clear()
        for turn in range(rounds):
            with harness.workspace() as other, shared_folder() as other_shm:
                cold = Restarts(other, other_shm, size, args.item_bytes)
                with cold.node(warm=False):
                    cold_s += cold.ready_s
            with restarts.node() as group:
                after = restarts.count(group) if turn == rounds - 1 else 0
            log = (folder / "node.log").read_text()
            if "warm start" not in log:
                raise RuntimeError(f"the node did not start warm:\n{log[-2000:]}")
        with restarts.node(warm=False):  # throws away what is left
            warm_s = restarts.ready_s[:rounds]
    report.samples({f"ready cold, {shown}": cold_s, f"ready warm, {shown}": warm_s}, "s", 1)
    report.ratio("cold over warm", harness.ratios(cold_s, warm_s))
    report.measured("items before the restarts", before)
    report.measured(f"items after {rounds} restarts", after)
    report.target(f"node of 8 workers, {shown}, ready warm, in s", warm_s, at_most=1.0)
    report.target("items kept, in %", [100 * after / before], at_least=99.9)
    report.finish()


if __name__ == "__main__":
    main()
