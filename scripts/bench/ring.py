#!/usr/bin/env python3
"""What it costs to ask the ring whose key it is, beside a dict lookup, and to make a ring.

Keys at random, as misses are. Targets: a lookup on a ring of 10 nodes costs about a microsecond
(at most 2 us here, for machines differ), and the fullest of 10 equal nodes has at most 1.10 of the
mean of 100,000 keys, over 200 sets of names (20 with --quick).

    scripts/bench/ring.py [--quick] [--rounds N] [--json FILE] [--check]
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import _harness as harness

from kamacache.cluster.membership import Member
from kamacache.cluster.ring import Ring

KEYS = 100_000
NODES = (10, 100)


def members(count: int, network: int = 0) -> list[Member]:
    """Return as many nodes, of one of many sets of names."""
    return [Member(f"10.{network}.0.{number}:8001") for number in range(1, count + 1)]


def each(look: Callable[[bytes], object], keys: list[bytes]) -> Callable[[], float]:
    """Return a slice: seconds a lookup."""

    def run() -> float:
        def body() -> None:
            for key in keys:
                look(key)

        return harness.per_call(len(keys), body)

    return run


def main() -> None:
    """Time lookups, then count keys."""
    args = harness.arguments(__doc__)
    report = harness.Report("ring", args)
    rounds = args.rounds or (3 if args.quick else 25)
    keys = [b"key:%d" % number for number in range(KEYS)]
    random.Random(7).shuffle(keys)
    some = keys[: KEYS // 10]
    known = dict.fromkeys(keys, 0)
    rings = {count: Ring(members(count)) for count in NODES}
    sides = {f"owner, {count} nodes": each(ring.owner, some) for count, ring in rings.items()}
    samples = harness.interleave(
        {
            "dict lookup": each(known.__getitem__, some),
            **sides,
            "ring of 10 nodes made": lambda: harness.per_call(1, lambda: Ring(members(10))),
        },
        rounds,
    )
    report.samples(samples, unit="us", scale=1e6)
    report.target(
        "owner of a key on a ring of 10, in us",
        [seconds * 1e6 for seconds in samples["owner, 10 nodes"]],
        at_most=2,
    )
    fullest = []
    for network in range(20 if args.quick else 200):
        ring = Ring(members(10, network))
        counts = Counter(map(ring.owner, keys))
        fullest.append(max(counts.values()) * len(counts) / KEYS)
    report.target("fullest of 10 nodes, of the mean: median of the sets", fullest, at_most=1.10)
    report.target("fullest of 10 nodes, of the mean: worst set", [max(fullest)], at_most=1.10)
    report.finish()


if __name__ == "__main__":
    main()
