#!/usr/bin/env python3
"""What a set costs an attached process, through the worker that owns the key; values of 100 B.

Targets: `set` at least 1.5 times as fast as redis-py's SET over a Unix socket; `set_many` of 100
at least twice as fast a key as a redis-py pipeline of 100 (transaction=False, its fastest form);
`set_many` of 100 into one worker whose shard is full and evicts, keys drawn from four times as many
as fit, at least 2.5 times as fast as that pipeline into a Redis that evicts nothing; `get_many` of
100 faster a key than MGET, with the near cache 4 times.

Beside them without a target: keys that are all new, and keys from twice as many as fit, whose
overwrites leave holes that are compacted; and what a request costs that is no request at all: an
echo over a Unix socket, the server a bare protocol on uvloop, in one process and in eight in turn,
as keys of eight workers are. The CPU time of a set is that of the client's process and of all
workers, the system's part included.

    scripts/bench/local_set.py [--quick] [--rounds N] [--seconds S] [--json FILE] [--check]
"""

from __future__ import annotations

import multiprocessing
import random
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final

import _harness as harness
from _cpu import NodeProcesses

import kamacache

KEYS: Final = 30_000
VALUE_BYTES: Final = 100
SETS: Final = 300  # a slice
BATCHES: Final = 6  # a slice
BATCH: Final = 100
WORKERS: Final = 8
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


def batched(put: Callable[[dict[str, bytes]], object], span: int = KEYS) -> Slice:
    """Return a slice of `BATCHES` batches; the time is that of one key."""
    pick = Pick(span)

    def run() -> float:
        batches = [dict(pick(BATCH)) for _ in range(BATCHES)]

        def body() -> None:
            for batch in batches:
                put(batch)

        return harness.per_call(BATCHES * BATCH, body)

    return run


def asked(get: Callable[[list[str]], object]) -> Slice:
    """Return a slice of `BATCHES` gets of `BATCH` keys; the time is that of one key."""
    pick = Pick()

    def run() -> float:
        batches = [[key for key, _ in pick(BATCH)] for _ in range(BATCHES)]

        def body() -> None:
            for keys in batches:
                get(keys)

        return harness.per_call(BATCHES * BATCH, body)

    return run


# -- one worker, its shard full -------------------------------------------------------------


def fill_and_serve(run_dir: str, spans: list[int], line: Connection) -> None:
    """Be a process of the node with one worker: a slice for each number received."""
    kamacache.attach(run_dir)
    groups = [kamacache.Group(f"small-{at}", cache_bytes=SMALL) for at in range(len(spans))]
    slices = [batched(group.set_many, span) for group, span in zip(groups, spans, strict=True)]
    for group, run in zip(groups, slices, strict=True):
        while group.stats()["evictions"] < SMALL_FITS // 2:
            run()
    line.send(None)
    while (asked := line.recv()) is not None:
        line.send(slices[asked]())


@contextmanager
def evicting(run_dir: Path, spans: list[int]) -> Iterator[list[Slice]]:
    """Yield a slice for each span of keys, run in a process attached to that node."""
    ours, theirs = Spawn.Pipe()
    process = Spawn.Process(target=fill_and_serve, args=(str(run_dir), spans, theirs), daemon=True)
    process.start()
    theirs.close()
    ours.recv()  # EOFError where it ended

    def slice_of(at: int) -> Slice:
        def run() -> float:
            ours.send(at)
            took: float = ours.recv()
            return took

        return run

    try:
        yield [slice_of(at) for at in range(len(spans))]
    finally:
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
    import redis

    report.version("redis-server", harness.server_version(program))
    with ExitStack() as stack:
        folder = stack.enter_context(harness.workspace())
        other = stack.enter_context(harness.workspace())
        groups = [f"{name}:64MiB" for name in ("scores", "near", "plain")]
        node = stack.enter_context(harness.running_node(folder, groups=groups, workers=WORKERS))
        spans = {"full": 4 * SMALL_FITS, "full, twice what fits": 2 * SMALL_FITS, "full, new": 0}
        small = [f"small-{at}:{SMALL}" for at in range(len(spans))]
        one = stack.enter_context(harness.running_node(other, groups=small, workers=1))
        full = stack.enter_context(evicting(one.run_dir, list(spans.values())))
        kamacache.attach(str(node.run_dir))
        group = kamacache.Group("scores", cache_bytes="64MiB")
        plain = kamacache.Group("plain", cache_bytes="64MiB", near_cache_items=0)
        near = kamacache.Group("near", cache_bytes="64MiB", near_cache_items=2 * KEYS)
        client = redis.Redis(
            unix_socket_path=str(stack.enter_context(harness.redis_server(folder)))
        )
        stack.callback(client.close)

        def pipeline(batch: dict[str, bytes]) -> None:
            with client.pipeline(transaction=False) as pipe:
                for key, value in batch.items():
                    pipe.set(key, value)
                pipe.execute()

        values = {f"key:{number}": bytes(VALUE_BYTES) for number in range(KEYS)}
        client.mset(values)
        for filled in (plain, near):
            filled.set_many(values)
            if filled.get_many(list(values)) != values:  # and it is near
                raise RuntimeError(f"{filled!r} lost values that it was given")
        used = {
            "set": CpuTime(single(group.set), SETS, NodeProcesses(node.pid)),
            "redis-py SET": CpuTime(single(client.set), SETS, None),
            "set_many a key": CpuTime(
                batched(group.set_many), BATCHES * BATCH, NodeProcesses(node.pid)
            ),
            "redis-py pipeline a key": CpuTime(batched(pipeline), BATCHES * BATCH, None),
        }
        sides: dict[str, Slice] = {
            "kamacache set": used["set"],
            "redis-py SET": used["redis-py SET"],
            "kamacache set_many": used["set_many a key"],
            "redis-py pipeline": used["redis-py pipeline a key"],
            **{f"set_many, 1 worker, {name}": run for name, run in zip(spans, full, strict=True)},
            "get_many, near cache off": asked(plain.get_many),
            "get_many, near cache on": asked(near.get_many),
            "redis-py MGET": asked(client.mget),
            "echo, 1 process": stack.enter_context(echoes(folder, 1)),
            f"echo, {WORKERS} processes": stack.enter_context(echoes(folder, WORKERS)),
        }
        samples = harness.interleave(sides, rounds, warm_up=2)
        group.set("key:0", b"last")
        if group.get("key:0") != b"last":
            raise RuntimeError("a set that was acknowledged is not there")

    report.samples(samples)
    for name, side in used.items():
        side.report(report, name)

    def against(name: str, theirs: str, ours: str, at_least: float | None = None) -> None:
        rounds = harness.ratios(samples[theirs], samples[ours])
        if at_least is None:
            report.ratio(name, rounds)
        else:
            report.target(name, rounds, at_least=at_least)

    against("speed of set / redis-py SET", "redis-py SET", "kamacache set", 1.5)
    for count in ("1 process", f"{WORKERS} processes"):
        against(f"speed of an echo, {count} / redis-py SET", "redis-py SET", f"echo, {count}")
    mark = f"redis-py pipeline({BATCH})"
    pipe = "redis-py pipeline"
    against(f"speed a key of set_many({BATCH}) / {mark}", pipe, "kamacache set_many", 2.0)
    name = f"speed a key of set_many({BATCH}), 1 worker, evicting"
    against(f"{name} / {mark}", pipe, "set_many, 1 worker, full", 2.5)
    for kind in ("twice what fits", "new"):
        against(f"{name}, {kind} / {mark}", pipe, f"set_many, 1 worker, full, {kind}")
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
