"""``scripts/bench/standard.py``: interrupted or out of time it keeps what is worth keeping."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import run_all
import standard
import standard_load
from PIL import Image

from tests.scripts.bench.standard_results import load, results


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["standard.py", *map(str, arguments)])
    return standard.main()


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Benchmarks and load tests that answer at once; what was asked of them."""
    asked: dict[str, Any] = {}

    def run(name: str, folder: Path, flags: list[str], limit_s: float) -> dict[str, Any]:
        asked[name] = (flags, limit_s)
        return {"targets": results()["benchmarks"]["local_hit"]["targets"], "versions": {"x": "1"}}

    monkeypatch.setattr(run_all, "run", run)
    monkeypatch.setattr(standard_load, "COMPARISONS", ())
    return asked


def test_page_is_made_from_what_was_measured(
    tmp_path: Path, measured: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    page, kept = tmp_path / "docs" / "page.md", tmp_path / "build" / "found.json"
    page.parent.mkdir()
    assert run_main(monkeypatch, "--page", page, "--results", kept) == 0
    text = page.read_text()
    assert "`scripts/bench/ring.py`" in text
    assert (page.parent / "page" / "targets.png").exists()
    assert "](page/targets.png)" in text
    assert measured["ring"][0] == ["--seconds=10"]
    assert json.loads(kept.read_text())["benchmarks"]["ring"]["targets"]
    page.unlink()
    assert run_main(monkeypatch, "--from", kept, "--page", page) == 0
    assert page.read_text() == text


def test_plots_of_an_earlier_run_are_not_on_the_page(tmp_path: Path) -> None:
    plots = tmp_path / "plots"
    plots.mkdir()
    for slug in ("read-mostly", "failed"):
        Image.new("RGB", (8, 8)).save(plots / f"{slug}.png")
    found = results(loads={"read-mostly": load(), "failed": load(failed="x")})
    del found["loads"]["failed"]["targets"]
    page = tmp_path / "page.md"
    standard.write_page(found, page, plots)
    assert "](page/read-mostly.png)" in page.read_text()
    assert not (tmp_path / "page" / "failed.png").exists()


def test_missed_target_fails_only_where_asked(
    tmp_path: Path, measured: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ("--only", "ring", "--results", tmp_path / "found.json")
    assert run_main(monkeypatch, *given) == 0
    assert (tmp_path / "found.md").exists(), "a part of the set does not replace the page"
    assert run_main(monkeypatch, *given, "--check") == 1


def test_part_that_failed_is_an_exit_code_and_a_line(
    tmp_path: Path, measured: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_all, "run", lambda *args: {"failed": "exit code 3"})
    page = tmp_path / "page.md"
    given = ("--only", "ring", "--results", tmp_path / "found.json", "--page", page)
    assert run_main(monkeypatch, *given) == 1
    assert "`scripts/bench/ring.py`: exit code 3" in page.read_text()


def test_no_part_begins_when_the_time_is_over(
    tmp_path: Path, measured: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(standard, "TOTAL_S", standard.PART_LEAST_S - 1)
    page = tmp_path / "page.md"
    assert run_main(monkeypatch, "--results", tmp_path / "found.json", "--page", page) == 0
    assert not measured
    assert "were over" in page.read_text()


def test_parts_are_limited_by_what_is_left(
    tmp_path: Path, measured: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(standard, "TOTAL_S", 10.0)
    run_main(monkeypatch, "--results", tmp_path / "found.json", "--page", tmp_path / "page.md")
    assert all(limit_s <= 10 for _, limit_s in measured.values())
    assert sum(part.seconds for part in standard.PARTS) < 500, "and are planned to fit"


def test_quick_leaves_the_page_alone(
    tmp_path: Path, measured: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.md"
    monkeypatch.setattr(standard, "PAGE", page)
    page.write_text("as it was")
    assert run_main(monkeypatch, "--quick", "--results", tmp_path / "found.json") == 0
    assert page.read_text() == "as it was"
    assert measured["ring"][0] == ["--quick"]
    assert "eviction" not in measured


@pytest.mark.integration
def test_interrupt_leaves_the_page_and_ends_what_runs(tmp_path: Path) -> None:
    page, kept, child = tmp_path / "page.md", tmp_path / "found.json", tmp_path / "child"
    page.write_text("as it was")
    (tmp_path / "ring.py").write_text(
        f"import os, pathlib, time\npathlib.Path({str(child)!r}).write_text(str(os.getpid()))\n"
        "time.sleep(60)\n"
    )
    program = (
        f"import sys; sys.path.insert(0, {str(run_all.HERE)!r})\n"
        "import pathlib, run_all, standard\n"
        f"run_all.HERE = pathlib.Path({str(tmp_path)!r})\n"
        "sys.exit(standard.main())\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, "--page", page, "--results", kept],
        stdout=subprocess.PIPE,
        text=True,
    )
    end = time.monotonic() + 20
    while not (child.exists() and child.read_text()):
        assert time.monotonic() < end
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted: the page is as it was" in said
    assert page.read_text() == "as it was"
    with pytest.raises(ProcessLookupError):
        os.kill(int(child.read_text()), 0)
