"""Closed and open loops on sessions whose behaviour is known: what they count, and from when."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from scripts.loadtest import async_loops
from scripts.loadtest.arrivals import EVEN, Arrivals
from scripts.loadtest.async_loops import AsyncRound
from scripts.loadtest.histogram import Histogram
from scripts.loadtest.loops import Behind, Due, Lane, Stop, closed_alone, in_threads
from scripts.loadtest.operations import AsyncOperator, Mix, Operator
from scripts.loadtest.popularity import Uniform
from scripts.loadtest.recording import Recorder, Report, Window
from scripts.loadtest.sizes import Values, parse_sizes
from scripts.loadtest.targets.null import AsyncNullSession, NullSession
from scripts.loadtest.workload import Drawn, KeyNames, Traced, Workload

Answer = Callable[[], object]  # runs for each get: sleeps, raises, or returns a value


NAMES = KeyNames(b"k")


class Script(NullSession):
    """A session whose gets do what they are told."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer

    def get(self, key: bytes, /) -> object:
        return self._answer()

    def get_many(self, keys: Sequence[bytes]) -> Sequence[bytes]:
        return () if self._answer() else keys

    def set_many(self, items: Mapping[bytes, bytes], ttl_s: float | None) -> None:
        self._answer()


class AsyncScript(AsyncNullSession):
    """The same; seconds that the answer returns are slept on the loop."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer

    async def get(self, key: bytes, /) -> object:
        answer = self._answer()
        if isinstance(answer, float):
            await asyncio.sleep(answer)
        return answer


class Counted:
    """What a round reported, added up."""

    def __init__(self, reports: list[Report], behind: Behind) -> None:
        self.reports = reports
        self.behind = behind
        self.counts = [sum(report.counts[kind] for report in reports) for kind in range(3)]
        self.keys = sum(report.keys for report in reports)
        self.found = sum(report.found for report in reports)
        self.errors: dict[str, int] = {}
        self.latencies = Histogram()
        self.delays = Histogram()
        for report in reports:
            for packed in report.latencies:
                self.latencies.add_packed(packed)
            self.delays.add_packed(report.start_delay)
            for name, count in report.errors.items():
                self.errors[name] = self.errors.get(name, 0) + count

    def slower_than(self, us: float) -> int:
        """How many latencies are above."""
        shares = np.linspace(0.05, 100, 2000)
        values = self.latencies.percentiles_us(list(shares))
        below = max(
            (share for share, value in zip(shares, values, strict=True) if value <= us), default=0.0
        )
        return round(self.latencies.count * (1 - below / 100))


class Bench:
    """Runs one round of any loop."""

    def __init__(
        self,
        seconds: float,
        rate: float | None = None,
        *,
        mix: Mix | None = None,
        batch: int = 1,
        trace: list[bytes] | None = None,
    ) -> None:
        source = (
            Drawn(Uniform(100, np.random.default_rng(1)), NAMES)
            if trace is None
            else Traced(trace, b"", again=False)
        )
        random = np.random.default_rng(2)
        self.workload = Workload(source, mix or Mix(1, 0, 0), batch, random=random)
        self.reports: list[Report] = []
        self.stop = Stop()
        self.behind = Behind()
        self._rate = rate
        self._values = Values(parse_sizes("10"), np.random.default_rng(3))
        start_ns = time.monotonic_ns() + 20_000_000
        self.window = Window(
            start_ns=start_ns, end_ns=start_ns + int(seconds * 1e9), slot_ns=100_000_000
        )
        self.recorder = Recorder(self.window, self.reports.append)

    def run(self, way: str, answer: Answer) -> Counted:
        """Run it in one of the ways: alone, threads, tasks."""
        if way == "alone":
            return self.alone(answer)
        return self.threads(answer, 3) if way == "threads" else self.tasks(answer, 3)

    def alone(self, answer: Answer) -> Counted:
        """One thread."""
        session = Script(answer)
        operator = self._operator(session)
        if self._rate is None:
            closed_alone(session, operator, self.workload, self.recorder, self.stop)
            return self._counted()
        return self.threads(answer, 1)

    def threads(self, answer: Answer, count: int) -> Counted:
        """Several threads that share the requests."""
        session, lock = Script(answer), threading.Lock()
        operator = self._operator(session)
        lanes = [Lane(session, operator, self.recorder, lock, self.stop) for _ in range(count)]
        operations = self.workload.operations(self._at_s)
        if self._rate is None:
            in_threads([lambda lane=lane: lane.run_closed(operations) for lane in lanes])  # type: ignore[misc]
        else:
            due = Due(operations, self._arrivals())
            in_threads([lambda lane=lane: lane.run_open(due, self.behind) for lane in lanes])  # type: ignore[misc]
            self.behind.count += due.rest(self.window.end_ns)
        return self._counted()

    def tasks(self, answer: Answer, count: int, timeout_s: float = 5.0) -> Counted:
        """An event loop."""

        async def run() -> None:
            session = AsyncScript(answer)
            operator = AsyncOperator(session, self._values, ttl_s=None, filling=None)
            round_ = AsyncRound(session, operator, self.recorder, self.stop, timeout_s=timeout_s)
            operations = self.workload.operations(self._at_s)
            try:
                if self._rate is None:
                    await round_.run_closed(operations, count)
                else:
                    due = Due(operations, self._arrivals())
                    await round_.run_open(due, self.behind)
                    self.behind.count += due.rest(self.window.end_ns)
            finally:
                round_.close()

        asyncio.run(run())
        return self._counted()

    def _at_s(self) -> float:
        return (time.monotonic_ns() - self.window.start_ns) / 1e9

    def _operator(self, session: Script) -> Operator:
        return Operator(session, self._values, ttl_s=None, filling=None)

    def _arrivals(self) -> Arrivals:
        assert self._rate is not None
        return Arrivals(
            start_ns=self.window.start_ns,
            end_ns=self.window.end_ns,
            rate=self._rate,
            kind=EVEN,
            process=0,
            processes=1,
            random=np.random.default_rng(4),
        )

    def _counted(self) -> Counted:
        self.recorder.report(time.monotonic_ns())
        return Counted(self.reports, self.behind)


def stall_once(seconds: float, after: int = 100) -> Answer:
    """Answer at once, but for one request that takes long."""
    calls = iter(range(10**9))
    lock = threading.Lock()

    def answer() -> object:
        with lock:
            number = next(calls)
        if number == after:
            time.sleep(seconds)
        return b"v"

    return answer


def raising(error: Exception, every: int = 1) -> Answer:
    """Raise at every so many-th request."""
    calls = iter(range(10**9))

    def answer() -> object:
        if next(calls) % every == 0:
            raise error
        return b"v"

    return answer


STALL_S = 0.4
RATE = 500.0


@pytest.mark.parametrize("way", ["thread", "tasks"])
def test_open_loop_counts_a_stall_in_every_request_that_it_held_up(way: str) -> None:
    bench, answer = Bench(1.0, RATE), stall_once(STALL_S)
    found = bench.alone(answer) if way == "thread" else bench.tasks(answer, 8)
    held_up = RATE * STALL_S
    # Those due in the stall waited for its rest, from all of it down to nothing.
    assert found.slower_than(50_000) >= held_up * (STALL_S - 0.05) / STALL_S * 0.9
    assert found.slower_than(STALL_S / 2 * 1e6) >= held_up / 2 * 0.9
    assert found.counts[0] + found.behind.count == pytest.approx(RATE, abs=1)


def test_closed_loop_counts_a_stall_once() -> None:
    found = Bench(0.6).alone(stall_once(0.3))
    assert found.counts[0] > 1000
    assert found.latencies.max_us == pytest.approx(300_000, rel=0.5)
    (p99_us,) = found.latencies.percentiles_us([99.0])
    assert p99_us < 100_000  # which is why there are open loops


@pytest.mark.parametrize("way", ["thread", "tasks"])
def test_what_was_due_and_never_begun_is_told(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(async_loops, "OUTSTANDING_MAX", 1)
    bench = Bench(0.5, RATE)

    def slow() -> object:
        time.sleep(0.02)
        return b"v"

    if way == "thread":
        found = bench.alone(slow)
    else:
        found = bench.tasks(lambda: 0.02, 1)
    assert found.counts[0] <= 26
    assert found.counts[0] + found.behind.count == pytest.approx(RATE * 0.5, abs=1)
    assert found.behind.longest_ns > 200_000_000
    (delay_us,) = found.delays.percentiles_us([50.0])
    assert delay_us > 100_000


def test_requests_of_an_open_loop_do_not_wait_for_each_other() -> None:
    found = Bench(0.5, 400.0).tasks(lambda: 0.1, 1)
    assert found.counts[0] + found.behind.count == pytest.approx(200, abs=1)
    assert found.counts[0] > 100  # one after the other would be 5
    (least_us,) = found.latencies.percentiles_us([1.0])
    assert least_us >= 100_000


def test_even_arrivals_are_begun_when_they_are_due() -> None:
    found = Bench(0.5, 100.0).tasks(lambda: b"v", 1)
    assert found.counts[0] + found.behind.count == pytest.approx(50, abs=1)
    (least_us,) = found.delays.percentiles_us([1.0])
    assert least_us < 1_000


@pytest.mark.parametrize("way", ["alone", "threads", "tasks"])
def test_closed_loops_count_requests_and_keys(way: str) -> None:
    bench = Bench(0.3, mix=Mix(6, 3, 1))
    found = bench.run(way, lambda: b"v")
    total = sum(found.counts)
    assert total == found.keys == found.latencies.count > 500
    assert found.found == found.counts[0]
    for count, share in zip(found.counts, (0.6, 0.3, 0.1), strict=True):
        assert count / total == pytest.approx(share, abs=0.05)
    assert not found.errors
    assert len({report.slot for report in found.reports}) >= 2


def test_batches_are_one_request_of_several_keys() -> None:
    found = Bench(0.1, mix=Mix(1, 0, 0), batch=10).alone(lambda: b"v")
    assert found.counts[0] == found.latencies.count
    assert found.counts[0] * 9 < found.keys <= found.counts[0] * 10
    assert found.found == found.keys
    missing = Bench(0.1, batch=10).alone(lambda: b"")
    assert missing.found == 0


@pytest.mark.parametrize("way", ["alone", "threads", "tasks"])
def test_misses_are_not_found(way: str) -> None:
    answers = iter(range(10**9))
    found = Bench(0.4).run(way, lambda: None if next(answers) % 4 == 0 else b"v")
    assert found.found / found.keys == pytest.approx(0.75, abs=0.02)
    assert all(report.found >= 0 for report in found.reports)


@pytest.mark.parametrize("way", ["alone", "threads", "tasks"])
def test_errors_are_counted_by_class_and_timeouts_as_latencies(way: str) -> None:
    class SocketTimeout(Exception):
        """As some clients name theirs."""

    for error, name, counted in (
        (SocketTimeout("late"), "timeout", True),
        (TimeoutError(), "timeout", True),
        (ConnectionResetError("gone"), "ConnectionResetError", False),
    ):
        found = Bench(0.4).run(way, raising(error, every=2))
        assert set(found.errors) == {name}
        wanted = sum(found.counts) + (found.errors[name] if counted else 0)
        assert found.latencies.count == wanted


def test_errors_alone_are_not_made_as_fast_as_they_can_be() -> None:
    found = Bench(0.5).alone(raising(ConnectionRefusedError()))
    assert 5 <= found.errors["ConnectionRefusedError"] <= 20


def test_what_does_not_end_is_cancelled_and_counted_as_late() -> None:
    began_s = time.monotonic()
    found = Bench(0.1).tasks(lambda: 60.0, 3, timeout_s=0.2)
    assert time.monotonic() - began_s < 5
    assert found.errors == {"timeout": 3}
    assert found.latencies.count == 3
    assert found.latencies.percentiles_us([1.0])[0] > 1_000_000  # timeout and grace


@pytest.mark.parametrize("way", ["alone", "threads", "tasks", "open threads", "open tasks"])
def test_a_round_ends_early_when_it_is_told_to(way: str) -> None:
    bench = Bench(60.0, 100.0 if way.startswith("open") else None)
    timer = threading.Timer(0.3, lambda: setattr(bench.stop, "requested", True))
    timer.start()
    began_s = time.monotonic()
    found = bench.run(way.removeprefix("open "), lambda: b"v")
    timer.join()
    assert time.monotonic() - began_s < 10
    assert found.counts[0] > 10


@pytest.mark.parametrize("way", ["alone", "threads", "tasks"])
def test_a_trace_ends_a_round(way: str) -> None:
    found = Bench(60.0, trace=[b"%d" % n for n in range(500)]).run(way, lambda: b"v")
    assert found.counts[0] == found.keys == 500


def test_a_defect_of_a_lane_is_raised() -> None:
    def body() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        in_threads([lambda: None, body])


def test_a_defect_of_a_task_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(5.0)

    def broken(*given: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(bench.recorder, "done", broken)
    with pytest.raises(ZeroDivisionError):
        bench.tasks(lambda: b"v", 2)
