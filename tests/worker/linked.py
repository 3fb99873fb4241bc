"""Workers of several nodes in one loop: real handlers, loaders and shards, links without a network.

What `kamacache.cluster.link` does between processes, `DirectLink` does by calling the other
worker's handlers, as the front of its node would. Cutting a link, slowing it down and losing what
was sent on it is then one assignment.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

from kamacache.clock import boottime_ms
from kamacache.cluster.exchange import PeerLostError
from kamacache.cluster.membership import Member, Membership
from kamacache.cluster.owed import OwedFile
from kamacache.cluster.peers import Link, Peers
from kamacache.config import GroupSpec
from kamacache.errors import DeadlineExceededError, KamaCacheError
from kamacache.limits import HANDOFF_S
from kamacache.store import ShardWriter, geometry
from kamacache.store.arena import private_arena
from kamacache.wire.messages import (
    FROM_PEER,
    Answers,
    Delete,
    DeleteMany,
    Done,
    Failure,
    Flush,
    Get,
    GetMany,
    Gets,
    Invalidate,
    Reply,
    Request,
    Set,
    SetMany,
    Value,
    Values,
)
from kamacache.wire.parts import answered
from kamacache.worker.handlers import Handlers, HostedGroup
from kamacache.worker.pools import GetterThreads
from kamacache.worker.replies import failure
from kamacache.worker.writes import Writes
from tests.worker.harness import Loading


class Asking:
    """A connection of a client, with one request under way."""

    def __init__(self, done: Callable[[Reply], None]) -> None:
        self.waiters: dict[Any, None] = {}
        self.answer = done


class DirectLink:
    """From one node to another."""

    def __init__(
        self, own: Node, address: str, nodes: dict[str, Node], former: Link | None
    ) -> None:
        self.address = address
        self._own = own
        self._nodes = nodes
        self._usable = True
        self.draining = False
        self.settled = True
        self.swallow = False  # requests are taken, and no answer ever comes
        self.sent: list[Request] = []
        self._queue: list[tuple[str, list[tuple[bytes, int]]]] = []
        self._flushes: list[str] = []
        if isinstance(former, DirectLink):
            self._queue, self._flushes = former._queue, former._flushes
        self._under_way: dict[int, Callable[[Any], None]] = {}
        self._ids = 0

    @property
    def usable(self) -> bool:
        return self._usable and not self.draining

    @property
    def up(self) -> bool:
        return self._usable

    @property
    def life(self) -> str:
        return ""

    @property
    def pending_invalidations(self) -> int:
        return len(self._queue)

    def start(self) -> None:
        self.heal()

    async def wait_settled(self) -> None: ...

    async def close(self) -> None:
        self.cut()

    def retry_now(self) -> None: ...

    def cut(self) -> None:
        """Fail: what is under way is lost."""
        self._usable = False
        under_way, self._under_way = self._under_way, {}
        for done in under_way.values():
            self._own.loop.call_soon(done, PeerLostError("the link failed", sent=True))
        self._own.peers.link_changed(self)

    def heal(self) -> None:
        """Deliver the invalidations that waited, then be up."""
        queue, self._queue = self._queue, []
        self._usable = True
        for group, items in queue:
            self.invalidate(group, items)
        flushes, self._flushes = self._flushes, []
        for name in flushes:
            flush = Flush(group=name, version=self._own.clock(), whole=True, flags=FROM_PEER)
            self._own.loop.call_soon(self._nodes[self.address].take, flush, lambda reply: None)
        self._own.peers.link_changed(self)

    def send(self, request: Request, done: Callable[[Any], None], deadline_s: float) -> None:
        loop = self._own.loop
        self.sent.append(request)
        if not self._usable:
            loop.call_soon(done, PeerLostError("the link failed", sent=False))
            return
        self._ids += 1
        ticket = self._ids
        request.flags |= FROM_PEER
        request.id = ticket
        request.sent = self._own.clock()
        request.until_ms = boottime_ms() + int((deadline_s - time.monotonic()) * 1000)
        request.budget_ms = max(int((deadline_s - time.monotonic()) * 1000), 1)
        timer = loop.call_later(
            max(deadline_s - time.monotonic(), 0), self._end, ticket, DeadlineExceededError("late")
        )

        left = len(request.keys) if isinstance(request, Gets) else 0

        def end(outcome: Any) -> None:
            nonlocal left
            if type(outcome) is Answers:
                left -= len(answered(outcome))
                if left > 0 and ticket in self._under_way:
                    done(outcome)
                    return
            timer.cancel()
            self._end(ticket, outcome)

        self._under_way[ticket] = done
        if not self.swallow:
            loop.call_soon(self._nodes[self.address].take, request, end)

    def _end(self, ticket: int, outcome: Any) -> None:
        done = self._under_way.pop(ticket, None)
        if done is not None:
            done(outcome)

    def invalidate(self, group: str, items: Sequence[tuple[bytes, int]]) -> None:
        if not self._usable or self.swallow:
            self._queue.append((group, list(items)))
            return
        request = Invalidate(group=group, items=list(items), flags=FROM_PEER)
        self._own.loop.call_soon(self._nodes[self.address].take, request, lambda reply: None)

    def flush(self) -> None:
        raise AssertionError("no test writes so much")

    def flush_whole(self, group: str) -> None:
        self._flushes.append(group)

    def stats(self) -> dict[str, int]:
        return {"requests": len(self.sent)}


def _cut(link: Link) -> None:
    assert isinstance(link, DirectLink)
    link.cut()


def owed_in_memory() -> OwedFile:
    """Return the file of a worker that has no successor."""
    fd = os.memfd_create("owed")
    try:
        return OwedFile(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)


class Node:
    """One node of one worker, with one group named g."""

    def __init__(
        self,
        name: str,
        nodes: dict[str, Node],
        getter: Callable[[Any], Any] | None,
        *,
        handoff_s: float = HANDOFF_S,
        getter_many: Callable[[Any], Any] | None = None,
        **settings: Any,
    ) -> None:
        self.name = name
        self.loop = asyncio.get_running_loop()
        self._nodes = nodes
        nodes[name] = self
        self.peers = Peers(
            lambda address, former: DirectLink(self, address, nodes, former),
            time.monotonic,
            close=_cut,
            owed=owed_in_memory(),
            handoff_s=handoff_s,
        )
        spec = GroupSpec(name="g", cache_bytes=1 << 22, **settings)
        self.shard = ShardWriter(
            private_arena(geometry(spec.cache_bytes, spec.item_bytes_mean)),
            group=spec.name,
            eviction=spec.eviction,
            hash_seed=1,
            mirror_share=spec.mirror_share,
        )
        threads = GetterThreads(self.loop, lambda: None)
        self.threads = threads
        self.group = HostedGroup(
            spec, self.shard, Loading(spec, getter, getter_many), threads, self.peers
        )
        self.groups = groups = {"g": self.group}
        self.handlers = Handlers(groups, self.loop)
        self.writes = Writes(groups, self.peers, self.loop)
        self.writes.join(self.handlers)

    def clock(self) -> int:
        return max(time.time_ns() >> 8, self.shard.last_version)

    def join(self, *names: str, number: int = 1) -> None:
        """Take a membership."""
        members = tuple(sorted(Member(name) for name in {*names, self.name}))
        self.peers.update(Membership(number=number, own=self.name, members=members))

    def link(self, name: str) -> DirectLink:
        found = next(link for link in self.peers.links if link.address == name)
        assert isinstance(found, DirectLink)
        return found

    def take(self, request: Any, done: Callable[[Any], None]) -> None:
        """Answer as front and worker do."""
        try:
            reply = self.handlers.table[type(request)](request, Asking(done))
        except KamaCacheError as error:
            reply = failure(request.id, error)
        if reply is not None:
            done(reply)

    async def ask(self, request: Request, timeout_s: float = 5.0) -> Reply:
        """Ask as an application does."""
        request.group = "g"
        request.id = 1
        request.budget_ms = request.budget_ms or int(timeout_s * 1000)
        answer: asyncio.Future[Reply] = self.loop.create_future()
        self.take(request, answer.set_result)
        return await asyncio.wait_for(answer, timeout_s)

    async def get(self, key: bytes, **fields: Any) -> bytes | Failure | None:
        reply = await self.ask(Get(key=key, **fields))
        return reply.value if isinstance(reply, Value) else _failed(reply)

    async def get_many(self, keys: list[bytes]) -> list[bytes | None]:
        reply = await self.ask(GetMany(keys=keys))
        assert isinstance(reply, Values), reply
        assert not reply.errors, reply.errors
        return reply.values

    async def set(self, key: bytes, value: bytes, ttl_ms: int | None = None) -> Reply:
        return await self.ask(Set(key=key, value=value, ttl_ms=ttl_ms))

    async def set_many(self, items: dict[bytes, bytes]) -> Reply:
        return await self.ask(SetMany(items=list(items.items())))

    async def delete(self, key: bytes) -> int:
        reply = await self.ask(Delete(key=key))
        assert isinstance(reply, Done), reply
        return reply.count

    async def delete_many(self, keys: list[bytes]) -> int:
        reply = await self.ask(DeleteMany(keys=keys))
        assert isinstance(reply, Done), reply
        return reply.count

    def held(self, key: bytes) -> bytes | None:
        """What this node's memory has."""
        held = self.shard.held(key)
        return None if held is None else held.value

    def close(self) -> None:
        self.threads.close()
        self.shard.close()


def _failed(reply: Reply) -> Failure:
    assert isinstance(reply, Failure), reply
    return reply


def key_of(owner: Node, nodes: Sequence[Node], *, then: str | None = None) -> bytes:
    """Return a key that the ring of all these nodes gives to one; ``then``: to whom next."""
    from kamacache.cluster.ring import Ring

    ring = Ring([Member(node.name) for node in nodes])
    for number in range(10_000):
        key = b"key-%d" % number
        owners = list(ring.owners(key))
        if owners[0] == owner.name and then in (None, owners[1]):
            return key
    raise AssertionError("no such key")
