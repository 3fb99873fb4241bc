#!/usr/bin/env python3
"""`make demo`: three nodes of `scripts/quickstart.py` that show who loads what, and then end.

Process: this one starts the nodes, each in a session of its own so that Ctrl-C comes here alone,
asks one of them over HTTP, reads in the nodes' logs who searched the database, and ends them,
whatever happens. Exit code 0 says that it saw what it promises, 1 that it did not.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import NamedTuple, NoReturn

from kamacache.cluster.membership import Member
from kamacache.cluster.ring import Ring

QUICKSTART = Path(__file__).resolve().with_name("quickstart.py")
SCORES = {"Tom": "630", "Jack": "589", "Sam": "567", "Peter": "999"}
UNKNOWN = "Nobody"
READY_S = 60.0
ASK_S = 20.0
END_S = 20.0
LOG_LINES = 20
LOADED = "[SlowDB] Searching for key: "


class DemoError(Exception):
    """The demo cannot go on; says why, and what to do."""


class Node:
    """One quickstart process and its log."""

    def __init__(self, port: int, peers: str, api: str | None, folder: Path) -> None:
        self.port = port
        self.address = f"127.0.0.1:{port}"
        self._log = folder / f"{port}.log"
        command = [sys.executable, str(QUICKSTART), f"--port={port}", f"--peers={peers}"]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command + ([f"--api={api}"] if api else []),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def check(self) -> None:
        """Raise where the process has ended."""
        if (code := self._process.poll()) is not None:
            raise DemoError(f"the node at {self.address} ended with code {code}:\n{self.log()}")

    def log(self) -> str:
        """Return the last lines it wrote."""
        lines = self._log.read_text(errors="replace").splitlines()[-LOG_LINES:]
        return "\n".join(f"    {self.port} | {line}" for line in lines)

    def loads(self) -> list[str]:
        """Return the keys that its workers searched the database for."""
        lines = self._log.read_text(errors="replace").splitlines()
        return [line.removeprefix(LOADED) for line in lines if line.startswith(LOADED)]

    def end(self, number: int) -> None:
        """Signal the process: TERM drains its node."""
        self._process.send_signal(number)

    def ended(self) -> bool:
        """Whether nothing of it is left, workers included."""
        if self._process.poll() is None:
            return False
        try:
            os.killpg(self._process.pid, 0)
        except ProcessLookupError:
            return True
        return False

    def kill(self) -> None:
        """Kill what is left."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


class Seen(NamedTuple):
    """One request: its answer, and the ports of the nodes that searched meanwhile."""

    status: int
    body: str
    searched: list[int]

    def __str__(self) -> str:
        body = self.body if self.status == 200 else str(self.status)
        where = " and ".join(map(str, self.searched))
        return f"{body}, {f'searched at {where}' if where else 'nobody searched'}"


@contextlib.contextmanager
def running(ports: Sequence[int], api: str) -> Iterator[list[Node]]:
    """Start the nodes, the last one with HTTP; end them whatever happens."""
    peers = ",".join(f"127.0.0.1:{port}" for port in ports)
    nodes: list[Node] = []
    with tempfile.TemporaryDirectory(prefix="kamacache-demo-") as folder:
        try:
            for port in ports:
                given = api if port == ports[-1] else None
                nodes.append(Node(port, peers, given, Path(folder)))
            yield nodes
        finally:
            end_all(nodes)


def end_all(nodes: Sequence[Node]) -> None:
    """Drain the nodes, and kill what does not end in time."""
    try:
        for node in nodes:
            node.end(signal.SIGTERM)
        wait_until(lambda: all(node.ended() for node in nodes), END_S)
    finally:  # Ctrl-C once more, too
        for node in nodes:
            node.kill()


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Poll; return whether it became true in time."""
    end_s = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end_s:
            return False
        time.sleep(0.05)
    return True


def check_free(ports: Sequence[int]) -> None:
    """Raise where something listens on one of the ports."""
    for port in ports:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError as error:
                raise DemoError(
                    f"port {port} of 127.0.0.1 is not free ({error.strerror}): end what uses it "
                    f"(ss -ltnp shows it), or choose others:\n"
                    f"    make demo ARGS='--ports 8101,8102,8103 --api-port 9998'"
                ) from error


def fetch(url: str) -> tuple[int, str]:
    """Return status and body of a GET."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=ASK_S) as reply:
            return reply.status, reply.read().decode(errors="replace")
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode(errors="replace")


def await_ready(nodes: Sequence[Node], api: str) -> None:
    """Wait until the HTTP interface is ready, and each node has linked to all others."""
    import grpc  # after the nodes' start: forks come before it

    from kamacache.v1 import kamacache_pb2 as pb
    from kamacache.v1.kamacache_pb2_grpc import CacheStub

    def linked(node: Node) -> bool:
        node.check()
        with grpc.insecure_channel(node.address, [("grpc.enable_http_proxy", 0)]) as channel:
            try:
                reply = CacheStub(channel).Stats(pb.StatsRequest(group="scores"), timeout=2)
            except grpc.RpcError:
                return False
        told = reply.groups[0].values
        # Both are sums over the node's workers.
        return bool(told["peers_up"] >= max(told["peers"], len(nodes) - 1))

    def ready() -> bool:
        try:
            return fetch(f"http://{api}/readyz")[0] == 200
        except OSError:
            return False

    for node in nodes:
        if not wait_until(lambda: linked(node), READY_S):  # noqa: B023
            raise DemoError(
                f"the node at {node.address} did not link to the others within {READY_S:g} s:\n"
                f"{node.log()}"
            )
    if not wait_until(ready, READY_S):
        raise DemoError(f"http://{api}/readyz did not say 200 within {READY_S:g} s")


def ask(nodes: Sequence[Node], api: str, key: str) -> Seen:
    """Ask for a key over HTTP, and see in the logs who searched for it."""
    before = {node: len(node.loads()) for node in nodes}
    status, body = fetch(f"http://{api}/api?key={urllib.parse.quote(key)}")
    searched = [node.port for node in nodes if key in node.loads()[before[node] :]]
    return Seen(status, body, searched)


def judge(key: str, owner: int, first: Seen, second: Seen) -> list[str]:
    """Return what is not as promised."""
    wrong = []
    expected = SCORES.get(key)
    for which, seen in (("first", first), ("second", second)):
        if expected is None and seen.status != 404:
            wrong.append(f"{key}: the {which} request was answered with {seen.status}, not 404")
        elif expected is not None and (seen.status, seen.body) != (200, expected):
            wrong.append(f"{key}: the {which} answer was {seen.status} {seen.body!r}")
    if first.searched != [owner]:
        wrong.append(f"{key}: searched at {first.searched} and not at its owner {owner} alone")
    if expected is not None and second.searched:
        wrong.append(f"{key}: searched again at {second.searched}")
    return wrong


def show(ports: Sequence[int], api: str) -> list[str]:
    """Run the demo; return what was not as promised."""
    print(f"Starting three nodes on 127.0.0.1: {', '.join(map(str, ports))} ...", flush=True)
    with running(ports, api) as nodes:
        await_ready(nodes, api)
        print(f"They are one cache now. Asking node {ports[-1]} by http://{api}/api?key=... twice:")
        ring = Ring(Member(node.address) for node in nodes)
        owners = {node.address: node.port for node in nodes}
        print(f"\n  {'key':8}{'owner':8}{'first request':32}second request")
        wrong = []
        for key in (*SCORES, UNKNOWN):
            owner = owners[ring.owner(key.encode())]
            first, second = ask(nodes, api, key), ask(nodes, api, key)
            print(f"  {key:8}{owner:<8}{first!s:32}{second}", flush=True)
            wrong += judge(key, owner, first, second)
        print("\nWhat their getters logged:")
        for node in nodes:
            for key in node.loads():
                print(f"  {node.port} | {LOADED}{key}")
        print("\nEnding the nodes ...", flush=True)
    return wrong


def on_signal(number: int, frame: FrameType | None) -> NoReturn:
    """End in the usual way, by way of what cleans up."""
    sys.exit(128 + number)


def main() -> int:
    """Parse the flags, run the demo, say how it went."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ports", default="8001,8002,8003", help="of the three nodes")
    parser.add_argument("--api-port", type=int, default=9999, help="of the HTTP interface")
    args = parser.parse_args()
    ports = [int(port) for port in args.ports.split(",")]
    if len({*ports, args.api_port}) != 4:
        parser.error("give three ports and another for --api-port, such as 8101,8102,8103 and 9998")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, on_signal)
    try:
        check_free([*ports, args.api_port])
        wrong = show(ports, f"127.0.0.1:{args.api_port}")
    except DemoError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    if wrong:
        print("Not as promised:", *wrong, sep="\n  ", file=sys.stderr)
        return 1
    print("As promised: each key was searched for once, at its owner; an unknown key is 404.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
