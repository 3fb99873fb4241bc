"""Benchmarks run as processes: what fails is told, and nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import run_all

# Starts something that would stay, says so, and waits; on SIGINT it takes its time to clean up.
SLOW = """
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
pathlib.Path(sys.argv[1], "child").write_text(str(child.pid))
try:
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(0.1)
    pathlib.Path(sys.argv[1], "cleaned").touch()
"""


def ended(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def await_true(condition: object, seconds: float = 20) -> None:
    assert callable(condition)
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_results_are_read_and_failures_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_all, "HERE", tmp_path)
    program = "import sys, pathlib\npath = sys.argv[1].removeprefix('--json=')\n"
    (tmp_path / "good.py").write_text(program + "pathlib.Path(path).write_text('{\"a\": 1}')\n")
    (tmp_path / "bad.py").write_text("raise SystemExit(3)\n")
    (tmp_path / "mute.py").write_text("")
    assert run_all.run("good", tmp_path) == {"a": 1}
    assert run_all.run("bad", tmp_path) == {"failed": "exit code 3"}
    assert run_all.run("mute", tmp_path) == {"failed": "it wrote no results"}
    assert "FAILED  bad: exit code 3" in capsys.readouterr().out


def test_too_long_a_run_cleans_up_and_leaves_no_process(tmp_path: Path) -> None:
    said = run_all.run_to_end([sys.executable, "-c", SLOW, str(tmp_path)], limit_s=2)
    assert said == "not done within 2 s"
    assert (tmp_path / "cleaned").exists()
    await_true(lambda: ended(int((tmp_path / "child").read_text())))


def test_interrupt_ends_what_runs(tmp_path: Path) -> None:
    program = (
        f"import sys; sys.path.insert(0, {str(run_all.HERE)!r})\n"
        f"import run_all; run_all.run_to_end([sys.executable, '-c', {SLOW!r}, sys.argv[1]])\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stderr=subprocess.PIPE
    )
    await_true((tmp_path / "child").exists)
    await_true(lambda: (tmp_path / "child").read_text())
    parent.send_signal(signal.SIGINT)
    _, said = parent.communicate(timeout=20)
    assert b"KeyboardInterrupt" in said
    assert (tmp_path / "cleaned").exists()
    await_true(lambda: ended(int((tmp_path / "child").read_text())))


def test_missed_and_failed_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    met = {"name": "fast", "met": True, "median": 1.0, "target": "at most 2"}
    results: dict[str, Any] = {
        "one": {"targets": [met, {**met, "name": "slow", "met": False}]},
        "two": {"targets": [{"name": "gone", "met": None, "skipped": "no server"}]},
        "three": {"failed": "exit code 1"},
    }
    assert run_all.tell(results) == (2, 1)
    said = capsys.readouterr().out
    for words in ("met     one: fast: 1.000", "MISSED  one: slow", "skipped two: gone: no server"):
        assert words in said
