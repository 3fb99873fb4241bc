#!/usr/bin/env python3
"""Which settings make a gRPC server in Python cheapest: engine, poller, loop, arguments, kind.

One server process for each, all alive at once, with a method that answers a few bytes and one that
answers 26 KB, as a BatchGet of 256 values does. One client asks them in turn, round by round, so
that a machine that changes its speed changes it for all; each figure is compared with that of the
front's own settings within its round. Printed for each: the median over the rounds of the latency
of one caller, of the time a call of 16 callers, of the latency of the large answer, and the
server's CPU time a call. docs/grpc-settings.md has what came out; its table is ``--markdown``'s.

    scripts/bench/front_settings.py [--quick] [--rounds N] [--only TEXT] [--markdown] [--json FILE]
"""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import _harness as harness

from kamacache.cluster.environment import GRPC_ENVIRONMENT, set_grpc_environment
from kamacache.front.settings import FrontSettings

Options = tuple[tuple[str, Any], ...]

OFF = GRPC_ENVIRONMENT["GRPC_EXPERIMENTS"]
EXPERIMENTS, POLLER = "GRPC_EXPERIMENTS", "GRPC_POLL_STRATEGY"
OWN = tuple(FrontSettings(listen="127.0.0.1:1").server_options())
CHOSEN = "the front's: aio, uvloop, engine off"
THREADS = 8  # of a server with threads
CALLERS = 16
CALLS, CALLS_TOGETHER, CALLS_LARGE = 60, 240, 25  # a slice
SERVICE = "bench.Empty"
LARGE_BYTES = 256 * 102  # values of 100 bytes, each with its tag and length


@dataclass(frozen=True)
class Setup:
    """One server: ``kind`` is "uvloop" or "asyncio" (both grpc.aio) or "threads"."""

    kind: str = "uvloop"
    experiments: str | None = OFF
    poller: str | None = None
    options: Options = ()
    calls_max: int | None = None
    registered: bool = False

    def environment(self) -> dict[str, str]:
        """Return this setup's environment; what it does not name is gRPC's own choice."""
        clean = harness.clean_environment(GRPC_VERBOSITY="ERROR")
        for name, text in ((EXPERIMENTS, self.experiments), (POLLER, self.poller)):
            clean.pop(name, None)
            if text is not None:
                clean[name] = text
        return clean


def _with(*options: tuple[str, Any]) -> Setup:
    return Setup(options=(*OWN, *options), calls_max=1_000, registered=True)


SETUPS: dict[str, Setup] = {
    CHOSEN: _with(),
    "aio, asyncio, gRPC's defaults": Setup("asyncio", None),
    "aio, asyncio, engine off": Setup("asyncio"),
    "aio, uvloop, gRPC's defaults": Setup("uvloop", None),
    "aio, uvloop, listener's engine off": Setup("uvloop", "-event_engine_listener"),
    "aio, uvloop, engine off, no arguments": Setup(),
    "aio, uvloop, all of the engine off": Setup(
        "uvloop",
        f"{OFF},-event_engine_callback_cq,-event_engine_for_all_other_endpoints",
    ),
    "engine off, poller epoll1": Setup(poller="epoll1"),
    "engine off, poller poll": Setup(poller="poll"),
    "engine on, poller poll": Setup(experiments=None, poller="poll"),
    "threads, gRPC's defaults": Setup("threads", None),
    "threads, engine off": Setup("threads"),
    "the front's, methods not registered": Setup(options=OWN, calls_max=1_000),
    "the front's, no bound on calls": Setup(options=OWN, registered=True),
    "the front's, optimised for latency": _with(("grpc.optimization_target", "latency")),
    "the front's, optimised for throughput": _with(("grpc.optimization_target", "throughput")),
    "the front's, no bandwidth probe": _with(("grpc.http2.bdp_probe", 0)),
    "the front's, reads of 64 KiB": _with(("grpc.experimental.tcp_read_chunk_size", 64 << 10)),
    "the front's, frame size tuning, lowat": Setup(
        "uvloop", f"{OFF},tcp_frame_size_tuning,tcp_rcv_lowat", None, OWN, 1_000, True
    ),
    "the front's, write buffer of 1 MiB": _with(("grpc.http2.write_buffer_size", 1 << 20)),
    "the front's, minimal stack (no limits)": _with(("grpc.minimal_stack", 1)),
}


# -- a server ----------------------------------------------------------------------------------


def _add(server: Any, setup: Setup, small: Any, large: Any) -> None:
    import grpc

    handlers: dict[str, Any] = {
        "Small": grpc.unary_unary_rpc_method_handler(small),
        "Large": grpc.unary_unary_rpc_method_handler(large),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    if setup.registered:
        server.add_registered_method_handlers(SERVICE, handlers)


async def serve_aio(setup: Setup) -> None:
    """Print the port, and serve until killed."""
    import grpc

    answer = bytes(LARGE_BYTES)

    async def small(request: bytes, context: Any) -> bytes:
        return request

    async def large(request: bytes, context: Any) -> bytes:
        return answer

    server = grpc.aio.server(options=setup.options, maximum_concurrent_rpcs=setup.calls_max)
    _add(server, setup, small, large)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


def serve_threads(setup: Setup) -> None:
    """As `serve_aio`, with the server of threads."""
    import grpc

    answer = bytes(LARGE_BYTES)
    server = grpc.server(ThreadPoolExecutor(THREADS), options=setup.options)
    _add(server, setup, lambda request, context: request, lambda request, context: answer)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    print(port, flush=True)
    server.wait_for_termination()


def run_on(kind: str, coroutine: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine on uvloop or on plain asyncio."""
    if kind == "asyncio":
        asyncio.run(coroutine)
    else:
        import uvloop

        uvloop.run(coroutine)


@contextmanager
def serving(name: str) -> Iterator[tuple[str, int]]:
    """Run the server of that name; yield its address and its process id."""
    process = subprocess.Popen(
        [sys.executable, __file__, "--serve", name],
        env=SETUPS[name].environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        port = process.stdout.readline().strip()
        if not port:
            raise RuntimeError(f"the server {name!r} did not start")
        yield f"127.0.0.1:{port}", process.pid
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()


# -- the client --------------------------------------------------------------------------------


class Side:
    """One server as the client sees it, and the slices that are measured."""

    def __init__(self, run: Callable[[Awaitable[Any]], Any], address: str, pid: int) -> None:
        import psutil

        self._run = run
        self._process = psutil.Process(pid)
        self._channel = run(_connected(address))
        self._small = self._channel.unary_unary(f"/{SERVICE}/Small")
        self._large = self._channel.unary_unary(f"/{SERVICE}/Large")
        self.cpu_s: list[float] = []  # a call, of each slice of `together`

    def alone(self) -> float:
        """Return the latency of one caller's calls."""
        return harness.per_call(CALLS, lambda: self._run(_ask(self._small, CALLS)))

    def together(self) -> float:
        """Return the time a call where 16 callers ask at once."""

        async def ask_all() -> None:
            await asyncio.gather(
                *(_ask(self._small, CALLS_TOGETHER // CALLERS) for _ in range(CALLERS))
            )

        before = sum(self._process.cpu_times()[:2])
        took_s = harness.per_call(CALLS_TOGETHER, lambda: self._run(ask_all()))
        self.cpu_s.append((sum(self._process.cpu_times()[:2]) - before) / CALLS_TOGETHER)
        return took_s

    def large(self) -> float:
        """Return the latency of one caller's calls with the large answer."""
        return harness.per_call(CALLS_LARGE, lambda: self._run(_ask(self._large, CALLS_LARGE)))

    def close(self) -> None:
        """End the connection."""
        self._run(self._channel.close())


async def _connected(address: str) -> Any:
    import grpc

    return grpc.aio.insecure_channel(address)


async def _ask(call: Any, count: int) -> None:
    for _ in range(count):
        await call(b"Tom")


def measure(names: list[str], rounds: int) -> dict[str, dict[str, Any]]:
    """Return the figures of each setup, and each figure over that of `CHOSEN`."""
    import uvloop

    samples: dict[str, dict[str, list[float]]] = {
        name: {"alone": [], "together": [], "large": []} for name in names
    }
    with ExitStack() as stack:
        runner = stack.enter_context(asyncio.Runner(loop_factory=uvloop.new_event_loop))
        sides: dict[str, Side] = {}
        for name in names:
            side = sides[name] = Side(runner.run, *stack.enter_context(serving(name)))  # type: ignore[arg-type]
            stack.callback(side.close)
        order = random.Random(1)
        for round_ in range(-1, rounds):  # round -1 warms up
            order.shuffle(names)  # no setup always follows the same other
            for name in names:
                for figure, taken in samples[name].items():
                    value = getattr(sides[name], figure)()
                    if round_ >= 0:
                        taken.append(value)
        # The clock of CPU time ticks every 10 ms: only the sum over all rounds says anything.
        cpu_s = {name: sum(side.cpu_s) / len(side.cpu_s) for name, side in sides.items()}
    results: dict[str, dict[str, Any]] = {}
    for name, figures in samples.items():
        row: dict[str, Any] = {}
        for figure, taken in figures.items():
            us = harness.spread([value * 1e6 for value in taken])[1]
            ratio = harness.spread(harness.ratios(taken, samples[CHOSEN][figure]))[1]
            row[figure] = {"us": round(us, 1), "ratio": round(ratio, 3)}
        ratio = cpu_s[name] / cpu_s[CHOSEN] if cpu_s[CHOSEN] else 0.0
        row["cpu"] = {"us": round(cpu_s[name] * 1e6, 1), "ratio": round(ratio, 3)}
        results[name] = row
    return results


HEADS = {"alone": "1 caller", "together": "16 callers", "large": "26 KB", "cpu": "server CPU"}


def show(results: dict[str, dict[str, Any]], *, markdown: bool) -> None:
    """Print the table: microseconds, and their ratio to the front's own settings."""
    if markdown:
        print("| us a call (ratio) | " + " | ".join(HEADS.values()) + " |")
        print("|---|" + "---|" * len(HEADS))
    else:
        print(f"{'us a call (ratio)':40}" + "".join(f"{head:>15}" for head in HEADS.values()))
    for name in SETUPS:
        if name not in results:
            continue
        cells = [f"{results[name][f]['us']:.0f} ({results[name][f]['ratio']:.2f})" for f in HEADS]
        if markdown:
            print(f"| {name} | " + " | ".join(cells) + " |")
        else:
            print(f"{name:40}" + "".join(f"{cell:>15}" for cell in cells))


def main() -> None:
    """Start the servers, measure, stop them."""
    if sys.argv[1:2] == ["--serve"]:
        setup = SETUPS[sys.argv[2]]
        if setup.kind == "threads":
            serve_threads(setup)
        else:
            run_on(setup.kind, serve_aio(setup))
        return
    args = harness.arguments(
        __doc__,
        only={"metavar": "TEXT", "default": "", "help": "setups whose name has TEXT, and the own"},
        markdown={"action": "store_true", "help": "print the table for a document"},
    )
    set_grpc_environment()  # of the client, the same for all
    report = harness.Report("front_settings", args, ("grpcio", "uvloop"))
    names = [name for name in SETUPS if args.only in name or name == CHOSEN]
    rounds = args.rounds or (2 if args.quick else 31)
    results = measure(names, rounds)
    report.measured("rounds", rounds)
    report.measured("settings", results)
    show(results, markdown=args.markdown)
    report.finish()


if __name__ == "__main__":
    main()
