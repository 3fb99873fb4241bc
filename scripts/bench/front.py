#!/usr/bin/env python3
"""What the gRPC front adds to gRPC: its Get and BatchGet of hits against handlers that do nothing.

The other side is a grpc.aio server in a process of its own, made with the front's own settings
(options, environment, uvloop), whose Get returns an empty message and whose BatchGet returns the
same ready-made reply of 256 values each time. One client asks both in turn over the loopback.
Targets: Get at most 1.15 times, BatchGet of 256 hits at most 1.5 times.

    scripts/bench/front.py [--quick] [--rounds N] [--json FILE] [--check]
"""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import _harness as harness

from kamacache.cluster.environment import set_grpc_environment
from kamacache.front.settings import FrontSettings

if TYPE_CHECKING:
    from kamacache.v1.kamacache_pb2_grpc import CacheStub

KEYS = 30_000
VALUE_BYTES = 100
BATCH = 256
GETS = 100  # a slice
BATCHES = 25  # a slice
CALLERS = 16
GROUP = "scores"


async def serve_nothing(port: int) -> None:
    """Be the other side until TERM."""
    import grpc

    from kamacache.v1 import kamacache_pb2 as pb2
    from kamacache.v1 import kamacache_pb2_grpc as pb2_grpc

    canned = pb2.BatchGetResponse(values=[bytes(VALUE_BYTES)] * BATCH)
    nothing = pb2.GetResponse()

    class Empty(pb2_grpc.CacheServicer):
        """Answers without looking at the request."""

        async def Get(self, request: Any, context: Any) -> Any:  # noqa: N802
            return nothing

        async def BatchGet(self, request: Any, context: Any) -> Any:  # noqa: N802
            return canned

    settings = FrontSettings(listen=f"127.0.0.1:{port}")
    server = grpc.aio.server(
        options=settings.server_options(), maximum_concurrent_rpcs=settings.calls_max
    )
    pb2_grpc.add_CacheServicer_to_server(Empty(), server)
    server.add_insecure_port(settings.listen)
    await server.start()
    told = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, told.set)
    print("ready", flush=True)
    await told.wait()
    await server.stop(None)


@contextmanager
def empty_server() -> Iterator[str]:
    """Run the other side; yield its address."""
    port = harness.free_port()
    process = subprocess.Popen(
        [sys.executable, __file__, "--serve-nothing", str(port)],
        stdout=subprocess.PIPE,
        text=True,
        env=harness.clean_environment(),
    )
    try:
        assert process.stdout is not None
        if process.stdout.readline().strip() != "ready":
            raise RuntimeError("the server of empty handlers did not start")
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=10)
        if process.stdout is not None:
            process.stdout.close()


class Side:
    """One server as the client sees it, and the slices that are measured."""

    def __init__(self, stub: CacheStub, run: Callable[[Awaitable[float]], float]) -> None:
        from kamacache.v1 import kamacache_pb2 as pb2

        draw = random.Random(5)
        keys = [b"key:%d" % number for number in range(KEYS)]
        self._stub = stub
        self._run = run
        self._one = [pb2.GetRequest(group=GROUP, key=key) for key in draw.choices(keys, k=2_000)]
        self._many = [
            pb2.BatchGetRequest(group=GROUP, keys=draw.sample(keys, BATCH)) for _ in range(50)
        ]

    async def _in_turn(self, call: Any, requests: Sequence[Any]) -> float:
        start = time.perf_counter()
        for request in requests:
            await call(request)
        return (time.perf_counter() - start) / len(requests)

    async def _together(self, call: Any, requests: Sequence[Any]) -> float:
        start = time.perf_counter()
        parts = [requests[at::CALLERS] for at in range(CALLERS)]
        await asyncio.gather(*(self._in_turn(call, part) for part in parts))
        return (time.perf_counter() - start) / len(requests)

    def get(self) -> float:
        """One caller, one call at a time."""
        draw = random.sample(self._one, GETS)
        return self._run(self._in_turn(self._stub.Get, draw))

    def get_together(self) -> float:
        """Sixteen callers at once: what throughput is left."""
        return self._run(self._together(self._stub.Get, random.sample(self._one, 4 * GETS)))

    def batch(self) -> float:
        """One caller, batches of 256."""
        return self._run(self._in_turn(self._stub.BatchGet, self._many[:BATCHES]))


async def fill(stub: CacheStub) -> None:
    """Give the node its values over gRPC, and see that all of them come back."""
    from kamacache.v1 import kamacache_pb2 as pb2

    for at in range(0, KEYS, 1000):
        keys = [b"key:%d" % number for number in range(at, at + 1000)]
        await stub.BatchSet(
            pb2.BatchSetRequest(group=GROUP, keys=keys, values=[bytes(VALUE_BYTES)] * len(keys))
        )
        reply = await stub.BatchGet(pb2.BatchGetRequest(group=GROUP, keys=keys))
        if reply.missing or set(reply.values) != {bytes(VALUE_BYTES)}:
            raise RuntimeError("the front lost values that it was given")


def main() -> None:
    """Start both servers and ask them in turn."""
    set_grpc_environment()
    if sys.argv[1:2] == ["--serve-nothing"]:
        import uvloop

        uvloop.run(serve_nothing(int(sys.argv[2])))
        return
    args = harness.arguments(__doc__)
    report = harness.Report("front", args, ("grpcio", "protobuf", "uvloop"))
    rounds = args.rounds or (4 if args.quick else 60)
    import grpc
    import uvloop

    from kamacache.v1 import kamacache_pb2_grpc as pb2_grpc

    with ExitStack() as stack:
        folder = stack.enter_context(harness.workspace())
        node = stack.enter_context(
            harness.running_node(folder, "--fronts=1", groups=(f"{GROUP}:64MiB",))
        )
        other = stack.enter_context(empty_server())
        runner = stack.enter_context(asyncio.Runner(loop_factory=uvloop.new_event_loop))

        async def connect(address: str) -> Any:
            return grpc.aio.insecure_channel(address)

        channels = [runner.run(connect(address)) for address in (node.address, other)]
        for channel in channels:
            stack.callback(lambda close: runner.run(close()), channel.close)
        stubs = [pb2_grpc.CacheStub(channel) for channel in channels]
        runner.run(fill(stubs[0]))
        front, empty = (Side(stub, runner.run) for stub in stubs)  # type: ignore[arg-type]
        samples = harness.interleave(
            {
                "Get, front": front.get,
                "Get, empty handler": empty.get,
                f"Get, {CALLERS} callers, front": front.get_together,
                f"Get, {CALLERS} callers, empty handler": empty.get_together,
                f"BatchGet {BATCH}, front": front.batch,
                f"BatchGet {BATCH}, canned values": empty.batch,
            },
            rounds,
            warm_up=2,
        )

    report.samples(samples)
    report.target(
        "Get of a hit / empty handler",
        harness.ratios(samples["Get, front"], samples["Get, empty handler"]),
        at_most=1.15,
    )
    report.ratio(
        f"the same, {CALLERS} callers at once",
        harness.ratios(
            samples[f"Get, {CALLERS} callers, front"],
            samples[f"Get, {CALLERS} callers, empty handler"],
        ),
    )
    report.target(
        f"BatchGet of {BATCH} hits / {BATCH} canned values",
        harness.ratios(
            samples[f"BatchGet {BATCH}, front"], samples[f"BatchGet {BATCH}, canned values"]
        ),
        at_most=1.5,
    )
    report.finish()


if __name__ == "__main__":
    main()
