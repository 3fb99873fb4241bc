"""Own keys that another node may still hold: asked for there before they are loaded.

*Process*: worker, in the loop's thread. *Invariants*: a peek waits for no load, at either end, and
for `PEER_PEEK_S` at most. Its flight is among the loader's, so that whoever asks joins it, and a
write detaches it: then what came is kept by nobody.
"""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from kamacache.calls import ChainLink
from kamacache.limits import PEER_PEEK_S
from kamacache.rundir.meters import GROUP
from kamacache.wire.messages import PEEK, Get, Value
from kamacache.worker.flights import Flight, Waiter
from kamacache.worker.loader import Loader

if TYPE_CHECKING:
    from kamacache.cluster.peers import Link

Chain = tuple[ChainLink, ...]

PEEKS: Final = GROUP.at("peeks")
PEEK_HITS: Final = GROUP.at("peek_hits")


class Peeking:
    """Own keys that another node may hold; those that it does not are loaded together."""

    __slots__ = (
        "_absent",
        "_chain",
        "_deadline_s",
        "_depth",
        "_loader",
        "_outstanding",
    )

    def __init__(self, loader: Loader, depth: int, chain: Chain) -> None:
        self._loader = loader
        self._depth = depth
        self._chain = chain
        self._deadline_s = time.monotonic() + min(PEER_PEEK_S, loader.spec.load_timeout_s)
        self._outstanding = 0
        self._absent: list[Flight] = []

    def ask(self, holder: Link, key: bytes, waiter: Waiter) -> Flight:
        """Ask for one key; its flight may be joined meanwhile."""
        loader = self._loader
        flight = loader.flights[key] = Flight(key, loader.shard.now(), depth=self._depth)
        flight.waiters[waiter] = None
        self._outstanding += 1
        loader.counts[PEEKS] += 1
        request = Get(group=loader.spec.name, key=key, flags=PEEK)
        holder.send(request, partial(self._answered, flight), self._deadline_s)
        return flight

    def _answered(self, flight: Flight, outcome: Any) -> None:
        self._outstanding -= 1
        loader = self._loader
        if type(outcome) is Value and outcome.version > loader.floor:
            self._keep(flight, outcome)
        else:
            flight.version = loader.shard.now()  # its load begins only now
            self._absent.append(flight)
        if not self._outstanding and self._absent:
            loader.begin(self._absent, self._depth, self._chain)

    def _keep(self, flight: Flight, held: Value) -> None:
        loader, key = self._loader, flight.key
        loader.counts[PEEK_HITS] += 1
        if loader.flights.get(key) is flight:
            del loader.flights[key]
            if held.value is not None or loader.spec.negative_ttl_ms:
                loader.keep(key, held.value, held.version, held.ttl_ms)
        flight.settle(held.value)
