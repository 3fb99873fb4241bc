"""Those who wait for loads on behalf of a connection: for one key, or for several.

*Process*: worker, in the loop's thread. *Invariant*: a waiter answers once: with the outcome, or
at its own deadline, whichever comes first; the load goes on for the others.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

from kamacache.config import GroupSpec
from kamacache.errors import DeadlineExceededError, KamaCacheError
from kamacache.wire.messages import FROM_PEER, GetMany, Reply, Request
from kamacache.worker.flights import Flight, Outcome
from kamacache.worker.replies import (
    Holder,
    failure,
    peer_value_reply,
    peer_values_reply,
    value_reply,
    values_reply,
)


class Asker(Protocol):
    """The connection that a request came on."""

    waiters: dict[Leaver, None]
    """Those who wait on this connection's behalf, for when it ends."""

    def answer(self, reply: Reply) -> None:
        """Send the reply of a request whose handler returned None."""


class Leaver(Protocol):
    """A waiter that can be told that nobody waits any more."""

    def leave(self) -> None: ...


class Wait:
    """What the two waiters share: the asker, and its deadline."""

    __slots__ = ("_asker", "_for_peer", "_id", "_spec", "_timer")

    def __init__(
        self,
        request: Request,
        asker: Asker,
        spec: GroupSpec,
        loop: asyncio.AbstractEventLoop,
        shard: Holder,
    ) -> None:
        self._asker = asker
        self._id = request.id
        self._spec = spec
        self._for_peer = shard if request.flags & FROM_PEER else None
        asker.waiters[self] = None
        self._timer = loop.call_later(request.budget_ms / 1000, self._late)

    def leave(self) -> None:
        """Be gone: the connection ended."""
        self._timer.cancel()

    def _late(self) -> None:
        self.leave()
        self._reply(
            failure(
                self._id,
                DeadlineExceededError(
                    f"group {self._spec.name!r}: the load did not end before the deadline; "
                    "it goes on",
                    group=self._spec.name,
                ),
            )
        )

    def _reply(self, reply: Reply) -> None:
        self._timer.cancel()
        self._asker.waiters.pop(self, None)
        self._asker.answer(reply)


class OneWaiter(Wait):
    """Who waits for one key."""

    __slots__ = ("flight",)

    flight: Flight | None

    def settle(self, flight: Flight, outcome: Outcome) -> None:
        """Answer."""
        if isinstance(outcome, KamaCacheError):
            self._reply(failure(self._id, outcome))
        elif self._for_peer is not None:
            self._reply(peer_value_reply(self._id, flight.key, outcome, self._for_peer))
        else:
            self._reply(value_reply(self._id, outcome))

    def leave(self) -> None:
        """Be gone."""
        super().leave()
        if self.flight is not None:
            self.flight.leave(self)


class ManyWaiter(Wait):
    """Who waits for several keys; answers when the last is settled."""

    __slots__ = ("_keys", "_outcomes", "pending")

    def __init__(
        self,
        request: GetMany,
        asker: Asker,
        spec: GroupSpec,
        loop: asyncio.AbstractEventLoop,
        shard: Holder,
        outcomes: dict[bytes, Outcome],
    ) -> None:
        super().__init__(request, asker, spec, loop, shard)
        self._keys = request.keys
        self._outcomes = outcomes
        self.pending: dict[bytes, Flight] = {}

    def settle(self, flight: Flight, outcome: Outcome) -> None:
        """Note the outcome, and answer when it is the last."""
        self._outcomes[flight.key] = outcome
        del self.pending[flight.key]
        if self.pending:
            return
        if self._for_peer is not None:
            reply = peer_values_reply(self._id, self._keys, self._outcomes, self._for_peer)
        else:
            reply = values_reply(self._id, self._keys, self._outcomes)
        self._reply(reply)

    def leave(self) -> None:
        """Be gone."""
        super().leave()
        for flight in self.pending.values():
            flight.leave(self)
