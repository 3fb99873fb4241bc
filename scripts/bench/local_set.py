#!/usr/bin/env python3
"""What a set costs an attached process, through the worker that owns the key; values of 100 B.

Targets: `set` at least 1.5 times as fast as redis-py's SET over a Unix socket, and `set_many` of
100 at least twice as fast a key as a redis-py pipeline of 100 (transaction=False, its fastest
form), both with a worker for each core and with eight, which wake each other's caches cold where
cores are fewer; `set_many` of 1,000 into one worker whose shard is full and evicts, keys drawn from
four times as many as fit, at least 2.5 times as fast as such a pipeline into a Redis that evicts
nothing; `get_many` of 100 faster a key than MGET, with the near cache 4 times.

Beside them without a target: batches of 100 into the full shard, keys that are all new, and keys
from twice as many as fit, whose overwrites leave holes that are compacted; and what a request costs
that is no request at all: an echo over a Unix socket, the server a bare protocol on uvloop, in one
process and in eight in turn, as keys of eight workers are. The CPU time of a set is that of the
client's process and of all workers, the system's part included.

A process is attached to one node, so each node has its own here, with its own redis-py beside it.

    scripts/bench/local_set.py [--quick] [--rounds N] [--seconds S] [--json FILE] [--check]
"""

from __future__ import annotations

import multiprocessing
import os
import random
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final, NoReturn

import _harness as harness
from _cpu import NodeProcesses

import kamacache

KEYS: Final = 30_000
VALUE_BYTES: Final = 100
SETS: Final = 300  # a slice
BATCHES: Final = 6  # a slice
BATCH: Final = 100
WORKERS: Final = 8
LARGE_BATCHES: Final = 4  # a slice
LARGE_BATCH: Final = 1_000
HOT_KEYS: Final = 600  # asked for again within the 5 s that the near cache believes a value
SMALL: Final = "8MiB"  # the shard that is full
SMALL_FITS: Final = 48_000  # items of this size that it holds
FRAME: Final = bytes(126)  # as long as a set's; the answer as that of a Done
ANSWER: Final = bytes(9)
Pairs = list[tuple[str, bytes]]
Slice = Callable[[], float]
Spawn: Final = multiprocessing.get_context("spawn")  # a fork would take connections along


class Pick:
    """Hands out keys with new values, so that every side writes something new each time."""

    def __init__(self, span: int = KEYS) -> None:
        self._draw = random.Random(3)
        self._span = span  # 0: all keys are new
        self._next = 0

    def __call__(self, count: int) -> Pairs:
        draw = self._draw
        self._next += count
        numbers = draw.sample(range(self._span), count) if self._span else range(count)
        first = 0 if self._span else self._next
        return [(f"key:{first + number}", draw.randbytes(VALUE_BYTES)) for number in numbers]


def single(put: Callable[[str, bytes], object]) -> Slice:
    """Return a slice of `SETS` single sets."""
    pick = Pick()

    def run() -> float:
        pairs = pick(SETS)

        def body() -> None:
            for key, value in pairs:
                put(key, value)

        return harness.per_call(SETS, body)

    return run


def batched(
    put: Callable[[dict[str, bytes]], object],
    span: int = KEYS,
    *,
    batches: int = BATCHES,
    size: int = BATCH,
) -> Slice:
    """Return a slice of several batches; the time is that of one key."""
    pick = Pick(span)

    def run() -> float:
        several = [dict(pick(size)) for _ in range(batches)]

        def body() -> None:
            for batch in several:
                put(batch)

        return harness.per_call(batches * size, body)

    return run


def asked(get: Callable[[list[str]], object]) -> Slice:
    """Return a slice of `BATCHES` gets of `BATCH` keys; the time is that of one key."""
    pick = Pick(HOT_KEYS)

    def run() -> float:
        batches = [[key for key, _ in pick(BATCH)] for _ in range(BATCHES)]

        def body() -> None:
            for keys in batches:
                get(keys)

        return harness.per_call(BATCHES * BATCH, body)

    return run


# -- a process for each other node ----------------------------------------------------------


def redis_client(path: str) -> tuple[Any, Callable[[dict[str, bytes]], object]]:
    """Return a client, and the function that sets a batch by a pipeline of it."""
    import redis

    client = redis.Redis(unix_socket_path=path)

    def pipeline(batch: dict[str, bytes]) -> None:
        with client.pipeline(transaction=False) as pipe:
            for key, value in batch.items():
                pipe.set(key, value)
            pipe.execute()

    return client, pipeline


def sets(redis_path: str) -> dict[str, Slice]:
    """Return the slices of a process attached to a node that has room."""
    group = kamacache.Group("scores", cache_bytes="64MiB")
    client, pipeline = redis_client(redis_path)
    return {
        "set": single(group.set),
        "redis-py SET": single(client.set),
        "set_many": batched(group.set_many),
        "redis-py pipeline": batched(pipeline),
    }


def evicting(redis_path: str) -> dict[str, Slice]:
    """Return the slices of a process attached to a node whose shards are full, and fill them."""
    spans = {"": 4 * SMALL_FITS, ", twice what fits": 2 * SMALL_FITS, ", new": 0}
    slices: dict[str, Slice] = {}
    for at, (name, span) in enumerate(spans.items()):
        group = kamacache.Group(f"small-{at}", cache_bytes=SMALL)
        large = batched(group.set_many, span, batches=LARGE_BATCHES, size=LARGE_BATCH)
        while group.stats()["evictions"] < SMALL_FITS // 2:
            large()
        slices[f"set_many({LARGE_BATCH}){name}"] = large
        if not name:
            slices[f"set_many({BATCH})"] = batched(group.set_many, span)
    _, pipeline = redis_client(redis_path)
    span = 4 * SMALL_FITS
    slices[f"redis-py pipeline({LARGE_BATCH})"] = batched(
        pipeline, span, batches=LARGE_BATCHES, size=LARGE_BATCH
    )
    slices[f"redis-py pipeline({BATCH})"] = batched(pipeline, span)
    return slices


def serve(run_dir: str, redis_path: str, kind: str, line: Connection) -> None:
    """Be the process of one node: tell the slices' names, then run each that is asked for."""
    kamacache.attach(run_dir)
    slices = {"sets": sets, "evicting": evicting}[kind](redis_path)
    line.send(list(slices))
    while (asked := line.recv()) is not None:
        line.send(slices[asked]())


@contextmanager
def elsewhere(run_dir: Path, redis_path: Path, kind: str) -> Iterator[dict[str, Slice]]:
    """Yield the slices of a process of its own, attached to that node."""
    ours, theirs = Spawn.Pipe()
    process = Spawn.Process(
        target=serve, args=(str(run_dir), str(redis_path), kind, theirs), daemon=True
    )
    process.start()
    theirs.close()

    def slice_of(name: str) -> Slice:
        def run() -> float:
            ours.send(name)
            took: float = ours.recv()
            return took

        return run

    try:
        yield {name: slice_of(name) for name in ours.recv()}  # EOFError where it ended
    finally:
        with suppress(OSError):
            ours.send(None)
        process.join(10)
        if process.is_alive():
            process.kill()


# -- no request at all -----------------------------------------------------------------------


def echo(path: str) -> None:
    """Answer whatever comes, until the other end closes."""
    import asyncio

    import uvloop

    class Answerer(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self.transport = transport

        def data_received(self, data: bytes) -> None:
            self.transport.write(ANSWER)  # type: ignore[attr-defined] # a stream's

        def connection_lost(self, exc: Exception | None) -> None:
            loop.stop()

    loop = uvloop.new_event_loop()
    loop.run_until_complete(loop.create_unix_server(Answerer, path))
    loop.run_forever()


def connected(line: socket.socket, path: Path) -> bool:
    """Connect; tell whether there was someone to connect to."""
    return line.connect_ex(str(path)) == 0


@contextmanager
def echoes(folder: Path, count: int) -> Iterator[Slice]:
    """Yield a slice of `SETS` round trips to so many processes in turn."""
    paths = [folder / f"echo-{count}-{at}" for at in range(count)]
    processes = [Spawn.Process(target=echo, args=(str(path),), daemon=True) for path in paths]
    lines = []
    try:
        for process in processes:
            process.start()
        for path in paths:
            lines.append(socket.socket(socket.AF_UNIX))
            # Until one is taken: an answerer ends with its first connection.
            harness.wait_for(partial(connected, lines[-1], path), f"{path} answers")
        buffer = bytearray(64)
        turns = [lines[at % count] for at in range(SETS)]

        def body() -> None:
            for line in turns:
                line.send(FRAME)
                line.recv_into(buffer)

        yield lambda: harness.per_call(SETS, body)
    finally:
        for line in lines:
            line.close()
        for process in processes:
            process.join(10)
            if process.is_alive():
                process.kill()


class CpuTime:
    """What a side uses while it runs: its own process, and the node's workers."""

    def __init__(self, run: Slice, calls: int, node: NodeProcesses | None) -> None:
        self._run = run
        self._calls = calls
        self._node = node
        self._used: Counter[str] = Counter()
        self._slices = 0

    def __call__(self) -> float:
        before = self._read()
        took = self._run()
        after = self._read()
        after.subtract(before)
        self._used.update(after)
        self._slices += 1
        return took

    def _read(self) -> Counter[str]:
        read = Counter() if self._node is None else self._node.read()
        read["client"] = time.process_time()  # type: ignore[assignment] # as in _cpu
        return read

    def report(self, report: harness.Report, name: str) -> None:
        """Print and keep the microseconds a call."""
        calls = self._calls * self._slices / 1e6
        used = {role: self._used[role] / calls for role in ("client", "worker") if self._used[role]}
        print(f"  CPU, {name}: " + ", ".join(f"{role} {us:.1f} us" for role, us in used.items()))
        report.measured(f"CPU, {name}", used | {"unit": "us"})


def main() -> None:
    """Start all servers, measure in turn, check that the last values stand."""
    args = harness.arguments(__doc__)
    report = harness.Report("local_set", args, ("redis", "hiredis"))
    rounds = args.rounds or (5 if args.quick else 60)
    program = harness.find_server("redis-server")
    if program is None:
        report.skip("set, set_many and get_many against redis-py", "redis-server is not installed")
        report.finish()
    report.version("redis-server", harness.server_version(program))
    cores = os.cpu_count() or 1
    with ExitStack() as stack:
        folders = [stack.enter_context(harness.workspace()) for _ in range(3)]
        redis_path = stack.enter_context(harness.redis_server(folders[0]))
        groups = [f"{name}:64MiB" for name in ("scores", "near", "plain")]
        small = [f"small-{at}:{SMALL}" for at in range(3)]
        node, per_core, full = (
            stack.enter_context(harness.running_node(folder, groups=names, workers=workers))
            for folder, names, workers in zip(
                folders, (groups, groups[:1], small), (WORKERS, cores, 1), strict=True
            )
        )
        kamacache.attach(str(node.run_dir))
        plain = kamacache.Group("plain", cache_bytes="64MiB", near_cache_items=0)
        near = kamacache.Group("near", cache_bytes="64MiB", near_cache_items=2 * KEYS)
        client, _ = redis_client(str(redis_path))
        stack.callback(client.close)
        values = {f"key:{number}": bytes(VALUE_BYTES) for number in range(KEYS)}
        client.mset(values)
        for filled in (plain, near):
            filled.set_many(values)
            if filled.get_many(list(values)) != values:  # and it is near
                raise RuntimeError(f"{filled!r} lost values that it was given")
        processes = NodeProcesses(node.pid)
        used = {
            name: CpuTime(run, SETS if "many" not in name else BATCHES * BATCH, processes)
            for name, run in sets(str(redis_path)).items()
            if "redis" not in name
        }
        sides: dict[str, Slice] = {
            f"{name}, {WORKERS} workers": run
            for name, run in (sets(str(redis_path)) | used).items()
        }
        for mark, run_dir, kind in (
            (f"{cores} workers", per_core.run_dir, "sets"),
            ("1 worker, evicting", full.run_dir, "evicting"),
        ):
            there = stack.enter_context(elsewhere(run_dir, redis_path, kind))
            sides |= {f"{name}, {mark}": run for name, run in there.items()}
        sides |= {
            "get_many, near cache off": asked(plain.get_many),
            "get_many, near cache on": asked(near.get_many),
            "redis-py MGET": asked(client.mget),
            "echo, 1 process": stack.enter_context(echoes(folders[0], 1)),
            f"echo, {WORKERS} processes": stack.enter_context(echoes(folders[0], WORKERS)),
        }
        samples = harness.interleave(sides, rounds, warm_up=2)
        group = kamacache.Group("scores", cache_bytes="64MiB")
        group.set("key:0", b"last")
        if group.get("key:0") != b"last":
            raise RuntimeError("a set that was acknowledged is not there")

    report.samples(samples)
    for name, side in used.items():
        side.report(report, f"{name}, {WORKERS} workers")
    conclude(report, samples, cores)


def conclude(report: harness.Report, samples: harness.Samples, cores: int) -> NoReturn:
    """Report every ratio, the targets among them, and finish."""

    def against(name: str, theirs: str, ours: str, at_least: float | None = None) -> None:
        rounds = harness.ratios(samples[theirs], samples[ours])
        if at_least is None:
            report.ratio(name, rounds)
        else:
            report.target(name, rounds, at_least=at_least)

    for workers in dict.fromkeys((cores, WORKERS)):
        mark = f"{workers} workers"
        against(
            f"speed of set, {mark} / redis-py SET",
            f"redis-py SET, {mark}",
            f"set, {mark}",
            1.5,
        )
        against(
            f"speed a key of set_many({BATCH}), {mark} / redis-py pipeline({BATCH})",
            f"redis-py pipeline, {mark}",
            f"set_many, {mark}",
            2.0,
        )
    for count in ("1 process", f"{WORKERS} processes"):
        against(
            f"speed of an echo, {count} / redis-py SET",
            f"redis-py SET, {WORKERS} workers",
            f"echo, {count}",
        )
    mark = "1 worker, evicting"
    for size, kind, at_least in (
        (LARGE_BATCH, "", 2.5),
        (LARGE_BATCH, ", twice what fits", None),
        (LARGE_BATCH, ", new", None),
        (BATCH, "", None),
    ):
        against(
            f"speed a key of set_many({size}){kind}, {mark} / redis-py pipeline({size})",
            f"redis-py pipeline({size}), {mark}",
            f"set_many({size}){kind}, {mark}",
            at_least,
        )
    for kind, at_least in (("off", 1.0), ("on", 4.0)):
        against(
            f"speed a key of get_many({BATCH}), near cache {kind} / redis-py MGET",
            "redis-py MGET",
            f"get_many, near cache {kind}",
            at_least,
        )
    report.finish()


if __name__ == "__main__":
    main()
