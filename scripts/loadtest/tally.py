"""One round added up, from the reports of all load processes as they come.

*Process*: the parent. *Invariants*: no report is kept, so that memory grows with the kept
intervals alone, of which a round has at most `INTERVALS_MAX`; what is counted is what
`scripts.loadtest.results` says.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from scripts.loadtest.histogram import Histogram
from scripts.loadtest.limits import ERROR_CLASSES_MAX, INTERVALS_MAX, SLOTS_OPEN_MAX
from scripts.loadtest.operations import KINDS
from scripts.loadtest.recording import Report, Window
from scripts.loadtest.results import (
    ALL_PROCESSES,
    Interval,
    OpResult,
    add_counts,
    merge_intervals,
)


class Slot:
    """What all processes did in one slot."""

    def __init__(self) -> None:
        self.processes: set[int] = set()
        self.histogram = Histogram()
        self.operations = self.errors = self.read = self.found = 0
        self.hits: int | None = 0

    def add(self, process: int, report: Report, *, found_is_hit: bool) -> None:
        """Add one process's report."""
        self.processes.add(process)
        for packed in report.latencies:
            self.histogram.add_packed(packed)
        self.operations += sum(report.counts)
        self.errors += sum(report.errors.values())
        self.read += report.read
        self.found += report.found
        hits = report.hits
        if hits is None and found_is_hit:
            hits = report.found
        self.hits = None if hits is None or self.hits is None else self.hits + hits


class Tally:
    """A round under way."""

    def __init__(
        self,
        *,
        target: str,
        round_: int,
        processes: int,
        window: Window,
        found_is_hit: bool,
        show: Callable[[Interval], None],
    ) -> None:
        """``show`` gets each slot when all have reported it, or it is late.

        ``found_is_hit``: where the processes do not know of hits, what was found was one.
        """
        self._target = target
        self._round = round_
        self._processes = processes
        self._window = window
        self._found_is_hit = found_is_hit
        self._show = show
        self._open: dict[int, Slot] = {}
        self._shown = -1
        slots = math.ceil((window.end_ns - window.start_ns) / window.slot_ns)
        self._join = max(1, math.ceil(slots / INTERVALS_MAX))  # slots that make one interval
        self._kept: dict[int, list[Interval]] = {}
        self._histograms = [Histogram() for _ in KINDS]
        self._counts = [0] * len(KINDS)
        self._start_delays = Histogram()
        self._errors: dict[str, int] = {}
        self._sentences: dict[str, str] = {}
        self.keys = self.read = self.found = 0
        self.hits: int | None = 0
        self.cpu_s = 0.0
        self.errors_in_a_row = 0
        self.success_s = time.monotonic()  # when an operation last ended well

    @property
    def operations(self) -> int:
        """How many ended without an error."""
        return sum(self._counts)

    @property
    def errors(self) -> dict[str, int]:
        """How many ended with one, by class, the most frequent first."""
        return add_counts([self._errors])

    @property
    def sentences(self) -> list[str]:
        """An error of each class, as it was first told."""
        return [self._sentences[name] for name in self.errors if name in self._sentences]

    @property
    def start_delay(self) -> str:
        """The histogram of how much later than due requests began."""
        return self._start_delays.encode() if self._start_delays.count else ""

    def ops(self) -> list[OpResult]:
        """Return what was done of each kind."""
        return [
            OpResult(kind=kind, count=count, histogram=histogram.encode())
            for kind, count, histogram in zip(KINDS, self._counts, self._histograms, strict=True)
            if count or histogram.count
        ]

    def add(self, process: int, report: Report) -> None:
        """Take a report."""
        for histogram, packed in zip(self._histograms, report.latencies, strict=True):
            histogram.add_packed(packed)
        for kind, count in enumerate(report.counts):
            self._counts[kind] += count
        self._start_delays.add_packed(report.start_delay)
        self.keys += report.keys
        self.read += report.read
        self.found += report.found
        self.cpu_s += report.cpu_ns / 1e9
        hits = report.found if report.hits is None and self._found_is_hit else report.hits
        self.hits = None if hits is None or self.hits is None else self.hits + hits
        self._note_errors(report)
        slot = self._open.setdefault(report.slot, Slot())
        slot.add(process, report, found_is_hit=self._found_is_hit)
        if len(slot.processes) == self._processes:
            self._close(report.slot)
        while len(self._open) > SLOTS_OPEN_MAX:
            self._close(min(self._open))

    def look(self, now_ns: int) -> None:
        """Show the slots that ended a slot ago, whoever has not reported them."""
        window = self._window
        late = (now_ns - window.start_ns) // window.slot_ns - 1
        for number in sorted(self._open):
            if number < late:
                self._close(number)

    def intervals(self) -> list[Interval]:
        """Return all intervals, in order; slots in which nothing ended are empty ones."""
        for number in sorted(self._open):
            self._close(number)
        if not self._kept:
            return []
        kept = {number: merge_intervals(parts)[0] for number, parts in self._kept.items()}
        return [kept.get(number) or self._empty(number) for number in range(max(kept) + 1)]

    def _note_errors(self, report: Report) -> None:
        for name, count in report.errors.items():
            known = name in self._errors or len(self._errors) < ERROR_CLASSES_MAX
            counted = name if known else "other"
            self._errors[counted] = self._errors.get(counted, 0) + count
        for name, sentence in report.sentences.items():
            self._sentences.setdefault(name, sentence)
        if any(report.counts):
            self.errors_in_a_row = 0
            self.success_s = time.monotonic()
        else:
            self.errors_in_a_row += sum(report.errors.values())

    def _close(self, number: int) -> None:
        """Show a slot and keep it within its interval."""
        slot = self._open.pop(number)
        self._show(self._interval(number, slot, 1))
        self._keep(self._interval(number // self._join, slot, self._join))

    def _keep(self, part: Interval) -> None:
        parts = self._kept.setdefault(part.slot, [])
        parts.append(part)
        if len(parts) > 1:
            self._kept[part.slot] = merge_intervals(parts)

    def _interval(self, number: int, slot: Slot, join: int) -> Interval:
        at_s, seconds = self._span(number, join)
        p50_us, p99_us = slot.histogram.percentiles_us((50.0, 99.0))
        return Interval(
            target=self._target,
            round=self._round,
            process=ALL_PROCESSES,
            slot=number,
            at_s=at_s,
            seconds=seconds,
            operations=slot.operations,
            errors=slot.errors,
            found=slot.found,
            hits=slot.hits,
            misses=None if slot.hits is None else max(slot.read - slot.hits, 0),
            p50_us=p50_us,
            p99_us=p99_us,
            max_us=slot.histogram.max_us,
            histogram=slot.histogram.encode(),
        )

    def _empty(self, number: int) -> Interval:
        return self._interval(number, Slot(), self._join)

    def _span(self, number: int, join: int) -> tuple[float, float]:
        window = self._window
        length_ns = window.slot_ns * join
        begin_ns = number * length_ns
        end_ns = min(begin_ns + length_ns, window.end_ns - window.start_ns)
        return begin_ns / 1e9, max(end_ns - begin_ns, 0) / 1e9
