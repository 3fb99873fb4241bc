"""A miss in a cluster: whose key it is, and what is asked of the peers for it.

*Process*: worker, in the loop's thread::

    miss ──► a flight of this key? join it
      │ no
      ▼
    the ring: another node's? ── yes ──► fetch: asked over the link, kept as a mirror
      │ ours                               └─ link failed ──► the next node, or ourselves
      ▼
    did another node have it until now? ── yes ──► peek: what it holds becomes ours
      │ no                                           └─ nothing held ──┐
      └────────────────────────────────────────────────────────────────┴──► getter (`Loader`)

*Invariants*:

- What a peer asks is never fetched and joins no fetch, only loads of this node: two nodes that
  take each other for a key's owner would wait for each other. A peek waits for no load.
- A fetch is a flight: a write or an invalidation detaches it, and then it keeps nothing.
- An owner's answer is final, not-found and errors too: nothing is loaded here after it. Only where
  the link failed or the node stops does another node take its place, `PEER_TRIES_MAX` at most.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from kamacache.calls import ChainLink
from kamacache.clock import boottime_ms
from kamacache.errors import (
    DeadlineExceededError,
    GroupNotFoundError,
    KamaCacheError,
    LoadError,
    NodeUnavailableError,
    ValueTooLargeError,
    from_fields,
)
from kamacache.limits import PEER_TRIES_MAX
from kamacache.repeated import RepeatedLog
from kamacache.rundir.meters import GROUP
from kamacache.wire.messages import Failure, Get, GetMany, Value, Values
from kamacache.worker.batches import Batch, KeysWaiter
from kamacache.worker.flights import Flight, Outcome, Waiter
from kamacache.worker.loader import Loader
from kamacache.worker.peeks import Peeking

if TYPE_CHECKING:
    from kamacache.cluster.peers import Link, Peers

FETCH_MARGIN_S: Final = 0.5  # the owner's word on a late load may arrive first

COUNTERS: Final = (
    "fetches",
    "fetches_joined",
    "fetches_detached",
    "fetch_errors",
    "fetches_rerouted",
    "mirrors_kept",
    "peeks",
    "peek_hits",
    "loads_standing_in",
    "loads_not_owned",
)
FETCHES: Final = GROUP.at("fetches")
JOINED: Final = GROUP.at("fetches_joined")
DETACHED: Final = GROUP.at("fetches_detached")
ERRORS: Final = GROUP.at("fetch_errors")
REROUTED: Final = GROUP.at("fetches_rerouted")
MIRRORS_KEPT: Final = GROUP.at("mirrors_kept")
STANDING_IN: Final = GROUP.at("loads_standing_in")
NOT_OWNED: Final = GROUP.at("loads_not_owned")

Chain = tuple[ChainLink, ...]

log = RepeatedLog(logging.getLogger("kamacache.worker.fetches"))


class Fetch:
    """What is asked of other nodes for keys of one request, until each has its outcome."""

    __slots__ = ("chain", "deadline_s", "depth", "reads")

    def __init__(self, reads: ClusterReads, depth: int, chain: Chain) -> None:
        self.reads = reads
        self.depth = depth
        self.chain = chain
        self.deadline_s = reads.deadline_s()

    def start(self, flights: Sequence[Flight], tries: int = 0) -> None:
        """Ask for each key where it goes now; load here what goes nowhere else."""
        here: list[Flight] = []
        by_link: dict[Link, list[Flight]] = {}
        for flight in flights:
            link = self.reads.peers.route(flight.key) if tries < PEER_TRIES_MAX else None
            if link is None:
                here.append(flight)
            else:
                by_link.setdefault(link, []).append(flight)
        for link, wanted in by_link.items():
            self.ask(link, wanted, tries)
        if here:
            self.reads.load_here(here, self.depth, self.chain)

    def ask(self, link: Link, flights: Sequence[Flight], tries: int) -> None:
        """Ask one node."""
        group = self.reads.loader.spec.name
        request: Get | GetMany
        if len(flights) == 1:
            request = Get(group=group, key=flights[0].key, depth=self.depth, chain=self.chain)
        else:
            keys = [flight.key for flight in flights]
            for flight in flights:
                flight.batched = True
            request = GetMany(group=group, keys=keys, depth=self.depth, chain=self.chain)
        link.send(request, partial(self.answered, flights, tries), self.deadline_s)

    def answered(self, flights: Sequence[Flight], tries: int, outcome: Any) -> None:
        """Take what came of asking for flights that were not answered `tries` times before."""
        kind = type(outcome)
        if kind is Values:
            self._take(flights, outcome, tries)
            return
        # One that was asked for alone, or from a greater depth, has two answers: the first counts.
        flights = [flight for flight in flights if not flight.settled]
        if not flights:
            return
        if kind is Value:
            self.reads.finish(flights[0], outcome.value, outcome.ttl_ms, outcome.version)
        elif kind is Failure:
            error = from_fields(outcome.kind, outcome.message, outcome.fields)
            if isinstance(error, NodeUnavailableError):  # it stops
                self.again(flights, tries)
            elif isinstance(error, GroupNotFoundError):  # not all nodes have it, or not yet
                self.reads.load_here(flights, self.depth, self.chain)
            else:
                self._fail(flights, error)
        elif isinstance(outcome, (DeadlineExceededError, LoadError)):
            self._fail(flights, outcome)
        else:  # the link failed
            self.again(flights, tries)

    def _take(self, flights: Sequence[Flight], reply: Values, tries: int) -> None:
        """Take values, which are in the order of all flights that were asked for."""
        errors = {failed.index: failed for failed in reply.errors}
        again = [flight for flight in flights[len(reply.values) :] if not flight.settled]
        meta = len(reply.ttls) == len(reply.versions) == len(reply.values)
        for index, (flight, value) in enumerate(zip(flights, reply.values, strict=False)):
            if flight.settled:  # it was asked for alone, and that answer came first
                continue
            failed = errors.get(index)
            if failed is not None:
                error = from_fields(failed.kind, failed.message, failed.fields)
                if isinstance(error, NodeUnavailableError):
                    again.append(flight)
                else:
                    self._fail([flight], error)
            elif meta:
                self.reads.finish(flight, value, reply.ttls[index], reply.versions[index])
            else:
                self.reads.finish(flight, value, 0, 0)
        if again:
            self.again(again, tries)

    def again(self, flights: Sequence[Flight], tries: int) -> None:
        """Ask where the keys go now that one more node did not answer."""
        self.reads.counts[REROUTED] += len(flights)
        self.start(flights, tries + 1)

    def _fail(self, flights: Sequence[Flight], error: KamaCacheError) -> None:
        self.reads.counts[ERRORS] += len(flights)
        for flight in flights:
            self.reads.finish(flight, error, 0, 0)


class Fetched(Flight):
    """A flight of a key that one node is asked for alone, as nearly all are that go well."""

    __slots__ = ("_chain", "_reads")

    def __init__(self, reads: ClusterReads, key: bytes, depth: int, chain: Chain) -> None:
        self.key = key
        self.version = 0
        self.depth = depth
        self.job = None
        self.batched = self.settled = False
        self.waiters = {}
        self._reads = reads
        self._chain = chain

    def answered(self, outcome: Any) -> None:
        """Take the first answer."""
        reads = self._reads
        if type(outcome) is Value and not self.settled:
            if reads.fetches.get(self.key) is self:
                del reads.fetches[self.key]
                if outcome.version and reads.loader.mirror_ttl_ms:
                    reads.keep_mirror(self.key, outcome.value, outcome.ttl_ms, outcome.version)
            self.settle(outcome.value)
        else:
            Fetch(reads, self.depth, self._chain).answered((self,), 0, outcome)


class Here:
    """Waits for this node's own loads on behalf of fetches that nobody else could answer."""

    __slots__ = ("_flights", "_reads")

    def __init__(self, reads: ClusterReads, flights: Sequence[Flight]) -> None:
        self._reads = reads
        self._flights = {flight.key: flight for flight in flights}

    def settle(self, flight: Flight, outcome: Outcome) -> None:
        """Hand the outcome on."""
        self._reads.finish(self._flights[flight.key], outcome, 0, 0)


class ClusterReads:
    """The loads of one group in one worker that has peers."""

    def __init__(self, loader: Loader, peers: Peers) -> None:
        self.loader: Final = loader
        self.peers: Final = peers
        self.fetches: dict[bytes, Flight | Batch] = {}
        # Keys that this node sets at another: how many times now, and the latest version that was
        # heard of meanwhile. Only the answer that tells of that version may be kept as a mirror.
        self.setting: dict[bytes, list[int]] = {}
        self.counts: Final = loader.counts  # add to a word by its place
        loader.owns = self._owns
        loader.mirror_ttl_ms = loader.spec.mirror_ttl_ms

    def load(
        self, key: bytes, depth: int, chain: Chain, waiter: Waiter, *, from_peer: bool = False
    ) -> Flight | LoadError:
        """As `Loader.load`: join the key's flight or start one."""
        flight = self._joined(key, depth, chain, waiter, from_peer)
        if flight is not None:
            return flight
        if not from_peer:
            link = self.peers.route(key)
            if link is not None:
                return self.fetch(key, link, depth, chain, waiter)
        return self._own([key], depth, chain, waiter)[0]

    def load_many(
        self,
        keys: list[bytes],
        depth: int,
        chain: Chain,
        waiter: KeysWaiter,
        *,
        from_peer: bool = False,
        links: Sequence[Link | None] | None = None,
    ) -> list[Flight | LoadError | None]:
        """Do the same for distinct keys; those of one owner go in one request.

        ``links`` is what `elsewhere` returned for them. None in place of a flight: the key is one
        of a `Batch`.
        """
        if links is None:
            links = [None] * len(keys) if from_peer else self.peers.routes(keys)
        busy = bool(self.fetches or self.loader.flights)
        if not busy and links[0] is not None and links.count(links[0]) == len(keys) > 1:
            self._batch(links[0], keys, depth, chain, waiter)
            return [None] * len(keys)
        joined: dict[bytes, Flight | LoadError | None] = {}
        theirs: dict[Link, list[bytes]] = {}
        ours: list[bytes] = []
        for key, link in zip(keys, links, strict=True):
            flight = self._joined(key, depth, chain, waiter, from_peer) if busy else None
            if flight is not None:
                joined[key] = flight
            elif link is None:
                ours.append(key)
            else:
                theirs.setdefault(link, []).append(key)
        for link, asked in theirs.items():
            if len(asked) == 1:
                joined[asked[0]] = self.fetch(asked[0], link, depth, chain, waiter)
            else:
                self._batch(link, asked, depth, chain, waiter)
        if ours:
            joined.update(zip(ours, self._own(ours, depth, chain, waiter), strict=True))
        return [joined.get(key) for key in keys]

    def elsewhere(self, keys: Sequence[bytes]) -> list[Link | None] | None:
        """Return the links to ask where this node need not look at what it holds; else None.

        Without mirrors it holds nothing of keys that are all other nodes'.
        """
        if self.loader.mirror_ttl_ms:
            return None
        links = self.peers.routes(keys)
        return None if None in links else links

    def detach(self, key: bytes) -> None:
        """Let the key's load and fetch store nothing: the key was written."""
        self.loader.detach(key)
        if self.fetches.pop(key, None) is not None:
            self.counts[DETACHED] += 1

    def detach_all(self, version: int) -> None:
        """Let no load or fetch under way store anything, nor a set of a lower version."""
        for key in [*self.loader.flights, *self.fetches]:
            self.detach(key)
        for key in self.setting:
            self.written(key, version)

    def written(self, key: bytes, version: int) -> None:
        """Take note of a write: the answer to an older set may still be on its way."""
        noted = self.setting.get(key)
        if noted is not None and version > noted[1]:
            noted[1] = version

    def set_begins(self, key: bytes) -> None:
        """Take note of writes of a key from now on; `set_ends` comes once for each."""
        self.setting.setdefault(key, [0, 0])[0] += 1

    def set_ends(self, key: bytes) -> int:
        """Return the latest version that was heard of."""
        noted = self.setting[key]
        noted[0] -= 1
        if not noted[0]:
            del self.setting[key]
        return noted[1]

    @property
    def busy(self) -> bool:
        """Whether anything is loaded or fetched, or peeked at to be loaded then."""
        return bool(self.loader.running or self.loader.flights or self.fetches)

    def stats(self) -> dict[str, int]:
        """Return the counters, those of the loader included."""
        counts = self.loader.meters.counts()
        own = {name: counts[name] for name in COUNTERS}
        return self.loader.stats() | own | {"fetches_in_flight": len(self.fetches)}

    def finish(self, flight: Flight, outcome: Outcome, ttl_ms: int, version: int) -> None:
        """Settle a fetch, and keep a mirror of what came, unless it was detached."""
        self.finished(flight.key, flight, outcome, ttl_ms, version)
        flight.settle(outcome)

    def finished(
        self, key: bytes, fetch: Flight | Batch, outcome: Outcome, ttl_ms: int, version: int
    ) -> None:
        """End a key's fetch, and keep a mirror of what came, unless it was detached."""
        if self.fetches.get(key) is fetch:
            del self.fetches[key]
            if version and not isinstance(outcome, KamaCacheError):
                self.keep_mirror(key, outcome, ttl_ms, version)

    def ask_again(self, flights: Sequence[Flight], depth: int, chain: Chain) -> None:
        """Ask the next node for what one that stops did not answer."""
        Fetch(self, depth, chain).again(flights, 0)

    def failed(self, flights: Sequence[Flight], outcome: Any, depth: int, chain: Chain) -> None:
        """Let fetches go on after the one answer that their node gave to all of them."""
        Fetch(self, depth, chain).answered(flights, 0, outcome)

    def deadline_s(self) -> float:
        """Return the time.monotonic() up to which an owner may take that is asked now."""
        return time.monotonic() + self.loader.spec.load_timeout_s + FETCH_MARGIN_S

    def keep_mirror(self, key: bytes, value: bytes | None, ttl_ms: int, version: int) -> None:
        """Keep another node's value for a while; ``ttl_ms`` 0: it does not expire there."""
        mirror_ttl_ms = self.loader.spec.mirror_ttl_ms
        if ttl_ms:
            mirror_ttl_ms = min(mirror_ttl_ms, ttl_ms)
        if not mirror_ttl_ms or version < self.loader.floor:
            return
        expiry_ms = boottime_ms() + mirror_ttl_ms
        try:
            stored = self.loader.shard.put(
                key,
                value or b"",
                expiry_ms,
                negative=value is None,
                version=version,
                mirror=True,
            )
        except ValueTooLargeError:
            return
        except Exception:  # who waits gets the value all the same
            log.warning("the shard refused a mirror", exc_info=True, group=self.loader.spec.name)
            return
        self.counts[MIRRORS_KEPT] += stored

    def load_here(self, flights: Sequence[Flight], depth: int, chain: Chain) -> None:
        """Load for fetches that no other node answers."""
        waiter = Here(self, flights)
        keys = [flight.key for flight in flights]
        started = self._own(keys, depth, chain, waiter)
        for flight, own in zip(flights, started, strict=True):
            if isinstance(own, KamaCacheError):
                self.finish(flight, own, 0, 0)

    def _owns(self, key: bytes) -> bool:
        """Tell whether a loaded value is this node's to keep; else it is a mirror."""
        if not self.peers.owns(key):
            self.counts[NOT_OWNED] += 1
            return False
        if self.peers.stands_in(key):
            self.counts[STANDING_IN] += 1
        return True

    def _joined(
        self, key: bytes, depth: int, chain: Chain, waiter: Waiter, from_peer: bool
    ) -> Flight | None:
        load = self.loader.flights.get(key)
        if load is not None:
            self.loader.join(load, depth, waiter)
            return load
        if from_peer:
            return None
        fetch = self.fetches.get(key)
        if fetch is None:
            return None
        flight = fetch.join(key) if isinstance(fetch, Batch) else fetch
        self.counts[JOINED] += 1
        flight.waiters[waiter] = None
        if depth > flight.depth or flight.batched:
            # The asker holds a thread that the owner's load may need: ask from its depth, too. And
            # a batch answers when its slowest key is loaded, which this one need not wait for.
            flight.depth = max(depth, flight.depth)
            flight.batched = False
            link = self.peers.route(key)
            if link is not None:
                Fetch(self, depth, chain).ask(link, (flight,), 0)
        return flight

    def fetch(self, key: bytes, link: Link, depth: int, chain: Chain, waiter: Waiter) -> Flight:
        """Ask another node for a key for which no flight is under way."""
        flight = self.fetches[key] = Fetched(self, key, depth, chain)
        flight.waiters[waiter] = None
        self.counts[FETCHES] += 1
        request = Get(group=self.loader.spec.name, key=key, depth=depth, chain=chain)
        deadline_s = time.monotonic() + self.loader.spec.load_timeout_s + FETCH_MARGIN_S
        link.send(request, flight.answered, deadline_s)
        return flight

    def _batch(
        self, link: Link, keys: list[bytes], depth: int, chain: Chain, waiter: KeysWaiter
    ) -> None:
        Batch(self, keys, depth, chain, waiter).ask(link, self.deadline_s())

    def _own(
        self, keys: Sequence[bytes], depth: int, chain: Chain, waiter: Waiter
    ) -> list[Flight | LoadError]:
        """Load keys here, after a look at who may hold them from before."""
        by_holder: dict[Link, list[bytes]] = {}
        for key in keys:
            if key in self.loader.flights or not self.peers.owns(key):
                continue
            holder = self.peers.holder_before(key)
            if holder is not None:
                by_holder.setdefault(holder, []).append(key)
        started: dict[bytes, Flight | LoadError] = {}
        if by_holder:
            peeking = Peeking(self.loader, depth, chain)
            for holder, held in by_holder.items():
                for key in held:
                    started[key] = peeking.ask(holder, key, waiter)
        rest = [key for key in keys if key not in started]
        if rest:
            flights = self.loader.load_many(rest, depth, chain, waiter)
            started.update(zip(rest, flights, strict=True))
        return [started[key] for key in keys]
