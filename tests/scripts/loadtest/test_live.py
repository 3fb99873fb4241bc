"""What is shown while a test runs."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import suppress

import pytest
from rich.console import Console

from scripts.loadtest import figures
from scripts.loadtest.live import PlainView, Tally, TerminalView, View, choose_view
from tests.scripts.loadtest.made_results import interval, op, round_result

TARGET = "grpc:[::1]:8001"
WIDTH = 80


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "LINES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    return Terminal()


@pytest.fixture
def view(terminal: Terminal, clock: Clock) -> Iterator[TerminalView]:
    with choose_view(terminal, clock=clock) as chosen:
        assert isinstance(chosen, TerminalView)
        yield chosen


def shown(view: TerminalView) -> list[str]:
    """Return the lines that rich's thread would draw now."""
    stream = io.StringIO()
    Console(file=stream, width=WIDTH, markup=False, highlight=False).print(view.render())
    lines = [line.rstrip() for line in stream.getvalue().splitlines()]
    assert max(map(len, lines), default=0) <= WIDTH
    # Where the terminal may put its "^C" without a line break.
    assert len(lines[-1]) < WIDTH // 2
    return lines if lines[-1] else lines[:-1]


def words(lines: list[str], start: str) -> str:
    """Return what follows ``start`` in the only line that begins so, evenly spaced."""
    (line,) = [line for line in lines if line.startswith(start)]
    return " ".join(line[len(start) :].split())


def test_rates_of_processes_add_up_whatever_each_ones_slot_lasted() -> None:
    tally = Tally(
        [
            interval([10.0] * 100, process=0, seconds=0.5),
            interval([10.0] * 50, process=1, seconds=0.25),
            interval([10.0] * 100, process=1, seconds=0.25, slot=1),
        ]
    )
    assert tally.rate == pytest.approx(200 + 300)


def test_a_slot_that_is_reported_in_parts_lasted_once() -> None:
    tally = Tally([interval([10.0] * 60, process=0), interval([10.0] * 40, process=0)])
    assert tally.rate == 200


def test_percentiles_are_those_of_all_processes_together() -> None:
    fast = interval([10.0] * 98, process=0, hits=9, misses=1)
    slow = interval([5_000.0, 65_000.0], process=1, errors=2, hits=0, misses=10)
    assert Tally([fast, slow]).figures() == (["200", "10.0 µs", "5.00 ms", "65.0 ms", "45.0%", "2"])


def test_what_is_not_known_is_a_dash() -> None:
    none = figures.NOTHING
    assert Tally().figures() == [none, none, none, none, none, "0"]
    assert Tally([interval(errors=7)]).figures() == ["0.0", none, none, none, none, "7"]
    known, unknown = interval([1.0], hits=1, misses=0), interval([1.0])
    assert Tally([known, unknown]).figures()[4] == none


def test_before_the_first_round_it_says_what_is_waited_for(
    view: TerminalView, clock: Clock
) -> None:
    clock.now += 2.0
    assert shown(view) == ["starting the load processes, 2.0 s"]


def test_a_bar_shows_target_round_and_time_left(view: TerminalView, clock: Clock) -> None:
    view.begin(TARGET, 2, 5, 10.0)
    clock.now += 4.0
    title, bar = shown(view)
    assert title == f"{TARGET}, round 2 of 5"
    assert bar.endswith("4.0 s of 10.0 s, 6.0 s left")
    assert len(bar) == WIDTH


def test_the_rounds_time_is_that_of_the_load_processes(view: TerminalView, clock: Clock) -> None:
    view.begin(TARGET, 1, 1, 10.0)
    clock.now += 3.0  # they take their time to start
    view.interval(interval([10.0], slot=0))
    clock.now += 0.25
    assert " 0.8 s of 10.0 s" in shown(view)[1]


def test_past_its_end_a_round_waits_for_answers(view: TerminalView, clock: Clock) -> None:
    view.begin(TARGET, 1, 1, 1.0)
    clock.now += 1.5
    assert shown(view)[1].endswith("1.0 s of 1.0 s, waiting for the last answers")


def test_figures_change_once_every_process_has_reported_a_slot(view: TerminalView) -> None:
    view.begin(TARGET, 1, 1, 10.0)
    for process in (0, 1):
        view.interval(interval([10.0] * 100, process=process, hits=100, misses=0))
    assert words(shown(view), "last 0.5 s") == "400 10.0 µs 10.0 µs 10.0 µs 100.0% 0"
    view.interval(interval([90.0] * 50, slot=1, process=0, errors=1, hits=50, misses=0))
    assert words(shown(view), "last 0.5 s").startswith("400 ")
    view.interval(interval([90.0] * 50, slot=1, process=1, hits=0, misses=50))
    assert words(shown(view), "last 0.5 s") == "200 90.0 µs 90.0 µs 90.0 µs 50.0% 1"
    whole = words(shown(view), "since the start")
    assert whole == "300 10.0 µs 90.0 µs 90.0 µs 83.3% 1"


def test_a_process_that_died_is_no_longer_counted(view: TerminalView) -> None:
    view.begin(TARGET, 1, 1, 10.0)
    view.interval(interval([10.0] * 100, process=0))
    view.interval(interval([10.0] * 100, process=1))
    for slot in (1, 2):
        view.interval(interval([10.0] * 100, process=0, slot=slot))
    assert words(shown(view), "last 0.5 s").startswith("200 ")


def test_silence_is_said(view: TerminalView, clock: Clock) -> None:
    view.begin(TARGET, 1, 1, 10.0)
    view.interval(interval([10.0]))
    clock.now += 2.0
    assert "no report" not in "\n".join(shown(view))
    clock.now += 2.0
    assert shown(view)[-1] == "no report for 4.0 s"


def test_each_round_begins_from_nothing(view: TerminalView) -> None:
    view.begin(TARGET, 1, 2, 10.0)
    view.interval(interval([10.0]))
    view.end(round_result(TARGET))
    assert shown(view) == []
    view.begin(TARGET, 2, 2, 10.0)
    assert len(shown(view)) == 2


def test_finished_rounds_stay_above_the_bar(view: TerminalView, terminal: Terminal) -> None:
    for number in (1, 2):
        view.begin(TARGET, number, 2, 10.0)
        view.end(round_result(TARGET, number, ops=[op("read", [10.0] * (100 * number))]))
    view.end(None)
    said = terminal.getvalue()
    assert "1/2 grpc:[::1]:8001" in said
    assert said.count("ops/s") == 1  # one heading for all
    assert said.index("100") < said.index("200")


def test_a_failed_round_says_why_at_once(view: TerminalView, terminal: Terminal) -> None:
    view.begin(TARGET, 1, 1, 10.0)
    view.end(round_result(TARGET, failed=f"{TARGET} answers only errors"))
    view.note("a word to the reader")
    assert f"{TARGET} answers only errors" in terminal.getvalue()
    assert "a word to the reader" in terminal.getvalue()


def test_storing_the_keys_has_no_known_end(view: TerminalView, clock: Clock) -> None:
    view.begin(TARGET, 1, 1, 0.0, "load")
    clock.now += 7.0
    title, bar = shown(view)
    assert title == f"{TARGET}, storing the keys"
    assert bar.endswith("7.0 s")


def test_stored_keys_fill_the_bar(view: TerminalView, clock: Clock) -> None:
    view.begin(TARGET, 1, 1, 0.0, "load")
    view.progress(250_000, 1_000_000)
    clock.now += 7.0
    assert shown(view)[1].endswith("250,000 of 1.00M keys, 7.0 s")
    view.begin(TARGET, 1, 1, 10.0)
    assert "keys" not in shown(view)[1]


def test_the_cursor_comes_back_however_the_test_ends(terminal: Terminal) -> None:
    with suppress(KeyboardInterrupt), choose_view(terminal) as view:
        view.begin(TARGET, 1, 1, 10.0)
        raise KeyboardInterrupt
    hide, show = "\x1b[?25l", "\x1b[?25h"
    said = terminal.getvalue()
    assert said.rindex(show) > said.rindex(hide)


def plain() -> tuple[View, io.StringIO]:
    stream = io.StringIO()
    view = choose_view(stream)
    assert isinstance(view, PlainView)
    return view, stream


def test_elsewhere_a_line_comes_every_two_seconds_of_the_round() -> None:
    view, stream = plain()
    with view:
        view.begin(TARGET, 1, 3, 10.0)
        for slot in range(9):
            for process in (0, 1):
                view.interval(interval([10.0 * (slot // 4 + 1)] * 100, slot=slot, process=process))
    begin, *lines = stream.getvalue().splitlines()
    assert begin == f"{TARGET}, round 1 of 3, 10.0 s"
    end = f"hits {figures.NOTHING}  errors 0"
    assert lines == [
        f"   2.0 s        400 ops/s  p50 10.0 µs  p99 10.0 µs  max 10.0 µs  {end}",
        f"   4.0 s        400 ops/s  p50 20.0 µs  p99 20.0 µs  max 20.0 µs  {end}",
    ]
    assert "\x1b" not in stream.getvalue()


def test_after_a_silence_a_line_says_its_own_time() -> None:
    view, stream = plain()
    view.begin(TARGET, 1, 1, 30.0)
    for slot in (0, 1, 20, 24):
        view.interval(interval([10.0], slot=slot))
    assert [line.split()[0] for line in stream.getvalue().splitlines()[1:]] == ["2.0", "12.0"]


def test_elsewhere_stored_keys_are_told_by_tenths() -> None:
    view, stream = plain()
    view.begin(TARGET, 1, 1, 0.0, "load")
    for done in range(0, 1001, 25):
        view.progress(done, 1000)
    first, *lines = stream.getvalue().splitlines()
    assert first == f"{TARGET}, storing the keys"
    assert lines == [f"  {done:,} of 1,000 keys" for done in range(100, 1001, 100)]


def test_elsewhere_a_round_ends_with_its_whole() -> None:
    view, stream = plain()
    view.begin(TARGET, 1, 1, 10.0)
    view.end(round_result(TARGET, ops=[op("read", [10.0] * 5)], failed="it died", seconds=2.5))
    view.end(None)
    _, whole, why = stream.getvalue().splitlines()
    assert whole.split()[:3] == ["whole", "2.0", "ops/s"]
    assert why.strip() == "it died"


def test_a_dumb_terminal_has_lines_and_quiet_has_nothing(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(choose_view(terminal), PlainView)
    with choose_view(terminal, quiet=True) as view:
        view.begin(TARGET, 1, 1, 10.0)
        view.interval(interval([10.0]))
        view.progress(1, 2)
        view.note("a word")
        view.end(round_result(TARGET))
    assert terminal.getvalue() == ""
