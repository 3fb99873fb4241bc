"""Flushes: all of a group's records dropped, in this worker and, where asked, at the other nodes.

*Process*: worker, in the loop's thread. Two who ask: a peer that has lost track of what this node
must drop, and the ``kamacache flush`` command (`kamacache.local.flushing`)::

    command ──► Flush ──► each worker of its node              round 1: whole, as of each clock
       └──────► FlushPeers ──► one of them ──► Flush ──► every node whose link is usable
                                     └─ down ──► into that link's queue: told when it is back
       then the same once more, with the latest version that anyone has answered

*Invariants*:

- What is loaded, fetched or peeked at when the flush comes is detached: it answers those who wait
  and stores nothing.
- A version below the flush's is not stored afterwards either (`Loader.floor`): another node that
  has not been flushed yet may still answer with it.
- The second round has one version for all nodes. A node that was flushed first may have asked one
  that came later, and those who wait for such an answer were told of the first round only. After
  it no node that answered has, keeps or waits for what is older.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

from kamacache.errors import KamaCacheError
from kamacache.limits import CALL_TIMEOUT_MAX_S, PEER_RETURN_S, SWEEP_SLOTS
from kamacache.wire.messages import (
    FROM_PEER,
    Done,
    Failure,
    Flush,
    FlushPeers,
    NodeFlushed,
    PeersFlushed,
    Reply,
)
from kamacache.worker.fetches import ClusterReads
from kamacache.worker.handlers import Handlers, HostedGroup, observe
from kamacache.worker.replies import failure
from kamacache.worker.waiters import Asker

if TYPE_CHECKING:
    from kamacache.cluster.peers import Link, Peers

LOOK_EVERY_S: Final = 0.02  # at a link of a node that has just come back


class Flushing:
    """The flushes of one worker; `join` puts it into the handlers' table."""

    def __init__(
        self,
        groups: dict[str, HostedGroup],
        loop: asyncio.AbstractEventLoop,
        peers: Peers | None = None,
        flushed: Callable[[], None] = lambda: None,
    ) -> None:
        """``peers`` None: a node without. ``flushed`` is called for each flush that ended."""
        self._groups = groups
        self._loop = loop
        self._peers = peers
        self._flushed = flushed
        self._tasks: set[asyncio.Task[None]] = set()

    def join(self, handlers: Handlers) -> None:
        """Take over the flushes of a worker's handlers."""
        self._group = handlers.group
        handlers.table.update({Flush: self.flush, FlushPeers: self.flush_peers})

    def flush(self, request: Flush, asker: Asker) -> Reply | None:
        """Drop all that is older than a version, a slice at a time; answer when it is gone."""
        groups = self._groups_of(request.group, known=not request.flags & FROM_PEER)
        self._begin(self._flush(request, asker, groups))
        return None

    def flush_peers(self, request: FlushPeers, asker: Asker) -> Reply | None:
        """Have every other node flush; answer when those that are there have."""
        groups = self._groups_of(request.group, known=True)
        if self._peers is None or not groups:
            return PeersFlushed(request.id)
        self._begin(self._flush_peers(request, asker, self._peers, groups))
        return None

    def _groups_of(self, name: str, *, known: bool) -> list[HostedGroup]:
        """Return the groups that are meant; one that only some nodes have may be missing."""
        if not name:
            return list(self._groups.values())
        if known or name in self._groups:
            return [self._group(name)]
        return []

    def _begin(self, doing: Any) -> None:
        task = self._loop.create_task(doing)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- here --------------------------------------------------------------------------------

    async def _flush(self, request: Flush, asker: Asker, groups: Sequence[HostedGroup]) -> None:
        reply: Reply
        dropped, latest = 0, request.version
        try:
            for group in groups:
                shard = group.shard
                if request.version:
                    observe(shard, request.version)
                # A node whose clock is ahead of the asker's has records of later versions.
                version = shard.now() if request.whole else request.version
                latest = max(latest, version)
                group.loader.floor = max(group.loader.floor, version)
                self._detach_all(group, version)
                before = shard.stats()["invalidated"]
                start = 0
                while start >= 0:
                    start = shard.flush_older(version, start, SWEEP_SLOTS)
                    await asyncio.sleep(0)
                dropped += shard.stats()["invalidated"] - before
            self._flushed()
            reply = Done(request.id, dropped, latest)
        except KamaCacheError as error:
            reply = failure(request.id, error)
        asker.answer(reply)

    def _detach_all(self, group: HostedGroup, version: int) -> None:
        if isinstance(group.reads, ClusterReads):
            group.reads.detach_all(version)
        else:
            for key in [*group.flights]:
                group.loader.detach(key)

    # -- at the other nodes --------------------------------------------------------------------

    async def _flush_peers(
        self, request: FlushPeers, asker: Asker, peers: Peers, groups: Sequence[HostedGroup]
    ) -> None:
        name, links = request.group, peers.links
        deadline_s = time.monotonic() + min(request.budget_ms / 1000, CALL_TIMEOUT_MAX_S)
        version = request.version or max([group.shard.now() for group in groups])
        peers.flush_absent(name)
        whole = not request.version

        def tell(link: Link) -> Any:
            flush = Flush(group=name, version=version, whole=whole)
            return self._tell(peers, link, flush, deadline_s)

        answers = await asyncio.gather(*map(tell, links))
        latest = max([version, *(version for _, version in answers)])
        asker.answer(PeersFlushed(request.id, latest, [node for node, _ in answers]))

    async def _tell(
        self, peers: Peers, link: Link, flush: Flush, deadline_s: float
    ) -> tuple[NodeFlushed, int]:
        """Have one node flush: now, or when its link is back."""
        address, group = link.address, flush.group
        returned_s = min(time.monotonic() + 2 * PEER_RETURN_S, deadline_s)
        while link.up and not link.usable and time.monotonic() < returned_s:  # noqa: ASYNC110
            await asyncio.sleep(LOOK_EVERY_S)
        if not link.usable:
            peers.owe_flush(link, group)
            return NodeFlushed(address, False, "it stops" if link.up else "the link is down"), 0
        done: asyncio.Future[Any] = self._loop.create_future()

        def answered(outcome: Any) -> None:
            if not done.done():
                done.set_result(outcome)

        link.send(flush, answered, deadline_s)
        outcome = await done
        if type(outcome) is Done:
            return NodeFlushed(address, True), outcome.version
        peers.owe_flush(link, group)
        why = outcome.message if type(outcome) is Failure else str(outcome)
        return NodeFlushed(address, False, why[:200]), 0
