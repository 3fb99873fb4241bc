#!/usr/bin/env python3
"""What a hit costs an attached process: 30,000 keys, values of 100 B, one process, one thread.

Each side gets every key once a slice, in one shuffled order (the servers and diskcache a part of
them: they are slower). Targets: at most 7 times a `cachetools.LRUCache` hit with the near cache
off, 2.3 times with it on. Beside it: redis-py and pymemcache over Unix sockets, and diskcache.

    scripts/bench/local_hit.py [--quick] [--rounds N] [--json FILE] [--check]
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import _harness as harness
import cachetools

import kamacache

KEYS = 30_000
VALUE_BYTES = 100
REMOTE_CALLS = 400  # a slice of about 20 ms
NEAR_OFF = "kamacache, near cache off"
NEAR_ON = "kamacache, near cache on"
DICT = "cachetools.LRUCache"


def asking(get: Callable[[str], object], keys: Sequence[str]) -> Callable[[], float]:
    """Return a slice that gets each of ``keys`` once."""

    def body() -> None:
        for key in keys:
            get(key)

    return lambda: harness.per_call(len(keys), body)


def indexing(cache: cachetools.LRUCache[str, bytes], keys: Sequence[str]) -> Callable[[], float]:
    """Return the same for ``cache[key]``: its fastest way; its get() asks twice."""

    def body() -> None:
        for key in keys:
            cache[key]

    return lambda: harness.per_call(len(keys), body)


def in_turn(ask: Callable[[list[str]], float], keys: Sequence[str]) -> Callable[[], float]:
    """Return a slice that passes the next ``REMOTE_CALLS`` keys to ``ask``."""
    at = 0

    def run() -> float:
        nonlocal at
        part = [keys[(at + step) % len(keys)] for step in range(REMOTE_CALLS)]
        at += REMOTE_CALLS
        return ask(part)

    return run


def main() -> None:
    """Start everything, fill it alike, check that all of it answers, measure."""
    args = harness.arguments(__doc__)
    report = harness.Report(
        "local_hit", args, ("cachetools", "redis", "pymemcache", "diskcache", "hiredis")
    )
    rounds = args.rounds or (5 if args.quick else 60)
    draw = random.Random(1)
    values = {f"key:{number}": draw.randbytes(VALUE_BYTES) for number in range(KEYS)}
    keys = draw.sample(list(values), KEYS)

    with ExitStack() as stack:
        folder = stack.enter_context(harness.workspace())
        node = stack.enter_context(
            harness.running_node(folder, groups=("near:32MiB", "plain:32MiB"))
        )
        kamacache.attach(str(node.run_dir))
        near = kamacache.Group("near", cache_bytes="32MiB", near_cache_items=32_768)
        plain = kamacache.Group("plain", cache_bytes="32MiB", near_cache_items=0)
        lru: cachetools.LRUCache[str, bytes] = cachetools.LRUCache(maxsize=KEYS)
        lru.update(values)
        near.set_many(values)
        plain.set_many(values)
        for group in (near, plain):
            if group.get_many(list(values)) != values:
                raise RuntimeError(f"{group!r} lost values that it was given")

        sides: dict[str, Callable[[], float]] = {
            DICT: indexing(lru, keys),
            NEAR_OFF: asking(plain.get, keys),
            NEAR_ON: asking(near.get, keys),
        }
        add_others(report, sides, stack, values, keys)

        before = plain.stats()
        samples = harness.interleave(sides, rounds, warm_up=2)
        after = plain.stats()

    report.samples(samples)
    report.measured("plain_stats", {"before": before, "after": after})
    base = samples[DICT]
    for name in sides:
        if name in ("redis-py", "pymemcache", "diskcache"):
            report.ratio(
                f"{name} / near cache off", harness.ratios(samples[name], samples[NEAR_OFF])
            )
            report.ratio(f"{name} / near cache on", harness.ratios(samples[name], samples[NEAR_ON]))
    report.target(f"{NEAR_OFF} / {DICT}", harness.ratios(samples[NEAR_OFF], base), at_most=7.0)
    report.target(f"{NEAR_ON} / {DICT}", harness.ratios(samples[NEAR_ON], base), at_most=2.3)
    report.finish()


def add_others(
    report: harness.Report,
    sides: dict[str, Callable[[], float]],
    stack: ExitStack,
    values: dict[str, bytes],
    keys: Sequence[str],
) -> None:
    """Start and fill redis, memcached and diskcache, those that are there."""
    folder = stack.enter_context(harness.workspace())
    probe = next(iter(values))
    if program := harness.find_server("redis-server"):
        import redis

        report.version("redis-server", harness.server_version(program))
        path = stack.enter_context(harness.redis_server(folder))
        client = redis.Redis(unix_socket_path=str(path))
        stack.callback(client.close)
        client.mset(values)
        assert client.get(probe) == values[probe]
        sides["redis-py"] = in_turn(lambda part: asking(client.get, part)(), keys)
    else:
        report.skip("redis-py", "redis-server is not installed")
    if program := harness.find_server("memcached"):
        from pymemcache.client.base import Client

        report.version("memcached", harness.server_version(program))
        path = stack.enter_context(harness.memcached_server(folder))
        memcache = Client(str(path), no_delay=True)
        stack.callback(memcache.close)
        memcache.set_many(values)
        assert memcache.get(probe) == values[probe]
        sides["pymemcache"] = in_turn(lambda part: asking(memcache.get, part)(), keys)
    else:
        report.skip("pymemcache", "memcached is not installed")
    import diskcache

    disk = stack.enter_context(diskcache.Cache(str(folder / "diskcache")))
    with disk.transact():
        for key, value in values.items():
            disk[key] = value
    assert disk.get(probe) == values[probe]
    sides["diskcache"] = in_turn(lambda part: asking(disk.get, part)(), keys)


if __name__ == "__main__":
    main()
