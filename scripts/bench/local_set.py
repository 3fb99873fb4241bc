#!/usr/bin/env python3
"""What a set costs an attached process: over 30,000 keys, values of 100 B, through the owner.

Targets: `set` at least 1.2 times as fast as redis-py's SET over a Unix socket; `set_many` of 100
at least twice as fast a key as a redis-py pipeline of 100 (transaction=False, its fastest form).

    scripts/bench/local_set.py [--quick] [--rounds N] [--json FILE] [--check]
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import ExitStack

import _harness as harness

import kamacache

KEYS = 30_000
VALUE_BYTES = 100
SETS = 300  # a slice
BATCHES = 6  # a slice
BATCH = 100
Pairs = list[tuple[str, bytes]]


class Pick:
    """Hands out keys with new values, so that every side writes something new each time."""

    def __init__(self) -> None:
        self._draw = random.Random(3)

    def __call__(self, count: int) -> Pairs:
        draw = self._draw
        numbers = draw.sample(range(KEYS), count)
        return [(f"key:{number}", draw.randbytes(VALUE_BYTES)) for number in numbers]


def single(put: Callable[[str, bytes], object]) -> Callable[[], float]:
    """Return a slice of `SETS` single sets."""
    pick = Pick()

    def run() -> float:
        pairs = pick(SETS)

        def body() -> None:
            for key, value in pairs:
                put(key, value)

        return harness.per_call(SETS, body)

    return run


def batched(put: Callable[[dict[str, bytes]], object]) -> Callable[[], float]:
    """Return a slice of `BATCHES` batches; the time is that of one key."""
    pick = Pick()

    def run() -> float:
        batches = [dict(pick(BATCH)) for _ in range(BATCHES)]

        def body() -> None:
            for batch in batches:
                put(batch)

        return harness.per_call(BATCHES * BATCH, body)

    return run


def main() -> None:
    """Start both servers, measure in turn, check that the last values stand."""
    args = harness.arguments(__doc__)
    report = harness.Report("local_set", args, ("redis", "hiredis"))
    rounds = args.rounds or (5 if args.quick else 60)
    program = harness.find_server("redis-server")
    if program is None:
        report.skip("set and set_many against redis-py", "redis-server is not installed")
        report.finish()
    import redis

    report.version("redis-server", harness.server_version(program))
    with ExitStack() as stack:
        folder = stack.enter_context(harness.workspace())
        node = stack.enter_context(harness.running_node(folder, groups=("scores:64MiB",)))
        kamacache.attach(str(node.run_dir))
        group = kamacache.Group("scores", cache_bytes="64MiB")
        client = redis.Redis(
            unix_socket_path=str(stack.enter_context(harness.redis_server(folder)))
        )
        stack.callback(client.close)

        def pipeline(batch: dict[str, bytes]) -> None:
            with client.pipeline(transaction=False) as pipe:
                for key, value in batch.items():
                    pipe.set(key, value)
                pipe.execute()

        sides = {
            "kamacache set": single(group.set),
            "redis-py SET": single(client.set),
            "kamacache set_many": batched(group.set_many),
            "redis-py pipeline": batched(pipeline),
        }
        samples = harness.interleave(sides, rounds, warm_up=2)
        group.set("key:0", b"last")
        if group.get("key:0") != b"last":
            raise RuntimeError("a set that was acknowledged is not there")

    report.samples(samples)
    report.target(
        "speed of set / redis-py SET",
        harness.ratios(samples["redis-py SET"], samples["kamacache set"]),
        at_least=1.2,
    )
    report.target(
        f"speed a key of set_many({BATCH}) / redis-py pipeline({BATCH})",
        harness.ratios(samples["redis-py pipeline"], samples["kamacache set_many"]),
        at_least=2.0,
    )
    report.finish()


if __name__ == "__main__":
    main()
