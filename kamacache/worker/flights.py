"""One key on its way into the shard, and those who wait for it.

*Process*: worker, in the loop's thread. A flight is a load by the getter (`loader`), a fetch from
another node or a peek at one (`fetches`).
"""

from __future__ import annotations

from typing import Protocol

from kamacache.errors import KamaCacheError
from kamacache.getters import Loaded
from kamacache.worker.pools import Job

Outcome = Loaded | KamaCacheError


class Waiter(Protocol):
    """Who waits for a flight."""

    def settle(self, flight: Flight, outcome: Outcome) -> None:
        """Take the outcome. Called once per flight joined, unless `Flight.leave` came first."""


class Flight:
    """One key's load in progress; ``version`` is the shard's clock when it began.

    What is loaded is stored with that version, so a write that came after the beginning wins,
    whichever node it was made at.
    """

    __slots__ = ("batched", "depth", "job", "key", "settled", "version", "waiters")

    def __init__(self, key: bytes, version: int = 0, *, depth: int = 0) -> None:
        self.key = key
        self.version = version
        self.depth = depth  # of the deepest asker
        self.job: Job | None = None  # None: a peer is asked first, or instead
        self.batched = False  # a peer is asked for it among others, and answers when all are there
        self.settled = False
        self.waiters: dict[Waiter, None] = {}  # ordered, and quick to leave

    def leave(self, waiter: Waiter) -> None:
        """Wait no longer."""
        self.waiters.pop(waiter, None)

    def settle(self, outcome: Outcome) -> None:
        """Give the outcome to all who wait."""
        self.settled = True
        waiters, self.waiters = self.waiters, {}
        for waiter in waiters:
            waiter.settle(self, outcome)
