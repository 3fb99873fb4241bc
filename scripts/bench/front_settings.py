#!/usr/bin/env python3
"""Measure which event loop and which gRPC settings make an empty grpc.aio handler cheapest.

One server process for each combination, all alive at once; one client asks them in turn, round
by round, so that a machine that changes its speed changes it for all. Printed for each: the
median over the rounds of the latency of one caller, of the throughput of 16, of the server's CPU
time a call, and each as a ratio to the first line. The last line is one JSON object.

    scripts/bench/front_settings.py [--rounds 15]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Coroutine
from typing import Any

WITHOUT_ENGINE = "-event_engine_client,-event_engine_listener"
SETTINGS: dict[str, tuple[str, dict[str, str]]] = {
    "asyncio, defaults": ("asyncio", {}),
    "asyncio, engine off": ("asyncio", {"GRPC_EXPERIMENTS": WITHOUT_ENGINE}),
    "asyncio, engine off, poll": (
        "asyncio",
        {"GRPC_EXPERIMENTS": WITHOUT_ENGINE, "GRPC_POLL_STRATEGY": "poll"},
    ),
    "uvloop, defaults": ("uvloop", {}),
    "uvloop, engine off": ("uvloop", {"GRPC_EXPERIMENTS": WITHOUT_ENGINE}),
    "uvloop, engine off, poll": (
        "uvloop",
        {"GRPC_EXPERIMENTS": WITHOUT_ENGINE, "GRPC_POLL_STRATEGY": "poll"},
    ),
}
METHOD = "/bench.Empty/Call"
CALLERS = 16


def run_on(loop: str, coroutine: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine on uvloop or on plain asyncio."""
    if loop == "uvloop":
        import uvloop

        uvloop.run(coroutine)
    else:
        asyncio.run(coroutine)


async def serve() -> None:
    """Serve a method that returns its few bytes unchanged; print the port; wait for a signal."""
    import grpc

    async def empty(request: bytes, context: Any) -> bytes:
        return request

    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(empty)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("bench.Empty", {"Call": handler}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


async def measure(ports: dict[str, int], pids: dict[str, int], rounds: int) -> None:
    """Ask every server in turn and print the table."""
    import grpc
    import psutil

    processes = {name: psutil.Process(pid) for name, pid in pids.items()}
    samples: dict[str, list[tuple[float, float, float]]] = {name: [] for name in ports}
    calls: dict[str, Any] = {
        name: grpc.aio.insecure_channel(f"127.0.0.1:{port}").unary_unary(METHOD)
        for name, port in ports.items()
    }

    async def ask(call: Any, count: int) -> None:
        for _ in range(count):
            await call(b"Tom")

    for round_ in range(-1, rounds):  # round -1 warms up
        for name, call in calls.items():
            cpu = sum(processes[name].cpu_times()[:2])
            t0 = time.perf_counter()
            await ask(call, 400)
            t1 = time.perf_counter()
            await asyncio.gather(*(ask(call, 50) for _ in range(CALLERS)))
            t2 = time.perf_counter()
            cpu = sum(processes[name].cpu_times()[:2]) - cpu
            if round_ >= 0:
                samples[name].append(((t1 - t0) / 400, (t2 - t1) / 50 / CALLERS, cpu / 1200))
    table = {
        name: [round(statistics.median(column) * 1e6, 1) for column in zip(*rows, strict=True)]
        for name, rows in samples.items()
    }
    first = next(iter(table.values()))
    print(f"{'us a call':28} {'1 caller':>14} {f'{CALLERS} callers':>14} {'server CPU':>14}")
    for name, row in table.items():
        cells = (f"{us:6.0f} ({us / base:4.2f})" for us, base in zip(row, first, strict=True))
        print(f"{name:28} " + " ".join(f"{cell:>14}" for cell in cells))
    keys = ("one_caller_us", "many_callers_us", "server_cpu_us")
    print(json.dumps({name: dict(zip(keys, row, strict=True)) for name, row in table.items()}))


def main() -> None:
    """Start the servers, measure, stop them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--serve", metavar="LOOP", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        run_on(args.serve, serve())
        return
    servers: dict[str, subprocess.Popen[str]] = {}
    ports: dict[str, int] = {}
    try:
        for name, (loop, settings) in SETTINGS.items():
            servers[name] = subprocess.Popen(
                [sys.executable, __file__, "--serve", loop],
                env={**os.environ, **settings},
                stdout=subprocess.PIPE,
                text=True,
            )
        for name, server in servers.items():
            assert server.stdout is not None
            ports[name] = int(server.stdout.readline())
        os.environ["GRPC_EXPERIMENTS"] = WITHOUT_ENGINE  # of the client, the same for all
        pids = {name: server.pid for name, server in servers.items()}
        run_on("uvloop", measure(ports, pids, args.rounds))
    finally:
        for server in servers.values():
            server.send_signal(signal.SIGKILL)
            server.wait()


if __name__ == "__main__":
    main()
