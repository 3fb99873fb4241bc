"""Threads that run sync getters: bounded by group and depth, replaced when they hang.

*Process*: worker. *Owns*: the threads of one worker. All methods are for the loop's thread; a
getter thread touches its queue, its job and `loop.call_soon_threadsafe`, nothing else.

    submit ──► queue of depth d ──► thread of depth d: claim ─► run ─► call_soon_threadsafe(finish)
    promote ─► queue of depth e > d        (in both queues; who claims it first runs it)

*Why nested getters cannot deadlock*: a load of depth d is waited for by getters of depth d - 1 or
less, and holds a thread of depth d only. What it waits for is queued at depth d + 1 or deeper,
because a nested asker promotes a queued load to its own depth. One case is left: a getter of
depth d that joins a load which *runs* at a depth below d waits for a thread of its own depth,
perhaps in another worker, where nobody can promote. So a pool of depth 1 or more whose threads
all wait in nested calls, without progress from one `relieve` to the next, gets one thread more
(`RELIEF_THREADS_MAX`). Nothing that holds a thread waits for a load queued at depth 0.

A job is claimed, and ended, by taking the one token of a list: ``list.pop`` is atomic under the
GIL and needs no lock.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, Final

from kamacache import calls
from kamacache.limits import HUNG_THREADS_MAX, LOADS_QUEUED_MAX, RELIEF_THREADS_MAX
from kamacache.rundir.meters import WORKER, Region

REPLACED: Final = WORKER.at("getters_replaced")


def take(token: list[None]) -> bool:
    """Take a token; True for the first who does, whichever threads ask."""
    try:
        token.pop()
    except IndexError:
        return False
    return True


class Job:
    """One call of a sync getter; the loader subclasses it."""

    __slots__ = ("_claim", "_end", "depths", "started_s", "thread")

    def __init__(self) -> None:
        self._claim: list[None] = [None]
        self._end: list[None] = [None]
        self.depths: list[DepthPool] = []  # the pools in whose queues it stands or stood
        self.started_s: float | None = None  # time.monotonic(); written by the getter thread
        self.thread: GetterThread | None = None

    def run(self, depth: int) -> Any:
        """Call the getter and return the outcome; in a getter thread. Must not raise."""
        raise NotImplementedError

    def finish(self, outcome: Any) -> None:
        """Take the outcome; in the loop's thread."""
        raise NotImplementedError

    def claim(self) -> bool:
        """Become the one who runs this job, or who calls it off."""
        return take(self._claim)

    def end(self) -> bool:
        """Become the one who ends the run: its thread, or the loop that gives it up."""
        return take(self._end)


class GetterThread(threading.Thread):
    """Takes jobs of one pool until told to stop (None), or until it was given up.

    A relief thread (``once``) ends after one job.
    """

    def __init__(self, pool: DepthPool, number: int, *, once: bool = False) -> None:
        super().__init__(name=f"getter-{pool.group}-{pool.depth}-{number}", daemon=True)
        self.pool = pool
        self.once = once
        self.job: Job | None = None

    def run(self) -> None:
        """Run jobs."""
        queue, depth, loop = self.pool.queue, self.pool.depth, self.pool.threads.loop
        while (job := queue.get()) is not None:
            if not job.claim():
                continue  # run from the queue of another depth, or called off
            job.thread = self
            job.started_s = time.monotonic()
            self.job = job
            outcome = job.run(depth)
            self.job = None
            kept = job.end()
            try:
                if kept:
                    loop.call_soon_threadsafe(job.finish, outcome)
                else:  # given up long ago: another thread has this one's place
                    loop.call_soon_threadsafe(self.pool.threads.returned)
                    return
                if self.once:
                    loop.call_soon_threadsafe(self.pool.relieved, self)
                    return
            except RuntimeError:  # the loop is closed: the worker ends
                return
            del job, outcome  # do not hold a value while idle


class GetterThreads:
    """What the pools of one worker share: the loop, and the count of hung threads."""

    __slots__ = ("_counts", "_on_too_many", "hung", "loop", "pools")

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        on_too_many: Callable[[], None],
        meters: Region | None = None,
    ) -> None:
        """``meters`` are the worker's; None: as in a test."""
        self.loop = loop
        self.hung = 0
        self._counts = (meters or Region(WORKER)).words
        self.pools: list[DepthPool] = []
        self._on_too_many = on_too_many

    @property
    def replaced(self) -> int:
        """How many were given up, by the workers before this one, too."""
        return self._counts[REPLACED]

    def gave_up(self) -> None:
        """Count a thread, or a task that ignores its cancellation, as hung."""
        self.hung += 1
        self._counts[REPLACED] += 1
        if self.hung > HUNG_THREADS_MAX:
            self._on_too_many()

    def returned(self) -> None:
        """Count back a hung one that came to its end after all."""
        self.hung -= 1

    def relieve(self) -> None:
        """Give a thread to pools that wait for themselves; call some times a second."""
        for pool in self.pools:
            pool.relieve()

    def close(self) -> None:
        """Let idle threads end. Those in a getter are daemons and die with the process."""
        for pool in self.pools:
            pool.close()


class DepthPool:
    """The threads of one group and one depth."""

    __slots__ = (
        "_numbers",
        "_stuck",
        "depth",
        "group",
        "queue",
        "size",
        "threads",
        "unfinished",
        "workers",
    )

    def __init__(self, threads: GetterThreads, group: str, depth: int, size: int) -> None:
        self.threads: Final = threads
        self.group: Final = group
        self.depth: Final = depth
        self.size: Final = size
        self.queue: SimpleQueue[Job | None] = SimpleQueue()
        self.workers: list[GetterThread] = []
        self.unfinished = 0  # jobs of this queue that did not finish, running ones included
        self._numbers = 0
        self._stuck: list[Job | None] = []
        threads.pools.append(self)

    def submit(self, job: Job) -> bool:
        """Queue a job; False when the queue is full."""
        if self.unfinished - len(self.workers) >= LOADS_QUEUED_MAX:
            return False
        job.depths.append(self)
        self.unfinished += 1
        if self.unfinished > len(self.workers) < self.size:
            self._spawn()
        self.queue.put(job)
        return True

    def finished(self) -> None:
        """Count a job of this queue as done, wherever it ran."""
        self.unfinished -= 1

    def give_up(self, thread: GetterThread) -> None:
        """Put another thread in the place of one that hangs."""
        if thread in self.workers:
            self.workers.remove(thread)
        self.threads.gave_up()
        if self.unfinished > len(self.workers) < self.size:
            self._spawn()

    def relieve(self) -> None:
        """See "Why nested getters cannot deadlock" above."""
        workers = self.workers
        if not self.depth or self.unfinished <= len(workers) or len(workers) < self.size:
            self._stuck = []
            return
        waiting = calls.waiting_threads
        jobs = [thread.job for thread in workers if thread.ident in waiting]
        if len(jobs) < len(workers):
            self._stuck = []
        elif self._stuck != jobs:  # jobs compare by identity
            self._stuck = jobs
        elif len(workers) < self.size + RELIEF_THREADS_MAX:
            self._stuck = []
            self._spawn(once=True)

    def relieved(self, thread: GetterThread) -> None:
        """Forget a relief thread that did its job."""
        if thread in self.workers:
            self.workers.remove(thread)

    def close(self) -> None:
        """Let the threads end when they are idle."""
        for _ in self.workers:
            self.queue.put(None)

    def _spawn(self, *, once: bool = False) -> None:
        self._numbers += 1
        thread = GetterThread(self, self._numbers, once=once)
        self.workers.append(thread)
        thread.start()
