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
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any, Final, NamedTuple, Protocol, TypeVar

import numpy as np

from scripts.loadtest.arrivals import Arrivals
from scripts.loadtest.async_loops import AsyncRound
from scripts.loadtest.histogram import Histogram
from scripts.loadtest.limits import (
    BLOCK_OPEN_MAX,
    BLOCK_OPERATIONS_MAX,
    CALIBRATION_OPERATIONS,
    CALIBRATION_S,
    CALIBRATIONS_MAX,
    LOAD_BATCH_BYTES,
    LOAD_BATCH_KEYS,
    LOAD_FAILURES_MAX,
    LOAD_PROGRESS_S,
    LOAD_TIMEOUTS_MAX,
)
from scripts.loadtest.loops import Behind, Due, Lane, Stop, closed_alone, in_threads, wait_out
from scripts.loadtest.messages import Answer, Done, Load, Loaded, Plan, Progress, Ready, Run
from scripts.loadtest.operations import AsyncOperator, Delay, Filling, Operator, parse_mix
from scripts.loadtest.popularity import TraceSpec, distinct, parse_popularity, read_trace
from scripts.loadtest.recording import Recorder, Report, Window
from scripts.loadtest.sizes import Values, parse_sizes
from scripts.loadtest.targets.base import (
    TIMEOUT,
    AsyncSession,
    SessionOptions,
    SyncSession,
    Target,
    TargetError,
    error_class,
    sentence_of,
)
from scripts.loadtest.targets.null import AsyncNullSession, NullSession
from scripts.loadtest.targets.specs import make_target
from scripts.loadtest.workload import Drawn, KeyNames, Source, Traced, Workload

T = TypeVar("T")
Send = Callable[[Answer], None]

CALIBRATION_STREAM: Final = 1 << 30  # of draws; no round has it
CALIBRATION_PREFIX: Final = b"load:"


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


class Streams(NamedTuple):
    """Independent random numbers for what is drawn, so that one does not shift the other."""

    keys: np.random.Generator
    kinds: np.random.Generator
    values: np.random.Generator
    arrivals: np.random.Generator
    delays: np.random.Generator


class Round(NamedTuple):
    """What is made anew for each round, however it is run."""

    workload: Workload
    values: Values
    filling: Filling | None
    streams: Streams
    window: Window

    def operations(self) -> Iterator[Any]:
        """Return the requests, for lanes to share."""
        start_ns = self.window.start_ns
        return self.workload.operations(lambda: (time.monotonic_ns() - start_ns) / 1e9)


class Kit:
    """What the crews share: the plan, as things."""

    def __init__(self, plan: Plan, stop: Stop, send: Send) -> None:
        self.plan = plan
        self.stop = stop
        self.send = send
        self.target: Target = make_target(plan.target)
        self.options = SessionOptions(
            group=plan.group, concurrency=plan.concurrency, timeout_s=plan.timeout_s
        )
        self.mix = parse_mix(plan.mix)
        self.sizes = parse_sizes(plan.value_size)
        self.getter = None if plan.getter is None else Delay(plan.getter)
        self.popularity = parse_popularity(plan.popularity)
        self.trace: list[bytes] | None = None
        if isinstance(self.popularity, TraceSpec):
            self.trace = read_trace(self.popularity.path)
        self._names: dict[bytes, KeyNames] = {}

    def streams(self, stream: int) -> Streams:
        """Return the random numbers of a round of this process."""
        seed = np.random.SeedSequence([self.plan.seed, stream, self.plan.process])
        return Streams(*(np.random.default_rng(child) for child in seed.spawn(5)))

    def round(self, window: Window, prefix: bytes, stream: int, *, endless: bool = False) -> Round:
        """Return what a round draws from; ``endless``: a trace begins anew at its end."""
        plan, streams = self.plan, self.streams(stream)
        workload = Workload(
            self._source(prefix, streams, endless=endless or plan.repeat_trace),
            self.mix,
            plan.batch,
            random=streams.kinds,
            most=BLOCK_OPERATIONS_MAX if plan.rate is None else BLOCK_OPEN_MAX,
        )
        filling = None
        if plan.fill:
            getter = self.getter
            delay = None if getter is None else lambda: getter.draw(streams.delays)
            filling = Filling(delay, plan.ttl_s)
        return Round(workload, Values(self.sizes, streams.values), filling, streams, window)

    def arrivals(self, drawn: Round) -> Arrivals:
        """Return when a round's requests are due."""
        plan = self.plan
        assert plan.rate is not None
        return Arrivals(
            start_ns=drawn.window.start_ns,
            end_ns=drawn.window.end_ns,
            rate=plan.rate,
            kind=plan.arrivals,
            process=plan.process,
            processes=plan.processes,
            random=drawn.streams.arrivals,
        )

    def load_batches(self, prefix: bytes) -> Iterator[list[bytes]]:
        """Return this process's share of all keys, in batches, the most popular last.

        So that where not all fit, those are there.
        """
        plan = self.plan
        size = max(1, min(LOAD_BATCH_KEYS, int(LOAD_BATCH_BYTES // (self.sizes.mean_bytes + 32))))
        if self.trace is not None:
            keys = distinct(self.trace)[plan.process :: plan.processes]
            for first in range(0, len(keys), size):
                yield [prefix + key for key in keys[first : first + size]]
            return
        first = plan.keys * plan.process // plan.processes
        last = plan.keys * (plan.process + 1) // plan.processes
        names = self._key_names(prefix)
        while last > first:
            begin = max(first, last - size)
            yield names.names(np.arange(begin, last, dtype=np.int64))
            last = begin

    def done(self, window: Window, behind: Behind, ended_ns: int) -> Done:
        """Return the closing words of a round."""
        end_ns = min(max(ended_ns, window.start_ns), window.end_ns)
        return Done(
            seconds=(end_ns - window.start_ns) / 1e9,
            behind=behind.count,
            behind_s=behind.longest_ns / 1e9,
        )

    def _source(self, prefix: bytes, streams: Streams, *, endless: bool) -> Source:
        if self.trace is not None:
            keys = self.trace[self.plan.process :: self.plan.processes]
            return Traced(keys, prefix, again=endless)
        drawn = self.popularity.start(self.plan.keys, streams.keys)
        return Drawn(drawn, self._key_names(prefix))

    def _key_names(self, prefix: bytes) -> KeyNames:
        if prefix not in self._names:
            self._names = {prefix: KeyNames(prefix)}
        return self._names[prefix]


class LoadCount:
    """Counts the keys that a load has stored, and those it could not."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._fresh = 0
        self._told_s = time.monotonic()
        self._stored = 0
        self._failed = 0
        self._in_a_row = self._late_in_a_row = 0
        self._sentence: str | None = None

    def stored(self, keys: int) -> None:
        """Count keys; tell the parent now and then."""
        self._stored += keys
        self._fresh += keys
        self._in_a_row = self._late_in_a_row = 0
        if time.monotonic() - self._told_s >= LOAD_PROGRESS_S:
            self._tell()

    def failed(self, keys: Sequence[bytes], error: Exception) -> Sequence[bytes]:
        """Return those to try one by one; the others are counted.

        One value that is too large fails its batch. Raises `TargetError` where it is useless to
        go on.
        """
        late = error_class(error) == TIMEOUT
        if len(keys) > 1 and not late:
            return keys
        self._failed += len(keys)
        self._sentence = self._sentence or sentence_of(error)
        self._in_a_row += 1
        self._late_in_a_row += late
        if self._in_a_row >= LOAD_FAILURES_MAX or self._late_in_a_row >= LOAD_TIMEOUTS_MAX:
            self._tell()
            gone = "keys cannot be stored any more" if self._stored else "no key can be stored"
            raise TargetError(f"{gone}: {sentence_of(error)}") from error
        return ()

    def loaded(self) -> Loaded:
        """Return the closing words."""
        self._tell()
        return Loaded(failed=self._failed, sentence=self._sentence)

    def _tell(self) -> None:
        self._send(Progress(keys=self._fresh))
        self._fresh, self._told_s = 0, time.monotonic()


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
        generator_us, clock_us = _calibrate(
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
        generator_us, clock_us = _calibrate(kit, self._run_null)
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


def _calibrate(kit: Kit, run: Callable[[Round, Recorder], None]) -> tuple[float, float]:
    """Return what an operation costs without a target, and the latency it then seems to have.

    The cost is CPU time: other load processes measure themselves at the same time. The first
    time does not count, in which numpy makes what it makes once.
    """
    length_ns = int(CALIBRATION_S * 1e9)
    nothing = Window(start_ns=0, end_ns=0, slot_ns=length_ns)
    drawn = kit.round(nothing, CALIBRATION_PREFIX, CALIBRATION_STREAM, endless=True)
    latencies, used_ns, operations = Histogram(), 0, 0
    for turn in range(CALIBRATIONS_MAX):
        reports: list[Report] = []
        start_ns, before_ns = time.monotonic_ns(), time.process_time_ns()
        window = Window(start_ns=start_ns, end_ns=start_ns + length_ns, slot_ns=length_ns)
        recorder = Recorder(window, reports.append)
        run(drawn._replace(window=window), recorder)
        if turn:
            used_ns += time.process_time_ns() - before_ns
            operations += recorder.total
            recorder.report(time.monotonic_ns())
            for report in reports:
                for packed in report.latencies:
                    latencies.add_packed(packed)
        if operations >= CALIBRATION_OPERATIONS or kit.stop.requested:
            break
    (clock_us,) = latencies.percentiles_us([50.0])
    return used_ns / 1000 / max(operations, 1), clock_us


def _bind(method: Callable[..., None], *given: object) -> Callable[[], None]:
    return lambda: method(*given)
