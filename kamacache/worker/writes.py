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
import logging
import time
from collections.abc import Sequence
from functools import partial
from typing import Any, Final

from kamacache.clock import boottime_ms
from kamacache.cluster.exchange import PeerLostError
from kamacache.cluster.peers import Link, Peers
from kamacache.errors import (
    DeadlineExceededError,
    GroupNotFoundError,
    KamaCacheError,
    NodeUnavailableError,
    ValueTooLargeError,
    from_fields,
)
from kamacache.limits import PEER_TRIES_MAX, PEER_WRITE_S, SWEEP_SLOTS
from kamacache.wire.messages import (
    FROM_PEER,
    Delete,
    DeleteMany,
    Done,
    Failure,
    Flush,
    Invalidate,
    PeerSeen,
    Reply,
    Request,
    Set,
    SetMany,
)
from kamacache.worker.fetches import ClusterReads
from kamacache.worker.handlers import (
    Handlers,
    HostedGroup,
    check_batch,
    check_key,
    distinct_items,
)
from kamacache.worker.replies import failure
from kamacache.worker.waiters import Asker

NOT_SENT_RETRY_S: Final = 0.005

log = logging.getLogger("kamacache.worker.writes")

_TO_TRY_AGAIN: Final = (PeerLostError, NodeUnavailableError, DeadlineExceededError)

Item = tuple[bytes, bytes | None]  # a key and the value to set; None: delete


class Writes:
    """What a worker with peers does with writes; `join` puts it into the handlers' table."""

    def __init__(
        self, groups: dict[str, HostedGroup], peers: Peers, loop: asyncio.AbstractEventLoop
    ) -> None:
        self.peers: Final = peers
        self.loop: Final = loop
        self.counters: dict[str, int] = dict.fromkeys(
            (
                "writes_sent",
                "writes_rerouted",
                "writes_not_owned",
                "writes_late",
                "invalidations_taken",
                "flushes_taken",
            ),
            0,
        )
        self._groups = groups
        self._flushing: set[asyncio.Task[None]] = set()

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
                Flush: self.flush,
                PeerSeen: self.peer_seen,
            }
        )

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
        for key, version in request.items:
            detach(key)
            written(key, version)
            dropped += shard.drop_older(key, version)
        self.counters["invalidations_taken"] += len(request.items)
        return Done(request.id, dropped)

    def flush(self, request: Flush, asker: Asker) -> Reply | None:
        """Drop all that is older than a version, a slice at a time; answer when it is gone."""
        names = [request.group] if request.group else list(self._groups)
        groups = [self._groups[name] for name in names if name in self._groups]
        task = self.loop.create_task(self._flush(request, asker, groups))
        self._flushing.add(task)
        task.add_done_callback(self._flushing.discard)
        return None

    async def _flush(self, request: Flush, asker: Asker, groups: Sequence[HostedGroup]) -> None:
        reply: Reply = Done(request.id, 0)
        try:
            for group in groups:
                reads = group.reads
                assert isinstance(reads, ClusterReads)
                reads.detach_all(request.version)
                group.shard.observe(request.version)
                start = 0
                while start >= 0:
                    start = group.shard.flush_older(request.version, start, SWEEP_SLOTS)
                    await asyncio.sleep(0)
            self.counters["flushes_taken"] += 1
        except KamaCacheError as error:
            reply = failure(request.id, error)
        except OverflowError as error:
            reply = failure(request.id, KamaCacheError(f"a flush of no version: {error}"))
        asker.answer(reply)

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
        self.counters["writes_not_owned"] += 1
        expiry_ms = group.expiry_after(ttl_ms)
        group.reads.detach(key)
        mirror_ttl_ms = group.spec.mirror_ttl_ms
        latest_ms = boottime_ms() + mirror_ttl_ms
        expiry_ms = min(expiry_ms or latest_ms, latest_ms)
        if not mirror_ttl_ms or not group.shard.put(key, value, expiry_ms, mirror=True):
            group.shard.delete(key)

    def _check_fresh(self, group: HostedGroup, request: Request) -> None:
        if request.sent:
            group.shard.observe(request.sent)
        if request.until_ms and boottime_ms() > request.until_ms:
            self.counters["writes_late"] += 1
            raise DeadlineExceededError(
                f"group {request.group!r}: the write arrived when its sender had given it up",
                group=request.group,
                timeout_s=PEER_WRITE_S,
            )

    def stats(self) -> dict[str, int]:
        """Return the counters."""
        return dict(self.counters)


class PendingWrite:
    """One request whose keys, or some of them, other nodes own."""

    __slots__ = (
        "_asker",
        "_count",
        "_deadline_s",
        "_error",
        "_gone",
        "_group",
        "_outstanding",
        "_reads",
        "_request",
        "_version",
        "_writes",
    )

    def __init__(self, writes: Writes, group: HostedGroup, request: Request, asker: Asker) -> None:
        self._writes = writes
        assert isinstance(group.reads, ClusterReads)
        self._group = group
        self._reads = group.reads
        self._request = request
        self._asker = asker
        self._deadline_s = time.monotonic() + request.budget_ms / 1000
        self._outstanding = 0
        self._count = self._version = 0
        self._error: KamaCacheError | None = None
        self._gone = False
        asker.waiters[self] = None

    def begin(self, ours: Sequence[Item], theirs: dict[Link, list[Item]], tries: int = 0) -> None:
        """Send every part where it goes; the end comes later, never in this call."""
        for link, items in theirs.items():
            self._send(link, items, tries)
        if ours:
            self._outstanding += 1
            self._writes.loop.call_soon(self._apply, ours)

    def leave(self) -> None:
        """Be gone: the connection ended. What was sent goes on."""
        self._gone = True

    def _apply(self, items: Sequence[Item]) -> None:
        try:
            count, version = self._writes.apply(self._group, self._request, items)
            self._count += count
            self._version = max(self._version, version)
        except KamaCacheError as error:
            self._error = self._error or error
        except Exception as error:  # who waits must hear of it
            log.exception("a write failed unexpectedly")
            self._error = self._error or KamaCacheError(f"the worker failed: {error!r}")
        self._end_part()

    def _send(self, link: Link, items: list[Item], tries: int) -> None:
        self._outstanding += 1
        self._writes.counters["writes_sent"] += len(items)
        if len(items) == 1 and items[0][1] is not None:
            self._reads.set_begins(items[0][0])
        now_s = time.monotonic()
        deadline_s = min(self._deadline_s, now_s + PEER_WRITE_S)
        link.send(self._part(items), partial(self._answered, items, tries, now_s), deadline_s)

    def _part(self, items: list[Item]) -> Request:
        """Return the request for some of the items; one alone is told its version exactly."""
        whole = self._request
        group, depth, chain = whole.group, whole.depth, whole.chain
        if isinstance(whole, Set | SetMany):
            values = [(key, value or b"") for key, value in items]
            if len(values) > 1:
                return SetMany(
                    group=group, depth=depth, chain=chain, items=values, ttl_ms=whole.ttl_ms
                )
            key, value = values[0]
            return Set(
                group=group, depth=depth, chain=chain, key=key, value=value, ttl_ms=whole.ttl_ms
            )
        keys = [key for key, _ in items]
        if len(keys) > 1:
            return DeleteMany(group=group, depth=depth, chain=chain, keys=keys)
        return Delete(group=group, depth=depth, chain=chain, key=keys[0])

    def _answered(self, items: list[Item], tries: int, sent_s: float, outcome: Any) -> None:
        latest = 0
        if len(items) == 1 and items[0][1] is not None:
            latest = self._reads.set_ends(items[0][0])
        if type(outcome) is Done:
            self._done(items, outcome, latest)
            self._end_part()
            return
        error = outcome
        if type(outcome) is Failure:
            error = from_fields(outcome.kind, outcome.message, outcome.fields)
        if isinstance(error, GroupNotFoundError):
            error.message = f"the key's owner has not got this group: {error.message}"
        if not isinstance(error, _TO_TRY_AGAIN):
            if type(outcome) is not Failure:  # the link takes no more
                error = NodeUnavailableError(str(error))
            self._fail(error)
            return
        if tries >= PEER_TRIES_MAX or time.monotonic() >= self._deadline_s:
            self._fail(self._given_up(error))
            return
        # Until then a copy of it may still be stored by who got it.
        wait_s = NOT_SENT_RETRY_S
        if type(outcome) is not Failure and getattr(outcome, "sent", True):
            wait_s = max(sent_s + PEER_WRITE_S - time.monotonic(), NOT_SENT_RETRY_S)
        wait_s = min(wait_s, max(self._deadline_s - time.monotonic(), 0.0))
        self._writes.loop.call_later(wait_s, self._again, items, tries + 1)

    def _given_up(self, error: Exception) -> KamaCacheError:
        if time.monotonic() >= self._deadline_s:
            return DeadlineExceededError(
                f"group {self._request.group!r}: the key's owner did not answer before the "
                "deadline; the write may have been made",
                group=self._request.group,
            )
        return NodeUnavailableError(
            f"group {self._request.group!r}: no node took the write after {PEER_TRIES_MAX + 1} "
            f"tries; the last said: {error}"
        )

    def _again(self, items: list[Item], tries: int) -> None:
        if time.monotonic() >= self._deadline_s:
            self._fail(self._given_up(NodeUnavailableError("the deadline passed")))
            return
        self._writes.counters["writes_rerouted"] += len(items)
        ours, theirs = self._writes.split(items)
        self.begin(ours, theirs, tries)
        self._end_part()

    def _done(self, items: list[Item], done: Done, latest: int) -> None:
        """Let this node's memory follow what the owner has acknowledged.

        ``latest`` is the version of the latest write that was heard of since the set was sent.
        """
        self._count += done.count
        self._version = max(self._version, done.version)
        group = self._group
        reads, shard = self._reads, group.shard
        one = len(items) == 1
        for key, value in items:
            reads.detach(key)
            reads.written(key, done.version)
            shard.drop_older(key, done.version)
            if one and value is not None and latest <= done.version:
                ttl_ms = getattr(self._request, "ttl_ms", None) or group.spec.ttl_ms or 0
                try:
                    reads.keep_mirror(key, value, ttl_ms, done.version)
                except ValueTooLargeError:
                    continue

    def _fail(self, error: Exception) -> None:
        if not isinstance(error, KamaCacheError):
            error = NodeUnavailableError(str(error))
        self._error = self._error or error
        self._end_part()

    def _end_part(self) -> None:
        self._outstanding -= 1
        if self._outstanding:
            return
        self._asker.waiters.pop(self, None)
        if self._gone:
            return
        if self._error is not None:
            self._asker.answer(failure(self._request.id, self._error))
            return
        whole = self._request
        count = len(whole.items) if isinstance(whole, SetMany) else self._count
        self._asker.answer(Done(whole.id, count, self._version))
