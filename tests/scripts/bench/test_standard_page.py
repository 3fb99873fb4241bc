"""The page of the standard set: what was lost comes first, and a part of a run makes a page too."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import cores_model
import pytest
import standard_page
import standard_plots

from tests.scripts.bench.standard_results import load, load_target, results, target

ROLES = {
    "local hit, near cache off": {"client": 2.0, "worker": 0.0, "front": 0.0},
    "local set": {"client": 20.0, "worker": 20.0, "front": 0.0},
}


def with_model() -> dict[str, Any]:
    found = results()
    model = [row.as_dict() for row in cores_model.table(ROLES)]
    found["benchmarks"]["many_cores"] = {
        "targets": [],
        "measured": {"model": model, "cpu_us_by_role": {"8 workers, 4 fronts": ROLES}},
    }
    return found


def section(page: str, title: str) -> str:
    """Return a section's text, up to the next one of its level."""
    assert f"## {title}\n" in page
    return page.partition(f"## {title}\n")[2].partition("\n## ")[0]


def test_missed_targets_come_before_everything_measured() -> None:
    page = standard_page.page(results())
    headings = re.findall(r"^## (.*)$", page, re.MULTILINE)
    assert headings == [
        "Missed, lost, not measured",
        "Targets",
        "Load tests",
        "Everything measured",
        "Commands",
    ]
    first = section(page, "Missed, lost, not measured")
    assert "| slow \\| hit | at most 5 | 6.25 (3.50 to 7) | `scripts/bench/local_hit.py` |" in first
    assert "fast hit" not in first
    assert "No load test was won by another server." in first
    assert "1 of 2 met." in section(page, "Targets")
    assert "scripts/bench/local_hit.py --seconds=25" in section(page, "Commands")
    for fact in ("2 cores, a processor", "redis 8.1.0", "2026-01-02", "321 s"):
        assert fact in page


def test_lost_load_tests_are_named_first() -> None:
    faster = load_target(ours=False, speeds=(2000.0, 2600.0, 2100.0))
    found = results(loads={"slug": load(targets={"local": load_target(ours=True), "them": faster})})
    first = section(standard_page.page(found), "Missed, lost, not measured")
    assert "| Reads and writes | local / them | 0.5 (0.462 to 0.524) | 1 | 1 |" in first


def test_lower_latency_elsewhere_is_a_loss_and_a_set_rate_is_no_win() -> None:
    slow = load_target(ours=True, speeds=(999.0, 999.0), p99_us=90.0)
    them = load_target(ours=False, speeds=(1000.0, 1000.0), p99_us=30.0)
    found = results(loads={"slug": load(targets={"local": slow, "them": them})})
    assert [pair["p99"][1] for _, pair in standard_page.losses_of(found)] == [3.0]
    same = load_target(ours=True, speeds=(999.0, 999.0), p99_us=30.0)
    open_loop = load(targets={"local": same, "them": them}, command="load_test.py --rate=1000")
    assert [*standard_page.losses_of(results(loads={"slug": open_loop}))] == []


def test_what_failed_or_was_skipped_is_told_with_its_reason() -> None:
    found = results(
        benchmarks={
            "front": {"failed": "exit code 1"},
            "local_set": {"targets": [{"name": "set", "met": None, "skipped": "no redis-server"}]},
        },
        loads={
            "one": load(skipped={"memcached": "memcached is not installed"}),
            "two": {"title": "Batches", "command": "...", "skipped": {}, "failed": "exit code 69"},
        },
        not_run={"`scripts/bench/ring.py`": "the time was over"},
    )
    first = section(standard_page.page(found), "Missed, lost, not measured")
    for line in (
        "- `scripts/bench/front.py`: exit code 1",
        "- `scripts/bench/local_set.py`: set: no redis-server",
        "- load test, Reads and writes: memcached: memcached is not installed",
        "- load test, Batches: exit code 69",
        "- `scripts/bench/ring.py`: the time was over",
    ):
        assert line in first


@pytest.mark.parametrize(
    "found",
    [
        {},
        {"machine": {"machine": "m"}},
        results(benchmarks={}),
        results(loads={}),
        results(benchmarks={"ring": {"failed": "exit code 1"}}, loads={}),
        results(loads={"x": load(targets={"local": load_target(ours=True, speeds=(1.0,))})}),
        results(loads={"x": load(targets={"local": {**load_target(ours=True), "rounds": {}}})}),
    ],
)
def test_part_of_a_run_makes_a_page(found: dict[str, object], tmp_path: Path) -> None:
    page = standard_page.page(found)
    assert page.startswith("# Benchmarks\n")
    assert page.endswith("\n")
    assert not page.endswith("\n\n")
    assert "None" not in page
    standard_plots.draw(found, tmp_path)


def test_tables_have_as_many_cells_in_every_row() -> None:
    lines = standard_page.page(with_model()).splitlines()
    for above, below in pairwise(lines):
        if above.startswith("|") and below.startswith("|"):
            counts = [len(re.findall(r"(?<!\\)\|", line)) for line in (above, below)]
            assert counts[0] == counts[1], (above, below)


def test_model_says_what_saturates_first() -> None:
    cores = section(standard_page.page(with_model()), "Many cores: a model")
    assert "| 64 | local hits, near cache off | 32,000,000 | cores |" in cores
    assert "the busiest worker" in cores
    assert "zipf 0.99" in cores


def test_plots_are_small_and_named_on_the_page(tmp_path: Path) -> None:
    found = with_model()
    drawn = standard_plots.draw(found, tmp_path)
    assert drawn.keys() == {"targets", "cores"}
    for path in drawn.values():
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size < 100_000
    page = standard_page.page(found, {name: f"benchmarks/{name}.png" for name in drawn})
    assert "](benchmarks/targets.png)" in page
    assert "](benchmarks/cores.png)" in page


def test_distance_of_a_target_is_below_one_when_it_is_met() -> None:
    assert standard_plots.distance(target()) == pytest.approx(0.8)
    assert standard_plots.distance(target(asked="at least 2")) == pytest.approx(0.5)
    assert standard_plots.distance(target(asked="soon")) is None


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (3, "3"),
        (0.0123, "0.0123"),
        (1.005, "1.00"),
        (12.34, "12.3"),
        (123456.7, "123,457"),
    ],
)
def test_numbers_have_few_digits(value: float, shown: str) -> None:
    assert standard_page.number(value) == shown


def test_what_the_load_test_says_of_itself_is_on_the_page() -> None:
    found = results(loads={"slug": load(notes=["redis: its load processes were busy"])})
    assert "- redis: its load processes were busy" in standard_page.page(found)
