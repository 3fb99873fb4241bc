"""A write on its way: its parts at other nodes and here, until all of them are acknowledged.

*Process*: worker, in the loop's thread::

    part ──► link ─┬─ acknowledged ──► this node's copies follow
                   ├─ refused by its owner ──► the write's error
                   └─ link failed, owner stops ──► once the owner refuses it: where it goes now

*Invariant*: the asker is answered once, when the last part has ended; an error of any part is the
write's, and what the others stored stands.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from functools import partial
from typing import Any, Final, Protocol

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
from kamacache.limits import PEER_TRIES_MAX, PEER_WRITE_S
from kamacache.repeated import RepeatedLog
from kamacache.rundir.meters import WORKER
from kamacache.wire.messages import (
    Delete,
    DeleteMany,
    Done,
    Failure,
    Request,
    Set,
    SetMany,
)
from kamacache.worker.fetches import ClusterReads
from kamacache.worker.handlers import HostedGroup
from kamacache.worker.replies import failure
from kamacache.worker.waiters import Asker

NOT_SENT_RETRY_S: Final = 0.005
SENT: Final = WORKER.at("writes_sent")
REROUTED: Final = WORKER.at("writes_rerouted")

log = RepeatedLog(logging.getLogger("kamacache.worker.pending"))

_TO_TRY_AGAIN: Final = (PeerLostError, NodeUnavailableError, DeadlineExceededError)

Item = tuple[bytes, bytes | None]  # a key and the value to set; None: delete


class Ways(Protocol):
    """Where writes go, and what is done with those of this node: `kamacache.worker.writes`."""

    loop: asyncio.AbstractEventLoop
    counts: memoryview[int]
    peers: Peers

    def split(self, items: Sequence[Item]) -> tuple[list[Item], dict[Link, list[Item]]]: ...
    def apply(
        self, group: HostedGroup, request: Request, items: Sequence[Item]
    ) -> tuple[int, int]: ...


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

    def __init__(self, writes: Ways, group: HostedGroup, request: Request, asker: Asker) -> None:
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
        self._writes.counts[SENT] += len(items)
        if len(items) == 1 and items[0][1] is not None:
            self._reads.set_begins(items[0][0])
        now_s = time.monotonic()
        deadline_s = min(self._deadline_s, now_s + PEER_WRITE_S)
        link.send(self._part(items), partial(self._answered, link, items, tries, now_s), deadline_s)

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

    def _answered(
        self, link: Link, items: list[Item], tries: int, sent_s: float, outcome: Any
    ) -> None:
        latest = 0
        if len(items) == 1 and items[0][1] is not None:
            latest = self._reads.set_ends(items[0][0])
        if type(outcome) is Done:
            tell = self._writes.peers.invalidate_skipped
            for key, _ in items:
                tell(self._group.spec.name, key, outcome.version, link)
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
        self._writes.counts[REROUTED] += len(items)
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
