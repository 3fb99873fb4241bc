"""Keys that one node is asked for together, each of them answered for itself.

*Process*: worker, in the loop's thread. What a request of many keys, or the gets of one turn of an
application's loop, miss at one other node is one `Gets` on its link, and one entry here; a `Flight`
for each key is made only for keys that someone else joins, or that go another way in the end. That
is what a key costs where all goes well: two changes of a dict, and its bytes copied.

*Invariants*: as of a `Fetch`: a write or an invalidation takes a key out of
`ClusterReads.fetches`, and then its answer is kept by nobody.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol

from kamacache.calls import ChainLink
from kamacache.errors import GroupNotFoundError, NodeUnavailableError, from_fields
from kamacache.rundir.meters import GROUP
from kamacache.wire.messages import Answers, Gets
from kamacache.worker.flights import Flight, Outcome, Waiter

if TYPE_CHECKING:
    from kamacache.cluster.peers import Link
    from kamacache.worker.fetches import ClusterReads

Chain = tuple[ChainLink, ...]

FETCHES: Final = GROUP.at("fetches")
ERRORS: Final = GROUP.at("fetch_errors")


class KeysWaiter(Waiter, Protocol):
    """Who waits for several keys."""

    pending: dict[bytes, Flight | None]

    def settle_key(self, key: bytes, outcome: Outcome) -> None:
        """Take one key's outcome."""

    def settle_all(self, keys: Sequence[bytes], values: list[bytes | None]) -> None:
        """Take the values of all keys that were asked for together."""


class Batch:
    """Distinct keys asked of one node for one waiter."""

    __slots__ = ("_chain", "_depth", "_flights", "_keys", "_left", "_reads", "_waiter")

    def __init__(
        self,
        reads: ClusterReads,
        keys: list[bytes],
        depth: int,
        chain: Chain,
        waiter: KeysWaiter,
    ) -> None:
        self._reads = reads
        self._keys = keys
        self._depth = depth
        self._chain = chain
        self._waiter = waiter
        self._flights: dict[bytes, Flight] = {}  # of keys that others wait for, too
        self._left: dict[int, None] | None = None  # None: nothing is answered yet

    def ask(self, link: Link, deadline_s: float) -> None:
        """Begin."""
        reads, keys = self._reads, self._keys
        reads.fetches.update(dict.fromkeys(keys, self))
        reads.counts[FETCHES] += len(keys)
        group = reads.loader.spec.name
        request = Gets(group=group, keys=keys, depth=self._depth, chain=self._chain)
        link.send(request, self._answered, deadline_s)

    def join(self, key: bytes) -> Flight:
        """Return a flight for one more who waits for a key."""
        flight = self._flights[key] = self._reads.fetches[key] = Flight(key, depth=self._depth)
        return flight

    def _answered(self, outcome: Any) -> None:
        if type(outcome) is not Answers:
            self._rest(outcome)
            return
        values, fetches = outcome.values, self._reads.fetches
        if (
            self._left is None
            and not outcome.at
            and len(values) == len(self._keys)
            and not self._flights
            and not self._reads.loader.mirror_ttl_ms
        ):
            for key in self._keys:
                if fetches.get(key) is self:
                    del fetches[key]
            self._waiter.settle_all(self._keys, values)
            return
        self._take(outcome)

    def _take(self, reply: Answers) -> None:
        """Take answers key by key."""
        if self._left is None:
            self._left = dict.fromkeys(range(len(self._keys)))
        meta = len(reply.ttls) == len(reply.versions) == len(reply.values)
        again: list[int] = []
        here: list[int] = []
        for place, index in enumerate(reply.at or range(len(reply.values))):
            ttl_ms, version = (reply.ttls[place], reply.versions[place]) if meta else (0, 0)
            self._finish(index, reply.values[place], ttl_ms, version)
        for failed in reply.errors:
            if failed.index not in self._left:
                continue
            error = from_fields(failed.kind, failed.message, failed.fields)
            if isinstance(error, NodeUnavailableError):  # it stops
                again.append(failed.index)
            elif isinstance(error, GroupNotFoundError):  # not all nodes have it, or not yet
                here.append(failed.index)
            else:
                self._reads.counts[ERRORS] += 1
                self._finish(failed.index, error, 0, 0)
        if again:
            flights = [self._flight(index) for index in again]
            self._reads.ask_again(flights, self._depth, self._chain)
        if here:
            flights = [self._flight(index) for index in here]
            self._reads.load_here(flights, self._depth, self._chain)

    def _finish(self, index: int, outcome: Outcome, ttl_ms: int, version: int) -> None:
        assert self._left is not None
        if index not in self._left:
            return
        del self._left[index]
        key = self._keys[index]
        flight = self._flights.pop(key, None)
        if flight is not None and not flight.settled:
            self._reads.finish(flight, outcome, ttl_ms, version)
        else:
            self._reads.finished(key, self, outcome, ttl_ms, version)
        self._waiter.settle_key(key, outcome)

    def _rest(self, outcome: Any) -> None:
        """Let all that is left go the way of fetches that failed."""
        left = range(len(self._keys)) if self._left is None else [*self._left]
        self._left = {}
        flights = [self._flight(index) for index in left]
        self._reads.failed(flights, outcome, self._depth, self._chain)

    def _flight(self, index: int) -> Flight:
        """Return the flight of a key that has to go another way."""
        if self._left:
            self._left.pop(index, None)
        key, fetches = self._keys[index], self._reads.fetches
        flight = self._flights.pop(key, None)
        if flight is None or flight.settled:
            flight = Flight(key, depth=self._depth)
            if fetches.get(key) is self:  # else a write detached it: what comes is not kept
                fetches[key] = flight
        if key in self._waiter.pending:
            self._waiter.pending[key] = flight
            flight.waiters[self._waiter] = None
        return flight
