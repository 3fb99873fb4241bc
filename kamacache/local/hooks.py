"""``on_worker_start`` and ``on_worker_stop`` where this process runs the getters itself.

*Process*: single-instance mode, or attached without a node. The start hook runs once in a process
(again in a forked child), before its first load and not at import, so that database pools open
after the fork here too. A hook that raised fails the loads that waited and is tried again by the
next one. The stop hook runs when the interpreter exits, where the start hook has run.
"""

from __future__ import annotations

import asyncio
import atexit
import inspect
import logging
import os
import threading
from collections.abc import Awaitable
from concurrent.futures import Future
from typing import Final

from kamacache.errors import LoadError
from kamacache.limits import BOOT_TIMEOUT_S
from kamacache.local.engine import EngineUser
from kamacache.local.threads import background_loop

log: Final = logging.getLogger("kamacache.local")


class WorkerHooks:
    """Runs a group's worker hooks in this process."""

    def __init__(self, group: EngineUser) -> None:
        self._group = group
        self._lock = threading.Lock()
        self._done: Future[LoadError | None] | None = None
        self.needed = group.has_worker_hooks

    def after_fork(self) -> None:
        """Forget that the parent ran the hook."""
        self._lock = threading.Lock()
        self._done = None
        self.needed = self._group.has_worker_hooks

    def start(self) -> None:
        """Run the start hook, or wait for whoever runs it; raise `LoadError` where it fails."""
        done, mine = self._claim()
        if mine:
            error: LoadError | None = None
            try:
                running = self._group.run_worker_start()
                if inspect.isawaitable(running):
                    there = asyncio.run_coroutine_threadsafe(_awaited(running), background_loop())
                    there.result(BOOT_TIMEOUT_S)
            except BaseException as raised:
                error = self._failed(raised)
                if not isinstance(raised, Exception):
                    self._settle(done, error)
                    raise
            self._settle(done, error)
        _raise(done.result(BOOT_TIMEOUT_S))

    async def astart(self) -> None:
        """Run the start hook on this loop, or wait for whoever runs it; raise as `start`."""
        done, mine = self._claim()
        if mine:
            error: LoadError | None = None
            try:
                running = self._group.run_worker_start()
                if inspect.isawaitable(running):
                    await running
            except BaseException as raised:
                error = self._failed(raised)
                if not isinstance(raised, Exception):
                    self._settle(done, error)
                    raise
            self._settle(done, error)
        _raise(await asyncio.wrap_future(done))

    def _claim(self) -> tuple[Future[LoadError | None], bool]:
        with self._lock:
            if self._done is not None:
                return self._done, False
            self._done = Future()
            self._done.set_running_or_notify_cancel()
            return self._done, True

    def _settle(self, done: Future[LoadError | None], error: LoadError | None) -> None:
        with self._lock:
            if error is not None:
                self._done = None
            else:
                self.needed = False
                atexit.register(self._stop, os.getpid())
        done.set_result(error)

    def _failed(self, raised: BaseException) -> LoadError:
        name = self._group.spec.name
        error = LoadError(
            f"group {name!r}: on_worker_start raised {type(raised).__name__}: {raised}",
            group=name,
            cause_type=type(raised).__name__,
        )
        error.__cause__ = raised
        return error

    def _stop(self, pid: int) -> None:
        if os.getpid() != pid:
            return  # a forked child that never started it
        try:
            running = self._group.run_worker_stop()
            if inspect.isawaitable(running):
                asyncio.run(_awaited(running))
        except Exception:
            log.exception("on_worker_stop failed", extra={"group": self._group.spec.name})


async def _awaited(running: Awaitable[None]) -> None:
    await running


def _raise(error: LoadError | None) -> None:
    if error is not None:
        raise LoadError(
            error.message, group=error.group, key=error.key, cause_type=error.cause_type
        ) from error.__cause__
