"""The picture of a test: latency by percentile, and throughput over time, a line for each target.

*Process*: the load test's own, after the last round; matplotlib is loaded only here. The left
panel's axis is that of HdrHistogram's plots, 1 / (1 - percentile) in powers of ten, which gives
the rarest requests as much room as the rest; a line ends at the greatest latency, at the share of
one request. The right panel shows the median of the rounds in each slot of time, and a band from
the least to the greatest. Colours are those of Okabe and Ito (Color Universal Design, 2008), which
people with any of the common colour blindnesses tell apart; lines differ in their dashes, too.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from math import log10
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Final

from scripts.loadtest import figures
from scripts.loadtest.headline import headline
from scripts.loadtest.histogram import Histogram
from scripts.loadtest.output import OutputError, check_writable, replace_file
from scripts.loadtest.results import Interval, RoundResult, Summary, TestResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS: Final = ("png", "svg", "pdf")
WIDTH_IN: Final = 12.0
HEIGHT_IN: Final = 5.5
DOTS_PER_INCH: Final = 130
POINTS_PER_DECADE: Final = 20  # of the left panel's axis
NINES_LABELLED_MAX: Final = 7
SLOT_SHARE_MIN: Final = 0.5  # of a whole slot's time: a shorter one's rate is noise
LINEAR_RATIO_MAX: Final = 20.0  # between targets' rates; beyond it the axis is logarithmic

COLOURS: Final = (
    "#0072B2",  # blue
    "#D55E00",  # vermilion
    "#009E73",  # bluish green
    "#CC79A7",  # reddish purple
    "#E69F00",  # orange
    "#56B4E9",  # sky blue
    "#000000",
)
DASHES: Final = ("-", "--", "-.", ":")


def check_plot(path: Path) -> None:
    """Find out whether a picture can be drawn and written there. Raises `OutputError`."""
    if path.suffix.lower().lstrip(".") not in FORMATS:
        endings = ", ".join(f".{name}" for name in FORMATS)
        raise OutputError(f"{path}: a plot is one of {endings}; end the file's name so")
    if importlib.util.find_spec("matplotlib") is None:
        raise OutputError("a plot needs matplotlib: pip install 'kamacache[loadtest]'")
    check_writable(path)


def write_plot(result: TestResult, path: Path) -> None:
    """Draw the test into a file of the kind its name says. Raises `OutputError`."""
    figure = draw(result)
    kind = path.suffix.lower().lstrip(".")
    replace_file(path, lambda made: figure.savefig(made, format=kind, dpi=DOTS_PER_INCH))


def draw(result: TestResult) -> Figure:
    """Return the figure: two panels, a line for each target in both."""
    from matplotlib.figure import Figure

    names = figures.labels(result.targets)
    figure = Figure(figsize=(WIDTH_IN, HEIGHT_IN), layout="constrained")
    latency, throughput = figure.subplots(1, 2)
    for number, target in enumerate(result.targets):
        _plot_latency(latency, result.histogram(target), _look(number))
        _plot_throughput(throughput, result.of(target), names[target], _look(number))
    summaries = [result.summary(target) for target in result.targets]
    _dress_latency(latency, [result.histogram(target).count for target in result.targets])
    _dress_throughput(throughput, [summary.operations_per_s for summary in summaries])
    for number, target in enumerate(result.targets):
        _mark_errors(throughput, result.of(target), names[target], _look(number))
    figure.suptitle("\n".join(headline(result.arguments)), fontsize=9, parse_math=False)
    _add_legend(figure, throughput, {names[one.target]: one for one in summaries})
    return figure


def _look(number: int) -> dict[str, Any]:
    """Return how the lines of the n-th target look, in both panels."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "linestyle": DASHES[number % len(DASHES)],
        "linewidth": 2,
    }


def _plot_latency(axes: Axes, latencies: Histogram, look: dict[str, Any]) -> None:
    x, y_us = latency_line(latencies)
    if x:
        axes.plot(x, y_us, marker=_dot(x), **look)


def _plot_throughput(
    axes: Axes, rounds: Sequence[RoundResult], name: str, look: dict[str, Any]
) -> None:
    times_s, middle, least, greatest = throughput_line(rounds)
    axes.plot(times_s, middle, label=name, marker=_dot(times_s), **look)
    if len(rounds) > 1:
        axes.fill_between(times_s, least, greatest, color=look["color"], alpha=0.15, linewidth=0)


def _mark_errors(
    axes: Axes, rounds: Sequence[RoundResult], name: str, look: dict[str, Any]
) -> None:
    """Mark the slots with errors, on the floor where the line has left through it."""
    failed_s = failing_slots(rounds)
    if failed_s:
        times_s, middle, *_ = throughput_line(rounds)
        rates = dict(zip(times_s, middle, strict=True))
        floor = axes.get_ylim()[0]
        cross = {"linestyle": "none", "marker": "X", "markersize": 9, "markeredgecolor": "black"}
        axes.plot(
            failed_s,
            [max(rates[time_s], floor) for time_s in failed_s],
            label=f"{name}: errors",
            clip_on=False,
            **{**look, **cross},
        )


def _add_legend(figure: Figure, axes: Axes, summaries: dict[str, Summary]) -> None:
    """Say under both panels which line is whose, with its figures."""
    lines = axes.get_lines()
    if not lines:
        return
    labels = []
    for line in lines:
        name = str(line.get_label())
        summary = summaries.get(name)
        if summary is not None:
            rate = f"{figures.rate(summary.operations_per_s)} ops/s"
            p50, p99 = figures.latency(summary.p50_us), figures.latency(summary.p99_us)
            name = f"{name}: {rate}, p50 {p50}, p99 {p99}"
        labels.append(name)
    figure.legend(
        lines, labels, loc="outside lower center", ncols=min(len(lines), 3), frameon=False
    )


def _dot(points: Sequence[float]) -> str:
    """Return the marker of a line: one point alone would not be seen."""
    return "o" if len(points) == 1 else ""


def latency_line(latencies: Histogram) -> tuple[list[float], list[float]]:
    """Return 1 / (1 - percentile) and the latency there, up to the greatest one."""
    count = latencies.count
    if not count:
        return [], []
    x = [1.0]
    while x[-1] < count:
        x.append(min(10 ** (len(x) / POINTS_PER_DECADE), count))
    y_us = latencies.percentiles_us([100 * (1 - 1 / one) for one in x])
    y_us[-1] = latencies.max_us
    return [float(one) for one in x], y_us


def throughput_line(
    rounds: Sequence[RoundResult],
) -> tuple[list[float], list[float], list[float], list[float]]:
    """Return the middles of the slots, and the rounds' median, least and greatest rate there."""
    slots = _slots(rounds)
    times_s = [_middle_s(same) for same in slots]
    rates = [[interval.rate for interval in same] for same in slots]
    return (
        times_s,
        [median(same) for same in rates],
        [min(same) for same in rates],
        [max(same) for same in rates],
    )


def failing_slots(rounds: Sequence[RoundResult]) -> list[float]:
    """Return the middles of the slots in which a request failed in any round."""
    return [_middle_s(same) for same in _slots(rounds) if any(one.errors for one in same)]


def _slots(rounds: Sequence[RoundResult]) -> list[list[Interval]]:
    """Return each slot's intervals of all rounds; a last one that was cut short is no rate."""
    by_slot: dict[int, list[Interval]] = {}
    whole_s = max((one.seconds for found in rounds for one in found.intervals), default=0.0)
    for found in rounds:
        for interval in found.intervals:
            if interval.seconds >= whole_s * SLOT_SHARE_MIN:
                by_slot.setdefault(interval.slot, []).append(interval)
    return [by_slot[slot] for slot in sorted(by_slot)]


def _middle_s(same: Sequence[Interval]) -> float:
    return median(interval.at_s + interval.seconds / 2 for interval in same)


def _dress_latency(axes: Axes, counts: Sequence[int]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

    axes.set_xscale("log")
    axes.set_yscale("log")
    nines = len(str(max([*counts, 10]) - 1))
    ticks = [1.0, *(10.0**one for one in range(1, min(nines, NINES_LABELLED_MAX) + 1))]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: percentile_label(x)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlim(1, max([*counts, 10]) * 1.2)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: latency_label(y)))
    axes.set_xlabel("percentile of requests")
    axes.set_ylabel("latency")
    axes.set_title("Latency by percentile", fontsize=10)
    axes.grid(visible=True, which="major", color="0.85")


def _dress_throughput(axes: Axes, rates: Sequence[float]) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    known = [rate for rate in rates if rate > 0]
    if known and max(known) > min(known) * LINEAR_RATIO_MAX:
        axes.set_yscale("log", nonpositive="clip")  # a stall leaves through the floor
        axes.set_ylim(min(known) / 4, max(known) * 4)
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: rate_label(y)))
    axes.set_xlabel("seconds since the start of the round")
    axes.set_ylabel("operations a second")
    axes.set_title("Throughput over time", fontsize=10)
    axes.grid(visible=True, color="0.85")


def percentile_label(x: float) -> str:
    """Return the percentile at 1 / (1 - percentile): 0%, 90%, 99%, 99.9%."""
    digits = max(round(log10(x)) - 2, 0)
    return f"{100 * (1 - 1 / x):.{digits}f}%"


def latency_label(us: float) -> str:
    """Return a latency as an axis shows it: 100 ns, 1 µs, 10 ms, 1 s."""
    for size_us, unit in ((1e6, "s"), (1e3, "ms"), (1.0, "µs")):
        if us >= size_us:
            return f"{us / size_us:g} {unit}"
    return f"{us * 1e3:g} ns"


def rate_label(per_s: float) -> str:
    """Return a rate as an axis shows it: 0, 500, 20k, 1.5M."""
    if per_s >= 1e6:
        return f"{per_s / 1e6:g}M"
    return f"{per_s / 1e3:g}k" if per_s >= 1e3 else f"{per_s:g}"
