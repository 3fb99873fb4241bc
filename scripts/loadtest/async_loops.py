"""Closed and open loops for sessions of an event loop; see `scripts.loadtest.loops` for both.

*Process*: load processes. *Invariants* as there, and: a target whose answers need no waiting (a
hit in memory) lets no other task run, so every lane steps aside after `TURN_OPERATIONS` requests;
what is under way when a round ends may end until its timeout, and is then cancelled and counted as
timed out, with the latency that it had reached.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Coroutine, Iterator
from typing import Any, Final

from scripts.loadtest.limits import OUTSTANDING_MAX, TURN_OPERATIONS
from scripts.loadtest.loops import NAP_NS, Behind, Due, Patience, Stop
from scripts.loadtest.operations import AsyncOperator, Keys
from scripts.loadtest.recording import Recorder
from scripts.loadtest.targets.base import AsyncSession
from scripts.loadtest.timing import Alarm
from scripts.loadtest.workload import Operation

_STOP_GRACE_S: Final = 1.0  # for requests under way when the round is told to end early
_GRACE_S: Final = 1.0  # beyond their timeout, when it ends by itself


class AsyncRound:
    """One round of one load process on its event loop."""

    def __init__(
        self,
        session: AsyncSession,
        operator: AsyncOperator,
        recorder: Recorder,
        stop: Stop,
        *,
        timeout_s: float,
    ) -> None:
        self._session = session
        self._operator = operator
        self._recorder = recorder
        self._stop = stop
        self._timeout_s = timeout_s
        self._alarm = Alarm(asyncio.get_running_loop())
        self._under_way: set[asyncio.Task[Any]] = set()
        self._ended = asyncio.Event()
        self._defect: BaseException | None = None

    async def run_closed(self, operations: Iterator[Operation], lanes: int) -> None:
        """Let so many tasks make one request after the other until the round ends."""
        await self._wait_until(self._recorder.window.start_ns)
        ticker = asyncio.ensure_future(self._tick())
        for _ in range(lanes):
            self._start(self._lane(operations))
        await self._finish(ticker)

    async def run_open(self, due: Due, behind: Behind) -> int:
        """Make each request when it is due, however many are under way, up to the bound.

        Returns when the last was begun, or the end came.
        """
        window, turn = self._recorder.window, 0
        ticker = asyncio.ensure_future(self._tick())
        while self._defect is None and (taken := due.next()) is not None:
            due_ns, kind, keys = taken
            now_ns = time.monotonic_ns()
            if now_ns < due_ns:
                now_ns = await self._wait_until(due_ns)
            if len(self._under_way) >= OUTSTANDING_MAX:
                now_ns = await self._wait_for_room()
            if now_ns >= window.end_ns or self._stop.requested:
                if due_ns <= now_ns:
                    behind.add(due_ns, min(now_ns, window.end_ns))
                break
            self._start(self._one(kind, keys, due_ns, opened=True))
            turn += 1
            if turn % TURN_OPERATIONS == 0:
                await asyncio.sleep(0)
        if not due.exhausted:
            await self._wait_until(window.end_ns)
        begun_ns = time.monotonic_ns()
        await self._finish(ticker)
        return begun_ns

    def close(self) -> None:
        """Give the timer back."""
        self._alarm.close()

    async def _lane(self, operations: Iterator[Operation]) -> None:
        window, stop, patience = self._recorder.window, self._stop, Patience()
        for turn, (kind, keys) in enumerate(operations, 1):
            began_ns = time.monotonic_ns()
            if began_ns >= window.end_ns or stop.requested:
                break
            if not await self._one(kind, keys, began_ns):
                await asyncio.sleep(patience.next_s(self._recorder.total))
            if turn % TURN_OPERATIONS == 0:
                await asyncio.sleep(0)

    async def _one(self, kind: int, keys: Keys, from_ns: int, *, opened: bool = False) -> bool:
        """Make a request and count its latency from a moment; return whether it ended well."""
        recorder = self._recorder
        if opened:
            recorder.delays_ns.append(time.monotonic_ns() - from_ns)
        error: BaseException | None = None
        found = 0
        try:
            found = await self._operator.run(kind, keys)
        except asyncio.CancelledError:
            if not self._stop.requested:
                late = TimeoutError("not answered when the round had ended, nor in the time after")
                recorder.failed(kind, time.monotonic_ns() - from_ns, late)
            raise
        except Exception as raised:
            error = raised
        ended_ns = time.monotonic_ns()
        if recorder.memory_hits is None:
            recorder.look(ended_ns)
        if error is None:
            recorder.done(kind, ended_ns - from_ns, keys, found)
        else:
            recorder.failed(kind, ended_ns - from_ns, error)
        return error is None

    async def _tick(self) -> None:
        """Report slots that have ended, also those in which nothing did.

        It asks memory first what it answered, which takes a moment; the requests that end
        meanwhile wait with their report for this one.
        """
        recorder = self._recorder
        while True:
            await asyncio.sleep((recorder.look_ns - time.monotonic_ns()) / 1e9)
            if recorder.memory_hits is not None:
                with contextlib.suppress(Exception):  # its requests tell what is wrong with it
                    recorder.memory_hits = await self._session.memory_hits()
            recorder.look(time.monotonic_ns())

    async def _wait_until(self, moment_ns: int) -> int:
        while (now_ns := time.monotonic_ns()) < moment_ns and not self._stop.requested:
            await self._alarm.until(min(moment_ns, now_ns + NAP_NS))
        return now_ns

    async def _wait_for_room(self) -> int:
        """Wait until fewer requests are under way than may be, or the round ends."""
        end_ns = self._recorder.window.end_ns
        while (now_ns := time.monotonic_ns()) < end_ns and not self._stop.requested:
            if len(self._under_way) < OUTSTANDING_MAX:
                break
            self._ended.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ended.wait(), NAP_NS / 1e9)
        return now_ns

    async def _finish(self, ticker: asyncio.Future[None]) -> None:
        """Wait for what is under way, cancel what does not end; raise a defect of our own."""
        end_s = self._recorder.window.end_ns / 1e9 + self._timeout_s + _GRACE_S
        stopped_s: float | None = None
        while self._under_way and self._defect is None:
            now_s = time.monotonic()
            if self._stop.requested and stopped_s is None:
                stopped_s = now_s
            until_s = end_s if stopped_s is None else min(end_s, stopped_s + _STOP_GRACE_S)
            if now_s >= until_s:
                break
            await asyncio.wait(self._under_way, timeout=min(until_s - now_s, NAP_NS / 1e9))
        left = [*self._under_way, ticker]
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        if self._defect is not None:
            raise self._defect

    def _start(self, body: Coroutine[Any, Any, object]) -> None:
        task = asyncio.ensure_future(body)
        self._under_way.add(task)
        task.add_done_callback(self._gone)

    def _gone(self, task: asyncio.Task[Any]) -> None:
        self._under_way.discard(task)
        self._ended.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            self._defect = error
