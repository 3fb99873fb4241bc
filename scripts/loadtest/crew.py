"""One load process's sessions, and how they load keys and run a round.

*Process*: load processes. One thread with one session for concurrency 1, several of each for
clients that only know threads, one event loop with one session for the others: what an
application would do.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, Protocol, TypeVar

from scripts.loadtest.async_loops import AsyncRound
from scripts.loadtest.kit import Kit, Round, Send, calibrate
from scripts.loadtest.loading import LoadCount
from scripts.loadtest.loops import Behind, Due, Lane, Stop, closed_alone, in_threads, wait_out
from scripts.loadtest.messages import Done, Load, Loaded, Plan, Ready, Run
from scripts.loadtest.operations import AsyncOperator, Operator
from scripts.loadtest.recording import Recorder
from scripts.loadtest.sizes import Values
from scripts.loadtest.targets.base import AsyncSession, SyncSession
from scripts.loadtest.targets.null import AsyncNullSession, NullSession

T = TypeVar("T")


class Crew(Protocol):
    """A load process's hands."""

    def open(self) -> Ready:
        """Connect and measure ourselves; raises `TargetError`."""

    def load(self, command: Load) -> Loaded:
        """Store or read this process's share of the keys."""

    def run(self, command: Run) -> Done:
        """Make requests for the length of a window."""

    def close(self) -> None:
        """Disconnect."""


class SyncCrew:
    """Sessions that block: one in this thread, or one each in several."""

    def __init__(self, kit: Kit, lanes: int) -> None:
        self._kit = kit
        self._lanes = lanes
        self._sessions: list[SyncSession] = []

    def open(self) -> Ready:
        """Connect, measure ourselves."""
        kit = self._kit
        for _ in range(self._lanes):
            self._sessions.append(kit.target.open(kit.options))
        null = NullSession()
        generator_us, clock_us = calibrate(
            kit, lambda drawn, recorder: self._closed([null], drawn, recorder)
        )
        return Ready(generator_us=generator_us, clock_us=clock_us)

    def load(self, command: Load) -> Loaded:
        """Store or read the keys."""
        kit, count = self._kit, LoadCount(self._kit.send)
        values = Values(kit.sizes, kit.streams(0).values)
        operator = Operator(self._sessions[0], values, ttl_s=kit.plan.ttl_s, filling=None)
        load = operator.read if command.read else operator.store
        for keys in kit.load_batches(command.prefix):
            if kit.stop.requested:
                break
            waiting = deque([keys])
            while waiting:
                tried = waiting.popleft()
                try:
                    load(tried)
                    count.stored(len(tried))
                except Exception as error:
                    waiting.extend([key] for key in count.failed(tried, error))
        return count.loaded()

    def run(self, command: Run) -> Done:
        """Run a round."""
        kit, window, behind = self._kit, command.window, Behind()
        drawn = kit.round(window, command.prefix, command.stream)
        recorder = Recorder(window, kit.send)
        recorder.begin(self._sessions[0].memory_hits())
        if kit.plan.rate is None:
            self._closed(self._sessions, drawn, recorder)
            ended_ns = time.monotonic_ns()
        else:
            ended_ns = self._open(drawn, recorder, behind)
        recorder.memory_hits = self._sessions[0].memory_hits()
        recorder.report(ended_ns)
        return kit.done(window, behind, ended_ns)

    def close(self) -> None:
        """Disconnect."""
        for session in self._sessions:
            session.close()

    def _closed(self, sessions: list[SyncSession], drawn: Round, recorder: Recorder) -> None:
        operators = [self._operator(session, drawn) for session in sessions]
        if len(sessions) == 1:
            closed_alone(sessions[0], operators[0], drawn.workload, recorder, self._kit.stop)
            return
        operations = drawn.operations()
        lanes = self._make_lanes(sessions, operators, recorder)
        in_threads([_bind(lane.run_closed, operations) for lane in lanes])

    def _open(self, drawn: Round, recorder: Recorder, behind: Behind) -> int:
        due = Due(drawn.operations(), self._kit.arrivals(drawn))
        operators = [self._operator(session, drawn) for session in self._sessions]
        lanes = self._make_lanes(self._sessions, operators, recorder)
        in_threads([_bind(lane.run_open, due, behind) for lane in lanes])
        wait_out(drawn.window, due, self._kit.stop)
        ended_ns = time.monotonic_ns()
        behind.count += due.rest(min(ended_ns, drawn.window.end_ns))
        return ended_ns

    def _make_lanes(
        self, sessions: list[SyncSession], operators: list[Operator], recorder: Recorder
    ) -> list[Lane]:
        lock = threading.Lock()
        return [
            Lane(session, operator, recorder, lock, self._kit.stop)
            for session, operator in zip(sessions, operators, strict=True)
        ]

    def _operator(self, session: SyncSession, drawn: Round) -> Operator:
        return Operator(session, drawn.values, ttl_s=self._kit.plan.ttl_s, filling=drawn.filling)


class AsyncCrew:
    """One session of an event loop that runs while there is something to do."""

    def __init__(self, kit: Kit) -> None:
        import uvloop

        self._kit = kit
        self._runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
        self._session: AsyncSession | None = None

    def open(self) -> Ready:
        """Connect, measure ourselves."""
        kit = self._kit
        self._session = self._run(kit.target.open_async(kit.options))
        generator_us, clock_us = calibrate(kit, self._run_null)
        return Ready(generator_us=generator_us, clock_us=clock_us)

    def load(self, command: Load) -> Loaded:
        """Store or read the keys."""
        return self._run(self._load(command))

    def run(self, command: Run) -> Done:
        """Run a round."""
        return self._run(self._round(command))

    def close(self) -> None:
        """Disconnect."""
        if self._session is not None:
            self._run(self._session.close())
        self._runner.close()

    async def _load(self, command: Load) -> Loaded:
        kit, count = self._kit, LoadCount(self._kit.send)
        values = Values(kit.sizes, kit.streams(0).values)
        operator = AsyncOperator(self._opened, values, ttl_s=kit.plan.ttl_s, filling=None)
        load = operator.read if command.read else operator.store
        for keys in kit.load_batches(command.prefix):
            if kit.stop.requested:
                break
            waiting = deque([keys])
            while waiting:
                tried = waiting.popleft()
                try:
                    await load(tried)
                    count.stored(len(tried))
                except Exception as error:
                    waiting.extend([key] for key in count.failed(tried, error))
        return count.loaded()

    async def _round(self, command: Run) -> Done:
        kit, window, behind, session = self._kit, command.window, Behind(), self._opened
        drawn = kit.round(window, command.prefix, command.stream)
        recorder = Recorder(window, kit.send)
        recorder.begin(await session.memory_hits())
        operator = self._operator(session, drawn)
        round_ = AsyncRound(session, operator, recorder, kit.stop, timeout_s=kit.plan.timeout_s)
        try:
            if kit.plan.rate is None:
                await round_.run_closed(drawn.operations(), kit.plan.concurrency)
            else:
                due = Due(drawn.operations(), kit.arrivals(drawn))
                begun_ns = await round_.run_open(due, behind)
                behind.count += due.rest(min(begun_ns, window.end_ns))
        finally:
            round_.close()
        ended_ns = time.monotonic_ns()
        recorder.memory_hits = await session.memory_hits()
        recorder.report(ended_ns)
        return kit.done(window, behind, ended_ns)

    def _run_null(self, drawn: Round, recorder: Recorder) -> None:
        async def run() -> None:
            session, kit = AsyncNullSession(), self._kit
            operator = self._operator(session, drawn)
            round_ = AsyncRound(session, operator, recorder, kit.stop, timeout_s=1.0)
            try:
                await round_.run_closed(drawn.operations(), kit.plan.concurrency)
            finally:
                round_.close()

        self._run(run())

    @property
    def _opened(self) -> AsyncSession:
        assert self._session is not None
        return self._session

    def _operator(self, session: AsyncSession, drawn: Round) -> AsyncOperator:
        return AsyncOperator(
            session, drawn.values, ttl_s=self._kit.plan.ttl_s, filling=drawn.filling
        )

    def _run(self, body: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(body)


def make_crew(plan: Plan, stop: Stop, send: Send) -> Crew:
    """Return the crew that the plan's target and concurrency ask for; raises `TargetError`."""
    kit = Kit(plan, stop, send)
    if plan.concurrency == 1:
        return SyncCrew(kit, 1)
    if kit.target.concurrent == "threads":
        return SyncCrew(kit, plan.concurrency)
    return AsyncCrew(kit)


def _bind(method: Callable[..., None], *given: object) -> Callable[[], None]:
    return lambda: method(*given)
