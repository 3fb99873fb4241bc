#!/usr/bin/env python3
"""What coalescing wins: remote gets of hits over peer links against one unary gRPC call for each.

A node with one front holds the values. 64 askers at a time, each asking again as soon as it is
answered, in one process (over one `PeerLink`) or spread over eight (over eight, as the workers of
a node do), get keys at random. The other side asks the same front for the same keys with one unary
grpc.aio Get each, same processes, loop (uvloop) and environment, over one channel a process. The
askers of a link are callbacks, as in a worker; those that await a future each are shown beside it.
Targets: a link's gets are at least 8 times as many from one process, 2 times from eight.

    scripts/bench/peer_link.py [--quick] [--rounds N] [--json FILE] [--check]
"""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import _harness as harness

from kamacache.cluster.environment import set_grpc_environment

KEYS = 30_000
VALUE_BYTES = 100
ASKERS = 64  # over all processes
PROCESSES = (1, 8)
GETS = {"link": 6_000, "link, futures": 6_000, "unary": 600}  # a slice, over all processes
TIMEOUT_S = 30.0
GROUP = "scores"


class Asker:
    """One process's link and channel, and its part of a slice."""

    def __init__(self, address: str) -> None:
        import grpc

        from kamacache.cluster.link import LinkEnd, PeerLink
        from kamacache.v1 import kamacache_pb2 as pb2
        from kamacache.v1 import kamacache_pb2_grpc as pb2_grpc
        from kamacache.wire.messages import Get, Value

        self._loop = asyncio.get_running_loop()
        self._keys = [b"key:%d" % number for number in range(KEYS)]
        self._get, self._value = Get, Value
        self._request = pb2.GetRequest
        self._channel = grpc.aio.insecure_channel(address)
        self._unary = pb2_grpc.CacheStub(self._channel).Get
        self.link = PeerLink(
            address,
            LinkEnd("127.0.0.1:9", "asker", 0),
            self._loop,
            clock=lambda: time.monotonic_ns() >> 10,
            on_change=lambda link: None,
        )

    async def slice(self, side: str, askers: int, gets: int) -> float:
        """Let so many askers get so many keys; return the seconds."""
        keys = random.choices(self._keys, k=gets)
        start = time.perf_counter()
        if side == "link":
            await self._by_callbacks(keys, askers)
        else:
            one = self._one_unary if side == "unary" else self._one_future
            await asyncio.gather(*(self._in_turn(one, keys[at::askers]) for at in range(askers)))
        return time.perf_counter() - start

    async def _in_turn(self, one: Callable[[bytes], Awaitable[None]], keys: list[bytes]) -> None:
        for key in keys:
            await one(key)

    async def _one_unary(self, key: bytes) -> None:
        reply = await self._unary(self._request(group=GROUP, key=key))
        if not reply.found:
            raise RuntimeError("a value is gone")

    async def _one_future(self, key: bytes) -> None:
        answer: asyncio.Future[Any] = self._loop.create_future()
        request = self._get(group=GROUP, key=key)
        self.link.send(request, answer.set_result, time.monotonic() + TIMEOUT_S)
        self._check(await answer)

    async def _by_callbacks(self, keys: list[bytes], askers: int) -> None:
        ended: asyncio.Future[None] = self._loop.create_future()
        left = len(keys)
        following = iter(keys)

        def ask(key: bytes) -> None:
            request = self._get(group=GROUP, key=key)
            self.link.send(request, answered, time.monotonic() + TIMEOUT_S)

        def answered(outcome: Any) -> None:
            nonlocal left
            self._check(outcome)
            left -= 1
            key = next(following, None)
            if key is not None:
                ask(key)
            elif not left:
                ended.set_result(None)

        for _ in range(min(askers, len(keys))):
            ask(next(following))
        await ended

    def _check(self, outcome: Any) -> None:
        if type(outcome) is not self._value or outcome.value is None:
            raise RuntimeError(f"not a value: {outcome}")

    async def close(self) -> None:
        """Close both."""
        await self.link.close()
        await self._channel.close()


async def ask(address: str) -> None:
    """Be one asking process: a line in for each slice, a line out when it is done."""
    asker = Asker(address)
    asker.link.start()
    await asker.link.wait_settled()
    if not asker.link.usable:
        raise RuntimeError("the link is not up")
    print("ready", flush=True)
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        side, askers, gets = line.rstrip().split(";")
        print(await asker.slice(side, int(askers), int(gets)), flush=True)
    await asker.close()


@contextmanager
def asking_processes(address: str, count: int) -> Iterator[list[subprocess.Popen[str]]]:
    """Run so many asking processes."""
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, "--ask", address],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=harness.clean_environment(),
        )
        for _ in range(count)
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            if process.stdout.readline().strip() != "ready":
                raise RuntimeError("an asking process did not start")
        yield processes
    finally:
        for process in processes:
            process.communicate(timeout=20)


def slice_of(processes: Sequence[subprocess.Popen[str]], side: str) -> float:
    """Let all processes do their part at once; return the seconds a get."""
    gets = GETS[side] // len(processes)
    start = time.perf_counter()
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(f"{side};{ASKERS // len(processes)};{gets}\n")
        process.stdin.flush()
    for process in processes:
        assert process.stdout is not None
        if not process.stdout.readline():
            raise RuntimeError("an asking process ended")
    return (time.perf_counter() - start) / (gets * len(processes))


async def fill(address: str) -> None:
    """Give the node its values."""
    import grpc

    from kamacache.v1 import kamacache_pb2 as pb2
    from kamacache.v1 import kamacache_pb2_grpc as pb2_grpc

    async with grpc.aio.insecure_channel(address) as channel:
        stub: Any = pb2_grpc.CacheStub(channel)
        for at in range(0, KEYS, 1000):
            keys = [b"key:%d" % number for number in range(at, at + 1000)]
            values = [bytes(VALUE_BYTES)] * len(keys)
            await stub.BatchSet(pb2.BatchSetRequest(group=GROUP, keys=keys, values=values))


def main() -> None:
    """Start the node and the askers, and let the sides take turns."""
    set_grpc_environment()
    import uvloop

    if sys.argv[1:2] == ["--ask"]:
        uvloop.run(ask(sys.argv[2]))
        return
    args = harness.arguments(__doc__)
    report = harness.Report("peer_link", args, ("grpcio", "msgspec", "uvloop"))
    rounds = args.rounds or (3 if args.quick else 25)
    names = {(side, count): f"{side}, {count} proc." for side in GETS for count in PROCESSES}
    with ExitStack() as stack:
        folder = stack.enter_context(harness.workspace())
        node = stack.enter_context(
            harness.running_node(
                folder,
                "--fronts=1",
                "--peers={address},127.0.0.1:9",
                groups=(f"{GROUP}:64MiB",),
                workers=1,
            )
        )
        uvloop.run(fill(node.address))
        processes = {
            count: stack.enter_context(asking_processes(node.address, count)) for count in PROCESSES
        }
        samples = harness.interleave(
            {
                name: lambda side=side, count=count: slice_of(processes[count], side)  # type: ignore[misc]
                for (side, count), name in names.items()
            },
            rounds,
        )
    report.samples(samples)
    for count, at_least in zip(PROCESSES, (8.0, 2.0), strict=True):
        unary = samples[names["unary", count]]
        report.target(
            f"unary / link, {ASKERS} askers in {count} processes",
            harness.ratios(unary, samples[names["link", count]]),
            at_least=at_least,
        )
        report.ratio(
            f"the same, a future each, {count} processes",
            harness.ratios(unary, samples[names["link, futures", count]]),
        )
    report.finish()


if __name__ == "__main__":
    main()
