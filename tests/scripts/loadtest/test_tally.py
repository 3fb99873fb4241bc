"""A round added up from the reports of several load processes."""

from __future__ import annotations

import time

import pytest

from scripts.loadtest.histogram import Histogram
from scripts.loadtest.limits import ERROR_CLASSES_MAX, INTERVALS_MAX
from scripts.loadtest.recording import Report, Window
from scripts.loadtest.results import Interval
from scripts.loadtest.tally import Tally

S = 1_000_000_000


class Parent:
    """A tally and what it showed."""

    def __init__(
        self, processes: int = 2, seconds: float = 5.0, *, found_is_hit: bool = True
    ) -> None:
        self.shown: list[Interval] = []
        self.start_ns = time.monotonic_ns()
        self.tally = Tally(
            target="redis",
            round_=3,
            processes=processes,
            window=Window(
                start_ns=self.start_ns,
                end_ns=self.start_ns + int(seconds * S),
                slot_ns=S // 2,
            ),
            found_is_hit=found_is_hit,
            show=self.shown.append,
        )


def report(
    slot: int,
    *latencies_us: float,
    found: int = 0,
    hits: int | None = None,
    errors: dict[str, int] | None = None,
) -> Report:
    histogram = Histogram()
    histogram.record([int(us * 1000) for us in latencies_us])
    empty = Histogram().pack()
    return Report(
        slot=slot,
        counts=[len(latencies_us), 0, 0],
        latencies=[histogram.pack(), empty, empty],
        keys=len(latencies_us),
        read=len(latencies_us),
        found=found,
        hits=hits,
        errors=errors or {},
        sentences={name: f"{name}: why" for name in errors or {}},
        start_delay=empty,
        cpu_ns=S // 4,
    )


def test_a_slot_is_shown_when_all_have_reported_it() -> None:
    parent = Parent()
    parent.tally.add(0, report(0, 1, 2, found=1))
    assert not parent.shown
    parent.tally.add(1, report(0, 3, found=1, errors={"timeout": 2}))
    (shown,) = parent.shown
    assert (shown.target, shown.round, shown.slot, shown.seconds) == ("redis", 3, 0, 0.5)
    assert (shown.operations, shown.errors, shown.hits, shown.misses) == (3, 2, 2, 1)
    assert shown.max_us == pytest.approx(3, rel=0.01)


def test_a_slot_that_one_does_not_report_is_shown_late() -> None:
    parent = Parent()
    parent.tally.add(0, report(0, 1))
    parent.tally.look(parent.start_ns + int(0.9 * S))
    assert not parent.shown
    parent.tally.look(parent.start_ns + int(1.1 * S))
    assert [shown.operations for shown in parent.shown] == [1]
    parent.tally.add(1, report(0, 2, 3))
    parent.tally.look(parent.start_ns + int(1.2 * S))
    assert [shown.operations for shown in parent.shown] == [1, 2]
    (kept,) = parent.tally.intervals()
    assert kept.operations == 3


def test_slots_in_which_nothing_ended_are_empty_intervals() -> None:
    parent = Parent(1)
    parent.tally.add(0, report(0, 1))
    parent.tally.add(0, report(3, 1, 1))
    assert [kept.operations for kept in parent.tally.intervals()] == [1, 0, 0, 2]
    assert [kept.at_s for kept in parent.tally.intervals()] == [0, 0.5, 1.0, 1.5]


def test_long_rounds_keep_fewer_and_longer_intervals() -> None:
    parent = Parent(1, seconds=86_400)
    for slot in range(0, 172_800, 999):
        parent.tally.add(0, report(slot, 1))
    kept = parent.tally.intervals()
    assert len(kept) <= INTERVALS_MAX
    assert kept[0].seconds == 72
    assert sum(one.operations for one in kept) == parent.tally.operations == 173


def test_the_whole_round() -> None:
    parent = Parent()
    parent.tally.add(0, report(0, 1, 2, 3, found=2))
    parent.tally.add(1, report(1, 4, errors={"ValueError": 1, "timeout": 3}))
    tally = parent.tally
    assert (tally.operations, tally.keys, tally.read, tally.found) == (4, 4, 4, 2)
    assert tally.errors == {"timeout": 3, "ValueError": 1}
    assert tally.sentences == ["timeout: why", "ValueError: why"]
    assert tally.cpu_s == 0.5
    (op,) = tally.ops()
    assert (op.kind, op.count, Histogram.decode(op.histogram).count) == ("read", 4, 4)
    assert tally.start_delay == ""


def test_hits_are_what_processes_say_else_what_was_found_else_unknown() -> None:
    told = Parent(found_is_hit=True)
    told.tally.add(0, report(0, 1, 2, 3, found=3, hits=1))
    assert told.tally.hits == 1
    found = Parent(found_is_hit=True)
    found.tally.add(0, report(0, 1, 2, 3, found=2))
    assert found.tally.hits == 2
    unknown = Parent(1, found_is_hit=False)
    unknown.tally.add(0, report(0, 1, 2, 3, found=2))
    assert unknown.tally.hits is None
    assert unknown.shown[0].hits is None


def test_errors_in_a_row_begin_anew_with_a_success() -> None:
    tally = Parent().tally
    tally.add(0, report(0, errors={"timeout": 2}))
    tally.add(1, report(0, errors={"timeout": 1}))
    assert tally.errors_in_a_row == 3
    tally.add(0, report(1, 5.0))
    assert tally.errors_in_a_row == 0


def test_classes_of_errors_are_bounded() -> None:
    tally = Parent().tally
    for number in range(ERROR_CLASSES_MAX + 5):
        tally.add(0, report(0, errors={f"E{number}": 1}))
    assert len(tally.errors) == ERROR_CLASSES_MAX + 1
    assert tally.errors["other"] == 5
