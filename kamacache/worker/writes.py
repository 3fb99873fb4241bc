"""Sets and deletes in a cluster: to the owner, with a version, and out of all other copies.

*Process*: worker, in the loop's thread::

    set ──► the ring: ours? ── yes ──► stored, version assigned ──► acknowledged
      │                                    └──► invalidation to every other node (queued, batched)
      └─ another node's ──► over its link ──► acknowledged with its version
                                └──► our mirror replaced (one key) or dropped (several)

*Invariants*:

- A write that a peer has given up is refused, and it gives up `PEER_WRITE_S` after it sent it, by
  the receiver's own clock. So when a link fails under a write, the writer waits for that time to
  pass and may then write at the next node: no late copy of it can overtake what is written there.
- What this node stores while the ring, as it sees it, names another owner is a mirror.
- An invalidation drops what is older than the write it tells of, whoever owns it, and detaches the
  key's loads and fetches.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

from kamacache.clock import boottime_ms
from kamacache.cluster.peers import Link, Peers
from kamacache.errors import (
    DeadlineExceededError,
)
from kamacache.limits import PEER_WRITE_S
from kamacache.rundir.meters import WORKER, Region
from kamacache.wire.messages import (
    FROM_PEER,
    Delete,
    DeleteMany,
    Done,
    Invalidate,
    PeerSeen,
    Reply,
    Request,
    Set,
    SetMany,
)
from kamacache.worker.fetches import ClusterReads
from kamacache.worker.flushing import Flushing
from kamacache.worker.handlers import (
    Handlers,
    HostedGroup,
    check_batch,
    check_key,
    distinct_items,
    observe,
)
from kamacache.worker.pending import Item, PendingWrite
from kamacache.worker.waiters import Asker

COUNTERS: Final = (
    "writes_sent",
    "writes_rerouted",
    "writes_not_owned",
    "writes_late",
    "invalidations_taken",
    "flushes_taken",
)
_, _, NOT_OWNED, LATE, INVALIDATIONS, FLUSHES = map(WORKER.at, COUNTERS)


class Writes:
    """What a worker with peers does with writes; `join` puts it into the handlers' table."""

    def __init__(
        self,
        groups: dict[str, HostedGroup],
        peers: Peers,
        loop: asyncio.AbstractEventLoop,
        meters: Region | None = None,
    ) -> None:
        """``meters`` are the worker's; None: as in a test."""
        self.peers = peers
        self.loop = loop
        self.meters = meters or Region(WORKER)
        self.counts = self.meters.words  # add to a word by its place
        self._groups = groups
        self._flushing = Flushing(groups, loop, peers, self._flushed)

    def join(self, handlers: Handlers) -> None:
        """Take over the writes of a worker's handlers."""
        self._group = handlers.group
        handlers.table.update(
            {
                Set: self.set,
                SetMany: self.set_many,
                Delete: self.delete,
                DeleteMany: self.delete_many,
                Invalidate: self.invalidate,
                PeerSeen: self.peer_seen,
            }
        )
        self._flushing.join(handlers)

    def set(self, request: Set, asker: Asker) -> Reply | None:
        """Store a value where it belongs."""
        group = self._groups.get(request.group) or self._group(request.group)
        check_key(request.key)
        return self._write(group, request, asker, [(request.key, request.value)])

    def set_many(self, request: SetMany, asker: Asker) -> Reply | None:
        """Store values where they belong."""
        group = self._group(request.group)
        return self._write(group, request, asker, distinct_items(request))

    def delete(self, request: Delete, asker: Asker) -> Reply | None:
        """Remove a key, wherever it is."""
        group = self._groups.get(request.group) or self._group(request.group)
        check_key(request.key)
        return self._write(group, request, asker, [(request.key, None)])

    def delete_many(self, request: DeleteMany, asker: Asker) -> Reply | None:
        """Remove keys, wherever they are."""
        group = self._group(request.group)
        check_batch(len(request.keys))
        for key in request.keys:
            check_key(key)
        return self._write(group, request, asker, [(k, None) for k in dict.fromkeys(request.keys)])

    def invalidate(self, request: Invalidate, asker: Asker) -> Reply:
        """Drop what another node's writes made old."""
        group = self._groups.get(request.group)
        if group is None:  # a group that only some nodes have
            return Done(request.id, 0)
        check_batch(len(request.items))
        reads = group.reads
        assert isinstance(reads, ClusterReads)
        shard, detach, written, dropped = group.shard, reads.detach, reads.written, 0
        observe(shard, max([version for _, version in request.items], default=0))
        for key, version in request.items:
            detach(key)
            written(key, version)
            dropped += shard.drop_older(key, version)
        self.counts[INVALIDATIONS] += len(request.items)
        return Done(request.id, dropped)

    def _flushed(self) -> None:
        self.counts[FLUSHES] += 1

    def peer_seen(self, request: PeerSeen, asker: Asker) -> Reply:
        """Try the link to a node that said hello to ours."""
        self.peers.seen(request.peer)
        return Done(request.id, 0)

    # -- the way of a write -----------------------------------------------------------------

    def _write(
        self, group: HostedGroup, request: Request, asker: Asker, items: Sequence[Item]
    ) -> Reply | None:
        if request.flags & FROM_PEER:
            self._check_fresh(group, request)
            return Done(request.id, *self.apply(group, request, items))
        ours, theirs = self.split(items)
        if not theirs:
            return Done(request.id, *self.apply(group, request, ours))
        # The ones of other nodes first: ours are stored only when the batch can be sent at all.
        write = PendingWrite(self, group, request, asker)
        write.begin(ours, theirs)
        return None

    def split(self, items: Sequence[Item]) -> tuple[list[Item], dict[Link, list[Item]]]:
        """Return which items are this node's, and which go over which link."""
        ours: list[Item] = []
        theirs: dict[Link, list[Item]] = {}
        for item in items:
            link = self.peers.route(item[0])
            if link is None:
                ours.append(item)
            else:
                theirs.setdefault(link, []).append(item)
        return ours, theirs

    def apply(self, group: HostedGroup, request: Request, items: Sequence[Item]) -> tuple[int, int]:
        """Store or drop here, tell the other nodes; return the count and the version."""
        ttl_ms = getattr(request, "ttl_ms", None)
        reads = group.reads
        assert isinstance(reads, ClusterReads)
        owned: list[tuple[bytes, bytes]] = []
        count = 0
        before = group.shard.last_version
        for key, value in items:
            if value is None:
                reads.detach(key)
                count += group.shard.delete(key)
            elif self.peers.owns(key):
                owned.append((key, value))
            else:
                self._put_mirror(group, key, value, ttl_ms)
                count += 1
        if len(owned) == 1:
            group.put(*owned[0], ttl_ms)
        elif owned:
            group.put_many(owned, ttl_ms)
        for key, _ in owned:
            reads.detach(key)
        count += len(owned)
        # That of the one record, if it was stored; else one above all that this step has given.
        version = group.shard.last_version
        if version == before or len(items) > 1 or items[0][1] is None:
            version = group.shard.now()
        for key, _ in items:
            reads.written(key, version)
        self.peers.invalidate(group.spec.name, [(key, version) for key, _ in items])
        return count, version

    def _put_mirror(self, group: HostedGroup, key: bytes, value: bytes, ttl_ms: int | None) -> None:
        """Store what the ring gives to another node, as far as this node sees it."""
        self.counts[NOT_OWNED] += 1
        expiry_ms = group.expiry_after(ttl_ms)
        group.reads.detach(key)
        mirror_ttl_ms = group.spec.mirror_ttl_ms
        latest_ms = boottime_ms() + mirror_ttl_ms
        expiry_ms = min(expiry_ms or latest_ms, latest_ms)
        if not mirror_ttl_ms or not group.shard.put(key, value, expiry_ms, mirror=True):
            group.shard.delete(key)

    def _check_fresh(self, group: HostedGroup, request: Request) -> None:
        if request.sent:
            observe(group.shard, request.sent)
        if request.until_ms and boottime_ms() > request.until_ms:
            self.counts[LATE] += 1
            raise DeadlineExceededError(
                f"group {request.group!r}: the write arrived when its sender had given it up",
                group=request.group,
                timeout_s=PEER_WRITE_S,
            )

    def stats(self) -> dict[str, int]:
        """Return the counters."""
        counts = self.meters.counts()
        return {name: counts[name] for name in COUNTERS}
