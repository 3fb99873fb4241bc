"""One load per key at a time in this process, shared by its threads and its asyncio tasks.

*Process*: one that runs getters itself: single-instance mode (`kamacache.local.single`), or
attached while the node is gone (`FallbackLoader`). *Invariant*: a load belongs to no asker. One
that is cancelled or out of time leaves, and the load goes on for the others and for the cache.

Fork: every table's lock is held across the fork, so the child never finds one locked by a thread
that it does not have. It drops flights, threads and counts; its private memory is a copy.
"""

from __future__ import annotations

import asyncio
import math
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator, Sequence

from kamacache import calls
from kamacache.errors import DeadlineExceededError, LoadError
from kamacache.getters import Loaded
from kamacache.limits import BATCH_KEYS_MAX, FORK_LOCK_S, HUNG_SWEEP_S, LOADS_ABANDONED_MAX
from kamacache.local.engine import EngineUser
from kamacache.local.flights import (
    Abandoned,
    Flight,
    FlightTable,
    Gathered,
    Keeper,
    Load,
    Outcome,
    result_of,
    value_of,
)
from kamacache.local.running import Runner, too_slow
from kamacache.store.reader import Answer


class Loads:
    """A group's loads in this process."""

    def __init__(self, group: EngineUser, keeper: Keeper) -> None:
        self._group = group
        self._name = group.spec.name
        self._load_timeout_s = group.spec.load_timeout_s
        self.table = FlightTable(self._name, keeper, self._load_timeout_s)
        self._runner = Runner(group, self.table)
        _live.add(self)

    def get(self, key: bytes, deadline_s: float | None) -> Loaded:
        """Return a key's value, loaded if need be; None: not found."""
        until_s = self._until(deadline_s)
        for _ in range(LOADS_ABANDONED_MAX):
            asked = self._ask(key, None, inline=self._runner.inline(deadline_s))
            if not isinstance(asked, Flight):
                return value_of(asked)
            outcome = self._wait(asked, until_s)
            if not isinstance(outcome, Abandoned):
                return result_of(outcome)
        raise self._lost(key)

    async def aget(self, key: bytes, deadline_s: float | None) -> Loaded:
        """As `get`, without blocking the loop."""
        until_s = self._until(deadline_s)
        for _ in range(LOADS_ABANDONED_MAX):
            asked = self._ask(key, asyncio.get_running_loop())
            if not isinstance(asked, Flight):
                return value_of(asked)
            outcome = await self._await(asked, until_s)
            if not isinstance(outcome, Abandoned):
                return result_of(outcome)
        raise self._lost(key)

    def get_many(self, keys: Sequence[bytes], deadline_s: float | None) -> dict[bytes, bytes]:
        """Return those found. A load that fails is raised after the others are loaded and kept."""
        until_s = self._until(deadline_s)
        gathered = Gathered(self._name)
        inline = self._runner.inline(deadline_s)
        for flight in self._ask_many(keys, gathered, None, inline=inline):
            try:
                outcome = self._wait(flight, until_s)
                if isinstance(outcome, Abandoned):
                    outcome = self.get(flight.key, until_s)
            except LoadError as error:
                outcome = error
            gathered.add(flight.key, outcome)
        return gathered.result()

    async def aget_many(
        self, keys: Sequence[bytes], deadline_s: float | None
    ) -> dict[bytes, bytes]:
        """As `get_many`, without blocking the loop."""
        until_s = self._until(deadline_s)
        gathered = Gathered(self._name)
        for flight in self._ask_many(keys, gathered, asyncio.get_running_loop()):
            try:
                outcome = await self._await(flight, until_s)
                if isinstance(outcome, Abandoned):
                    outcome = await self.aget(flight.key, until_s)
            except LoadError as error:
                outcome = error
            gathered.add(flight.key, outcome)
        return gathered.result()

    def after_fork(self) -> None:
        """Begin anew in the child. Called with the lock held, by the only thread there is."""
        self.table.after_fork()
        self._runner.after_fork()

    def _until(self, deadline_s: float | None) -> float:
        """Return when an asker leaves; one that named no time waits as long as the load may take.

        A nested one leaves with the call it serves, which is how cycles across threads end.
        """
        if deadline_s is not None:
            return deadline_s
        outer = calls.current.get()
        return math.inf if outer is None else outer.deadline_s

    def _ask(
        self, key: bytes, loop: asyncio.AbstractEventLoop | None, *, inline: bool = False
    ) -> Answer | Flight:
        """Return what is kept, or the key's flight: one under way, or one begun here."""
        depth, chain = calls.nested(self._name, key)
        load = None
        with self.table.lock:
            asked = self.table.find(key)
            if asked is None and self._group.has_getter:
                load = self.table.begin([key], depth, chain)
                self._runner.place(load, inline=inline)
        if load is not None:
            self._runner.start(load, loop)
            return load.flights[0]
        if isinstance(asked, Flight):
            self._runner.promote(asked.load, depth)
        return asked

    def _ask_many(
        self,
        keys: Sequence[bytes],
        gathered: Gathered,
        loop: asyncio.AbstractEventLoop | None,
        *,
        inline: bool = False,
    ) -> Iterator[Flight]:
        """Yield the flights to wait for; what is kept goes into ``gathered`` at once."""
        keys = list(dict.fromkeys(keys))
        if self._group.has_getter_many:
            for at in range(0, len(keys), BATCH_KEYS_MAX):
                batch = keys[at : at + BATCH_KEYS_MAX]
                yield from self._ask_batch(batch, gathered, loop, inline=inline)
            return
        # As many loads go ahead of the asker's waiting as may run at a time. An inline one is
        # over when _ask returns, so none is held while waiting for another caller's: two callers
        # who did that with the same keys in another order would wait for each other.
        ahead = 0 if inline else self._group.spec.load_threads
        waiting: deque[Flight] = deque()
        for key in keys:
            try:
                asked = self._ask(key, loop, inline=inline)
            except LoadError as error:
                gathered.add(key, error)
                continue
            if isinstance(asked, Flight):
                waiting.append(asked)
            else:
                gathered.add(key, asked)
            if len(waiting) > ahead:
                yield waiting.popleft()
        yield from waiting

    def _ask_batch(
        self,
        keys: Sequence[bytes],
        gathered: Gathered,
        loop: asyncio.AbstractEventLoop | None,
        *,
        inline: bool,
    ) -> list[Flight]:
        """Begin one load for all keys that are neither kept nor in flight."""
        depth = 0
        chain: tuple[calls.ChainLink, ...] = ()
        allowed: list[bytes] = []
        for key in keys:
            try:
                depth, chain = calls.nested(self._name, key)  # the same for all, if allowed
                allowed.append(key)
            except LoadError as error:
                gathered.add(key, error)
        flights: list[Flight] = []
        missing: list[bytes] = []
        load: Load | None = None
        with self.table.lock:
            for key in allowed:
                asked = self.table.find(key)
                if isinstance(asked, Flight):
                    flights.append(asked)
                elif asked is None:
                    missing.append(key)
                else:
                    gathered.add(key, asked)
            if missing:
                load = self.table.begin(missing, depth, chain)
                self._runner.place(load, inline=inline)
        for flight in flights:
            self._runner.promote(flight.load, depth)
        if load is not None:  # ours runs before we wait for any other's
            self._runner.start(load, loop)
            flights.extend(load.flights)
        return flights

    def _wait(self, flight: Flight, until_s: float) -> Outcome:
        """Block until the flight's answer or the deadline."""
        if not flight.future.done():
            self._check_reachable(flight.load)
        while True:
            try:
                return flight.future.result(self._pause_s(flight.load, until_s))
            except TimeoutError:
                self._check_time(flight, until_s)

    async def _await(self, flight: Flight, until_s: float) -> Outcome:
        """Wait on the loop for the flight's answer or the deadline."""
        if flight.future.done():
            return flight.future.result()
        future = asyncio.wrap_future(flight.future)
        try:
            while True:
                await asyncio.wait([future], timeout=self._pause_s(flight.load, until_s))
                if future.done():
                    return future.result()
                self._check_time(flight, until_s)
        finally:
            future.cancel()  # ours alone; the flight's own is running and cannot be cancelled

    def _pause_s(self, load: Load, until_s: float) -> float:
        """How long to wait before looking again: briefly where hung threads may be in the way."""
        left_s = min(until_s, load.expires_s) - time.monotonic()
        if load.pool is not None and not load.claimed:
            left_s = min(left_s, HUNG_SWEEP_S)
        return max(0.0, left_s)

    def _check_time(self, flight: Flight, until_s: float) -> None:
        """Raise `DeadlineExceededError` when the asker's time or the load's is over."""
        now = time.monotonic()
        load = flight.load
        if flight.future.done():
            return
        if now >= load.expires_s:
            with self.table.lock:
                self.table.expire(load)
            raise too_slow(self._name, self._load_timeout_s)
        if now >= until_s:
            raise DeadlineExceededError(
                f"group {self._name!r}: the deadline passed before the load ended; it goes on",
                group=self._name,
            )
        if load.pool is not None and not load.claimed:
            self.table.sweep()

    def _check_reachable(self, load: Load) -> None:
        """Raise `LoadError` at once where the load cannot go on while this thread waits for it."""
        if load.pool is None and load.thread_id == threading.get_ident():
            raise LoadError(
                f"group {self._name!r}: the getter asks for the key that it is loading",
                group=self._name,
                cause_type="cycle",
            )
        if load.loop is not None and load.loop is asyncio._get_running_loop():
            raise LoadError(
                f"group {self._name!r}: this would block the event loop that the load runs on; "
                "use the await forms there, such as aget()",
                group=self._name,
                cause_type="blocked_loop",
            )

    def _lost(self, key: bytes) -> LoadError:
        return LoadError(
            f"group {self._name!r}: {LOADS_ABANDONED_MAX} loads were lost with their event loops",
            group=self._name,
            key=key,
            cause_type="abandoned",
        )


class NothingKept:
    """A keeper for loads that are not to be cached."""

    def find(self, key: bytes) -> Answer:
        """Return None: nothing is kept."""
        return None

    def keep(self, key: bytes, loaded: Loaded) -> None:
        """Do nothing."""


class FallbackLoader(Loads):
    """An attached group's own getter while there is no node: uncached, one call per key."""

    def __init__(self, group: EngineUser) -> None:
        super().__init__(group, NothingKept())

    def detach(self, key: bytes) -> None:
        """Let later gets load anew: what is in flight for the key may be outdated."""
        with self.table.lock:
            self.table.detach(key)


_live: weakref.WeakSet[Loads] = weakref.WeakSet()
_forking = threading.Lock()  # two threads that fork at once would take the locks in any order
_held: list[Loads] = []


def _before_fork() -> None:
    _forking.acquire()
    # Only a fork from a signal handler that interrupted the holder itself waits in vain; the holder
    # then goes on in the child, and releases the lock there.
    _held.extend(loads for loads in list(_live) if loads.table.lock.acquire(timeout=FORK_LOCK_S))


def _after_fork_in_parent() -> None:
    _release()


def _after_fork_in_child() -> None:
    for loads in list(_live):
        loads.after_fork()
    _release()


def _release() -> None:
    while _held:
        _held.pop().table.lock.release()
    _forking.release()


os.register_at_fork(
    before=_before_fork,
    after_in_parent=_after_fork_in_parent,
    after_in_child=_after_fork_in_child,
)
