"""A group of an attached process: memory first, a worker's socket second, no node last.

*Process*: applications, and a node's own fronts and workers (for nested gets)::

    Group.get ── lookup ──► near cache ──► shards, mapped read-only
        └─ None ─► get ──► worker i over its Unix socket ──► its getter, once for all who ask
                    └─ no node ──► fallback: this process's own getter, or an error

*Invariants*: a get that fails because the *node* is gone falls back; one that fails because of
its key (LoadError, deadline) never does, or the database would be asked twice for it. Writes do
not fall back: an invalidation that nobody took is an error the caller must know of.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import sys
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar

from kamacache import calls
from kamacache.config import GroupSpec
from kamacache.errors import (
    KamaCacheError,
    LoadError,
    NodeUnavailableError,
    StorageError,
    from_fields,
)
from kamacache.hashing import shard_hash, worker_of
from kamacache.limits import (
    BATCH_BYTES_SOFT,
    BATCH_KEYS_MAX,
    COUNTER_FLUSH_S,
    LOAD_TIMEOUT_S,
    REATTACH_EVERY_S,
)
from kamacache.local.engine import EngineUser
from kamacache.local.link import call_all
from kamacache.local.loads import FallbackLoader
from kamacache.local.mapping import DIRECT_READS, NodeMapping
from kamacache.store import Answer, Arena, Lookup, NearCache, Negative
from kamacache.store.entries import Entry, EntryLookup
from kamacache.store.near import NEAR_CACHE_BYTES, NEAR_CACHE_ITEMS
from kamacache.wire.messages import (
    Delete,
    DeleteMany,
    Done,
    Get,
    GetMany,
    Reply,
    Request,
    Set,
    SetMany,
    Stats,
    StatsReply,
    Value,
    Values,
)

if TYPE_CHECKING:
    from kamacache.local.attach import Attachment

T = TypeVar("T")

log = logging.getLogger("kamacache.local")

STATS_TIMEOUT_S: Final = 2.0
DEADLINE_MARGIN_S: Final = 0.5  # lets the worker's own word on a late load arrive first
_OWN: Final = ("near_hits", "memory_hits", "negative_hits")
_SUMMED: Final = ("items", "live_bytes", "evictions", "expired", "loads", "load_errors")
_RENAMED: Final = {  # what a worker says, as single-instance mode says it
    "loads_joined": "joined",
    "loads_detached": "detached",
    "loads_in_flight": "loading",
}


def _nothing(key: str | bytes) -> Answer:
    return None


class _Bound:
    """A group in one mapping: what changes when the node is started anew."""

    __slots__ = ("entry", "lookup", "mapping", "near", "published", "spec")

    def __init__(
        self,
        mapping: NodeMapping,
        name: str,
        user: EngineUser | None,
        renewed: Callable[[], None],
    ) -> None:
        """Map the group. Without a user, as in a front, the near cache is of the default size."""
        self.mapping = mapping
        self.spec: GroupSpec = mapping.spec(name)
        self.near: NearCache | None = None
        if user is None:
            self.near = NearCache(NEAR_CACHE_ITEMS, NEAR_CACHE_BYTES)
        elif user.near_cache_items:
            self.near = NearCache(user.near_cache_items, user.near_cache_bytes)
        ends = None if user is None else user.get_ends
        self.lookup: Lookup = mapping.lookup(name, self.near, renewed, ends)
        self.entry: EntryLookup = mapping.entry_lookup(name)
        mapping.counters()  # while they can be opened: counting must not fail later
        self.published = self.lookup.counts()  # those that are in this process's counter slot


class AttachedEngine:
    """Answers one group from its node."""

    def __init__(
        self, attachment: Attachment, name: str, *, user: EngineUser | None = None
    ) -> None:
        self._attachment = attachment
        self._name = name
        self._user = user
        self._bound: _Bound | None = None
        self._leading = False  # from the end of __init__ on, when the group asks this engine
        self._unbound: KamaCacheError | None = None  # why a node that serves cannot be used
        self._bind_after_s = 0.0
        self._counts = _no_counts()
        self._flushed_s = time.monotonic()
        self._reset_locks()
        self._fallback: FallbackLoader | None = None
        if user is not None and user.has_getter and user.fallback == "getter":
            self._fallback = None if attachment.in_node else FallbackLoader(user)
        _instances.add(self)
        self._reach()
        self._leading = True

    # -- memory ----------------------------------------------------------------------------

    @property
    def lookup(self) -> Callable[[str | bytes], Answer]:
        """Near cache and memory only, never blocks; None: ask by `get`."""
        bound = self._bound
        return bound.lookup.get if bound is not None and DIRECT_READS else _nothing

    @property
    def direct(self) -> Callable[..., Any] | None:
        """The group's own ``get`` in one frame, where it has one."""
        bound = self._bound
        return bound.lookup.direct if bound is not None and DIRECT_READS else None

    def lookup_many(self, keys: Sequence[str | bytes]) -> list[Answer]:
        """Look several keys up in memory, in their order."""
        bound = self._bound
        if bound is None or not DIRECT_READS:
            return [None] * len(keys)
        return bound.lookup.many(keys)

    def lookup_entry(self, key: bytes) -> Entry | Negative | None:
        """Read memory, with TTL and version; counts nothing, touches nothing."""
        bound = self._bound
        return bound.entry(key) if bound is not None and DIRECT_READS else None

    # -- one key ---------------------------------------------------------------------------

    def get(self, key: bytes, deadline_s: float | None) -> bytes | None:
        """Return the value, loaded if need be; None: not found."""
        bound, fresh = self._reach()
        if bound is None:
            return self._loader().get(key, deadline_s)
        if fresh and (found := self.lookup(key)) is not None:
            return _known(found)
        request, until_s = self._get_request(key, bound, deadline_s)
        try:
            reply = bound.mapping.links[self._shard(key, bound)].call(request, until_s)
        except NodeUnavailableError as error:
            return self._loader(error).get(key, deadline_s)
        return _value(reply)

    async def aget(self, key: bytes, deadline_s: float | None) -> bytes | None:
        """As `get`."""
        bound, fresh = self._reach()
        if bound is None:
            return await self._loader().aget(key, deadline_s)
        if fresh and (found := self.lookup(key)) is not None:
            return _known(found)
        request, until_s = self._get_request(key, bound, deadline_s)
        try:
            reply = await bound.mapping.async_links[self._shard(key, bound)].call(request, until_s)
        except NodeUnavailableError as error:
            return await self._loader(error).aget(key, deadline_s)
        return _value(reply)

    def set(self, key: bytes, value: bytes, ttl_ms: int | None, deadline_s: float | None) -> None:
        """Keep a value; returns when the worker has stored it."""
        bound, until_s = self._for_write(deadline_s)
        request = Set(group=self._name, key=key, value=value, ttl_ms=ttl_ms)
        self._nest(request)
        bound.mapping.links[self._shard(key, bound)].call(request, until_s)
        self._counts["sets"] += 1

    async def aset(
        self, key: bytes, value: bytes, ttl_ms: int | None, deadline_s: float | None
    ) -> None:
        """As `set`."""
        bound, until_s = self._for_write(deadline_s)
        request = Set(group=self._name, key=key, value=value, ttl_ms=ttl_ms)
        self._nest(request)
        await bound.mapping.async_links[self._shard(key, bound)].call(request, until_s)
        self._counts["sets"] += 1

    def delete(self, key: bytes, deadline_s: float | None) -> bool:
        """Drop a key; tell whether a value was there."""
        bound, until_s = self._for_write(deadline_s)
        request = Delete(group=self._name, key=key)
        self._nest(request)
        reply = bound.mapping.links[self._shard(key, bound)].call(request, until_s)
        self._counts["deletes"] += 1
        return _count(reply) > 0

    async def adelete(self, key: bytes, deadline_s: float | None) -> bool:
        """As `delete`."""
        bound, until_s = self._for_write(deadline_s)
        request = Delete(group=self._name, key=key)
        self._nest(request)
        reply = await bound.mapping.async_links[self._shard(key, bound)].call(request, until_s)
        self._counts["deletes"] += 1
        return _count(reply) > 0

    # -- many keys -------------------------------------------------------------------------

    def get_many(self, keys: Sequence[bytes], deadline_s: float | None) -> dict[bytes, bytes]:
        """Return the values of those found; one failed load raises after the others are kept."""
        bound, fresh = self._reach()
        if bound is None:
            return self._loader(count=len(keys)).get_many(keys, deadline_s)
        found, keys = self._looked_up(keys) if fresh else ({}, keys)
        until_s = self._until(bound, deadline_s)
        gathered = _Gathered(self._name, found)
        for batch in self._get_batches(keys, bound):
            outcomes = call_all([(bound.mapping.links[s], r) for s, r in batch], until_s)
            gathered.take([request for _, request in batch], outcomes)
        if gathered.unreached:
            loader = self._loader(gathered.error, count=len(gathered.unreached))
            gathered.values.update(loader.get_many(gathered.unreached, deadline_s))
        return gathered.result()

    async def aget_many(
        self, keys: Sequence[bytes], deadline_s: float | None
    ) -> dict[bytes, bytes]:
        """As `get_many`."""
        bound, fresh = self._reach()
        if bound is None:
            return await self._loader(count=len(keys)).aget_many(keys, deadline_s)
        found, keys = self._looked_up(keys) if fresh else ({}, keys)
        until_s = self._until(bound, deadline_s)
        gathered = _Gathered(self._name, found)
        for batch in self._get_batches(keys, bound):
            outcomes = await _all(
                bound.mapping.async_links[s].call(request, until_s) for s, request in batch
            )
            gathered.take([request for _, request in batch], outcomes)
        if gathered.unreached:
            loader = self._loader(gathered.error, count=len(gathered.unreached))
            gathered.values.update(await loader.aget_many(gathered.unreached, deadline_s))
        return gathered.result()

    def set_many(
        self, items: Mapping[bytes, bytes], ttl_ms: int | None, deadline_s: float | None
    ) -> None:
        """Keep several values; the first error is raised after all workers have answered."""
        bound, until_s = self._for_write(deadline_s)
        for batch in self._set_batches(items, ttl_ms, bound):
            _done(call_all([(bound.mapping.links[s], r) for s, r in batch], until_s))
        self._counts["sets"] += len(items)

    async def aset_many(
        self, items: Mapping[bytes, bytes], ttl_ms: int | None, deadline_s: float | None
    ) -> None:
        """As `set_many`."""
        bound, until_s = self._for_write(deadline_s)
        for batch in self._set_batches(items, ttl_ms, bound):
            links = bound.mapping.async_links
            _done(await _all(links[s].call(request, until_s) for s, request in batch))
        self._counts["sets"] += len(items)

    def delete_many(self, keys: Sequence[bytes], deadline_s: float | None) -> int:
        """Drop several keys; return how many had a value."""
        bound, until_s = self._for_write(deadline_s)
        count = 0
        for batch in self._delete_batches(keys, bound):
            count += _done(call_all([(bound.mapping.links[s], r) for s, r in batch], until_s))
        self._counts["deletes"] += len(keys)
        return count

    async def adelete_many(self, keys: Sequence[bytes], deadline_s: float | None) -> int:
        """As `delete_many`."""
        bound, until_s = self._for_write(deadline_s)
        count = 0
        for batch in self._delete_batches(keys, bound):
            links = bound.mapping.async_links
            count += _done(await _all(links[s].call(request, until_s) for s, request in batch))
        self._counts["deletes"] += len(keys)
        return count

    # -- numbers ---------------------------------------------------------------------------

    def stats(self) -> dict[str, Any]:
        """Return the group's counters over the whole node, and what this process keeps near.

        Hits of other processes are at most `COUNTER_FLUSH_S` and their next read behind.
        """
        bound, until_s = self._for_write(time.monotonic() + STATS_TIMEOUT_S)
        requests = [(links, Stats(group=self._name)) for links in bound.mapping.links]
        return self._stats(bound, call_all(requests, until_s))

    async def astats(self) -> dict[str, Any]:
        """As `stats`."""
        bound, until_s = self._for_write(time.monotonic() + STATS_TIMEOUT_S)
        links = bound.mapping.async_links
        replies = await _all(link.call(Stats(group=self._name), until_s) for link in links)
        return self._stats(bound, replies)

    def _stats(self, bound: _Bound, replies: Sequence[Reply | KamaCacheError]) -> dict[str, Any]:
        self.flush()
        totals = bound.mapping.totals(self._name)
        # Those of single-instance mode are there even while no worker answers.
        names = (*_SUMMED, *_RENAMED.values(), "loads_not_kept")
        summed: dict[str, int] = dict.fromkeys(names, 0)
        answered = 0
        for reply in replies:
            if isinstance(reply, StatsReply):
                answered += 1
                for said, count in reply.stats.items():
                    name = _RENAMED.get(said, said)
                    summed[name] = summed.get(name, 0) + count
        hits = totals["near_hits"] + totals["memory_hits"]
        arenas = bound.mapping.arenas(self._name)
        return {
            "mode": "attached",
            "workers": len(replies),
            "workers_answered": answered,
            "gets": hits + totals["negative_hits"] + totals["socket_gets"],
            "hits": hits,
            "misses": totals["socket_gets"],  # what memory did not answer: a worker was asked
            **{name: count for name, count in totals.items() if name not in ("gets", "errors")},
            **summed,
            "capacity_bytes": sum(arena.geometry.total_bytes for arena in arenas),
            "value_bytes_max": arenas[0].geometry.value_bytes_max(1),
            "own": self._own(bound),
            "near_items": len(bound.near.entries) if bound.near else 0,
            "near_bytes": bound.near.bytes if bound.near else 0,
        }

    def _own(self, bound: _Bound) -> dict[str, int]:
        """Return the hits of this process alone, in the node's present life."""
        return dict(zip(_OWN, bound.lookup.counts(), strict=True))

    def arenas(self) -> Sequence[Arena]:
        """Return the group's shards as this process maps them; for diagnosis."""
        bound, _ = self._reach()
        if bound is None:
            raise self._unavailable()
        return bound.mapping.arenas(self._name)

    def flush(self) -> None:
        """Add what was counted privately since the last time to this process's slot."""
        bound = self._bound
        if bound is None or not self._flushing.acquire(blocking=False):
            return
        try:
            self._flushed_s = time.monotonic()
            reads = bound.lookup.counts()
            near, memory, negative = (
                now - before for now, before in zip(reads, bound.published, strict=True)
            )
            bound.published = reads
            counts, self._counts = self._counts, _no_counts()
            bound.mapping.count(
                self._name,
                (
                    0,
                    near,
                    memory,
                    negative,
                    counts["socket_gets"],
                    counts["sets"],
                    counts["deletes"],
                    counts["fallback_loads"],
                ),
            )
        finally:
            self._flushing.release()

    def close(self) -> None:
        """Publish the last counts. Connections belong to the attachment."""
        self.flush()

    # -- the node --------------------------------------------------------------------------

    def _reach(self) -> tuple[_Bound | None, bool]:
        """Return the group in the node's present life, and whether memory is new since the miss."""
        mapping = self._attachment.current()
        bound = self._bound
        if mapping is None:
            return None, False
        if time.monotonic() - self._flushed_s > COUNTER_FLUSH_S:
            self.flush()
        if bound is not None and bound.mapping is mapping:
            return bound, False
        bound = self._bind(mapping)
        return bound, bound is not None

    def _bind(self, mapping: NodeMapping) -> _Bound | None:
        """Map the group in this life of the node. None where it ends just now, or cannot be read.

        Raises `GroupNotFoundError`.
        """
        with self._binding:
            bound = self._bound
            if bound is not None and bound.mapping is mapping:
                return bound
            if time.monotonic() < self._bind_after_s:
                return None
            try:
                bound = _Bound(mapping, self._name, self._user, self._renewed)
            except (NodeUnavailableError, StorageError) as error:
                self._bind_after_s = time.monotonic() + REATTACH_EVERY_S
                if self._unbound is None and mapping.serving:
                    log.warning(
                        "a node serves but its memory cannot be used: %s",
                        error,
                        extra={"group": self._name},
                    )
                self._unbound = error
                return None
            self._bound = bound
            self._unbound = None
            if self._fallback is not None and not bound.spec.has_getter:
                log.warning(
                    "this group's getter is not used while a node serves, for the group has no "
                    "getter there and so loads nothing: load it into the node with --app, or set "
                    "its values and give this process no getter",
                    extra={"group": self._name},
                )
        if self._leading and self._user is not None:
            # The group holds the lookup of the node's last life, or of none.
            self._user._use(self)
            if self._attachment.closed:  # its group was turned over meanwhile
                self._user._use(None)
        return bound

    def _renewed(self) -> None:
        if time.monotonic() - self._flushed_s > COUNTER_FLUSH_S:
            self.flush()

    def _loader(
        self, error: NodeUnavailableError | None = None, *, count: int = 1
    ) -> FallbackLoader:
        if self._fallback is None:
            raise error or self._unavailable()
        self._counts["fallback_loads"] += count
        return self._fallback

    def _unavailable(self) -> NodeUnavailableError:
        error = self._attachment.unavailable()
        error.__cause__ = self._unbound
        return error

    # -- requests --------------------------------------------------------------------------

    def _looked_up(self, keys: Sequence[bytes]) -> tuple[dict[bytes, bytes], list[bytes]]:
        """Return the values in memory and the keys to ask for."""
        found: dict[bytes, bytes] = {}
        missing: list[bytes] = []
        for key, answer in zip(keys, self.lookup_many(keys), strict=True):
            if isinstance(answer, bytes):
                found[key] = answer
            elif answer is None:
                missing.append(key)
        return found, missing

    def _shard(self, key: bytes, bound: _Bound) -> int:
        about = bound.mapping.description
        return worker_of(shard_hash(key, about.hash_seed), about.workers)

    def _until(self, bound: _Bound, deadline_s: float | None) -> float:
        if deadline_s is not None:
            return deadline_s
        return calls.deadline_after(None, bound.spec.load_timeout_s + DEADLINE_MARGIN_S)

    def _get_request(
        self, key: bytes, bound: _Bound, deadline_s: float | None
    ) -> tuple[Get, float]:
        request = Get(group=self._name, key=key)
        if calls.current.get() is not None:
            request.depth, request.chain = calls.nested(self._name, key)
        self._counts["socket_gets"] += 1
        return request, self._until(bound, deadline_s)

    def _nest(self, request: Request) -> None:
        """Say from which depth a request comes that names many keys or waits for no load.

        The worker looks for cycles itself, key by key; a write may name a key of its own chain.
        """
        outer = calls.current.get()
        if outer is not None:
            request.depth, request.chain = outer.depth + 1, outer.chain

    def _for_write(self, deadline_s: float | None) -> tuple[_Bound, float]:
        bound, _ = self._reach()
        if bound is None:
            raise self._unavailable()
        if deadline_s is None:
            deadline_s = calls.deadline_after(None, LOAD_TIMEOUT_S)
        return bound, deadline_s

    def _by_shard(self, keys: Sequence[bytes], bound: _Bound) -> list[list[bytes]]:
        about = bound.mapping.description
        seed, workers = about.hash_seed, about.workers
        shards: list[list[bytes]] = [[] for _ in range(workers)]
        for key in keys:
            shards[worker_of(shard_hash(key, seed), workers)].append(key)
        return shards

    def _get_batches(
        self, keys: Sequence[bytes], bound: _Bound
    ) -> Iterator[list[tuple[int, GetMany]]]:
        self._counts["socket_gets"] += len(keys)
        for batch in _rounds(self._by_shard(keys, bound), _cut):
            requests = []
            for shard, part in batch:
                request = GetMany(group=self._name, keys=part)
                self._nest(request)
                requests.append((shard, request))
            yield requests

    def _delete_batches(
        self, keys: Sequence[bytes], bound: _Bound
    ) -> Iterator[list[tuple[int, DeleteMany]]]:
        for batch in _rounds(self._by_shard(keys, bound), _cut):
            requests = [(shard, DeleteMany(group=self._name, keys=part)) for shard, part in batch]
            for _, request in requests:
                self._nest(request)
            yield requests

    def _set_batches(
        self, items: Mapping[bytes, bytes], ttl_ms: int | None, bound: _Bound
    ) -> Iterator[list[tuple[int, SetMany]]]:
        shards = [
            [(key, items[key]) for key in keys] for keys in self._by_shard(list(items), bound)
        ]
        for batch in _rounds(shards, _cut_items):
            requests = [
                (shard, SetMany(group=self._name, items=part, ttl_ms=ttl_ms))
                for shard, part in batch
            ]
            for _, request in requests:
                self._nest(request)
            yield requests

    # -- forks -----------------------------------------------------------------------------

    def _reset_locks(self) -> None:
        self._binding = threading.Lock()
        self._flushing = threading.Lock()

    def _after_fork(self) -> None:
        """Begin the counts anew in the child: the parent will publish its own."""
        self._reset_locks()
        self._counts = _no_counts()
        if self._bound is not None:
            self._bound.published = self._bound.lookup.counts()
            if self._bound.near is not None:
                self._bound.near.clear()


class _Gathered:
    """What a get_many has so far."""

    def __init__(self, name: str, values: dict[bytes, bytes]) -> None:
        self._name = name
        self._asked = len(values)
        self._failed = 0
        self._first: KamaCacheError | None = None
        self.values = values
        self.unreached: list[bytes] = []
        self.error: NodeUnavailableError | None = None

    def take(self, requests: Sequence[GetMany], outcomes: Sequence[Reply | KamaCacheError]) -> None:
        """Take the outcomes of requests, in their order."""
        for request, outcome in zip(requests, outcomes, strict=True):
            self._asked += len(request.keys)
            if isinstance(outcome, NodeUnavailableError):
                self.unreached += request.keys
                self.error = outcome
            elif isinstance(outcome, KamaCacheError):
                self._fail(outcome, len(request.keys))
            elif isinstance(outcome, Values):
                for key, value in zip(request.keys, outcome.values, strict=True):
                    if value is not None:
                        self.values[key] = value
                for failed in outcome.errors:
                    self._fail(from_fields(failed.kind, failed.message, failed.fields), 1)
            elif isinstance(outcome, Value):  # of a single key, too large to share a frame
                if outcome.value is not None:
                    self.values[request.keys[0]] = outcome.value
            else:
                _unexpected(outcome)

    def _fail(self, error: KamaCacheError, keys: int) -> None:
        self._failed += keys
        self._first = self._first or error

    def result(self) -> dict[bytes, bytes]:
        """Return the values, or raise the first failure with the number of all."""
        first = self._first
        if first is None:
            return self.values
        if not isinstance(first, LoadError) or self._asked == 1:
            raise first
        raise LoadError(
            f"group {self._name!r}: {self._failed} of {self._asked} keys could not be loaded; "
            f"the first: {first}",
            group=self._name,
            key=first.key,
            cause_type=first.cause_type,
        ) from first


def _no_counts() -> dict[str, int]:
    return dict.fromkeys(("socket_gets", "sets", "deletes", "fallback_loads"), 0)


def _known(found: Answer) -> bytes | None:
    return found if isinstance(found, bytes) else None


def _cut(keys: list[bytes]) -> int:
    """Return how many keys go into the next frame."""
    return min(len(keys), BATCH_KEYS_MAX)


def _cut_items(items: list[tuple[bytes, bytes]]) -> int:
    """Return how many items go into the next frame, one at least."""
    room = BATCH_BYTES_SOFT
    for count, (key, value) in enumerate(items[:BATCH_KEYS_MAX]):
        room -= len(key) + len(value)
        if room < 0:
            return count or 1
    return min(len(items), BATCH_KEYS_MAX)


def _rounds(
    shards: list[list[T]], cut: Callable[[list[T]], int]
) -> Iterator[list[tuple[int, list[T]]]]:
    """Yield rounds of at most one frame for each shard, until all is sent."""
    while any(shards):
        batch = []
        for shard, waiting in enumerate(shards):
            if waiting:
                count = cut(waiting)
                batch.append((shard, waiting[:count]))
                shards[shard] = waiting[count:]
        yield batch


async def _all(requests: Iterator[Awaitable[Reply]]) -> list[Reply | KamaCacheError]:
    """Await requests side by side; each has its own outcome, as in `call_all`."""
    outcomes = await asyncio.gather(*requests, return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, BaseException) and not isinstance(outcome, KamaCacheError):
            raise outcome
    return outcomes  # type: ignore[return-value] # other exceptions were raised above


def _done(outcomes: Sequence[Reply | KamaCacheError]) -> int:
    """Return the sum of counts, or raise the first error."""
    count = 0
    for outcome in outcomes:
        if isinstance(outcome, KamaCacheError):
            raise outcome
        count += _count(outcome)
    return count


def _value(reply: Reply) -> bytes | None:
    return reply.value if isinstance(reply, Value) else _unexpected(reply)


def _count(reply: Reply) -> int:
    return reply.count if isinstance(reply, Done) else _unexpected(reply)


def _unexpected(reply: object) -> NoReturn:
    raise KamaCacheError(
        f"a worker answered with {type(reply).__name__}; do node and application run one version?"
    )


_instances: weakref.WeakSet[AttachedEngine] = weakref.WeakSet()


def engines_of(attachment: Attachment) -> list[AttachedEngine]:
    """Return the engines that answer by an attachment."""
    return [engine for engine in list(_instances) if engine._attachment is attachment]


def _after_fork_in_child() -> None:
    for engine in list(_instances):
        engine._after_fork()
    _publish_at_end_of_pool()


def _at_exit() -> None:
    for engine in list(_instances):
        engine.flush()


_finalized = False


def _publish_at_end_of_pool() -> None:
    # A child of multiprocessing ends by os._exit, which skips atexit, after its finalizers. It
    # drops those that it inherits, and only then runs what was registered for its start.
    global _finalized
    util = sys.modules.get("multiprocessing.util")
    if util is not None and not _finalized:
        _finalized = True
        util.register_after_fork(
            _at_exit, lambda publish: util.Finalize(None, publish, exitpriority=0)
        )


os.register_at_fork(after_in_child=_after_fork_in_child)
atexit.register(_at_exit)
