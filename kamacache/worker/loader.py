"""Single flight: at most one load per key, whoever asks, and what becomes of its outcome.

*Process*: worker; everything here runs in the loop's thread, except `LoadJob.run`.

    ask ──► flight of this key? ── yes ──► wait with the others (promote it, if it is queued)
               │ no
               ▼
            new flight ──► job ──► getter thread, or task on the loop
                                       │ outcome, or load_timeout
                                       ▼
            kept in the shard, unless detached ──► every waiter gets it

*Invariants*:

- A flight is in ``flights`` until it is settled, times out, or is detached by a set or delete; what
  is not in ``flights`` any more stores nothing. So a load never overwrites what was written after
  it began, and those who ask after the write start a new one.
- A waiter that leaves (deadline, disconnect) takes nothing with it: the load goes on, its result
  is kept.
- Whatever a getter does, its flight ends within ``load_timeout`` in the queue plus
  ``load_timeout`` running.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
from collections.abc import Callable, Sequence
from typing import Final

from kamacache.calls import Call, ChainLink, current
from kamacache.clock import boottime_ms
from kamacache.config import GroupSpec
from kamacache.errors import DeadlineExceededError, KamaCacheError, LoadError, ValueTooLargeError
from kamacache.getters import Loadable, Loaded
from kamacache.limits import LOAD_DEPTH_MAX, LOADS_QUEUED_MAX
from kamacache.repeated import RepeatedLog
from kamacache.rundir.meters import GROUP, Region
from kamacache.worker.flights import Flight, Outcome, Waiter
from kamacache.worker.pools import DepthPool, GetterThreads, Job
from kamacache.worker.shard import Shard
from kamacache.worker.slow import SlowLoads

Outcomes = dict[bytes, Loaded] | KamaCacheError

CHAIN_KEYS_MAX: Final = 64  # keys of one getter_many call that its nested calls' chain names

COUNTERS: Final = (
    "loads",
    "load_errors",
    "load_timeouts",
    "loads_joined",
    "loads_refused",
    "loads_detached",
    "loads_not_kept",
)
LOADS, LOAD_ERRORS, LOAD_TIMEOUTS, JOINED, REFUSED, DETACHED, NOT_KEPT = map(GROUP.at, COUNTERS)
QUEUE_US: Final = GROUP.at("load_queue_us")

log = RepeatedLog(logging.getLogger("kamacache.worker.loader"))


class LoadJob(Job):
    """One call of the getter, for one flight or, with ``getter_many``, for several."""

    __slots__ = ("asked_s", "chain", "done", "flights", "keys", "loader", "many", "task", "timer")

    def __init__(self, loader: Loader, flights: Sequence[Flight], many: bool) -> None:
        super().__init__()
        self.loader = loader
        self.flights = flights
        self.keys = [flight.key for flight in flights]
        self.many = many
        self.chain: tuple[ChainLink, ...] = ()
        self.asked_s = time.monotonic()
        self.done = False
        self.task: asyncio.Task[None] | None = None
        self.timer: asyncio.TimerHandle | None = None
        for flight in flights:
            flight.job = self

    def call(self, depth: int) -> Call:
        """Return what nested calls of the getter must know."""
        group = self.loader.spec.name
        links = tuple((group, key) for key in self.keys[:CHAIN_KEYS_MAX])
        started_s = time.monotonic() if self.started_s is None else self.started_s
        return Call(depth, self.chain + links, started_s + self.loader.spec.load_timeout_s)

    def run(self, depth: int) -> Outcomes:
        """Call the getter; in a getter thread."""
        return contextvars.Context().run(self._run, depth)

    def _run(self, depth: int) -> Outcomes:
        # Every job has a context of its own, so that none sees what a getter left in a variable.
        current.set(self.call(depth))
        loadable = self.loader.loadable
        assert loadable is not None
        try:
            if self.many:
                return loadable.load_many(self.keys)
            return {self.keys[0]: loadable.load(self.keys[0])}
        except BaseException as error:
            return self.loader.error_of(error)

    async def arun(self) -> None:
        """Await the getter; a task of the loop."""
        loadable = self.loader.loadable
        assert loadable is not None
        try:
            outcome: Outcomes
            if self.many:
                outcome = await loadable.aload_many(self.keys)
            else:
                outcome = {self.keys[0]: await loadable.aload(self.keys[0])}
        except BaseException as error:
            outcome = self.loader.error_of(error)
        self.finish(outcome)

    def finish(self, outcome: Outcomes) -> None:
        """Settle the flights with what the getter gave, unless the timer came first."""
        if not self.done:
            self.close()
            self.loader.settle(self, outcome)

    def close(self) -> None:
        """Take the job out of the timer's and the pools' books."""
        self.done = True
        if self.timer is not None:
            self.timer.cancel()
        for pool in self.depths:
            pool.finished()


def _always(key: bytes) -> bool:
    return True


class Loader:
    """The flights of one group in one worker."""

    def __init__(
        self,
        spec: GroupSpec,
        shard: Shard,
        loadable: Loadable | None,
        threads: GetterThreads,
        meters: Region | None = None,
    ) -> None:
        """``meters`` outlive this process; None: as in a test."""
        self.spec: Final = spec
        self.shard: Final = shard
        self.loadable: Final = loadable if loadable is not None and loadable.has_getter else None
        self.flights: dict[bytes, Flight] = {}
        self.meters: Final = meters or Region(GROUP)
        self.counts: Final = self.meters.words  # add to a word by its place
        self.owns: Callable[[bytes], bool] = _always  # else what is loaded is kept as a mirror
        self.mirror_ttl_ms = 0
        self.slow = SlowLoads()  # the worker's, where it is a node's
        self.floor = 0  # no older version is kept, as of the last flush
        self.running = 0  # jobs that did not finish, detached ones included
        self.stray: list[asyncio.Task[None]] = []  # cancelled, not ended yet
        self._hung_tasks: set[asyncio.Task[None]] = set()
        self._threads = threads
        self._loop = threads.loop
        self._pools: Final = [
            DepthPool(threads, spec.name, depth, spec.load_threads)
            for depth in range(LOAD_DEPTH_MAX + 1)
        ]

    @property
    def busy(self) -> bool:
        """Whether a load runs or is queued, one that a write detached included."""
        return self.running > 0

    def load(
        self,
        key: bytes,
        depth: int,
        chain: tuple[ChainLink, ...],
        waiter: Waiter,
        *,
        from_peer: bool = False,
    ) -> Flight | LoadError:
        """Join the key's flight or start one; the waiter is settled later, never in this call."""
        flight = self.flights.get(key)
        if flight is not None:
            self.join(flight, depth, waiter)
            return flight
        flight = Flight(key, self.shard.now(), depth=depth)
        if self.loadable is None:  # a group without a getter, whose owner is another node
            self._loop.call_soon(self.begin, (flight,), depth, chain)
        else:
            error = self._start(LoadJob(self, (flight,), many=False), depth, chain)
            if error is not None:
                return error
        self.flights[key] = flight
        flight.waiters[waiter] = None
        return flight

    def load_many(
        self,
        keys: Sequence[bytes],
        depth: int,
        chain: tuple[ChainLink, ...],
        waiter: Waiter,
        *,
        from_peer: bool = False,
        links: object = None,
    ) -> list[Flight | LoadError]:
        """Do the same for distinct keys; those without a flight go in one call where possible."""
        error: LoadError | None = None
        fresh: dict[bytes, Flight] = {}
        if self.loadable is not None and self.loadable.has_getter_many:
            version = self.shard.now()
            fresh = {
                key: Flight(key, version, depth=depth) for key in keys if key not in self.flights
            }
        if len(fresh) > 1:
            error = self._start(LoadJob(self, [*fresh.values()], many=True), depth, chain)
        else:
            fresh = {}
        joined: list[Flight | LoadError] = []
        for key in keys:
            flight = fresh.get(key)
            if flight is None:
                joined.append(self.load(key, depth, chain, waiter))
            elif error is not None:
                joined.append(error)
            else:
                self.flights[key] = flight
                flight.waiters[waiter] = None
                joined.append(flight)
        return joined

    def begin(self, flights: Sequence[Flight], depth: int, chain: tuple[ChainLink, ...]) -> None:
        """Call the getter for flights that are there already, and have no job yet."""
        if self.loadable is None:
            for flight in flights:
                self._settle_one(flight, None)
            return
        depth = max(depth, *(flight.depth for flight in flights))
        many = len(flights) > 1 and self.loadable.has_getter_many
        for part in [flights] if many else [(flight,) for flight in flights]:
            error = self._start(LoadJob(self, part, many=many), depth, chain)
            if error is not None:
                for flight in part:
                    self._settle_one(flight, error)

    def detach(self, key: bytes) -> None:
        """Let the key's load store nothing: the key was written. Those who wait get its answer."""
        if self.flights.pop(key, None) is not None:
            self.counts[DETACHED] += 1

    def stats(self) -> dict[str, int]:
        """Return counters, and what is going on."""
        counts = self.meters.counts()
        own = {name: counts[name] for name in COUNTERS}
        return own | {"loads_in_flight": len(self.flights)}

    @property
    def calls_running(self) -> int:
        """Calls of the getter that run now; those given up are not among them."""
        if self.loadable is None or self.loadable.is_async:
            return self.running
        return sum([thread.job is not None for pool in self._pools for thread in pool.workers])

    def tick(self) -> None:
        """Count as hung what did not heed its cancellation; call about once a second."""
        for task in self.stray:
            if not task.done():
                log.warning(
                    "an async getter ignores its cancellation at load_timeout",
                    group=self.spec.name,
                )
                self._hung_tasks.add(task)
                task.add_done_callback(self._stray_ended)
                self._threads.gave_up()
        self.stray = []

    def error_of(self, error: BaseException) -> KamaCacheError:
        """Return what the waiters get for what a getter raised."""
        if isinstance(error, KamaCacheError):
            return error
        return LoadError(
            f"group {self.spec.name!r}: the getter raised {type(error).__name__}",
            group=self.spec.name,
            cause_type=type(error).__name__,
        )

    def settle(self, job: LoadJob, outcomes: Outcomes) -> None:
        """Keep what a job loaded, and answer those who wait for it."""
        self.running -= 1
        self._took(job, time.monotonic())
        if isinstance(outcomes, KamaCacheError):
            self.counts[LOAD_ERRORS] += 1
        for flight in job.flights:
            if isinstance(outcomes, KamaCacheError):
                self._settle_one(flight, outcomes)
            else:
                self._settle_one(flight, outcomes.get(flight.key))

    def _took(self, job: LoadJob, now_s: float) -> None:
        """Count how long a load waited for a thread, and how long its getter ran."""
        started_s = now_s if job.started_s is None else job.started_s
        self.counts[QUEUE_US] += int((started_s - job.asked_s) * 1e6)
        if job.started_s is not None:  # else it was given up in the queue
            self.meters.observe(now_s - started_s)
        if (seconds := now_s - job.asked_s) >= self.slow.bound_s:
            depth = max(flight.depth for flight in job.flights)
            self.slow.tell(self.spec.name, job.keys, depth, seconds, started_s - job.asked_s)

    def _settle_one(self, flight: Flight, outcome: Outcome) -> None:
        key = flight.key
        if self.flights.get(key) is flight:  # else detached: stores nothing
            del self.flights[key]
            if not isinstance(outcome, KamaCacheError):
                self.keep(key, outcome, flight.version)
        flight.settle(outcome)

    def join(self, flight: Flight, depth: int, waiter: Waiter) -> None:
        """Let one more wait for a flight; its load runs at the depth of the deepest of them."""
        self.counts[JOINED] += 1
        flight.waiters[waiter] = None
        flight.depth = max(flight.depth, depth)
        job = flight.job
        if job is None:
            return  # begins later, at the flight's depth
        if job.depths and job.started_s is None and job.depths[-1].depth < depth:
            # The asker holds a thread of depth - 1 and must not wait for one of the same or less.
            # Where the deeper queue is full, the load still runs from the one it stands in.
            self._pools[depth].submit(job)

    def _start(self, job: LoadJob, depth: int, chain: tuple[ChainLink, ...]) -> LoadError | None:
        assert self.loadable is not None
        job.chain = chain
        if self.loadable.is_async:
            refused = self.running >= LOADS_QUEUED_MAX
            if not refused:
                job.started_s = time.monotonic()
                context = contextvars.Context()
                context.run(current.set, job.call(depth))
                job.task = self._loop.create_task(job.arun(), context=context)
        else:
            refused = not self._pools[depth].submit(job)
        if refused:
            self.counts[REFUSED] += 1
            return LoadError(
                f"group {self.spec.name!r}: {LOADS_QUEUED_MAX} loads wait already; "
                "the getter is too slow for what is asked of it",
                group=self.spec.name,
                cause_type="overloaded",
            )
        self.running += 1
        self.counts[LOADS] += len(job.flights)
        job.timer = self._loop.call_later(self.spec.load_timeout_s, self._timed_out, job)
        return None

    def _timed_out(self, job: LoadJob) -> None:
        if job.done:
            return
        now = time.monotonic()
        timeout_s = self.spec.load_timeout_s
        if job.started_s is not None and (left := job.started_s + timeout_s - now) > 0.001:
            job.timer = self._loop.call_later(left, self._timed_out, job)  # it was queued first
            return
        where = "in the queue" if job.started_s is None and job.claim() else "in the getter"
        if where == "in the getter" and job.task is None:
            if job.started_s is None:  # claimed this instant
                job.timer = self._loop.call_later(timeout_s, self._timed_out, job)
                return
            if not job.end():
                return  # its outcome is on the way to the loop
            assert job.thread is not None
            log.warning(
                "a getter runs longer than load_timeout; its thread is replaced",
                group=self.spec.name,
                load_timeout_s=timeout_s,
                hung=self._threads.hung + 1,
            )
            job.thread.pool.give_up(job.thread)
        elif job.task is not None:
            job.task.cancel()
            self.stray.append(job.task)
        job.close()
        self.counts[LOAD_TIMEOUTS] += 1
        error = DeadlineExceededError(
            f"group {self.spec.name!r}: the load took longer than load_timeout "
            f"({timeout_s:g} s) {where}",
            timeout_s=timeout_s,
            group=self.spec.name,
        )
        self.settle(job, error)

    def keep(self, key: bytes, value: Loaded, version: int, ttl_ms: int | None = None) -> None:
        """Store what was loaded, as the owner or as a mirror; ``ttl_ms`` None: the group's."""
        spec = self.spec
        if version < self.floor:
            self.counts[NOT_KEPT] += 1
            return
        if ttl_ms is None:
            ttl_ms = spec.negative_ttl_ms if value is None else spec.ttl_ms or 0
        if value is None and not ttl_ms:
            return
        mirror = not self.owns(key)
        if mirror:
            ttl_ms = min(ttl_ms or self.mirror_ttl_ms, self.mirror_ttl_ms)
            if not ttl_ms:
                return
        try:
            self.shard.put(
                key,
                value or b"",
                boottime_ms() + ttl_ms if ttl_ms else 0,
                negative=value is None,
                version=version,
                mirror=mirror,
            )
        except ValueTooLargeError:
            self.counts[NOT_KEPT] += 1  # returned all the same
        except Exception:
            log.warning("the shard refused a loaded value", exc_info=True, group=spec.name)
            self.counts[NOT_KEPT] += 1

    def _stray_ended(self, task: asyncio.Task[None]) -> None:
        self._hung_tasks.discard(task)
        self._threads.returned()
