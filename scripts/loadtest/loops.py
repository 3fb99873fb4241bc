"""Closed and open loops for sessions that block: one thread, or several that take turns.

*Process*: load processes. A closed loop makes the next request when the last has ended: it measures
how much a target can take, and its latencies leave out what a stall kept from being asked. An open
loop makes requests when they are due (`scripts.loadtest.arrivals`) and counts their latency from
there, so that a stall is in the latency of all requests that it held up.

*Invariants*: a request counts that began before the end of the round; nothing but the request is
between the two looks at the clock; a slot is reported before what ended after it is counted.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence

from scripts.loadtest.arrivals import Arrivals
from scripts.loadtest.limits import ERROR_PAUSE_FIRST_S, ERROR_PAUSE_MAX_S
from scripts.loadtest.operations import READ, Keys, Operator
from scripts.loadtest.recording import Recorder, Window
from scripts.loadtest.targets.base import SyncSession
from scripts.loadtest.timing import sleep_until
from scripts.loadtest.workload import Operation, Workload

NAP_NS = 200_000_000  # how long a wait may be deaf to a stop


class Stop:
    """Whether the round was told to end early."""

    __slots__ = ("requested",)

    def __init__(self) -> None:
        self.requested = False


class Behind:
    """What was due and was not begun when the round ended."""

    def __init__(self) -> None:
        self.count = 0
        self.longest_ns = 0

    def add(self, due_ns: int, now_ns: int) -> None:
        """Count a request."""
        self.count += 1
        self.longest_ns = max(self.longest_ns, now_ns - due_ns)


class Patience:
    """How long a closed loop waits after an error: longer with each one in a row."""

    def __init__(self) -> None:
        self._pause_s = ERROR_PAUSE_FIRST_S
        self._done = -1

    def next_s(self, done: int) -> float:
        """Return seconds; ``done`` is how many requests have ended well so far."""
        if done != self._done:
            self._done, self._pause_s = done, ERROR_PAUSE_FIRST_S
        pause_s, self._pause_s = self._pause_s, min(2 * self._pause_s, ERROR_PAUSE_MAX_S)
        return pause_s


def closed_alone(
    session: SyncSession, operator: Operator, workload: Workload, recorder: Recorder, stop: Stop
) -> None:
    """Make one request after the other until the round ends; the fastest loop there is.

    Reads of one key, which a target may answer in a tenth of a microsecond, go past all
    bookkeeping but one list.
    """
    clock, window = time.monotonic_ns, recorder.window
    get, not_found = session.get, session.not_found
    latencies_ns: list[int] = []
    append, patience, missing, over = latencies_ns.append, Patience(), 0, False
    value: object = None
    found = 0
    sleep_until(window.start_ns)
    while not over and (now_ns := clock()) < window.end_ns and not stop.requested:
        block = workload.block((now_ns - window.start_ns) / 1e9)
        if not block:
            break
        for kind, keys in block:
            alone = kind == READ and isinstance(keys, bytes)
            began_ns = clock()
            try:
                if alone:
                    try:
                        value = get(keys)  # type: ignore[arg-type] # alone says so
                    except not_found:
                        value = None
                    if value is None:
                        operator.fill(keys)
                else:
                    found = operator.run(kind, keys)
            except Exception as error:
                ended_ns = clock()
                missing, over = _settle(
                    session, recorder, stop, latencies_ns, missing, now_ns=ended_ns
                )
                recorder.failed(kind, ended_ns - began_ns, error)
                if over:
                    break
                time.sleep(patience.next_s(recorder.total))
                continue
            ended_ns = clock()
            if ended_ns >= recorder.look_ns:
                missing, over = _settle(
                    session, recorder, stop, latencies_ns, missing, now_ns=ended_ns
                )
            if alone:
                append(ended_ns - began_ns)
                if value is None:
                    missing += 1
            else:
                recorder.done(kind, ended_ns - began_ns, keys, found)
            if over:
                break
        recorder.reads(latencies_ns, missing)
        recorder.fold()
        missing = 0


def _settle(
    session: SyncSession,
    recorder: Recorder,
    stop: Stop,
    latencies_ns: list[int],
    missing: int,
    *,
    now_ns: int,
) -> tuple[int, bool]:
    """Count the reads so far, report if it is time; return 0 missing, and whether it is over."""
    recorder.reads(latencies_ns, missing)
    if now_ns >= recorder.look_ns:
        recorder.memory_hits = session.memory_hits()
        recorder.report(now_ns)
    return 0, now_ns >= recorder.window.end_ns or stop.requested


class Due:
    """The requests of an open loop, one by one, with the moment that each is due."""

    def __init__(self, operations: Iterator[Operation], arrivals: Arrivals) -> None:
        self._operations = operations
        self._arrivals = arrivals
        self._lock = threading.Lock()
        self.exhausted = False  # there are no more requests, whatever the time

    def next(self) -> tuple[int, int, Keys] | None:
        """Return when, which kind and which keys; None after the end."""
        with self._lock:
            due_ns = self._arrivals.next()
            if due_ns is None:
                return None
            for kind, keys in self._operations:
                return due_ns, kind, keys
            self.exhausted = True
            return None

    def rest(self, end_ns: int) -> int:
        """Count what was due before ``end_ns`` and was not taken."""
        with self._lock:
            return self._arrivals.rest(end_ns)


class Lane:
    """One thread's way through a round; several share all but session and operator."""

    def __init__(
        self,
        session: SyncSession,
        operator: Operator,
        recorder: Recorder,
        lock: threading.Lock,
        stop: Stop,
    ) -> None:
        self._session = session
        self._operator = operator
        self._recorder = recorder
        self._lock = lock
        self._stop = stop
        self._patience = Patience()

    def run_closed(self, operations: Iterator[Operation]) -> None:
        """Make one request after the other until the round ends."""
        window = self._recorder.window
        sleep_until(window.start_ns)
        for kind, keys in operations:
            began_ns = time.monotonic_ns()
            if began_ns >= window.end_ns or self._stop.requested:
                break
            if not self._one(kind, keys, began_ns):
                time.sleep(self._patience.next_s(self._recorder.total))

    def run_open(self, due: Due, behind: Behind) -> None:
        """Make each request when it is due, or as soon after it as this thread is free."""
        end_ns = self._recorder.window.end_ns
        while (taken := due.next()) is not None:
            due_ns, kind, keys = taken
            while (now_ns := time.monotonic_ns()) < due_ns and not self._stop.requested:
                sleep_until(min(due_ns, now_ns + NAP_NS))
            if now_ns >= end_ns or self._stop.requested:
                if due_ns <= now_ns:
                    with self._lock:
                        behind.add(due_ns, min(now_ns, end_ns))
                break
            self._one(kind, keys, due_ns, delay_ns=now_ns - due_ns)

    def _one(self, kind: int, keys: Keys, from_ns: int, delay_ns: int | None = None) -> bool:
        """Make a request and count its latency from a moment; return whether it ended well."""
        recorder, error, found = self._recorder, None, 0
        try:
            found = self._operator.run(kind, keys)
        except Exception as raised:
            error = raised
        ended_ns = time.monotonic_ns()
        with self._lock:
            if ended_ns >= recorder.look_ns:
                recorder.memory_hits = self._session.memory_hits()
                recorder.report(ended_ns)
            if delay_ns is not None:
                recorder.delays_ns.append(delay_ns)
            if error is None:
                recorder.done(kind, ended_ns - from_ns, keys, found)
            else:
                recorder.failed(kind, ended_ns - from_ns, error)
        return error is None


def wait_out(window: Window, due: Due, stop: Stop) -> None:
    """Wait for the end of a round in which nothing is due any more, if it has one."""
    while (now_ns := time.monotonic_ns()) < window.end_ns:
        if due.exhausted or stop.requested:
            break
        sleep_until(min(window.end_ns, now_ns + NAP_NS))


def in_threads(bodies: Sequence[Callable[[], None]]) -> None:
    """Run these side by side until all have ended; one alone runs in the caller's thread.

    What one raises, a defect of the load test, is raised here when all have ended.
    """
    raised: list[BaseException] = []

    def guarded(body: Callable[[], None]) -> None:
        try:
            body()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=guarded, args=(body,)) for body in bodies[1:]]
    for thread in threads:
        thread.start()
    guarded(bodies[0])
    for thread in threads:
        thread.join()
    if raised:
        raise raised[0]
