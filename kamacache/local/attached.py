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

import atexit
import logging
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

from xxhash import xxh3_64_intdigest

from kamacache import calls
from kamacache.config import GroupSpec
from kamacache.errors import KamaCacheError, NodeUnavailableError, StorageError
from kamacache.hashing import shard_hash, worker_of
from kamacache.limits import CALL_TIMEOUT_MAX_S, KEY_BYTES_MAX, LOAD_TIMEOUT_S, REATTACH_EVERY_S
from kamacache.local.batching import (
    Gathered,
    acall_all,
    count_all,
    delete_batches,
    get_batches,
    set_batches,
)
from kamacache.local.counting import GroupCounts, UnpublishedReads, group_stats
from kamacache.local.engine import EngineUser
from kamacache.local.exchange import count_of, nest, value_of
from kamacache.local.link import WorkerLinks, call_all
from kamacache.local.loads import FallbackLoader
from kamacache.local.mapping import DIRECT_READS, NodeMapping
from kamacache.store import Answer, Arena, Geometry, Lookup, NearCache, Negative, check_value_size
from kamacache.store.entries import Entry, EntryLookup
from kamacache.store.near import NEAR_CACHE_BYTES, NEAR_CACHE_ITEMS
from kamacache.store.served import NO_READS, ServedReads
from kamacache.wire.messages import Delete, Get, Reply, Set, Stats

if TYPE_CHECKING:
    from kamacache.local.attach import Attachment

log = logging.getLogger("kamacache.local")

STATS_TIMEOUT_S: Final = 2.0
DEADLINE_MARGIN_S: Final = 0.5  # lets the worker's own word on a late load arrive first


def _nothing(key: str | bytes) -> Answer:
    return None


class _Bound:
    """A group in one mapping: what changes when the node is started anew."""

    __slots__ = (
        "entry",
        "geometry",
        "links",
        "lookup",
        "mapping",
        "near",
        "reads",
        "seed",
        "served",
        "spec",
        "value_bytes_sure",
    )

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
        self.served: ServedReads = mapping.served_reads(name, renewed)
        self.geometry: Geometry = mapping.arenas(name)[0].geometry
        self.value_bytes_sure = self.geometry.value_bytes_beside(KEY_BYTES_MAX)
        self.links = mapping.links
        self.seed = mapping.description.hash_seed
        mapping.counters()  # while they can be opened: counting must not fail later
        self.reads = UnpublishedReads(self.lookup.counts, self.served.counts)

    def check_sizes(self, items: Mapping[bytes, bytes]) -> None:
        """Raise `ValueTooLargeError` where one of several values is too large."""
        if max(map(len, items.values()), default=0) > self.value_bytes_sure:
            for key, value in items.items():
                check_value_size(self.spec.name, self.geometry, key, value)

    def links_of(self, key: bytes) -> WorkerLinks:
        """Return the connections to the worker that owns a key."""
        # `worker_of`, spelled out: a set is a few microseconds of Python, and calls most of them.
        return self.links[(xxh3_64_intdigest(key, self.seed) >> 48) * len(self.links) >> 16]


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
        self._counts = GroupCounts(name)
        self._binding = threading.Lock()
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

    @property
    def served(self) -> ServedReads:
        """Memory only, for whoever answers others."""
        bound = self._bound
        return bound.served if bound is not None and DIRECT_READS else NO_READS

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
            reply = bound.links_of(key).call(request, until_s)
        except NodeUnavailableError as error:
            return self._loader(error).get(key, deadline_s)
        return value_of(reply)

    async def aget(self, key: bytes, deadline_s: float | None) -> bytes | None:
        """As `get`."""
        bound, fresh = self._reach()
        if bound is None:
            return await self._loader().aget(key, deadline_s)
        if fresh and (found := self.lookup(key)) is not None:
            return _known(found)
        about = bound.mapping.description
        shard = (shard_hash(key, about.hash_seed) >> 48) * about.workers >> 16  # `worker_of`
        links = bound.mapping.async_links[shard]
        try:
            if calls.current.get() is None:
                self._counts.fresh["socket_gets"] += 1
                until_s = deadline_s
                if until_s is None:
                    timeout_s = bound.spec.load_timeout_s + DEADLINE_MARGIN_S
                    until_s = time.monotonic() + min(timeout_s, CALL_TIMEOUT_MAX_S)
                return await links.get(self._name, key, until_s)
            request, until_s = self._get_request(key, bound, deadline_s)
            return value_of(await links.call(request, until_s))
        except NodeUnavailableError as error:
            return await self._loader(error).aget(key, deadline_s)

    def set(self, key: bytes, value: bytes, ttl_ms: int | None, deadline_s: float | None) -> None:
        """Keep a value; returns when the worker has stored it."""
        bound, until_s = self._for_write(deadline_s)
        if len(value) > bound.value_bytes_sure:
            check_value_size(self._name, bound.geometry, key, value)
        request = Set(group=self._name, key=key, value=value, ttl_ms=ttl_ms)
        if calls.current.get() is not None:
            nest(request)
        bound.links_of(key).call(request, until_s)
        self._counts.fresh["sets"] += 1

    async def aset(
        self, key: bytes, value: bytes, ttl_ms: int | None, deadline_s: float | None
    ) -> None:
        """As `set`."""
        bound, until_s = self._for_write(deadline_s)
        check_value_size(self._name, bound.geometry, key, value)
        request = Set(group=self._name, key=key, value=value, ttl_ms=ttl_ms)
        nest(request)
        await bound.mapping.async_links[self._shard(key, bound)].call(request, until_s)
        self._counts.fresh["sets"] += 1

    def delete(self, key: bytes, deadline_s: float | None) -> bool:
        """Drop a key; tell whether a value was there."""
        bound, until_s = self._for_write(deadline_s)
        request = Delete(group=self._name, key=key)
        nest(request)
        reply = bound.links_of(key).call(request, until_s)
        self._counts.fresh["deletes"] += 1
        return count_of(reply) > 0

    async def adelete(self, key: bytes, deadline_s: float | None) -> bool:
        """As `delete`."""
        bound, until_s = self._for_write(deadline_s)
        request = Delete(group=self._name, key=key)
        nest(request)
        reply = await bound.mapping.async_links[self._shard(key, bound)].call(request, until_s)
        self._counts.fresh["deletes"] += 1
        return count_of(reply) > 0

    # -- many keys -------------------------------------------------------------------------

    def get_many(self, keys: Sequence[bytes], deadline_s: float | None) -> dict[bytes, bytes]:
        """Return the values of those found; one failed load raises after the others are kept."""
        bound, fresh = self._reach()
        if bound is None:
            return self._loader(count=len(keys)).get_many(keys, deadline_s)
        found, keys = self._looked_up(keys) if fresh else ({}, keys)
        until_s = self._until(bound, deadline_s)
        gathered = Gathered(self._name, found)
        self._counts.fresh["socket_gets"] += len(keys)
        for batch in get_batches(self._name, keys, bound.mapping.description):
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
        gathered = Gathered(self._name, found)
        self._counts.fresh["socket_gets"] += len(keys)
        for batch in get_batches(self._name, keys, bound.mapping.description):
            outcomes = await acall_all(
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
        """Keep several values; nothing is sent if one is too large.

        Another error, such as a worker that cannot be reached, is raised after all workers have
        answered: what the others stored stands.
        """
        bound, until_s = self._for_write(deadline_s)
        bound.check_sizes(items)
        for batch in set_batches(self._name, items, ttl_ms, bound.mapping.description):
            count_all(call_all([(bound.mapping.links[s], r) for s, r in batch], until_s))
        self._counts.fresh["sets"] += len(items)

    async def aset_many(
        self, items: Mapping[bytes, bytes], ttl_ms: int | None, deadline_s: float | None
    ) -> None:
        """As `set_many`."""
        bound, until_s = self._for_write(deadline_s)
        bound.check_sizes(items)
        for batch in set_batches(self._name, items, ttl_ms, bound.mapping.description):
            links = bound.mapping.async_links
            count_all(await acall_all(links[s].call(request, until_s) for s, request in batch))
        self._counts.fresh["sets"] += len(items)

    def delete_many(self, keys: Sequence[bytes], deadline_s: float | None) -> int:
        """Drop several keys; return how many had a value."""
        bound, until_s = self._for_write(deadline_s)
        count = 0
        for batch in delete_batches(self._name, keys, bound.mapping.description):
            count += count_all(call_all([(bound.mapping.links[s], r) for s, r in batch], until_s))
        self._counts.fresh["deletes"] += len(keys)
        return count

    async def adelete_many(self, keys: Sequence[bytes], deadline_s: float | None) -> int:
        """As `delete_many`."""
        bound, until_s = self._for_write(deadline_s)
        count = 0
        for batch in delete_batches(self._name, keys, bound.mapping.description):
            links = bound.mapping.async_links
            count += count_all(
                await acall_all(links[s].call(request, until_s) for s, request in batch)
            )
        self._counts.fresh["deletes"] += len(keys)
        return count

    # -- numbers ---------------------------------------------------------------------------

    def stats(self, deadline_s: float | None = None) -> dict[str, Any]:
        """Return the group's counters over the whole node, and what this process keeps near.

        Hits of other processes are at most `COUNTER_FLUSH_S` and their next read behind.
        """
        bound, until_s = self._for_write(deadline_s or time.monotonic() + STATS_TIMEOUT_S)
        requests = [(links, Stats(group=self._name)) for links in bound.mapping.links]
        return self._stats(bound, call_all(requests, until_s))

    async def astats(self, deadline_s: float | None = None) -> dict[str, Any]:
        """As `stats`."""
        bound, until_s = self._for_write(deadline_s or time.monotonic() + STATS_TIMEOUT_S)
        links = bound.mapping.async_links
        replies = await acall_all(link.call(Stats(group=self._name), until_s) for link in links)
        return self._stats(bound, replies)

    def _stats(self, bound: _Bound, replies: Sequence[Reply | KamaCacheError]) -> dict[str, Any]:
        self.flush()
        return group_stats(self._name, bound.mapping, replies, reads=bound.reads, near=bound.near)

    def arenas(self) -> Sequence[Arena]:
        """Return the group's shards as this process maps them; for diagnosis."""
        bound, _ = self._reach()
        if bound is None:
            raise self._unavailable()
        return bound.mapping.arenas(self._name)

    def flush(self) -> None:
        """Add what was counted privately since the last time to this process's slot."""
        bound = self._bound
        if bound is not None:
            self._counts.publish(bound.mapping, bound.reads)

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
        if time.monotonic() > self._counts.due_s:
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
        if time.monotonic() > self._counts.due_s:
            self.flush()

    def _loader(
        self, error: NodeUnavailableError | None = None, *, count: int = 1
    ) -> FallbackLoader:
        if self._fallback is None:
            raise error or self._unavailable()
        self._counts.fresh["fallback_loads"] += count
        return self._fallback

    def _unavailable(self) -> NodeUnavailableError:
        reason = self._unbound
        if reason is None:
            return self._attachment.unavailable()
        run_dir = self._attachment.run_dir.path
        error = NodeUnavailableError(
            f"a node serves at {run_dir}, but this process cannot use it: {reason}; do both run "
            "the same version of kamacache?",
            run_dir=str(run_dir),
        )
        error.__cause__ = reason
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
        self._counts.fresh["socket_gets"] += 1
        return request, self._until(bound, deadline_s)

    def _for_write(self, deadline_s: float | None) -> tuple[_Bound, float]:
        now_s = monotonic()
        bound = self._bound
        # `_reach`, where nothing has changed and no counts are due.
        if (
            bound is None
            or self._attachment.current() is not bound.mapping
            or now_s > self._counts.due_s
        ):
            bound, _ = self._reach()
            if bound is None:
                raise self._unavailable()
        if deadline_s is None:
            if calls.current.get() is None:
                deadline_s = now_s + LOAD_TIMEOUT_S
            else:
                deadline_s = calls.deadline_after(None, LOAD_TIMEOUT_S)
        return bound, deadline_s

    # -- forks -----------------------------------------------------------------------------

    def _after_fork(self) -> None:
        """Begin the counts anew in the child: the parent will publish its own."""
        self._binding = threading.Lock()
        self._counts.reset()
        if self._bound is not None:
            self._bound.reads.forget()
            if self._bound.near is not None:
                self._bound.near.clear()


def _known(found: Answer) -> bytes | None:
    return found if isinstance(found, bytes) else None


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
