"""The picture: what its lines hold, not its pixels."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.lines import Line2D

from scripts.loadtest import plot
from scripts.loadtest.output import OutputError
from scripts.loadtest.plot import check_plot, draw, latency_line, write_plot
from scripts.loadtest.results import RoundResult
from tests.scripts.loadtest.made_results import histogram, interval, op, round_result, whole_test

LOCAL, REDIS = "local:/run/kamacache", "redis:127.0.0.1:6379"
ROOT = Path(__file__).resolve().parents[3]


def with_rates(
    target: str, number: int, *operations: int, failing: int | None = None
) -> RoundResult:
    """Return a round of slots with so many operations each, one of them with an error."""
    return round_result(
        target,
        number,
        intervals=[
            interval([10.0] * count, slot=slot, errors=int(slot == failing))
            for slot, count in enumerate(operations)
        ],
    )


def points(line: Line2D) -> list[tuple[float, float]]:
    """Return what a line was drawn through."""
    return [(float(x), float(y)) for x, y in np.asarray(line.get_xydata())]


def test_the_latency_line_is_the_histogram_by_rarity() -> None:
    draw_from = random.Random(7)
    latencies = sorted(draw_from.lognormvariate(4, 1) for _ in range(10_000))
    x, y_us = latency_line(histogram(latencies))
    assert x[0] == 1.0
    assert x[-1] == 10_000.0  # one request
    assert x == sorted(x)
    assert y_us == sorted(y_us)
    for one, us in zip(x, y_us, strict=True):
        rank = min(max(round(10_000 * (1 - 1 / one)) - 1, 0), 9_999)
        nearest = latencies[rank : rank + 2]
        assert nearest[0] * 0.998 <= us <= nearest[-1] * 1.002
    assert y_us[-1] == pytest.approx(latencies[-1], rel=0.001)


def test_few_latencies_make_a_short_line_and_none_makes_none() -> None:
    assert latency_line(histogram([])) == ([], [])
    x, y_us = latency_line(histogram([10.0]))
    assert x == [1.0]
    assert y_us == pytest.approx([10.0], rel=0.001)
    x, y_us = latency_line(histogram([10.0, 20.0, 30.0]))
    assert (x[0], x[-1]) == (1.0, 3.0)
    assert (y_us[0], y_us[-1]) == pytest.approx((10.0, 30.0), rel=0.001)


def test_each_target_has_one_line_in_both_panels_with_its_own_look() -> None:
    figure = draw(
        whole_test(
            with_rates(LOCAL, 1, 100, 200), with_rates(REDIS, 1, 50, 60), with_rates(LOCAL, 2, 1, 2)
        )
    )
    latency, throughput = figure.axes
    for axes in (latency, throughput):
        local, redis = axes.get_lines()
        assert local.get_color() != redis.get_color()
        assert local.get_linestyle() != redis.get_linestyle()
    for one, other in zip(latency.get_lines(), throughput.get_lines(), strict=True):
        assert one.get_color() == other.get_color()
    assert latency.get_xscale() == latency.get_yscale() == "log"
    assert [line.get_label() for line in throughput.get_lines()] == ["local", "redis"]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "local: 2.0 ops/s, p50 100 µs, p99 100 µs",
        "redis: 2.0 ops/s, p50 100 µs, p99 100 µs",
    ]


def test_throughput_is_the_rounds_median_and_a_band_around_it() -> None:
    figure = draw(
        whole_test(
            with_rates(LOCAL, 1, 100, 200, 300),
            with_rates(LOCAL, 2, 110, 220),  # interrupted
            with_rates(LOCAL, 3, 150, 150, 400),
        )
    )
    axes = figure.axes[1]
    (line,) = axes.get_lines()
    assert points(line) == [
        (0.25, 220.0),
        (0.75, 400.0),
        (1.25, 700.0),
    ]
    (band,) = axes.collections
    (path,) = band.get_paths()
    corners = {(float(x), float(y)) for x, y in np.asarray(path.vertices)}
    assert corners >= {(0.25, 200.0), (0.25, 300.0), (0.75, 300.0), (0.75, 440.0), (1.25, 800.0)}
    assert axes.get_ylim()[0] == 0


def test_a_slot_that_was_cut_short_is_no_rate() -> None:
    cut = round_result(
        LOCAL,
        intervals=[interval([10.0] * 100), interval([10.0] * 9, slot=1, seconds=0.001)],
    )
    (line,) = draw(whole_test(cut)).axes[1].get_lines()
    assert points(line) == [(0.25, 200.0)]
    assert line.get_marker() == "o"  # one point has no line to be seen by


def test_slots_with_errors_are_marked_where_the_line_is() -> None:
    figure = draw(whole_test(with_rates(LOCAL, 1, 100, 0, 300, failing=1)))
    _, errors = figure.axes[1].get_lines()
    assert points(errors) == [(0.75, 0.0)]
    assert errors.get_label() == "local: errors"


def test_errors_are_seen_where_a_logarithmic_line_is_not() -> None:
    many = round_result(LOCAL, ops=[op("read", [1.0] * 1000)], intervals=[interval([1.0] * 500)])
    figure = draw(whole_test(many, with_rates(REDIS, 1, 1, 0, failing=1)))
    axes = figure.axes[1]
    *_, errors = axes.get_lines()
    assert axes.get_yscale() == "log"
    ((_, rate),) = points(errors)
    assert rate == axes.get_ylim()[0] > 0
    assert not errors.get_clip_on()


def test_rates_far_apart_share_a_logarithmic_axis() -> None:
    near = draw(whole_test(with_rates(LOCAL, 1, 100), with_rates(REDIS, 1, 20)))
    assert near.axes[1].get_yscale() == "linear"
    many = round_result(LOCAL, ops=[op("read", [1.0] * 1000)], intervals=[interval([1.0] * 500)])
    far = draw(whole_test(many, with_rates(REDIS, 1, 1)))
    assert far.axes[1].get_yscale() == "log"


def test_the_axis_of_percentiles_is_labelled_in_nines() -> None:
    assert [plot.percentile_label(x) for x in (1.0, 10.0, 100.0, 1e3, 1e5)] == (
        ["0%", "90%", "99%", "99.9%", "99.999%"]
    )
    assert [plot.latency_label(us) for us in (0.1, 1.0, 1e4, 1e6)] == (
        ["100 ns", "1 µs", "10 ms", "1 s"]
    )
    assert [plot.rate_label(per_s) for per_s in (0, 500, 20_000, 1.5e6)] == (
        ["0", "500", "20k", "1.5M"]
    )


def test_the_title_is_the_workload_taken_literally(tmp_path: Path) -> None:
    arguments = {"mix": "90:10:0", "popularity": r"trace:/data/$\no$.gz"}
    result = whole_test(with_rates(LOCAL, 1, 100), arguments=arguments)
    assert draw(result).get_suptitle() == r"mix 90:10:0, trace:/data/$\no$.gz"
    write_plot(result, tmp_path / "plot.png")  # as mathematics it could not be drawn


def test_an_empty_test_is_an_empty_picture_not_an_error(tmp_path: Path) -> None:
    path = tmp_path / "plot.png"
    write_plot(whole_test(round_result(LOCAL, ops=[])), path)
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("name", "start"), [("a.png", b"\x89PNG"), ("A.SVG", b"<?xml")])
def test_the_files_name_says_its_kind(tmp_path: Path, name: str, start: bytes) -> None:
    path = tmp_path / name
    write_plot(whole_test(with_rates(LOCAL, 1, 100, 100)), path)
    assert path.read_bytes().startswith(start)
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("name", ["plot", "plot.jpg", "plot.json"])
def test_another_kind_is_refused_before_the_test(tmp_path: Path, name: str) -> None:
    with pytest.raises(OutputError, match=r"\.png, \.svg, \.pdf"):
        check_plot(tmp_path / name)


def test_a_place_that_cannot_be_written_is_refused_before_the_test(tmp_path: Path) -> None:
    check_plot(tmp_path / "plot.png")
    with pytest.raises(OutputError, match="there is no directory"):
        check_plot(tmp_path / "none" / "plot.png")


def test_matplotlib_is_not_loaded_until_something_is_drawn(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from scripts.loadtest.plot import check_plot;"
        "check_plot(pathlib.Path(sys.argv[1])); sys.exit('matplotlib' in sys.modules)"
    )
    argv = [sys.executable, "-c", code, str(tmp_path / "plot.png")]
    subprocess.run(argv, cwd=ROOT, check=True, timeout=30)
