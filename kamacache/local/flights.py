"""The table of loads in flight: at most one per key, and what their askers get.

*Process*: one that runs getters itself. *Owns*: the table and the lock, which the cache below
shares, since its writer is for one thread at a time. *Invariants*:

- What takes a flight out of the table (set, delete, age) leaves its askers with its answer, keeps
  that answer out of the cache, and lets the next asker begin anew. So a load that began before a
  set or delete never overwrites it, and a getter that hangs leaves no key stuck.
- "Nothing kept, no flight in the table" is decided, and a flight put in, under one hold of the
  lock; "flight out, answer kept" too. So no asker can slip between the two and load twice.
- No user code runs while the lock is held.
- An error is an answer like another; each asker raises a copy of its own, since a traceback
  grows by every thread that raises the same object.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Final, Protocol

from kamacache.calls import ChainLink
from kamacache.errors import KamaCacheError, LoadError, from_fields, to_fields
from kamacache.getters import Loaded
from kamacache.limits import HUNG_SWEEP_S
from kamacache.local.threads import LoadThreads
from kamacache.repeated import RepeatedLog
from kamacache.store.reader import Answer, Negative

log: Final = RepeatedLog(logging.getLogger("kamacache.local"))

COUNTS: Final = ("loads", "load_errors", "joined", "detached", "expired")


class Keeper(Protocol):
    """Where loads look before they begin, and leave what they loaded."""

    def find(self, key: bytes) -> Answer:
        """Return what is kept, with authority. Called with the lock held."""

    def keep(self, key: bytes, loaded: Loaded) -> None:
        """Keep a loaded value, or that there is none. Called with the lock held."""


class Abandoned:
    """The type of `ABANDONED`."""

    __slots__ = ()


ABANDONED: Final = Abandoned()
"""The answer of a load whose event loop ended under it: ask again."""

Outcome = Loaded | KamaCacheError | Abandoned


class Flight:
    """A key that is being loaded."""

    __slots__ = ("future", "key", "load")

    def __init__(self, key: bytes, load: Load) -> None:
        self.key = key
        self.load = load
        self.future = _running()


class Load:
    """One run of the getter, with a flight for each of its keys: one, but for ``getter_many``."""

    __slots__ = (
        "chain",
        "claimed",
        "context",
        "depth",
        "ended",
        "expires_s",
        "flights",
        "generation",
        "given_up",
        "loop",
        "pool",
        "thread_id",
    )

    def __init__(
        self,
        keys: Sequence[bytes],
        depth: int,
        chain: tuple[ChainLink, ...],
        expires_s: float,
        generation: int,
    ) -> None:
        self.depth = depth
        self.chain = chain
        self.expires_s = expires_s  # time.monotonic(), when whoever notices takes it out
        self.generation = generation  # of the process, counted by forks
        self.flights = tuple(Flight(key, self) for key in keys)
        self.claimed = False  # someone runs it, or it expired in the queue: nobody else may
        self.ended = False
        self.given_up = False  # its thread hangs and was replaced
        self.context: contextvars.Context | None = None
        self.loop: asyncio.AbstractEventLoop | None = None  # where its task runs
        self.pool: LoadThreads | None = None  # where it is queued, or runs
        self.thread_id: int | None = None  # which thread calls the getter


class FlightTable:
    """The flights of one group in this process."""

    def __init__(self, name: str, keeper: Keeper, load_timeout_s: float) -> None:
        self.lock = threading.Lock()
        self.counts = dict.fromkeys(COUNTS, 0)
        self._name = name
        self._keeper = keeper
        self._load_timeout_s = load_timeout_s
        self._flights: dict[bytes, Flight] = {}
        self._generation = 0
        self._swept_s = 0.0

    def __len__(self) -> int:
        return len(self._flights)

    def find(self, key: bytes) -> Answer | Flight:
        """Return what is kept, or the flight to join; None: begin a load. Lock held."""
        found = self._keeper.find(key)
        if found is not None:
            return found
        flight = self._flights.get(key)
        if flight is None:
            return None
        if time.monotonic() >= flight.load.expires_s:
            self.expire(flight.load)
            return None
        self.counts["joined"] += 1
        return flight

    def begin(self, keys: Sequence[bytes], depth: int, chain: tuple[ChainLink, ...]) -> Load:
        """Put the flights of a new load into the table. Lock held."""
        expires_s = time.monotonic() + self._load_timeout_s
        load = Load(keys, depth, chain, expires_s, self._generation)
        for flight in load.flights:
            self._flights[flight.key] = flight
        self.counts["loads"] += len(keys)
        return load

    def claim(self, load: Load, pool: LoadThreads | None) -> bool:
        """Make this thread the one that runs the load; False where that is decided already."""
        with self.lock:
            if load.claimed:
                return False
            load.claimed = True
            load.expires_s = time.monotonic() + self._load_timeout_s
            load.pool = pool
            load.thread_id = threading.get_ident()
            return True

    def queue(self, load: Load, pool: LoadThreads) -> None:
        """Note where a new load waits for a thread, which gives it that much more time. Lock held.

        It may wait for the load timeout, since that is when the threads in its way are given up,
        and then run for as long.
        """
        load.pool = pool
        load.expires_s += self._load_timeout_s

    def detach(self, key: bytes) -> None:
        """Take a key's flight out, because a set or delete overtook it. Lock held."""
        self._flights.pop(key, None)

    def expire(self, load: Load) -> None:
        """Take out a load that is too old, and give up the thread it hangs in. Lock held."""
        for flight in load.flights:
            if self._flights.get(flight.key) is flight:
                del self._flights[flight.key]
                self.counts["expired"] += 1
        if not load.claimed:
            load.claimed = True  # still queued: never to run
        elif load.pool and load.thread_id and not load.given_up and not load.ended:
            load.given_up = load.pool.give_up(load.thread_id)

    def sweep(self) -> None:
        """Expire what is too old, so that loads queued behind hung threads get their place."""
        now = time.monotonic()
        with self.lock:
            if now - self._swept_s < HUNG_SWEEP_S / 2:
                return
            self._swept_s = now
            for flight in [f for f in self._flights.values() if now >= f.load.expires_s]:
                self.expire(flight.load)

    def complete(
        self, load: Load, outcome: Mapping[bytes, Loaded] | KamaCacheError | Abandoned
    ) -> None:
        """Keep what was loaded where the flight still stands, then answer the askers."""
        load.ended = True
        results: list[tuple[Flight, Outcome]]
        if isinstance(outcome, KamaCacheError | Abandoned):
            results = [(flight, outcome) for flight in load.flights]
        else:
            results = [(flight, outcome[flight.key]) for flight in load.flights]
        if load.generation != self._generation:
            # The getter forked and goes on in the child, whose table is anew. A thread of the
            # parent may have held the future's lock; only the caller below us knows the flight.
            for flight, result in results:
                flight.future = _running()
                flight.future.set_result(result)
            return
        with self.lock:
            for flight, result in results:
                self._settle(flight, result)
        for flight, result in results:
            flight.future.set_result(result)

    def _settle(self, flight: Flight, result: Outcome) -> None:
        if isinstance(result, KamaCacheError):
            self.counts["load_errors"] += 1
        if self._flights.get(flight.key) is not flight:
            self.counts["detached"] += 1
            return
        del self._flights[flight.key]
        if isinstance(result, KamaCacheError | Abandoned):
            return
        try:
            self._keeper.keep(flight.key, result)
        except Exception:  # the askers must have their answer whatever happens
            log.exception("loaded value not kept", about=self._name, group=self._name)

    def after_fork(self) -> None:
        """Begin anew in the child: nobody is left who would end these flights."""
        self._generation += 1
        self._flights.clear()
        self.counts = dict.fromkeys(COUNTS, 0)


class Gathered:
    """What a get_many has so far."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._asked = 0
        self._failures: list[LoadError] = []
        self._values: dict[bytes, bytes] = {}

    def add(self, key: bytes, outcome: Answer | Outcome) -> None:
        """Take the answer for one key; an error other than LoadError ends the call at once."""
        self._asked += 1
        if isinstance(outcome, LoadError):
            self._failures.append(outcome)
        elif isinstance(outcome, bytes):
            self._values[key] = outcome
        elif isinstance(outcome, KamaCacheError):
            raise copy_of(outcome) from outcome.__cause__

    def result(self) -> dict[bytes, bytes]:
        """Return the values, or raise the first failure with the number of all."""
        if not self._failures:
            return self._values
        first = self._failures[0]
        error = copy_of(first)
        if self._asked > 1:
            count = f"{len(self._failures)} of {self._asked} keys"
            message = f"group {self._name!r}: {count} could not be loaded; the first: {first}"
            error = LoadError(message, group=self._name, key=first.key, cause_type=first.cause_type)
        raise error from first.__cause__


def value_of(found: Answer) -> Loaded:
    """Return what was kept as a load's result."""
    return None if isinstance(found, Negative) else found


def result_of(outcome: Loaded | KamaCacheError) -> Loaded:
    """Return a load's result, or raise its error."""
    if isinstance(outcome, KamaCacheError):
        raise copy_of(outcome) from outcome.__cause__
    return outcome


def copy_of(error: KamaCacheError) -> KamaCacheError:
    """Return an error like this one, without its traceback."""
    return from_fields(*to_fields(error))


def _running() -> Future[Outcome]:
    future: Future[Outcome] = Future()
    future.set_running_or_notify_cancel()  # from here on no asker can cancel it
    return future
