#!/usr/bin/env python3
"""What a hit costs an attached process: 30,000 keys, values of 100 B, one process, one thread.

Each side gets every key once a slice (the servers and diskcache a part of them: they are slower),
in the order in which all caches were filled, and in a shuffled one. The order matters: in the first
the processor's caches foresee what comes, and a dict is little more than its bytecode: it is the
harder one. Targets: at most 5 times a `cachetools.LRUCache` hit with the near cache off, 2 times
with it on. Beside it: redis-py and pymemcache over Unix sockets, and diskcache.

A target's side calls a bound method, ``get = group.get``, as `cachetools` is indexed: both without
looking a name up. "group.get" is the same with the name looked up at each call, as most programs
do it.

A near-cache entry is read from shared memory anew when its time is over (5 s). The median of the
ratios leaves that out where most slices have none of it; "all slices together" counts it in, and
too much of it, since here the near cache has only a part of the time in which its entries age.

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
NAMED = "group.get"


def asking(get: Callable[[str], object], keys: Sequence[str]) -> Callable[[], float]:
    """Return a slice that gets each of ``keys`` once."""

    def body() -> None:
        for key in keys:
            get(key)

    return lambda: harness.per_call(len(keys), body)


def naming(group: kamacache.Group, keys: Sequence[str]) -> Callable[[], float]:
    """Return the same, with the method looked up at each call."""

    def body() -> None:
        for key in keys:
            group.get(key)

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
    orders = {"in order": list(values), "shuffled": draw.sample(list(values), KEYS)}

    with ExitStack() as stack:
        folder = stack.enter_context(harness.workspace())
        groups = [f"{kind}-{at}:32MiB" for kind in ("near", "plain") for at in range(len(orders))]
        node = stack.enter_context(harness.running_node(folder, groups=groups))
        kamacache.attach(str(node.run_dir))
        sides: dict[str, Callable[[], float]] = {}
        for at, (order, keys) in enumerate(orders.items()):
            lru: cachetools.LRUCache[str, bytes] = cachetools.LRUCache(maxsize=KEYS)
            lru.update(values)
            near = kamacache.Group(f"near-{at}", cache_bytes="32MiB", near_cache_items=32_768)
            plain = kamacache.Group(f"plain-{at}", cache_bytes="32MiB", near_cache_items=0)
            for group in (near, plain):
                group.set_many(values)
                if group.get_many(list(values)) != values:
                    raise RuntimeError(f"{group!r} lost values that it was given")
            sides[f"{DICT}, {order}"] = indexing(lru, keys)
            sides[f"{NEAR_OFF}, {order}"] = asking(plain.get, keys)
            sides[f"{NEAR_ON}, {order}"] = asking(near.get, keys)
            sides[f"{NEAR_OFF}, {NAMED}, {order}"] = naming(plain, keys)
            sides[f"{NEAR_ON}, {NAMED}, {order}"] = naming(near, keys)
        add_others(report, sides, stack, values, orders["shuffled"])
        samples = harness.interleave(sides, rounds, warm_up=2)

    report.samples(samples)
    for name in ("redis-py", "pymemcache", "diskcache"):
        for side in (NEAR_OFF, NEAR_ON):
            if name in samples:
                of = samples[f"{side}, shuffled"]
                report.ratio(f"{name} / {side}, shuffled", harness.ratios(samples[name], of))
    for order in orders:
        base = samples[f"{DICT}, {order}"]
        for side, at_most in ((NEAR_OFF, 5.0), (NEAR_ON, 2.0)):
            ours = samples[f"{side}, {order}"]
            named = harness.ratios(samples[f"{side}, {NAMED}, {order}"], base)
            report.ratio(f"{side}, {NAMED} / {DICT}, {order}", named)
            report.ratio(f"{side} / {DICT}, {order}, all slices together", [sum(ours) / sum(base)])
            report.target(f"{side} / {DICT}, {order}", harness.ratios(ours, base), at_most=at_most)
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
