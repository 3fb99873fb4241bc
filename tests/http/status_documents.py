"""Nodes that there are not, for the status page: snapshots of every state that it has to show.

`StatusServer` shows one of them to a browser, and what it shows can be changed while it does.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

import msgspec

from kamacache.cluster.membership import Member
from kamacache.cluster.ring import Ring
from kamacache.http.changes import Changes
from kamacache.http.history import COLUMNS, History, mark_of
from kamacache.http.status import document, peer_states, state_of
from kamacache.http.status_page import page_document
from kamacache.local.snapshot import (
    FrontInfo,
    GroupInfo,
    GrpcMethod,
    HttpInfo,
    MemberInfo,
    MembershipInfo,
    NodeInfo,
    NodeSnapshot,
    PeerInfo,
    RoleInfo,
    ShardInfo,
    WorkerInfo,
    call_histogram,
    load_histogram,
)

UNIX_S = 1_800_000_000.0
BOOTTIME_MS = 900_000_000


def snapshot(
    at_s: float = 0.0,
    *,
    groups: int = 3,
    members: int = 4,
    workers: int = 4,
    state: Any = "ready",
    unix_s: float = UNIX_S,
) -> NodeSnapshot:
    """Return a busy node ``at_s`` seconds after its first look at it; 0 or 1 member: alone."""
    now_ms = BOOTTIME_MS + int(at_s * 1000)
    addresses = [f"10.20.{i // 250}.{i % 250 + 1}:8001" for i in range(members)]
    clustered = members > 1
    node = NodeInfo(
        name=addresses[0] if addresses else "10.20.0.1:8001",
        version="0.1.0",
        python="3.11.7",
        epoch="e5f1c2",
        pid=4100,
        state=state,
        serving=state == "ready",
        serve_until_left_ms=1800,
        ready=state == "ready",
        began_ms=BOOTTIME_MS - 7_512_000,
        began_unix_s=unix_s - 7_512,
        uptime_s=7512 + at_s,
        workers=workers,
        fronts=2,
        listen="0.0.0.0:8001",
        api="0.0.0.0:9999",
        clustered=clustered,
        run_dir="/run/kamacache",
        shm_dir="/dev/shm/kamacache",
        boottime_ms=now_ms,
        unix_s=unix_s + at_s,
        reloads=1,
        reloads_refused=0,
    )
    return NodeSnapshot(
        node=node,
        roles=_roles(workers, at_s, clustered),
        membership=_membership(addresses) if clustered else None,
        peers=[_peer(i, address, at_s) for i, address in enumerate(addresses)][1:],
        workers=[
            WorkerInfo(index=i, answered=True, answer_s=0.001, connections=9, loads_running=i % 3)
            for i in range(workers)
        ],
        groups=[_group(i, at_s, workers) for i in range(groups)],
        grpc=[_grpc(at_s)],
        fronts=[FrontInfo(index=i, calls_in_flight=2 + i, peer_streams=6) for i in range(2)],
        http=HttpInfo(in_flight=1, connections=4),
    )


def _roles(workers: int, at_s: float, clustered: bool) -> list[RoleInfo]:
    places = [("supervisor", 0), *(("worker", i) for i in range(workers))]
    places += [("front", 0), ("front", 1), ("http", 0), *([("agent", 0)] if clustered else [])]
    return [
        RoleInfo(
            role=role,
            index=index,
            pid=4100 + number,
            ready=True,
            restarts=0,
            started_ms=BOOTTIME_MS - 7_510_000,
            cpu_s=at_s * (0.31 if role in ("worker", "front") else 0.004) * (1 + index / 9),
            rss_bytes=(88 << 20) + number * 1_234_567,
            own_bytes=(31 << 20) + number * 234_567,
        )
        for number, (role, index) in enumerate(places)
    ]


@functools.cache  # a ring of 300 nodes takes a second
def _shares(addresses: tuple[str, ...]) -> dict[str, float]:
    return Ring(Member(address) for address in addresses).shares()


def _membership(addresses: list[str]) -> MembershipInfo:
    shares = _shares(tuple(addresses))
    members = [MemberInfo(address=a, weight=1, share=shares[a]) for a in addresses]
    return MembershipInfo(number=12, own=addresses[0], members=members)


def _wave(at_s: float, size: float, period_s: float) -> float:
    """Return a counter whose rate swings around 1."""
    return at_s + size * period_s / 6.283 * (1 - math.cos(at_s * 6.283 / period_s))


def _peer(number: int, address: str, at_s: float) -> PeerInfo:
    peer = PeerInfo(address=address, member=True, links=4, usable=4, connects=4)
    calls = int(_wave(at_s, 0.4, 240) * 160)
    peer.calls, peer.in_flight, peer.invalidations_sent = calls, number % 3, calls // 9
    peer.seconds = call_histogram()
    peer.seconds.counts[2:7] = [int(calls * p) for p in (0.3, 0.5, 0.16, 0.03, 0.01)]
    return peer


def _group(number: int, at_s: float, workers: int) -> GroupInfo:
    names = ("scores", "sessions", "user-profiles")
    name = names[number] if number < len(names) else f"group-{number:03d}"
    gets = _wave(at_s, 0.35, 300 + 20 * number) * 21_000 / (1 + number)
    slower_s = max(0.0, at_s - 400)
    loads = int((gets + slower_s * 9_000) * (0.004 + 0.01 * number))
    seconds = load_histogram()
    shape = (0.1, 0.3, 0.35, 0.18, 0.05, 0.02)
    slow = 2 if at_s > 400 else 1
    seconds.counts[slow : slow + 6] = [int(loads * p) for p in shape]
    capacity = 64 << 20
    fill = 0.55 + 0.4 * ((number * 37) % 10) / 10
    shard = capacity // workers
    return GroupInfo(
        name=name,
        spec={"has_getter": True},
        gets=int(gets),
        near_hits=int(gets * 0.71),
        memory_hits=int(gets * 0.21),
        negative_hits=int(gets * 0.02),
        misses=int(gets * 0.06),
        worker_hits=int(gets * 0.02),
        loads=loads,
        fetches=loads * 2,
        load_seconds=seconds,
        shards=[
            ShardInfo(
                worker=i,
                items=int(shard * fill / 180),
                live_bytes=int(shard * fill),
                capacity_bytes=shard,
                mirror_bytes=shard // 20,
                evictions=int(loads * 0.5 / workers),
            )
            for i in range(workers)
        ],
    )


def _grpc(at_s: float) -> GrpcMethod:
    calls = int(_wave(at_s, 0.2, 200) * 900)
    seconds = call_histogram()
    seconds.counts[1:6] = [int(calls * p) for p in (0.15, 0.6, 0.2, 0.04, 0.01)]
    return GrpcMethod(method="Get", codes={"OK": calls}, seconds=seconds)


class Watched:
    """A document as /status.json gives it, of snapshots that a test makes."""

    def __init__(self) -> None:
        self.history = History()
        self.changes = Changes()
        self.document: dict[str, Any] = {}

    def take(self, shot: NodeSnapshot) -> dict[str, Any]:
        """Take the next snapshot; return the document."""
        now = mark_of(shot)
        self.changes.note(shot, state_of(shot), peer_states(shot))
        now_ms = int(shot.node.unix_s * 1000)
        self.history.add(now, now_ms)
        before = self.history.recent(now)
        self.history.note(now)
        document_now = document(shot, now, before, self.changes)
        points = msgspec.json.decode(self.history.since(0, now_ms))
        history = {"columns": list(COLUMNS), "points": points}
        self.document = msgspec.to_builtins({**document_now, "history": history})
        return self.document


def watched(
    change: Callable[[NodeSnapshot], None] | None = None, *, seconds: int = 600, **shape: Any
) -> dict[str, Any]:
    """Return the document after some time of a busy node; ``change`` is made to the last look."""
    node = Watched()
    for at_s in range(0, seconds + 1, 2):
        shot = snapshot(float(at_s), **shape)
        if change is not None and at_s >= seconds - 1:
            change(shot)
        node.take(shot)
    return node.document


class StatusServer:
    """The page and one document, on a port of 127.0.0.1; a context manager."""

    def __init__(self, shown: dict[str, Any] | None = None) -> None:
        self.shown: dict[str, Any] | None = shown
        self.asked = 0
        html, policy = page_document()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path == "/":
                    self.reply(200, html.encode(), "text/html; charset=utf-8")
                elif self.path.startswith("/status.json"):
                    outer.asked += 1
                    body = msgspec.json.encode(outer.shown or {"message": "the node is away"})
                    self.reply(200 if outer.shown else 503, body, "application/json")
                else:
                    self.reply(404, b"", "text/plain")

            def reply(self, status: int, body: bytes, kind: str) -> None:
                self.send_response(status)
                self.send_header("content-type", kind)
                self.send_header("content-length", str(len(body)))
                self.send_header("content-security-policy", policy)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: Any) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self.url = f"http://127.0.0.1:{self._server.server_port}/"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
