#!/usr/bin/env python3
"""Whether readers disturb each other: two reader processes against two that loop over a dict.

Two child processes, each pinned to a core where there are two. A round measures four phases in
turn: gets from shared memory in one child and in both, dict lookups in one child and in both.
How much two do more than one depends on the machine (shared cores, turbo, other work), so the
readers' gain is held against the dict loops' gain of the same round:

    (readers both / readers alone) / (dicts both / dicts alone)        target: at least 0.9

with the near cache off (each get reads the other processes' memory) and on.

    scripts/bench/readers_scale.py [--quick] [--rounds N] [--json FILE] [--check]
"""

from __future__ import annotations

import multiprocessing
import os
import random
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing.connection import Connection

import _harness as harness

import kamacache

KEYS = 30_000
VALUE_BYTES = 100
CHUNK = 500
KINDS = {"near cache off": "plain", "near cache on": "near", "dict": ""}
Job = tuple[str, float, float]  # kind, start and end on time.monotonic()


def key_of(number: int) -> str:
    """Return the text of a key."""
    return f"key:{number}"


def child(pipe: Connection, run_dir: str, cpu: int | None, seed: int) -> None:
    """Attach, then run loops as told: answer each job with operations a second."""
    if cpu is not None:
        os.sched_setaffinity(0, {cpu})
    keys = [key_of(number) for number in range(KEYS)]
    random.Random(seed).shuffle(keys)
    chunks = [keys[at : at + CHUNK] for at in range(0, KEYS, CHUNK)]
    kamacache.attach(run_dir)
    own = {key: bytes(VALUE_BYTES) for key in keys}
    gets: dict[str, Callable[[str], object]] = {
        "near cache off": kamacache.Group("plain", cache_bytes="32MiB", near_cache_items=0).get,
        "near cache on": kamacache.Group("near", cache_bytes="32MiB", near_cache_items=32_768).get,
        "dict": own.__getitem__,
    }
    for get in gets.values():
        for key in keys:
            get(key)
    pipe.send("ready")
    while True:
        job: Job | None = pipe.recv()
        if job is None:
            return
        kind, start_s, end_s = job
        pipe.send(loop(gets[kind], chunks, start_s, end_s))


def loop(
    get: Callable[[str], object], chunks: list[list[str]], start_s: float, end_s: float
) -> float:
    """Get keys from ``start_s`` to ``end_s``; return the rate."""
    while time.monotonic() < start_s:
        pass  # both children start within a microsecond, with a core that is awake
    begin = time.monotonic()
    calls = 0
    while True:
        for chunk in chunks:
            for key in chunk:
                get(key)
            calls += CHUNK
            now = time.monotonic()
            if now >= end_s:
                return calls / (now - begin)


class Readers:
    """The two children, and one phase after the other."""

    def __init__(self, run_dir: str, slice_s: float) -> None:
        spawn = multiprocessing.get_context("spawn")
        cores = sorted(os.sched_getaffinity(0))
        self._slice_s = slice_s
        self._pipes: list[Connection] = []
        self._children = []
        self._alone = 0
        for number in range(2):
            ours, theirs = spawn.Pipe()
            cpu = cores[number] if len(cores) > 1 else None
            process = spawn.Process(target=child, args=(theirs, run_dir, cpu, number), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._children.append(process)
        for pipe in self._pipes:
            self._receive(pipe)

    @staticmethod
    def _receive(pipe: Connection) -> float:
        if not pipe.poll(60):
            raise TimeoutError("a reader process does not answer")
        rate: float = pipe.recv()
        return rate

    def rate(self, kind: str, both: bool) -> float:
        """Return operations a second of one child (they take turns) or of both together."""
        if both:
            chosen = self._pipes
        else:
            chosen = [self._pipes[self._alone % 2]]
            self._alone += 1
        start_s = time.monotonic() + 0.005
        for pipe in chosen:
            pipe.send((kind, start_s, start_s + self._slice_s))
        return sum(self._receive(pipe) for pipe in chosen)

    def close(self) -> None:
        """End the children."""
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._children:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()


def main() -> None:
    """Fill the groups, run the phases, compare the gains."""
    args = harness.arguments(__doc__)
    report = harness.Report("readers_scale", args)
    rounds = args.rounds or (4 if args.quick else 60)
    values = {key_of(number): bytes(VALUE_BYTES) for number in range(KEYS)}
    with ExitStack() as stack:
        folder = stack.enter_context(harness.workspace())
        node = stack.enter_context(
            harness.running_node(folder, groups=("near:32MiB", "plain:32MiB"))
        )
        kamacache.attach(str(node.run_dir))
        for name in ("near", "plain"):
            kamacache.Group(name, cache_bytes="32MiB").set_many(values)
        readers = Readers(str(node.run_dir), slice_s=0.05 if args.quick else 0.1)
        stack.callback(readers.close)

        def phase(kind: str, both: bool) -> Callable[[], float]:
            return lambda: readers.rate(kind, both)

        sides = {
            f"{kind}, {'two' if both else 'one'}": phase(kind, both)
            for kind in KINDS
            for both in (False, True)
        }
        samples = harness.interleave(sides, rounds)

    report.samples(samples, unit="million/s", scale=1e-6)
    gains = {
        kind: harness.ratios(samples[f"{kind}, two"], samples[f"{kind}, one"]) for kind in KINDS
    }
    for kind, gain in gains.items():
        report.ratio(f"two processes / one, {kind}", gain)
    if statistics.median(gains["dict"]) < 1.2:
        print("  two dict loops hardly gain over one here: this machine has no second core to give")
    for kind in ("near cache off", "near cache on"):
        report.target(
            f"gain of two readers / gain of two dict loops, {kind}",
            harness.ratios(gains[kind], gains["dict"]),
            at_least=0.9,
        )
    report.finish()


if __name__ == "__main__":
    main()
