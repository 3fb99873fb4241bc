"""Where a load runs: the caller's thread, a pool's thread, or a task on an event loop.

*Process*: one that runs getters itself::

    asked by          sync getter                                   async getter
    get()             the caller's thread; a pool's thread where    the background loop
                      the call or the group names a time
    aget()            a pool's thread                               a task on the asker's loop

*Invariants*: every load ends in `FlightTable.complete`, whatever the getter does. Each depth of
nesting has a pool of its own, and queued work is promoted: an asker from deeper down submits it
again to its own depth's pool, and the first thread to claim it runs it. So the threads of a pool
never all wait for work queued in that same pool.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
from collections.abc import Mapping
from functools import partial
from typing import Final

from kamacache import calls
from kamacache.errors import DeadlineExceededError, KamaCacheError, LoadError
from kamacache.getters import Loaded
from kamacache.limits import LOADS_QUEUED_MAX
from kamacache.local.engine import EngineUser
from kamacache.local.flights import ABANDONED, FlightTable, Load
from kamacache.local.hooks import WorkerHooks
from kamacache.local.threads import LoadThreads, background_loop
from kamacache.repeated import RepeatedLog

log: Final = RepeatedLog(logging.getLogger("kamacache.local"))


class Runner:
    """Runs the loads of one group."""

    def __init__(self, group: EngineUser, table: FlightTable) -> None:
        self._group = group
        self._name = group.spec.name
        self._table = table
        self._pools: dict[int, LoadThreads] = {}
        self._tasks: set[asyncio.Task[None]] = set()  # a loop holds its tasks weakly
        self._hooks = WorkerHooks(group)

    def inline(self, deadline_s: float | None) -> bool:
        """Whether a synchronous caller runs the getter itself: nothing has to interrupt it."""
        return deadline_s is None and not self._group.load_bounded and not self._group.is_async

    def place(self, load: Load, *, inline: bool) -> None:
        """Settle in which pool a new load will be queued. Lock held, so that joiners see it."""
        if not inline and not self._group.is_async:
            self._table.queue(load, self._pool(load.depth))

    def start(self, load: Load, loop: asyncio.AbstractEventLoop | None) -> None:
        """Run a placed load here, or hand it to the thread or loop that will.

        ``loop`` is the asker's running loop, None for a synchronous asker. KeyboardInterrupt and
        SystemExit of a getter that runs here come out of this call.
        """
        if load.pool is not None:
            load.context = contextvars.copy_context()
            if load.pool.full():
                self._table.sweep()
            if not load.pool.submit(partial(self._run_queued, load, load.pool)):
                self._table.complete(load, self._overloaded())
        elif not self._group.is_async:
            if self._table.claim(load, None):
                self._run(load)
        elif len(self._tasks) >= LOADS_QUEUED_MAX:
            self._table.complete(load, self._overloaded())
        else:
            load.claimed = True
            load.context = contextvars.copy_context()
            load.loop = loop or background_loop()
            if loop is not None:
                self._spawn(load)
            else:
                load.loop.call_soon_threadsafe(self._spawn, load)

    def promote(self, load: Load, depth: int) -> None:
        """Queue a load that still waits at a lower depth at the depth of a new asker too."""
        if load.pool is None or load.claimed:
            return
        with self._table.lock:
            if load.claimed or depth <= load.depth:
                return
            load.depth = depth
            pool = self._pool(depth)
        pool.submit(partial(self._run_queued, load, pool))  # full: the first queue still has it

    def after_fork(self) -> None:
        """Begin anew in the child: no thread and no task came along."""
        self._pools = {}
        self._tasks = set()
        self._hooks.after_fork()

    def _pool(self, depth: int) -> LoadThreads:
        pool = self._pools.get(depth)
        if pool is None:
            name = f"kamacache-{self._name}-{depth}"
            pool = self._pools[depth] = LoadThreads(name, self._group.spec.load_threads)
        return pool

    def _call(self, load: Load) -> calls.Call:
        # The load's own time, not the asker's: others may join who can wait longer.
        links = tuple((self._name, flight.key) for flight in load.flights)
        return calls.Call(load.depth, load.chain + links, load.expires_s)

    def _run(self, load: Load) -> None:
        """Call the getter in this thread."""
        outcome: Mapping[bytes, Loaded] | KamaCacheError
        token = calls.current.set(self._call(load))
        try:
            if self._hooks.needed:
                self._hooks.start()
            if len(load.flights) > 1:
                outcome = self._group.load_many([flight.key for flight in load.flights])
            else:
                key = load.flights[0].key
                outcome = {key: self._group.load(key)}
        except LoadError as error:
            outcome = error
        except BaseException as error:
            self._table.complete(load, self._interrupted(error))
            raise
        finally:
            calls.current.reset(token)
        self._table.complete(load, outcome)

    def _run_queued(self, load: Load, pool: LoadThreads) -> None:
        """Run a queued load in a pool's thread, unless it was promoted and runs elsewhere."""
        if not self._table.claim(load, pool):
            return
        context, load.context = load.context, None
        try:
            (context or contextvars.copy_context()).run(self._run, load)
        except BaseException as error:  # its askers have it as LoadError; the thread lives on
            log.warning(
                "getter tried to end its thread",
                about=self._name,
                group=self._name,
                error=type(error).__name__,
            )

    def _spawn(self, load: Load) -> None:
        """Make the load's task; runs on the load's loop."""
        loop, context = load.loop, load.context
        assert loop is not None
        load.context = None
        task = loop.create_task(self._arun(load), context=context)
        self._tasks.add(task)
        task.add_done_callback(partial(self._ended, load))

    def _ended(self, load: Load, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not load.ended:  # cancelled before its first step
            self._table.complete(load, ABANDONED)
        if not task.cancelled():
            task.exception()  # seen: the askers had it as a LoadError

    async def _arun(self, load: Load) -> None:
        """Await the getter, in a task with a context of its own."""
        calls.current.set(self._call(load))
        outcome: Mapping[bytes, Loaded] | KamaCacheError
        try:
            async with asyncio.timeout(load.expires_s - time.monotonic()):
                if self._hooks.needed:
                    await self._hooks.astart()
                if len(load.flights) > 1:
                    outcome = await self._group.aload_many([f.key for f in load.flights])
                else:
                    key = load.flights[0].key
                    outcome = {key: await self._group.aload(key)}
        except LoadError as error:
            outcome = error
        except TimeoutError:  # ours: the getter's own would be a LoadError
            outcome = too_slow(self._name, self._group.spec.load_timeout_s)
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is not None and task.cancelling():  # the loop ends, not the getter
                self._table.complete(load, ABANDONED)
                raise
            outcome = self._interrupted(error)
        except BaseException as error:
            self._table.complete(load, self._interrupted(error))
            if load.loop is not background_loop():
                raise  # KeyboardInterrupt, SystemExit: they end the asker's loop, never ours
            return
        self._table.complete(load, outcome)

    def _overloaded(self) -> LoadError:
        return LoadError(
            f"group {self._name!r}: {LOADS_QUEUED_MAX} loads wait already",
            group=self._name,
            cause_type="overloaded",
        )

    def _interrupted(self, error: BaseException) -> LoadError:
        failure = LoadError(
            f"group {self._name!r}: the load was ended by {type(error).__name__}",
            group=self._name,
            cause_type=type(error).__name__,
        )
        failure.__cause__ = error
        return failure


def too_slow(name: str, load_timeout_s: float) -> DeadlineExceededError:
    """Return the error of a load that its group's load timeout ended."""
    return DeadlineExceededError(
        f"group {name!r}: the load took longer than load_timeout, {load_timeout_s} s",
        timeout_s=load_timeout_s,
        group=name,
    )
