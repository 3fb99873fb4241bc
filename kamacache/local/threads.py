"""Threads that run getters where the caller's thread must not: bounded pools, and one loop.

*Process*: one that runs getters itself (single-instance mode, or attached without a node).
*Rejected*: `concurrent.futures.ThreadPoolExecutor`, whose threads are joined when the interpreter
exits, so one hanging getter would hang the program's end; and which cannot replace a hung thread.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections import deque
from collections.abc import Callable

from kamacache.limits import HUNG_THREADS_MAX, LOAD_THREAD_IDLE_S, LOADS_QUEUED_MAX


class LoadThreads:
    """A pool of daemon threads for one depth of nesting.

    A thread given up as hung (`give_up`) no longer counts, so another may start in its place, up
    to `HUNG_THREADS_MAX` at a time. Idle threads end after `LOAD_THREAD_IDLE_S`.
    """

    def __init__(self, name: str, threads_max: int) -> None:
        self._name = name
        self._threads_max = threads_max
        self._work: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition(threading.Lock())
        self._idle = 0
        self._threads = 0  # alive, hung ones left out
        self._hung: set[int] = set()

    def submit(self, work: Callable[[], None]) -> bool:
        """Queue work, which must not raise; False where the queue is full."""
        with self._changed:
            if len(self._work) >= LOADS_QUEUED_MAX:
                return False
            self._work.append(work)
            if self._idle >= len(self._work):
                self._changed.notify()
            elif self._threads < self._threads_max:
                started = self._start_one()
                if not started and not self._threads:  # no one would ever come for it
                    self._work.pop()
                    return False
            return True

    def full(self) -> bool:
        """Whether work waits for a thread."""
        return bool(self._work)

    def give_up(self, thread_id: int) -> bool:
        """Let another thread take the place of a hung one; False where too many hang."""
        with self._changed:
            if thread_id in self._hung:
                return True
            if len(self._hung) >= HUNG_THREADS_MAX:
                return False
            self._hung.add(thread_id)
            self._threads -= 1
            if len(self._work) > self._idle:
                self._start_one()
            return True

    def _start_one(self) -> bool:
        try:
            threading.Thread(target=self._run, name=self._name, daemon=True).start()
        except RuntimeError:  # the system gives no more; those that are there do the work
            return False
        self._threads += 1
        return True

    def _run(self) -> None:
        me = threading.get_ident()
        while (work := self._next(me)) is not None:
            work()
            del work  # or its key and context live until the next one comes

    def _next(self, me: int) -> Callable[[], None] | None:
        with self._changed:
            if me in self._hung:  # it came back; its place may have been taken
                self._hung.discard(me)
                if self._threads >= self._threads_max:
                    return None
                self._threads += 1
            while not self._work:
                self._idle += 1
                woken = self._changed.wait(LOAD_THREAD_IDLE_S)
                self._idle -= 1
                if not woken and not self._work:
                    self._threads -= 1
                    return None
            return self._work.popleft()


_loop: asyncio.AbstractEventLoop | None = None
_loop_lock = threading.Lock()
_left_in_parent: list[asyncio.AbstractEventLoop] = []


def background_loop() -> asyncio.AbstractEventLoop:
    """Return this process's loop for async getters that synchronous callers ask for.

    One daemon thread runs it, from the first use to the end of the process.
    """
    global _loop
    with _loop_lock:
        if _loop is None:
            loop = asyncio.new_event_loop()
            started = threading.Event()
            loop.call_soon(started.set)
            threading.Thread(target=loop.run_forever, name="kamacache-loop", daemon=True).start()
            started.wait()
            _loop = loop
        return _loop


def _after_fork_in_child() -> None:
    # The loop's thread did not come along. The object is kept, for collecting it would close
    # descriptors, and take them out of the epoll set that the parent still uses.
    global _loop, _loop_lock
    _loop_lock = threading.Lock()
    if _loop is not None:
        _left_in_parent.append(_loop)
        _loop = None


os.register_at_fork(after_in_child=_after_fork_in_child)
