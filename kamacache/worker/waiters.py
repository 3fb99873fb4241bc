"""Those who wait for loads on behalf of a connection: for one key, or for several.

*Process*: worker, in the loop's thread. *Invariant*: a waiter answers each key once: with the
outcome, or at its own deadline, whichever comes first; the load goes on for the others.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Final, Protocol

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

CLOCK_STEP_S: Final = 0.002  # a loop's own clock is in milliseconds, and behind
NEVER_S: Final = float("inf")


class Asker(Protocol):
    """The connection that a request came on."""

    waiters: dict[Leaver, None]
    """Those who wait on this connection's behalf, for when it ends."""

    def answer(self, reply: Reply) -> None:
        """Send the reply of a request whose handler returned None."""


class Leaver(Protocol):
    """A waiter that can be told that nobody waits any more."""

    def leave(self) -> None: ...


class Deadlines:
    """When the waiters of one worker give up: one timer, set for the earliest of them.

    A timer for each costs more than all else that waiting for a fetch does.
    """

    __slots__ = ("_timer", "earliest_s", "loop", "waits")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop: Final = loop
        self.waits: dict[Wait, None] = {}
        self.earliest_s = NEVER_S  # none is before
        self._timer: asyncio.TimerHandle | None = None

    def wake_at(self, until_s: float) -> None:
        self.earliest_s = until_s
        if self._timer is not None:
            self._timer.cancel()
        wait_s = until_s - time.monotonic()
        self._timer = self.loop.call_later(max(0.0, wait_s), self._end_late)

    def _end_late(self) -> None:
        self._timer = None
        self.earliest_s = NEVER_S
        before_s = time.monotonic() + CLOCK_STEP_S
        for wait in [wait for wait in self.waits if wait.until_s <= before_s]:
            wait.late()
        if self.waits:
            self.wake_at(min(wait.until_s for wait in self.waits))


class Wait:
    """What all waiters share: the asker, and its deadline."""

    __slots__ = ("_asker", "_deadlines", "_for_peer", "_id", "_spec", "until_s")

    def __init__(
        self,
        request: Request,
        asker: Asker,
        spec: GroupSpec,
        deadlines: Deadlines,
        shard: Holder,
    ) -> None:
        self._asker = asker
        self._id = request.id
        self._spec = spec
        self._for_peer = shard if request.flags & FROM_PEER else None
        self._deadlines = deadlines
        self.until_s = time.monotonic() + request.budget_ms / 1000
        asker.waiters[self] = None
        deadlines.waits[self] = None
        if self.until_s < deadlines.earliest_s:
            deadlines.wake_at(self.until_s)

    def leave(self) -> None:
        """Be gone: the connection ended."""
        self._deadlines.waits.pop(self, None)

    def late(self) -> None:
        """Say that the time is over."""
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
        self._deadlines.waits.pop(self, None)
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
        deadlines: Deadlines,
        shard: Holder,
        outcomes: dict[bytes, Outcome],
        keys: Sequence[bytes],
    ) -> None:
        """``keys`` are those that have no outcome yet, each once."""
        super().__init__(request, asker, spec, deadlines, shard)
        self._keys = request.keys
        self._outcomes = outcomes
        self.pending: dict[bytes, Flight | None] = dict.fromkeys(keys)  # None: not known

    def settle(self, flight: Flight, outcome: Outcome) -> None:
        """Note the outcome, and answer when it is the last."""
        self.settle_key(flight.key, outcome)

    def settle_key(self, key: bytes, outcome: Outcome) -> None:
        """Do so for a key of a `kamacache.worker.batches.Batch`."""
        if key not in self.pending:
            return  # answered for want of time
        del self.pending[key]
        self._outcomes[key] = outcome
        if not self.pending:
            self._answer()

    def settle_all(self, keys: Sequence[bytes], values: Sequence[bytes | None]) -> None:
        """Do so for all keys of one."""
        if not self.pending:
            return
        self._outcomes.update(zip(keys, values, strict=True))
        if len(self.pending) == len(keys):
            self.pending.clear()
        else:
            for key in keys:
                del self.pending[key]
        if not self.pending:
            self._answer()

    def _answer(self) -> None:
        if self._for_peer is not None:
            reply = peer_values_reply(self._id, self._keys, self._outcomes, self._for_peer)
        else:
            reply = values_reply(self._id, self._keys, self._outcomes)
        self._reply(reply)

    def leave(self) -> None:
        """Be gone."""
        super().leave()
        pending, self.pending = self.pending, {}
        for flight in pending.values():
            if flight is not None:
                flight.leave(self)
