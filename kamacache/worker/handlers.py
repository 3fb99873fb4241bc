"""What a worker answers to each request: hits and writes at once, loads when they end.

*Process*: worker, in the loop's thread. A handler returns the reply, or None when a waiter will
answer later; it raises a `KamaCacheError` for the asker alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

from kamacache.calls import check_chain
from kamacache.clock import boottime_ms
from kamacache.config import GroupSpec
from kamacache.errors import (
    ConfigError,
    DeadlineExceededError,
    GroupNotFoundError,
    KamaCacheError,
    KeyTooLongError,
    NodeUnavailableError,
)
from kamacache.getters import Loadable
from kamacache.limits import BATCH_KEYS_MAX, KEY_BYTES_MAX, TTL_MS_MAX
from kamacache.rundir.meters import GROUP, Region
from kamacache.store import NEGATIVE
from kamacache.wire.messages import (
    FROM_PEER,
    PEEK,
    Answers,
    Delete,
    DeleteMany,
    Done,
    Get,
    GetMany,
    Gets,
    LinkNow,
    Ping,
    Reply,
    Request,
    Set,
    SetMany,
    Stats,
    StatsReply,
)
from kamacache.wire.parts import in_frames
from kamacache.worker.each import EachWaiter, each, places_of
from kamacache.worker.fetches import ClusterReads
from kamacache.worker.flights import Flight, Outcome
from kamacache.worker.loader import Loader
from kamacache.worker.pools import GetterThreads
from kamacache.worker.replies import (
    peek_reply,
    peer_value_reply,
    peer_values_reply,
    value_reply,
    values_reply,
)
from kamacache.worker.shard import Shard
from kamacache.worker.waiters import Asker, Deadlines, ManyWaiter, OneWaiter, Wait

if TYPE_CHECKING:
    from kamacache.cluster.peers import Link, Peers


HITS: Final = GROUP.at("worker_hits")


class HostedGroup:
    """One group in one worker: its shard and its loads."""

    __slots__ = (
        *("_lasts", "counts", "flights", "loader", "loads", "reads", "remote", "shard"),
        "spec",
    )

    def __init__(
        self,
        spec: GroupSpec,
        shard: Shard,
        loadable: Loadable | None,
        threads: GetterThreads,
        peers: Peers | None = None,
        meters: Region | None = None,
    ) -> None:
        """``meters`` are this group's in this worker; None: as in a test."""
        self.spec: Final = spec
        self.shard: Final = shard
        self.loader: Final = Loader(spec, shard, loadable, threads, meters)
        self.reads: Final[Loader | ClusterReads] = (
            self.loader if peers is None else ClusterReads(self.loader, peers)
        )
        self.remote: Final = self.reads if isinstance(self.reads, ClusterReads) else None
        self.counts: Final = self.loader.counts
        # Whether what is not in memory is looked for any further.
        self.loads: Final = self.loader.loadable is not None or peers is not None
        self.flights: Final = self.loader.flights
        self._lasts: Final = spec.ttl_ms is None  # what is stored, unless a time is given

    def put(self, key: bytes, value: bytes, ttl_ms: int | None) -> None:
        """Store a value for a time; None: the group's."""
        if not 0 < len(key) <= KEY_BYTES_MAX:
            check_key(key)
        expiry_ms = 0 if ttl_ms is None and self._lasts else self.expiry_after(ttl_ms)
        self.shard.put(key, value, expiry_ms)
        if self.flights:
            self.loader.detach(key)

    def put_many(self, items: Sequence[tuple[bytes, bytes]], ttl_ms: int | None) -> None:
        """Store values of distinct keys; one that is refused is an error before any is stored."""
        self.shard.put_many(items, self.expiry_after(ttl_ms))
        if self.flights:
            for key, _ in items:
                self.loader.detach(key)

    def expiry_after(self, ttl_ms: int | None) -> int:
        """Return the absolute expiry of what is stored now; None: the group's time, 0: never."""
        if ttl_ms is None:
            ttl_ms = self.spec.ttl_ms
            if ttl_ms is None:
                return 0
        elif not 0 < ttl_ms <= TTL_MS_MAX:
            raise ConfigError(
                f"ttl is {ttl_ms} ms; it must be from 1 to {TTL_MS_MAX} ms", setting="ttl"
            )
        return boottime_ms() + ttl_ms

    def delete(self, key: bytes) -> bool:
        """Remove a key; True when it was there."""
        check_key(key)
        if self.flights:
            self.loader.detach(key)
        return self.shard.delete(key)


def check_key(key: bytes) -> None:
    """Raise `KeyTooLongError` for a key of a length that is not allowed."""
    if not 0 < len(key) <= KEY_BYTES_MAX:
        raise KeyTooLongError(
            f"the key has {len(key)} bytes; 1 to {KEY_BYTES_MAX} are allowed",
            key_bytes=len(key),
            limit_bytes=KEY_BYTES_MAX,
        )


def observe(shard: Shard, version: int) -> None:
    """Let a shard take note of another node's clock; `KamaCacheError` where it is none."""
    try:
        shard.observe(version)
    except OverflowError as error:
        raise KamaCacheError(f"another node's clock is not believed: {error}") from error


def distinct_items(request: SetMany) -> list[tuple[bytes, bytes]]:
    """Return what a batch stores, the last value of each key; its keys are checked."""
    items = request.items
    check_batch(len(items))
    by_key = dict(items)
    check_key(min(by_key, key=len, default=b"-"))
    check_key(max(by_key, key=len, default=b"-"))
    return items if len(by_key) == len(items) else list(by_key.items())


class Handlers:
    """The groups of one worker, and what it does for each request."""

    __slots__ = ("_deadlines", "_groups", "draining", "extra_stats", "links_now", "table")

    def __init__(
        self,
        groups: dict[str, HostedGroup],
        loop: asyncio.AbstractEventLoop,
        extra_stats: Callable[[], dict[str, int]] = dict,
    ) -> None:
        """Serve a node without peers; `kamacache.worker.writes` changes the table for one."""
        self._groups = groups
        self._deadlines: Final = Deadlines(loop)
        self.draining = False
        self.extra_stats = extra_stats
        self.links_now: Callable[[], list[LinkNow]] = list  # to the peers
        self.table: Final[dict[type[Request], Callable[[Any, Asker], Reply | None]]] = {
            Get: self.get,
            GetMany: self.get_many,
            Gets: self.gets,
            Set: self.set,
            SetMany: self.set_many,
            Delete: self.delete,
            DeleteMany: self.delete_many,
            Stats: self.stats,
            Ping: self.ping,
        }

    @property
    def loading(self) -> bool:
        """Whether a load runs or is queued, one that a write detached included."""
        return any(group.reads.busy for group in self._groups.values())

    def group(self, name: str) -> HostedGroup:
        """Return a group, or raise `GroupNotFoundError`."""
        try:
            return self._groups[name]
        except KeyError:
            known = sorted(self._groups)
            raise GroupNotFoundError(
                f"the node has no group {name!r}; it has {', '.join(known) or 'none'}",
                group=name,
                known=known,
            ) from None

    def get(self, request: Get, asker: Asker) -> Reply | None:
        """Answer a hit, or wait for the key's load."""
        group = self._groups.get(request.group) or self.group(request.group)
        key = request.key
        if not 0 < len(key) <= KEY_BYTES_MAX:
            check_key(key)
        from_peer = bool(request.flags & FROM_PEER)
        if request.flags & PEEK:
            return peek_reply(request.id, key, group.shard)
        remote = group.remote
        link = None
        if remote is not None and not from_peer and not group.loader.mirror_ttl_ms:
            link = remote.peers.route(key)  # what it holds of another node's it need not look for
        found = None if link is not None else group.shard.get(key)
        if found is not None or not group.loads:
            if found is not None:
                group.counts[HITS] += 1
            value = found if isinstance(found, bytes) else None
            if from_peer:
                return peer_value_reply(request.id, key, value, group.shard)
            return value_reply(request.id, value)
        if request.sent:
            observe(group.shard, request.sent)
        if self.draining or request.budget_ms <= 0:
            self._check_load(request)
        if request.depth:
            check_chain(request.group, key, request.depth, request.chain)
        waiter = OneWaiter(request, asker, group.spec, self._deadlines, group.shard)
        if (
            link is not None
            and remote is not None
            and (key not in remote.fetches and key not in group.flights)
        ):
            waiter.flight = remote.fetch(key, link, request.depth, request.chain, waiter)
            return None
        waiter.flight = None
        flight = group.reads.load(
            key,
            request.depth,
            request.chain,
            waiter,
            from_peer=from_peer,
        )
        if isinstance(flight, KamaCacheError):
            _forget(asker, waiter)
            raise flight
        waiter.flight = flight
        return None

    def get_many(self, request: GetMany, asker: Asker) -> Reply | None:
        """Answer when every key is found or its load ended."""
        group = self.group(request.group)
        check_batch(len(request.keys))
        outcomes, missing, links = self._look_up(group, request)
        if not missing:
            return _values(request, outcomes, group)
        self._check_loads(group, request)
        waiter = ManyWaiter(
            request, asker, group.spec, self._deadlines, group.shard, outcomes, missing
        )
        self._load(group, request, missing, links, waiter)
        return None

    def gets(self, request: Gets, asker: Asker) -> Reply | None:
        """Answer each key when it is found or its load ended."""
        group = self._groups.get(request.group) or self.group(request.group)
        check_batch(len(request.keys))
        outcomes, missing, links = self._look_up(group, request)
        if outcomes:
            places = places_of(request.keys)
            holder = group.shard if request.flags & FROM_PEER else None
            for part in in_frames(each(request.id, [*outcomes.items()], places, holder)):
                asker.answer(part)
        if missing:
            self._check_loads(group, request)
            waiter = EachWaiter(request, asker, group.spec, self._deadlines, group.shard, missing)
            self._load(group, request, missing, links, waiter)
        return None if request.keys else Answers(request.id)

    def _look_up(
        self, group: HostedGroup, request: GetMany | Gets
    ) -> tuple[dict[bytes, Outcome], list[bytes], list[Link | None] | None]:
        """Return what is known of a request's keys, the others, and where those are asked for.

        Without the last it is to be found out.
        """
        keys = request.keys
        if not keys:
            return {}, keys, None
        check_key(min(keys, key=len))
        check_key(max(keys, key=len))
        distinct = dict.fromkeys(keys)
        if len(distinct) < len(keys):
            keys = list(distinct)
        outcomes: dict[bytes, Outcome] = {}
        missing, links = keys, None
        if group.remote is not None and not request.flags & FROM_PEER:
            links = group.remote.elsewhere(keys)
        if links is None:
            missing = []
            look_up = group.shard.get
            for key in keys:
                found = look_up(key)
                if isinstance(found, bytes):
                    outcomes[key] = found
                elif found is NEGATIVE or not group.loads:
                    outcomes[key] = None
                else:
                    missing.append(key)
            group.counts[HITS] += len(outcomes)
        if missing and request.depth:
            links = None
            loadable = []
            for key in missing:
                try:
                    check_chain(request.group, key, request.depth, request.chain)
                except KamaCacheError as error:
                    outcomes[key] = error
                else:
                    loadable.append(key)
            missing = loadable
        return outcomes, missing, links

    def _check_loads(self, group: HostedGroup, request: GetMany | Gets) -> None:
        """Raise where what is not known must not be loaded."""
        if request.sent:
            observe(group.shard, request.sent)
        self._check_load(request)

    def _load(
        self,
        group: HostedGroup,
        request: GetMany | Gets,
        keys: list[bytes],
        links: list[Link | None] | None,
        waiter: ManyWaiter | EachWaiter,
    ) -> None:
        """Load keys for a waiter."""
        flights: Sequence[Flight | KamaCacheError | None] = group.reads.load_many(
            keys,
            request.depth,
            request.chain,
            waiter,
            from_peer=bool(request.flags & FROM_PEER),
            links=links,
        )
        if flights.count(None) == len(flights):
            return
        for key, flight in zip(keys, flights, strict=True):
            if isinstance(flight, Flight):
                waiter.pending[key] = flight
        for key, flight in zip(keys, flights, strict=True):
            if isinstance(flight, KamaCacheError):
                waiter.settle_key(key, flight)

    def set(self, request: Set, asker: Asker) -> Reply:
        """Store a value."""
        group = self._groups.get(request.group) or self.group(request.group)
        group.put(request.key, request.value, request.ttl_ms)
        return Done(request.id, 1)

    def set_many(self, request: SetMany, asker: Asker) -> Reply:
        """Store values; one that is refused is an error before any is stored."""
        group = self.group(request.group)
        group.put_many(distinct_items(request), request.ttl_ms)
        return Done(request.id, len(request.items))

    def delete(self, request: Delete, asker: Asker) -> Reply:
        """Remove a key."""
        group = self._groups.get(request.group) or self.group(request.group)
        return Done(request.id, int(group.delete(request.key)))

    def delete_many(self, request: DeleteMany, asker: Asker) -> Reply:
        """Remove keys."""
        group = self.group(request.group)
        check_batch(len(request.keys))
        return Done(request.id, sum([group.delete(key) for key in request.keys]))

    def stats(self, request: Stats, asker: Asker) -> Reply:
        """Return the numbers of a group's shard and of its loads, or the worker's own."""
        if not request.group:
            return self._now(request)
        group = self.group(request.group)
        return StatsReply(
            request.id, {**group.shard.stats(), **group.reads.stats(), **self.extra_stats()}
        )

    def _now(self, request: Stats) -> Reply:
        numbers, groups = self.extra_stats(), []
        numbers["loads_running"] = 0
        for group in self._groups.values():
            loader, remote = group.loader, group.remote
            running = loader.calls_running
            numbers["loads_running"] += running
            fetches = 0 if remote is None else len(remote.fetches)
            groups.append([len(loader.flights), max(0, loader.running - running), fetches])
        return StatsReply(request.id, numbers, groups, self.links_now())

    def ping(self, request: Ping, asker: Asker) -> Reply:
        """Say that the loop turns."""
        return Done(request.id, 0)

    def _check_load(self, request: Request) -> None:
        # Loads that run may need nested ones to come to their end, also while draining.
        if self.draining and not request.depth:
            raise NodeUnavailableError("the node is stopping; this key would have to be loaded")
        if request.budget_ms <= 0:
            raise DeadlineExceededError(
                f"group {request.group!r}: the deadline passed before the load began",
                group=request.group,
            )


def check_batch(count: int) -> None:
    """Raise `ConfigError` for more keys than one request may name."""
    if count > BATCH_KEYS_MAX:
        raise ConfigError(
            f"a batch of {count} keys; {BATCH_KEYS_MAX} fit into one request",
            setting="keys",
            value=str(count),
        )


def _forget(asker: Asker, waiter: Wait) -> None:
    waiter.leave()
    asker.waiters.pop(waiter, None)


def _values(request: GetMany, outcomes: dict[bytes, Outcome], group: HostedGroup) -> Reply:
    if request.flags & FROM_PEER:
        return peer_values_reply(request.id, request.keys, outcomes, group.shard)
    return values_reply(request.id, request.keys, outcomes)
