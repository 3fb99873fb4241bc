"""What a person sees while a load test runs: progress in a terminal, a line every 2 s elsewhere.

*Process*: the load test's own. Its loop calls `begin`, `interval`, `note` and `end`; in a terminal
a thread of rich draws `REFRESH_PER_S` times a second, and only reads what the loop left in one
attribute. *Invariants*: a rate is the sum of what each load process says of its own seconds, so
one that reports late does not lower it; percentiles come of merged histograms, never of other
percentiles; where nothing was measured stands a dash, not 0.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Final, NamedTuple, Self, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from scripts.loadtest import figures
from scripts.loadtest.histogram import Histogram
from scripts.loadtest.results import Interval, RoundResult

REFRESH_PER_S: Final = 4
PLAIN_EVERY_S: Final = 2.0
SILENCE_SHOWN_S: Final = 3.0  # without a report of any load process
NAME_CHARS: Final = 26
FIGURE_CHARS: Final = 9
COLUMNS: Final = ("ops/s", "p50", "p99", "max", "hits", "errors")

MEASURE: Final = "measure"
PHASES: Final = {"load": "storing the keys", "warm": "warming up"}


def choose_view(
    stream: TextIO | None = None,
    *,
    quiet: bool = False,
    clock: Callable[[], float] = time.monotonic,
) -> View:
    """Return the view that fits ``stream`` (stdout): a terminal, anything else, or nobody."""
    if quiet:
        return View()
    console = open_console(sys.stdout if stream is None else stream)
    if console.is_terminal and not console.is_dumb_terminal:
        return TerminalView(console, clock)
    return PlainView(console)


def open_console(stream: TextIO) -> Console:
    """Return a console that takes text as it is: an IPv6 address is no markup."""
    return Console(file=stream, markup=False, highlight=False, emoji=False)


class Tally:
    """What load processes reported, added up."""

    __slots__ = ("_by_process", "_latencies", "_slots", "errors", "hits", "misses")

    def __init__(self, intervals: Iterable[Interval] = ()) -> None:
        self._by_process: dict[int, tuple[int, float]] = {}  # operations, seconds
        self._slots: set[tuple[int, int]] = set()
        self._latencies = Histogram()
        self.errors = 0
        self.hits: int | None = 0
        self.misses: int | None = 0
        for interval in intervals:
            self.add(interval)

    def add(self, interval: Interval) -> None:
        """Add one interval; a slot that a process reports in parts lasted once."""
        operations, seconds = self._by_process.get(interval.process, (0, 0.0))
        slot = (interval.process, interval.slot)
        if slot not in self._slots:
            self._slots.add(slot)
            seconds += interval.seconds
        self._by_process[interval.process] = (operations + interval.operations, seconds)
        if interval.histogram:
            self._latencies.add(Histogram.decode(interval.histogram))
        self.errors += interval.errors
        self.hits = _plus(self.hits, interval.hits)
        self.misses = _plus(self.misses, interval.misses)

    @property
    def rate(self) -> float | None:
        """Operations a second; None before the first report."""
        known = [done / seconds for done, seconds in self._by_process.values() if seconds > 0]
        return sum(known) if known else None

    def figures(self) -> list[str]:
        """Return what stands under `COLUMNS`."""
        return _figures(self.rate, self._latencies, self.hits, self.misses, self.errors)


def round_figures(result: RoundResult) -> list[str]:
    """Return what stands under `COLUMNS` of a whole round."""
    rate = result.operations / result.seconds if result.seconds > 0 else None
    return _figures(rate, result.histogram, result.hits, result.misses, result.error_count)


def _figures(
    rate: float | None, latencies: Histogram, hits: int | None, misses: int | None, errors: int
) -> list[str]:
    p50_us, p99_us = latencies.percentiles_us((50.0, 99.0))
    known = hits is not None and misses is not None and hits + misses > 0
    return [
        figures.rate(rate),
        *(
            figures.latency(us if latencies.count else None)
            for us in (p50_us, p99_us, latencies.max_us)
        ),
        figures.share((hits or 0) / ((hits or 0) + (misses or 0)) if known else None),
        figures.amount(errors),
    ]


def _plus(so_far: int | None, more: int | None) -> int | None:
    return None if so_far is None or more is None else so_far + more


class View:
    """Shows nothing, as ``--quiet`` asks; the other views show what it leaves out."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return None

    def begin(
        self, target: str, round_: int, rounds: int, seconds: float, phase: str = MEASURE
    ) -> None:
        """Say what starts, and for how long (0: as long as it takes); rounds count from 1."""

    def interval(self, interval: Interval) -> None:
        """Take what one load process did in one slot."""

    def progress(self, done: int, total: int) -> None:
        """Say how many of the keys are stored."""

    def end(self, result: RoundResult | None) -> None:
        """Close what began; without a result, nothing was measured."""

    def note(self, sentence: str) -> None:
        """Show a sentence that stays."""


class _Round(NamedTuple):
    """What `begin` said."""

    target: str
    round: int
    rounds: int
    seconds: float
    phase: str

    @property
    def title(self) -> str:
        """The target, the round, and what is done where it is not the measurement."""
        of = f", round {self.round} of {self.rounds}" if self.rounds > 1 else ""
        doing = f", {PHASES[self.phase]}" if self.phase in PHASES else ""
        return f"{self.target}{of}{doing}"

    def short_title(self, chars: int) -> str:
        """The same in a column."""
        of = f"{self.round}/{self.rounds} " if self.rounds > 1 else ""
        return f"{of}{figures.shorten(self.target, chars - len(of))}"


class PlainView(View):
    """A line every `PLAIN_EVERY_S` of a round's own time, of what came since the line before."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._since: list[Interval] = []
        self._next_s = PLAIN_EVERY_S
        self._tenths = 0

    def begin(
        self, target: str, round_: int, rounds: int, seconds: float, phase: str = MEASURE
    ) -> None:
        """Print what starts."""
        self._since, self._next_s, self._tenths = [], PLAIN_EVERY_S, 0
        title = _Round(target, round_, rounds, seconds, phase).title
        self.note(f"{title}, {figures.seconds(seconds)}" if seconds > 0 else title)

    def interval(self, interval: Interval) -> None:
        """Print a line when the first process has got past its time."""
        if interval.at_s >= self._next_s and self._since:
            self._line(f"{self._next_s:6.1f} s", Tally(self._since).figures())
            self._since = []
        while self._next_s <= interval.at_s:
            self._next_s += PLAIN_EVERY_S
        self._since.append(interval)

    def progress(self, done: int, total: int) -> None:
        """Print each tenth of the way."""
        tenths = done * 10 // max(total, 1)
        if tenths > self._tenths:
            self._tenths = tenths
            self.note(f"  {figures.amount(done)} of {figures.amount(total)} keys")

    def end(self, result: RoundResult | None) -> None:
        """Print the whole round's figures."""
        self._since = []
        if result is not None:
            self._line("   whole", round_figures(result))
            if result.failed:
                self.note(f"  {result.failed}")

    def note(self, sentence: str) -> None:
        """Print the sentence on a line of its own, however long."""
        self._console.print(Text(sentence), soft_wrap=True)

    def _line(self, name: str, shown: list[str]) -> None:
        named = (f"{title} {figure}" for title, figure in zip(COLUMNS[1:], shown[1:], strict=True))
        self.note(f"{name}  {shown[0]:>9} {COLUMNS[0]}  {'  '.join(named)}")


class TerminalView(View):
    """A bar and the latest figures, redrawn in place; finished rounds stay above it."""

    def __init__(self, console: Console, clock: Callable[[], float]) -> None:
        self._console = console
        self._clock = clock
        self._round: _Round | None = None
        self._started = False  # has any round begun?
        self._began = self._heard = clock()
        self._whole = Tally()
        self._latest: dict[int, Interval] = {}  # of each load process
        # What the drawing thread reads: each replaced as a whole.
        self._rows: list[tuple[str, list[str]]] = []
        self._keys: tuple[int, int] | None = None  # stored, of all
        self._headed = False
        self._live = Live(
            console=console,
            refresh_per_second=REFRESH_PER_S,
            transient=True,
            get_renderable=self.render,
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._round = None
        self._live.stop()

    def begin(
        self, target: str, round_: int, rounds: int, seconds: float, phase: str = MEASURE
    ) -> None:
        """Show an empty bar."""
        self._whole, self._latest, self._rows, self._keys = Tally(), {}, [], None
        self._began = self._heard = self._clock()
        self._round = _Round(target, round_, rounds, seconds, phase)
        self._started = True
        self._live.refresh()

    def interval(self, interval: Interval) -> None:
        """Add it up; the figures change once every process has reported a slot."""
        self._heard = self._clock()
        # The round's own clock is the load processes': they start after `begin`.
        self._began = max(self._began, self._heard - interval.at_s - interval.seconds)
        self._whole.add(interval)
        self._latest[interval.process] = interval
        newest = max(one.slot for one in self._latest.values())
        self._latest = {
            process: one for process, one in self._latest.items() if one.slot >= newest - 1
        }
        if all(one.slot == newest for one in self._latest.values()):
            latest = Tally(self._latest.values())
            self._rows = [
                (f"last {interval.seconds:.1g} s", latest.figures()),
                ("since the start", self._whole.figures()),
            ]

    def progress(self, done: int, total: int) -> None:
        """Fill the bar by keys."""
        self._keys = (done, total)

    def end(self, result: RoundResult | None) -> None:
        """Leave the whole round's figures above the bar."""
        round_, self._round = self._round, None
        if result is None or round_ is None:
            return
        table = _figures_table(header=not self._headed)
        self._headed = True
        _add_row(table, round_.short_title(NAME_CHARS), round_figures(result))
        self._console.print(table)
        if result.failed:
            self._console.print(Text(f"  {result.failed}", style="red"))

    def note(self, sentence: str) -> None:
        """Print the sentence above the bar."""
        self._console.print(Text(sentence))

    def render(self) -> RenderableType:
        """Return what is drawn now; called by rich's thread."""
        round_, rows = self._round, self._rows
        now = self._clock()
        if round_ is None:
            waited = figures.seconds(now - self._began)
            return Text("" if self._started else f"starting the load processes, {waited}")
        parts: list[RenderableType] = [Text(round_.title, style="bold"), self._bar(round_, now)]
        if rows:
            table = _figures_table(header=True)
            for name, shown in rows:
                _add_row(table, name, shown)
            parts.append(table)
        silent_s = now - self._heard
        if rows and silent_s >= SILENCE_SHOWN_S:
            parts.append(Text(f"no report for {figures.seconds(silent_s)}", style="yellow"))
        # The terminal's own "^C" at the end of a full line would begin another one, and what
        # is drawn next would leave the topmost line behind.
        parts.append(Text(""))
        return Group(*parts)

    def _bar(self, round_: _Round, now: float) -> RenderableType:
        elapsed_s = now - self._began
        grid = Table.grid(expand=True, padding=(0, 2, 0, 0))
        grid.add_column(ratio=1)
        grid.add_column(justify="right", no_wrap=True)
        if self._keys is not None:
            done, total = self._keys
            keys = f"{figures.amount(done)} of {figures.amount(total)} keys"
            grid.add_row(
                ProgressBar(total=max(total, 1), completed=done),
                Text(f"{keys}, {figures.seconds(elapsed_s)}"),
            )
            return grid
        if round_.seconds <= 0:
            bar = ProgressBar(total=None, pulse=True)
            grid.add_row(bar, Text(figures.seconds(elapsed_s)))
            return grid
        shown_s = min(elapsed_s, round_.seconds)
        left = (
            f"{figures.seconds(round_.seconds - shown_s)} left"
            if shown_s < round_.seconds
            else "waiting for the last answers"
        )
        grid.add_row(
            ProgressBar(total=round_.seconds, completed=shown_s),
            Text(f"{figures.seconds(shown_s)} of {figures.seconds(round_.seconds)}, {left}"),
        )
        return grid


def _figures_table(*, header: bool) -> Table:
    table = Table(box=None, show_header=header, header_style="dim", padding=0, pad_edge=False)
    table.add_column("", width=NAME_CHARS, no_wrap=True)
    for column in COLUMNS:
        table.add_column(column, width=FIGURE_CHARS, justify="right", no_wrap=True)
    return table


def _add_row(table: Table, name: str, shown: list[str]) -> None:
    *cells, errors = map(Text, shown)
    cells[0].stylize("bold")
    if errors.plain != "0":
        errors.stylize("red")
    table.add_row(Text(name), *cells, errors)
