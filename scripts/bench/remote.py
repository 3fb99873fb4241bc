#!/usr/bin/env python3
"""What a remote get costs an application: through its node to the owner, against gRPC itself.

Two nodes of a cluster, mirrors off; this process is attached to one and gets keys that the other
owns and holds. 64 at a time (asyncio) against one unary grpc.aio Get each to the owner's front,
with 1 worker a node and with 8. One at a time against what no design can leave out: a round trip
on a bare bidirectional stream of grpc.aio plus one over a bare Unix socket, both canned, in a
process of their own, uvloop and the same environment everywhere. A `get_many` of 1,024 keys against
one message each way on such a stream that carries the same bytes. CPU is that of this process, of
all of the node it is attached to, and of all of the owner's.

    scripts/bench/remote.py [--quick] [--rounds N] [--json FILE] [--check] [--workers 1,8]
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final, cast

import _harness as harness
import psutil

from kamacache.cluster.environment import set_grpc_environment
from kamacache.cluster.membership import Member
from kamacache.cluster.ring import Ring
from kamacache.wire.frames import frame
from kamacache.wire.messages import Get, GetMany, Value, Values

KEYS: Final = 4_096
VALUE_BYTES: Final = 100
ASKERS: Final = 64
BATCH: Final = 1_024
GROUP: Final = "scores"
STREAM: Final = "/bench.Canned/Stream"
OPTIONS: Final = [("grpc.max_receive_message_length", 64 << 20)]
GETS: Final = {"ours": 4_000, "unary": 500}  # a slice
ALONE: Final = 120  # a slice
BATCHES: Final = 12  # a slice
AT_LEAST: Final = {1: 10.0, 8: 4.0}

VERSION: Final = 1 << 52
EXCHANGED: Final = {  # (what is sent, what comes back) as the links say it
    "one": (
        frame(
            Get(id=1 << 20, group=GROUP, key=b"key:1000", budget_ms=30_000, flags=1, sent=VERSION)
        ),
        frame(Value(1 << 20, bytes(VALUE_BYTES), 0, VERSION)),
    ),
    "many": (
        frame(GetMany(id=1 << 20, group=GROUP, keys=[b"key:1000"] * BATCH, sent=VERSION)),
        frame(Values(1 << 20, [bytes(VALUE_BYTES)] * BATCH, [], [0] * BATCH, [VERSION] * BATCH)),
    ),
}
REPLY_TO: Final = {len(sent): answer for sent, answer in EXCHANGED.values()}


# -- canned: a stream and a Unix socket -----------------------------------------------------------


class _Echo(asyncio.Protocol):
    """Answers each request with what is ready made for it."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._transport.write(REPLY_TO[len(data)])


async def serve_canned(port: int, path: str) -> None:
    """Be the canned other side until TERM."""
    import grpc

    async def stream(_requests: object, context: Any) -> None:
        while (message := await context.read()) is not grpc.aio.EOF:
            await context.write(REPLY_TO[len(message)])

    class Canned(grpc.GenericRpcHandler):
        def service(self, details: Any) -> Any:
            return grpc.stream_stream_rpc_method_handler(stream)

    server = grpc.aio.server(options=OPTIONS)
    server.add_generic_rpc_handlers((Canned(),))
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    loop = asyncio.get_running_loop()
    await loop.create_unix_server(_Echo, path)
    told = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, told.set)
    print("ready", flush=True)
    await told.wait()
    await server.stop(None)


@contextmanager
def canned_server(folder: Path) -> Iterator[tuple[str, str]]:
    """Run the canned other side; yield its address and its Unix socket."""
    port, path = harness.free_port(), str(folder / "canned.sock")
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).resolve()), "--serve-canned", str(port), path],
        stdout=subprocess.PIPE,
        text=True,
        env=harness.clean_environment(),
    )
    try:
        assert process.stdout is not None
        if process.stdout.readline().strip() != "ready":
            raise RuntimeError("the canned server did not start")
        yield f"127.0.0.1:{port}", path
    finally:
        process.terminate()
        process.communicate(timeout=20)


class _Line(asyncio.Protocol):
    """The asking end of a bare Unix socket, one round trip at a time."""

    def __init__(self) -> None:
        self._answer: asyncio.Future[None] | None = None
        self._left = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    async def ask(self, sent: bytes, answer_bytes: int) -> None:
        self._answer = asyncio.get_running_loop().create_future()
        self._left = answer_bytes
        self._transport.write(sent)
        await self._answer

    def data_received(self, data: bytes) -> None:
        self._left -= len(data)
        if not self._left and self._answer is not None:
            self._answer.set_result(None)

    def close(self) -> None:
        self._transport.close()


# -- the asking process ---------------------------------------------------------------------------


class Asker:
    """This process's ways of asking, all on one loop."""

    def __init__(self, run_dir: Path, owner: str, keys: Sequence[bytes]) -> None:
        import kamacache

        kamacache.attach(run_dir)
        self._group = kamacache.Group(GROUP, fallback="error")
        self._keys = keys
        self._following = itertools.cycle(keys)
        self._owner = owner

    async def open(self, canned: tuple[str, str]) -> None:
        """Connect all."""
        import grpc

        from kamacache.v1 import kamacache_pb2 as pb2
        from kamacache.v1 import kamacache_pb2_grpc as pb2_grpc

        self._request = pb2.GetRequest
        self._channels = [grpc.aio.insecure_channel(self._owner, options=OPTIONS)]
        self._unary = pb2_grpc.CacheStub(self._channels[0]).Get
        address, path = canned
        self._channels.append(grpc.aio.insecure_channel(address, options=OPTIONS))
        self._stream: Any = self._channels[1].stream_stream(STREAM)()
        loop = asyncio.get_running_loop()
        _, self._line = await loop.create_unix_connection(_Line, path)

    async def linked(self, workers: int) -> None:
        """Wait until every worker of the own node has a link to the owner."""
        deadline_s = time.monotonic() + harness.SERVER_START_S
        while (await self._group.astats()).get("peers_up", 0) < workers:
            if time.monotonic() > deadline_s:
                raise TimeoutError("the nodes do not link")
            await asyncio.sleep(0.05)

    async def fill(self) -> None:
        """Give the owner its values."""
        from kamacache.v1 import kamacache_pb2 as pb2
        from kamacache.v1 import kamacache_pb2_grpc as pb2_grpc

        stub: Any = pb2_grpc.CacheStub(self._channels[0])
        for at in range(0, len(self._keys), BATCH):
            keys = self._keys[at : at + BATCH]
            values = [bytes(VALUE_BYTES)] * len(keys)
            await stub.BatchSet(pb2.BatchSetRequest(group=GROUP, keys=keys, values=values))

    async def close(self) -> None:
        """Close all."""
        self._stream.cancel()
        self._line.close()
        for channel in self._channels:
            await channel.close()

    async def together(self, side: str) -> None:
        """Let all askers get, each again as soon as it is answered."""
        one = self._one_unary if side == "unary" else self._one
        left = GETS[side]

        async def ask() -> None:
            nonlocal left
            while left > 0:
                left -= 1
                await one(next(self._following))

        await asyncio.gather(*(ask() for _ in range(ASKERS)))

    async def alone(self) -> None:
        for _ in range(ALONE):
            await self._one(next(self._following))

    async def alone_stream(self) -> None:
        for _ in range(ALONE):
            await self._one_message("one")

    async def alone_line(self) -> None:
        sent, answer = EXCHANGED["one"]
        for _ in range(ALONE):
            await self._line.ask(sent, len(answer))

    async def batches(self) -> None:
        for at in range(BATCHES):
            start = at % (len(self._keys) // BATCH) * BATCH
            keys = self._keys[start : start + BATCH]
            if len(await self._group.aget_many(keys)) != BATCH:
                raise RuntimeError("values are gone")

    async def batches_stream(self) -> None:
        for _ in range(BATCHES):
            await self._one_message("many")

    async def batches_line(self) -> None:
        sent, answer = EXCHANGED["many"]
        for _ in range(BATCHES):
            await self._line.ask(sent, len(answer))

    async def _one(self, key: bytes) -> None:
        await self._group.aget(key)

    async def _one_unary(self, key: bytes) -> None:
        reply = await self._unary(self._request(group=GROUP, key=key))
        if not reply.found:
            raise RuntimeError("a value is gone")

    async def _one_message(self, which: str) -> None:
        sent, answer = EXCHANGED[which]
        await self._stream.write(sent)
        if len(await self._stream.read()) != len(answer):
            raise RuntimeError("a canned answer is not whole")


class Usage:
    """CPU seconds of this process and of whole nodes, by what ran meanwhile."""

    def __init__(self, nodes: dict[str, int]) -> None:
        self._processes = {"application": [psutil.Process(os.getpid())]}
        for name, pid in nodes.items():
            root = psutil.Process(pid)
            self._processes[name] = [root, *root.children(recursive=True)]
        self.spent_s: dict[str, dict[str, float]] = {}

    def _now(self) -> dict[str, float]:
        return {
            name: sum(times.user + times.system for times in (p.cpu_times() for p in processes))
            for name, processes in self._processes.items()
        }

    def of(self, side: str, body: Callable[[], float]) -> float:
        """Run a slice; add what it cost."""
        before = self._now()
        seconds = body()
        spent = self.spent_s.setdefault(side, dict.fromkeys(before, 0.0))
        for name, now_s in self._now().items():
            spent[name] += now_s - before[name]
        return seconds

    def reset(self) -> None:
        """Begin anew."""
        self.spent_s.clear()


@contextmanager
def pair_of_nodes(folder: Path, workers: int) -> Iterator[list[harness.RunningNode]]:
    """Run two nodes that are each other's peers."""
    addresses = [f"127.0.0.1:{harness.free_port()}" for _ in range(2)]
    with ExitStack() as stack:
        nodes = []
        for number, address in enumerate(addresses):
            home = folder / f"{workers}-{number}"
            home.mkdir()
            nodes.append(
                stack.enter_context(
                    harness.running_node(
                        home,
                        "--fronts=1",
                        f"--peers={','.join(addresses)}",
                        groups=(f"{GROUP}:64MiB,mirror_ttl=0",),
                        workers=workers,
                        address=address,
                    )
                )
            )
        yield nodes


def keys_of(owner: str, addresses: Sequence[str]) -> list[bytes]:
    """Return keys that a node owns."""
    ring = Ring([Member(address) for address in addresses])
    numbers = (b"key:%d" % number for number in itertools.count(1000))
    return list(itertools.islice((key for key in numbers if ring.owner(key) == owner), KEYS))


def measure(
    report: harness.Report,
    folder: Path,
    canned: tuple[str, str],
    workers: int,
    rounds: int,
) -> None:
    """Measure with so many workers a node."""
    import uvloop

    import kamacache

    with pair_of_nodes(folder, workers) as (own, owner):
        keys = keys_of(owner.address, [own.address, owner.address])
        loop = uvloop.new_event_loop()
        asker = Asker(own.run_dir, owner.address, keys)
        loop.run_until_complete(asker.open(canned))
        loop.run_until_complete(asker.linked(workers))
        loop.run_until_complete(asker.fill())
        usage = Usage({"its node": own.pid, "the owner": owner.pid})

        def slices(side: str, calls: int, body: Callable[[], Awaitable[None]]) -> Any:
            def run() -> float:
                start = time.perf_counter()
                loop.run_until_complete(body())
                return (time.perf_counter() - start) / calls

            return lambda: usage.of(side, run)

        counts = {
            **GETS,
            "alone": ALONE,
            "alone, bare stream": ALONE,
            "alone, bare socket": ALONE,
            "get_many": BATCHES,
            "get_many, bare stream": BATCHES,
            "get_many, bare socket": BATCHES,
        }
        bodies: dict[str, Callable[[], Awaitable[None]]] = {
            "ours": lambda: asker.together("ours"),
            "unary": lambda: asker.together("unary"),
            "alone": asker.alone,
            "alone, bare stream": asker.alone_stream,
            "alone, bare socket": asker.alone_line,
            "get_many": asker.batches,
            "get_many, bare stream": asker.batches_stream,
            "get_many, bare socket": asker.batches_line,
        }
        sides = {side: slices(side, counts[side], body) for side, body in bodies.items()}
        for run in sides.values():
            run()
        usage.reset()
        samples = harness.interleave(sides, rounds, warm_up=0)
        loop.run_until_complete(asker.close())
        kamacache.detach()
        loop.close()
    mark = f"{workers} worker{'s' * (workers > 1)}"
    report.samples({f"{side}, {mark}": values for side, values in samples.items()})
    for side in ("ours", "unary", "alone", "get_many"):
        spent = usage.spent_s[side]
        calls = counts[side] * rounds
        shown = {name: seconds / calls * 1e6 for name, seconds in spent.items()}
        print(f"  CPU, {side}: " + ", ".join(f"{name} {us:.1f} us" for name, us in shown.items()))
        report.measured(f"CPU a call, {side}, {mark}", {**shown, "unit": "us"})
    report.target(
        f"unary / remote get, {ASKERS} at a time, {mark}",
        harness.ratios(samples["unary"], samples["ours"]),
        at_least=AT_LEAST.get(workers, 1.0),
    )
    bare = [
        a + b
        for a, b in zip(samples["alone, bare stream"], samples["alone, bare socket"], strict=True)
    ]
    report.target(
        f"one at a time / bare stream + bare socket, {mark}",
        harness.ratios(samples["alone"], bare),
        at_most=1.4,
    )
    report.target(
        f"get_many of {BATCH} / bare stream of the same bytes, {mark}",
        harness.ratios(samples["get_many"], samples["get_many, bare stream"]),
        at_most=1.5,
    )


def main() -> None:
    """Start the nodes and the canned side, and let the sides take turns."""
    set_grpc_environment()
    import uvloop

    if sys.argv[1:2] == ["--serve-canned"]:
        uvloop.run(serve_canned(int(sys.argv[2]), sys.argv[3]))
        return
    args = harness.arguments(
        __doc__, workers={"default": "1,8", "help": "of each node, one after the other"}
    )
    report = harness.Report("remote", args, ("grpcio", "msgspec", "uvloop"))
    rounds = args.rounds or (3 if args.quick else 25)
    with ExitStack() as stack:
        folder = stack.enter_context(harness.workspace())
        canned = stack.enter_context(canned_server(folder))
        for workers in map(int, args.workers.split(",")):
            measure(report, folder, canned, workers, rounds)
    report.finish()


if __name__ == "__main__":
    main()
