"""Reports: what ended in a slot is in that slot's report, once."""

from __future__ import annotations

import pytest

from scripts.loadtest.histogram import Histogram
from scripts.loadtest.limits import ERROR_CLASSES_MAX
from scripts.loadtest.operations import DELETE, READ, WRITE
from scripts.loadtest.recording import Recorder, Report, Window

WINDOW = Window(start_ns=1_000, end_ns=1_950, slot_ns=100)


class Sheet:
    """A recorder and its reports."""

    def __init__(self) -> None:
        self.reports: list[Report] = []
        self.recorder = Recorder(WINDOW, self.reports.append)

    def total(self, name: str) -> int:
        """The sum of one count."""
        return sum(getattr(report, name) or 0 for report in self.reports)


@pytest.mark.parametrize(
    ("now_ns", "slot"), [(0, 0), (1_000, 0), (1_099, 0), (1_100, 1), (1_949, 9), (9_999, 9)]
)
def test_slots_of_a_window(now_ns: int, slot: int) -> None:
    assert WINDOW.slot(now_ns) == slot


def test_what_ended_in_a_slot_is_in_its_report() -> None:
    sheet = Sheet()
    for ended_ns in (1_010, 1_050, 1_210, 1_920, 2_500):
        sheet.recorder.look(ended_ns)
        sheet.recorder.done(READ, 10, b"k", 1)
    sheet.recorder.report(2_600)
    assert [(report.slot, sum(report.counts)) for report in sheet.reports] == [
        (0, 2),
        (2, 1),
        (9, 1),
        (9, 1),
    ]


def test_counts_of_all_kinds() -> None:
    sheet = Sheet()
    sheet.recorder.done(READ, 10, [b"a", b"b"], 1)
    sheet.recorder.done(WRITE, 20, [b"a", b"b", b"c"], 0)
    sheet.recorder.done(DELETE, 30, b"a", 0)
    sheet.recorder.reads([1, 2, 3], missing=1)
    sheet.recorder.report(1_050)
    (report,) = sheet.reports
    assert report.counts == [4, 1, 1]
    assert (report.keys, report.read, report.found) == (9, 5, 3)
    latencies = Histogram()
    latencies.add_packed(report.latencies[READ])
    assert latencies.count == 4
    assert sheet.recorder.total == 6


def test_a_report_is_a_difference() -> None:
    sheet = Sheet()
    sheet.recorder.done(READ, 10, b"a", 1)
    sheet.recorder.failed(READ, 10, ValueError("one"))
    sheet.recorder.report(1_050)
    sheet.recorder.report(1_150)
    first, second = sheet.reports
    assert first.errors == {"ValueError": 1}
    assert first.sentences == {"ValueError": "ValueError: one"}
    assert (second.counts, second.errors, second.sentences) == ([0, 0, 0], {}, {})
    assert not any(second.latencies)


def test_a_sentence_is_told_once_for_each_class() -> None:
    sheet = Sheet()
    for text in ("one", "two"):
        sheet.recorder.failed(READ, 10, ValueError(text))
        sheet.recorder.report(1_050)
    assert [report.sentences for report in sheet.reports] == [
        {"ValueError": "ValueError: one"},
        {},
    ]


def test_classes_of_errors_are_bounded() -> None:
    sheet = Sheet()
    for number in range(ERROR_CLASSES_MAX + 10):
        sheet.recorder.failed(READ, 1, type(f"Error{number}", (Exception,), {})())
    sheet.recorder.report(1_050)
    (report,) = sheet.reports
    assert len(report.errors) == ERROR_CLASSES_MAX + 1
    assert report.errors["other"] == 10


def test_hits_of_memory_are_never_more_than_was_read() -> None:
    sheet = Sheet()
    recorder = sheet.recorder
    recorder.begin(1_000)
    for told, reads in ((1_004, 5), (1_020, 10), (1_020, 5), (1_018, 0)):
        recorder.reads([1] * reads, missing=0)
        recorder.memory_hits = told
        recorder.report(1_050)
    # The second answer came late, after reads that are counted only in the third report.
    assert [report.hits for report in sheet.reports] == [4, 11, 5, 0]


def test_a_node_that_began_anew_counts_from_nothing() -> None:
    sheet = Sheet()
    sheet.recorder.begin(500)
    for told in (510, 3, 7):
        sheet.recorder.reads([1] * 10, missing=0)
        sheet.recorder.memory_hits = told
        sheet.recorder.report(1_050)
    assert sheet.total("hits") <= 17
    assert sheet.total("hits") >= 13


def test_hits_that_memory_does_not_tell_are_not_known() -> None:
    sheet = Sheet()
    sheet.recorder.begin(None)
    sheet.recorder.reads([1], missing=0)
    sheet.recorder.report(1_050)
    assert sheet.reports[0].hits is None
