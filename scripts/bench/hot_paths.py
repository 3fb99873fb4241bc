"""The library's hot paths as functions to call again and again, for those who count or profile.

*Process*: one client of a node (`instructions.py`, `profiles.py`), which runs the application's
part of each path against the real node, and the worker's part by itself: what a request costs
there is counted from the frame's bytes to the reply's.

*Invariant*: a path does the same work each time it is called, so that two calls cost twice one.
Where a path can be named by the public interface it is; the others name what a request goes
through, and follow the library when it changes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import cachetools

import kamacache
from kamacache.cluster.membership import Member
from kamacache.cluster.ring import Ring
from kamacache.cluster.stream import FrameSplitter, pack
from kamacache.config import GroupSpec
from kamacache.store import private_shard
from kamacache.wire.frames import frame
from kamacache.wire.messages import (
    Answers,
    Get,
    Gets,
    Set,
    SetMany,
    Value,
    decode_reply,
    decode_request,
)
from kamacache.worker.handlers import Handlers, HostedGroup
from kamacache.worker.pools import GetterThreads
from kamacache.worker.protocol import Server

KEYS = 200
BATCH = 100
VALUE = bytes(100)
GROUPS = ("near:4MiB", "plain:4MiB")  # what the node must have
REFERENCE = "cachetools.LRUCache hit"


@dataclass(frozen=True)
class HotPath:
    """One path: ``run`` goes through it ``operations`` times."""

    name: str
    operations: int
    run: Callable[[], object]


def hot_paths(run_dir: Path) -> Iterator[HotPath]:
    """Yield the reference and then every path, filled and ready to run."""
    kamacache.attach(str(run_dir))
    keys = [f"key:{number}" for number in range(KEYS)]
    lru: cachetools.LRUCache[str, bytes] = cachetools.LRUCache(maxsize=KEYS)
    lru.update(dict.fromkeys(keys, VALUE))
    yield HotPath(REFERENCE, KEYS, each(lru.__getitem__, keys))
    yield from _application(keys)
    yield from _worker([key.encode() for key in keys])
    yield from _store([key.encode() for key in keys])
    yield from _cluster([key.encode() for key in keys])


def each(call: Callable[[Any], object], arguments: Sequence[Any]) -> Callable[[], None]:
    """Return a function that calls ``call`` with each of ``arguments``."""

    def run() -> None:
        for argument in arguments:
            call(argument)

    return run


def _application(keys: list[str]) -> Iterator[HotPath]:
    """What an attached process does itself; the node's part is not in it."""
    near = kamacache.Group("near", cache_bytes="4MiB", near_cache_items=32_768)
    plain = kamacache.Group("plain", cache_bytes="4MiB", near_cache_items=0)
    batches = [keys[at : at + BATCH] for at in range(0, len(keys), BATCH)]
    pairs = [dict.fromkeys(batch, VALUE) for batch in batches]
    for group in (near, plain):
        group.set_many(dict.fromkeys(keys, VALUE))
        if group.get_many(keys) != dict.fromkeys(keys, VALUE):
            raise RuntimeError(f"{group!r} lost values that it was given")
    yield HotPath("local hit, near cache on", len(keys), each(near.get, keys))
    yield HotPath("local hit, near cache off", len(keys), each(plain.get, keys))
    yield HotPath("get_many of 100, a key, near cache on", len(keys), each(near.get_many, batches))
    yield HotPath(
        "get_many of 100, a key, near cache off", len(keys), each(plain.get_many, batches)
    )
    yield HotPath(
        "set, the application's part", len(keys), each(lambda key: plain.set(key, VALUE), keys)
    )
    yield HotPath(
        "set_many of 100, a key, the application's part", len(keys), each(plain.set_many, pairs)
    )


class Replies:
    """A transport that takes what a worker writes, and drops it."""

    def write(self, data: bytes) -> None:
        """Take the replies of one read."""

    def get_write_buffer_size(self) -> int:
        """Say that all was sent."""
        return 0

    def set_write_buffer_limits(self, high: int) -> None:
        """Take the bounds."""


def _worker(keys: list[bytes]) -> Iterator[HotPath]:
    """What a worker does from a request's bytes to its reply's, sockets and loop left out."""
    spec = GroupSpec(name="g", cache_bytes=4 << 20)
    loop = asyncio.new_event_loop()
    writer, _ = private_shard(spec)
    hosted = HostedGroup(spec, writer, None, GetterThreads(loop, lambda: None))
    connection = Server(Handlers({"g": hosted}, loop), loop).connection()
    connection.connection_made(cast(asyncio.Transport, Replies()))
    sets = [frame(Set(group="g", key=key, value=VALUE, id=1, budget_ms=1_000)) for key in keys]
    gets = [frame(Get(group="g", key=key, id=1, budget_ms=1_000)) for key in keys]
    many = [
        frame(SetMany(group="g", items=[(key, VALUE) for key in part], id=1, budget_ms=1_000))
        for part in (keys[at : at + BATCH] for at in range(0, len(keys), BATCH))
    ]
    received = connection.data_received
    each(received, sets)()
    if writer.stats()["items"] != len(keys):
        raise RuntimeError("the worker did not keep what it was sent")
    yield HotPath("set, the worker's part", len(keys), each(received, sets))
    yield HotPath("set_many of 100, a key, the worker's part", len(keys), each(received, many))
    yield HotPath("get of a hit, the worker's part", len(keys), each(received, gets))
    loop.close()


def _store(keys: list[bytes]) -> Iterator[HotPath]:
    """The writer alone: keys that are replaced, and new keys into a shard that is full."""
    writer, _ = private_shard(GroupSpec(name="g", cache_bytes=4 << 20))
    yield HotPath("put", len(keys), each(lambda key: writer.put(key, VALUE), keys))
    # Of the least size: 400 puts fill 14 of its segments, so two runs evict as much as each other.
    full, _ = private_shard(GroupSpec(name="g", cache_bytes=1))
    fresh = _numbers()
    count = 2 * len(keys)
    while full.stats()["evictions"] < 6_000:  # three times what it holds: it is settled
        full.put_many([(next(fresh), VALUE) for _ in range(BATCH)])

    def put_new() -> None:
        for _ in range(count):
            full.put(next(fresh), VALUE)

    yield HotPath("put of a new key, lru evicts", count, put_new)


def _numbers() -> Iterator[bytes]:
    number = 0
    while True:
        yield b"k%011d" % number
        number += 1


def _cluster(keys: list[bytes]) -> Iterator[HotPath]:
    """Whose key it is, and what a peer link does to a request and its reply."""
    ring = Ring([Member(f"10.0.0.{number}:8001") for number in range(1, 11)])
    yield HotPath("owner on a ring of 10", len(keys), each(ring.owner, keys))
    splitter = FrameSplitter()

    def carried(messages: list[Any], decode: Callable[[Any], object]) -> None:
        frames = [frame(message) for message in messages]
        for body in splitter.bodies(pack(frames, sum(map(len, frames)))):
            decode(body)

    requests = [Get(group="g", key=key, id=1, budget_ms=1_000, flags=1) for key in keys]
    replies = [Value(1, VALUE, 1_000, 1) for _ in keys]
    parts = [slice(at, at + BATCH) for at in range(0, len(keys), BATCH)]

    def there_and_back(part: slice) -> None:
        carried(requests[part], decode_request)
        carried(replies[part], decode_reply)

    yield HotPath("peer frame, there and back", len(keys), each(there_and_back, parts))
    asked = [Gets(group="g", keys=keys[part], id=1, budget_ms=1_000, flags=1) for part in parts]
    told = [1_000] * BATCH
    answers = Answers(1, [VALUE] * BATCH, ttls=told, versions=told)

    def together(request: Gets) -> None:
        carried([request], decode_request)
        carried([answers], decode_reply)

    yield HotPath(f"peer Gets of {BATCH}, there and back, a key", len(keys), each(together, asked))
