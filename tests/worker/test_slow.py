"""Tests of what is logged of slow loads."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from kamacache.rundir.live import LiveSettings
from kamacache.worker.slow import SlowLoads, key_digest
from tests.worker.harness import running

SECRET = "customer:4711:card"


def slow_lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [vars(record) for record in caplog.records if record.message == "slow load"]


def bound(ms: int) -> SlowLoads:
    slow = SlowLoads()
    slow.apply(LiveSettings(slow_load_ms=ms))
    return slow


def load(key: str) -> bytes:
    time.sleep(0.02)
    return b"v"


def test_a_slow_load_is_logged_without_its_key_and_a_quick_one_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with running(tmp_path) as worker:
        group = worker.group(load)
        group.loader.slow = bound(3_600_000)
        worker.get("quick")
        assert not slow_lines(caplog)
        group.loader.slow = bound(10)
        worker.get(SECRET)
    [line] = slow_lines(caplog)
    assert line["group"] == "g"
    assert line["ms"] >= 20
    assert 0 <= line["queued_ms"] <= line["ms"]
    assert (line["keys"], line["key_bytes"], line["depth"]) == (1, len(SECRET), 0)
    assert line["key_digest"] == key_digest(SECRET.encode())
    assert SECRET not in str(line)


def test_slow_loads_of_a_group_are_one_line_in_an_interval(
    caplog: pytest.LogCaptureFixture,
) -> None:
    slow = bound(10)
    for number in range(5):
        slow.tell("g", [b"%d" % number], 0, 1.0, 0.5)
    slow.tell("h", [b"k", b"l"], 2, 1.0, 0.0)
    assert [(line["group"], line["keys"], line["skipped"]) for line in slow_lines(caplog)] == [
        ("g", 1, 0),
        ("h", 2, 0),
    ]


def test_a_reload_changes_the_bound_and_zero_ends_it() -> None:
    slow = bound(250)
    assert slow.bound_s == 0.25
    slow.apply(LiveSettings(slow_load_ms=0))
    assert slow.bound_s == float("inf")


def test_a_digest_is_short_and_the_same_everywhere() -> None:
    assert key_digest(b"Tom") == "3cd6cffa0693"
