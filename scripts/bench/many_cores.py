#!/usr/bin/env python3
"""CPU time of a request in a node of 8 workers and 4 fronts, against one of 1 and 1.

What a node of many processes must not do is to spend more on each request. Both nodes run at the
same time, hold the same keys, and are asked in turn by one client process each, in short slices;
what a slice used is read from the CPU clocks of all of the node's processes and of the client. So
it counts however few cores there are, and other work on the machine is not in it. Targets: a hit
(local, near cache off and on; through a front, one caller and 16 on 8 connections) uses at most
1.2 times the CPU. Sets and batches are reported.

From the CPU a request takes in each role `cores_model.py` computes what 8, 16 and 64 cores carry.

    scripts/bench/many_cores.py [--quick] [--rounds N] [--json FILE] [--check]
"""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import _cpu
import _harness as harness
import cores_model

import kamacache

KEYS = 10_000
VALUE_BYTES = 100
BATCH = 100
CONNECTIONS = 8  # more than fronts: the kernel spreads them over the fronts that listen
CALLERS = 16
GROUPS = ("near:16MiB", "plain:16MiB")
SHAPES = {"1 worker, 1 front": (1, 1), "8 workers, 4 fronts": (8, 4)}
ALONE, MANY = SHAPES
RATIO_MAX = 1.2
IDLE_S = 0.5

# Of each kind, how many operations are a slice: about 20 ms.
SLICES = {
    "local hit, near cache off": 10_000,
    "local hit, near cache on": 10_000,
    "get_many of 100, a key": 100 * BATCH,
    "local set": 300,
    "set_many of 100, a key": 20 * BATCH,
    "front Get, 1 caller": 60,
    "front Get, 16 callers": 160,
    "front Set, 16 callers": 160,
}
JUDGED = (
    "local hit, near cache off",
    "local hit, near cache on",
    "front Get, 1 caller",
    "front Get, 16 callers",
)


# -- the client, a process of its own for each node --------------------------------------------


class Client:
    """Every kind of request to one node."""

    def __init__(self, run_dir: str, address: str, run: Callable[[Any], Any]) -> None:
        import grpc

        from kamacache.v1 import kamacache_pb2 as pb2
        from kamacache.v1 import kamacache_pb2_grpc as pb2_grpc

        kamacache.attach(run_dir)
        self._near = kamacache.Group("near", cache_bytes="16MiB", near_cache_items=32_768)
        self._plain = kamacache.Group("plain", cache_bytes="16MiB", near_cache_items=0)
        self._value = bytes(VALUE_BYTES)
        self._keys = [f"key:{number}" for number in range(KEYS)]
        for group in (self._near, self._plain):
            group.set_many(dict.fromkeys(self._keys, self._value))
        self._run = run
        self._pb2 = pb2

        async def connect() -> list[Any]:
            own = [("grpc.use_local_subchannel_pool", 1)]
            channels = [grpc.aio.insecure_channel(address, own) for _ in range(CONNECTIONS)]
            await asyncio.gather(*(channel.channel_ready() for channel in channels))
            return [pb2_grpc.CacheStub(channel) for channel in channels]

        self._stubs = run(connect())
        self._work: dict[str, Callable[[list[str]], None]] = {
            "local hit, near cache off": self._each(self._plain.get),
            "local hit, near cache on": self._each(self._near.get),
            "get_many of 100, a key": self._batches(self._plain.get_many),
            "local set": self._each(lambda key: self._plain.set(key, self._value)),
            "set_many of 100, a key": self._batches(
                lambda keys: self._plain.set_many(dict.fromkeys(keys, self._value))
            ),
            "front Get, 1 caller": self._front(1, self._get),
            "front Get, 16 callers": self._front(CALLERS, self._get),
            "front Set, 16 callers": self._front(CALLERS, self._set),
        }

    def slice(self, kind: str, count: int) -> dict[str, float]:
        """Do so many of one kind; return the CPU seconds of this process, and the time taken."""
        keys = random.choices(self._keys, k=count)
        began, used = time.perf_counter(), time.process_time()
        self._work[kind](keys)
        return {"client": time.process_time() - used, "seconds": time.perf_counter() - began}

    def _each(self, call: Callable[[str], object]) -> Callable[[list[str]], None]:
        def work(keys: list[str]) -> None:
            for key in keys:
                call(key)

        return work

    def _batches(self, call: Callable[[list[str]], object]) -> Callable[[list[str]], None]:
        def work(keys: list[str]) -> None:
            for at in range(0, len(keys), BATCH):
                call(keys[at : at + BATCH])

        return work

    async def _get(self, stub: Any, key: str) -> None:
        reply = await stub.Get(self._pb2.GetRequest(group="plain", key=key.encode()))
        if not reply.found:
            raise RuntimeError("a value is gone")

    async def _set(self, stub: Any, key: str) -> None:
        await stub.Set(self._pb2.SetRequest(group="plain", key=key.encode(), value=self._value))

    def _front(
        self, callers: int, ask: Callable[[Any, str], Awaitable[None]]
    ) -> Callable[[list[str]], None]:
        async def in_turn(stub: Any, keys: list[str]) -> None:
            for key in keys:
                await ask(stub, key)

        async def together(keys: list[str]) -> None:
            await asyncio.gather(
                *(
                    in_turn(self._stubs[at % CONNECTIONS], keys[at::callers])
                    for at in range(callers)
                )
            )

        def work(keys: list[str]) -> None:
            self._run(together(keys))

        return work


def serve_slices(run_dir: str, address: str) -> None:
    """Be the client: a line in for each slice, a line of JSON out when it is done."""
    from kamacache.cluster.environment import set_grpc_environment

    set_grpc_environment()
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        client = Client(run_dir, address, runner.run)
        print("ready", flush=True)
        for line in sys.stdin:
            kind, count = line.rstrip().split(";")
            print(json.dumps(client.slice(kind, int(count))), flush=True)


# -- one node and its client, as the benchmark sees them ---------------------------------------


class Side:
    """A node of one shape; keeps what each slice used, by role."""

    def __init__(self, node: harness.RunningNode, client: subprocess.Popen[str]) -> None:
        self._processes = _cpu.NodeProcesses(node.pid)
        self._client = client
        self.used: dict[str, list[dict[str, float]]] = {kind: [] for kind in SLICES}

    def slice(self, kind: str) -> float:
        """Run a slice; return the CPU seconds of an operation, all processes together."""
        assert self._client.stdin is not None
        assert self._client.stdout is not None
        before = self._processes.read()
        self._client.stdin.write(f"{kind};{SLICES[kind]}\n")
        self._client.stdin.flush()
        line = self._client.stdout.readline()
        if not line:
            raise RuntimeError("a client ended")
        roles = _cpu.between(before, self._processes.read())
        told = json.loads(line)
        roles["client"] = told["client"]
        an_operation = {role: seconds / SLICES[kind] for role, seconds in roles.items()}
        self.used[kind].append({**an_operation, "seconds": told["seconds"] / SLICES[kind]})
        return sum(an_operation.values())

    def idle(self) -> dict[str, float]:
        """Return what share of a core each role uses when nobody asks."""
        before = self._processes.read()
        time.sleep(IDLE_S)
        used = _cpu.between(before, self._processes.read())
        return {role: seconds / IDLE_S for role, seconds in used.items()}

    def by_role(self, kind: str, rounds: int, idle: dict[str, float]) -> dict[str, float]:
        """Return the median of each role's CPU in the last rounds, in us an operation.

        What the role would have used meanwhile without a request is taken off.
        """
        medians = {
            role: harness.spread([each[role] * 1e6 for each in self.used[kind][-rounds:]])[1]
            for role in self.used[kind][0]
        }
        seconds = medians.pop("seconds")
        return {role: max(0.0, us - idle.get(role, 0.0) * seconds) for role, us in medians.items()}


@contextmanager
def side(folder: Path, workers: int, fronts: int) -> Iterator[Side]:
    """Run a node and its client."""
    folder.mkdir()
    with harness.running_node(folder, f"--fronts={fronts}", groups=GROUPS, workers=workers) as node:
        client = subprocess.Popen(
            [sys.executable, __file__, "--client", str(node.run_dir), node.address],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=harness.clean_environment(),
        )
        try:
            assert client.stdout is not None
            if client.stdout.readline().strip() != "ready":
                raise RuntimeError("a client did not start")
            yield Side(node, client)
        finally:
            client.communicate(timeout=20)


def main() -> None:
    """Start both nodes, let them take turns, compare, extrapolate."""
    if sys.argv[1:2] == ["--client"]:
        serve_slices(*sys.argv[2:4])
        return
    args = harness.arguments(__doc__)
    report = harness.Report("many_cores", args, ("grpcio", "uvloop", "psutil"))
    rounds = args.rounds or (3 if args.quick else 60)
    with ExitStack() as stack:
        folder = stack.enter_context(harness.workspace())
        sides = {
            name: stack.enter_context(side(folder / str(at), *shape))
            for at, (name, shape) in enumerate(SHAPES.items())
        }
        slices: dict[str, Callable[[], float]] = {
            f"{kind}, {name}": lambda one=one, kind=kind: one.slice(kind)  # type: ignore[misc]
            for kind in SLICES
            for name, one in sides.items()
        }
        samples = harness.interleave(slices, rounds)
        idle = {name: one.idle() for name, one in sides.items()}
    report.samples(samples)
    for kind in SLICES:
        found = harness.ratios(samples[f"{kind}, {MANY}"], samples[f"{kind}, {ALONE}"])
        name = f"CPU of a {kind}: {MANY} / {ALONE}"
        if kind in JUDGED:
            report.target(name, found, at_most=RATIO_MAX)
        else:
            report.ratio(name, found)
    taken = len(next(iter(samples.values())))
    roles = {
        name: {kind: one.by_role(kind, taken, idle[name]) for kind in SLICES}
        for name, one in sides.items()
    }
    for name, used in idle.items():
        print(f"  {name}: idle, it uses {sum(used.values()):.1%} of a core")
    report.measured("idle_cores", idle)
    report.measured("cpu_us_by_role", roles)
    model = cores_model.table(roles[MANY])
    report.measured("model", [row.as_dict() for row in model])
    print(cores_model.as_text(model))
    report.finish()


if __name__ == "__main__":
    main()
