"""What a load process counts, and its reports: one each interval, as differences.

*Process*: load processes make them, the parent adds them up. *Invariants*: a report holds what
ended in one slot since the last one, so that a process that is killed takes at most one slot with
it; an operation counts when it began before the round's end, however late it ends. Latencies are
those of operations that ended without an error, and of timeouts: leaving out a request because it
took too long would hide the very stall that is looked for.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec

from scripts.loadtest.histogram import Histogram
from scripts.loadtest.limits import BLOCK_OPERATIONS_MAX, ERROR_CLASSES_MAX
from scripts.loadtest.operations import KINDS, READ, Keys
from scripts.loadtest.targets.base import TIMEOUT, error_class, sentence_of

OTHER = "other"


class Window(msgspec.Struct, frozen=True, kw_only=True):
    """When a round runs, on CLOCK_MONOTONIC, which all processes of a machine share."""

    start_ns: int
    end_ns: int
    slot_ns: int

    def slot(self, now_ns: int) -> int:
        """Return the slot of a moment; the last one for all that is later."""
        last = max((self.end_ns - self.start_ns - 1) // self.slot_ns, 0)
        return min(max((now_ns - self.start_ns) // self.slot_ns, 0), last)


class Report(msgspec.Struct, frozen=True, kw_only=True, tag="report"):
    """What ended in one slot of one process since its last report."""

    slot: int
    counts: list[int]  # operations without an error, by kind
    latencies: list[bytes]  # packed, by kind
    keys: int
    read: int  # keys
    found: int
    hits: int | None  # of the process's own memory; None: it does not know
    errors: dict[str, int]
    sentences: dict[str, str]  # of each class, once
    start_delay: bytes
    cpu_ns: int


class Recorder:
    """Counts of one load process in one round. Not for threads without a lock around it."""

    def __init__(self, window: Window, send: Callable[[Report], None]) -> None:
        self.window = window
        self._send = send
        self.latencies_ns: list[list[int]] = [[] for _ in KINDS]
        self.delays_ns: list[int] = []
        self.counts = [0] * len(KINDS)
        self.keys = self.read = self.found = 0
        self.total = 0  # operations without an error, in this round
        self.memory_hits: int | None = None  # as last told, since the process began
        self._hits_before: int | None = None  # of what was told
        self._hits_told = 0
        self._read_told = 0
        self._histograms = [Histogram() for _ in KINDS]
        self._delays = Histogram()
        self._errors: dict[str, int] = {}
        self._sentences: dict[str, str] = {}
        self._told: set[str] = set()
        self._slot = 0
        self._cpu_ns = time.process_time_ns()
        self.look_ns = min(window.start_ns + window.slot_ns, window.end_ns)

    def begin(self, memory_hits: int | None) -> None:
        """Note what memory had answered before the round."""
        self._hits_before = self.memory_hits = memory_hits

    def reads(self, latencies_ns: list[int], missing: int) -> None:
        """Count reads of one key each, made since the last look, and empty the list."""
        count = len(latencies_ns)
        self.latencies_ns[READ] += latencies_ns
        latencies_ns.clear()
        self.counts[READ] += count
        self.total += count
        self.keys += count
        self.read += count
        self.found += count - missing

    def done(self, kind: int, latency_ns: int, keys: Keys, found: int) -> None:
        """Count an operation that ended without an error."""
        latencies = self.latencies_ns[kind]
        latencies.append(latency_ns)
        count = 1 if isinstance(keys, bytes) else len(keys)
        self.counts[kind] += 1
        self.total += 1
        self.keys += count
        if kind == READ:
            self.read += count
            self.found += found
        if len(latencies) >= BLOCK_OPERATIONS_MAX:
            self.fold()

    def failed(self, kind: int, latency_ns: int, error: BaseException) -> None:
        """Count an operation that ended with an error."""
        name = error_class(error)
        if name == TIMEOUT:
            self.latencies_ns[kind].append(latency_ns)
        if name not in self._told:
            if len(self._told) >= ERROR_CLASSES_MAX:
                name = OTHER
            self._told.add(name)
            self._sentences.setdefault(name, sentence_of(error))
        self._errors[name] = self._errors.get(name, 0) + 1

    def fold(self) -> None:
        """Turn the lists into histograms: a list of ints takes 32 bytes for each."""
        for histogram, latencies in zip(self._histograms, self.latencies_ns, strict=True):
            if latencies:
                histogram.record(latencies)
                latencies.clear()
        if self.delays_ns:
            self._delays.record(self.delays_ns)
            self.delays_ns.clear()

    def look(self, now_ns: int) -> None:
        """Report if a slot has ended; call it before counting what ended at ``now_ns``."""
        if now_ns >= self.look_ns:
            self.report(now_ns)

    def report(self, now_ns: int) -> None:
        """Send what was counted since the last time, all of which ended in one slot."""
        self.fold()
        window = self.window
        slot, self._slot = self._slot, window.slot(now_ns)
        if now_ns < window.end_ns:
            ends_ns = window.start_ns + (self._slot + 1) * window.slot_ns
            self.look_ns = min(ends_ns, window.end_ns)
        else:
            self.look_ns = now_ns + window.slot_ns  # requests that end late
        cpu_ns = time.process_time_ns()
        report = Report(
            slot=slot,
            counts=self.counts,
            latencies=[histogram.pack() for histogram in self._histograms],
            keys=self.keys,
            read=self.read,
            found=self.found,
            hits=self._fresh_hits(),
            errors=self._errors,
            sentences=self._sentences,
            start_delay=self._delays.pack(),
            cpu_ns=cpu_ns - self._cpu_ns,
        )
        self._cpu_ns = cpu_ns
        self.counts = [0] * len(KINDS)
        self.keys = self.read = self.found = 0
        self._errors, self._sentences = {}, {}
        for histogram in self._histograms:
            histogram.clear()
        self._delays.clear()
        self._send(report)

    def _fresh_hits(self) -> int | None:
        """Return what memory answered since the last report, in all never more than was read."""
        if self.memory_hits is None or self._hits_before is None:
            return None
        if self.memory_hits < self._hits_before:  # a node that began anew counts from 0 again
            self._hits_before = self.memory_hits - self._hits_told
        self._read_told += self.read
        told = self._hits_told
        self._hits_told = max(told, min(self.memory_hits - self._hits_before, self._read_told))
        return self._hits_told - told
