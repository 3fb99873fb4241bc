"""What every way of running a load process shares: its plan made into things, and what is drawn.

*Process*: load processes. *Invariant*: seed, round and process number decide all that is drawn.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

import numpy as np

from scripts.loadtest.arrivals import Arrivals
from scripts.loadtest.histogram import Histogram
from scripts.loadtest.limits import (
    BLOCK_OPEN_MAX,
    BLOCK_OPERATIONS_MAX,
    CALIBRATION_OPERATIONS,
    CALIBRATION_S,
    CALIBRATIONS_MAX,
    LOAD_BATCH_BYTES,
    LOAD_BATCH_KEYS,
)
from scripts.loadtest.loops import Behind, Stop
from scripts.loadtest.messages import Answer, Done, Plan
from scripts.loadtest.operations import Delay, Filling, parse_mix
from scripts.loadtest.popularity import TraceSpec, distinct, parse_popularity, read_trace
from scripts.loadtest.recording import Recorder, Report, Window
from scripts.loadtest.sizes import Values, parse_sizes
from scripts.loadtest.targets.base import SessionOptions, Target
from scripts.loadtest.targets.specs import make_target
from scripts.loadtest.workload import Drawn, KeyNames, Source, Traced, Workload

Send = Callable[[Answer], None]

CALIBRATION_STREAM: Final = 1 << 30  # of draws; no round has it
CALIBRATION_PREFIX: Final = b"load:"


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


def calibrate(kit: Kit, run: Callable[[Round, Recorder], None]) -> tuple[float, float]:
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
