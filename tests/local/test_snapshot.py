"""`kamacache.local.snapshot`: quantiles of histograms, and what can be written as JSON."""

from __future__ import annotations

import msgspec
import pytest

from kamacache.local.snapshot import Histogram, NodeSnapshot, load_histogram


def histogram(*counts: int, sum_s: float = 0.0) -> Histogram:
    return Histogram(bounds_s=(1.0, 2.0, 4.0), counts=list(counts), sum_s=sum_s)


def test_a_quantile_is_interpolated_within_its_bucket() -> None:
    told = histogram(10, 10, 0, 0)
    assert told.quantile_s(0.25) == pytest.approx(0.5)
    assert told.quantile_s(0.5) == pytest.approx(1.0)
    assert told.quantile_s(0.75) == pytest.approx(1.5)
    assert told.quantile_s(1.0) == pytest.approx(2.0)


def test_a_quantile_above_the_last_bound_is_told_as_that_bound() -> None:
    assert histogram(0, 0, 1, 9).quantile_s(0.9) == 4.0


def test_of_nothing_there_is_no_quantile() -> None:
    assert load_histogram().quantile_s(0.5) is None


def test_histograms_add_up_and_tell_what_came_since() -> None:
    told = histogram(1, 2, 3, 4, sum_s=10.0)
    told.add(histogram(1, 0, 0, 1, sum_s=5.0))
    assert (told.counts, told.sum_s, told.count) == ([2, 2, 3, 5], 15.0, 12)
    fresh = told.since(histogram(1, 2, 3, 4, sum_s=10.0))
    assert (fresh.counts, fresh.sum_s) == ([1, 0, 0, 1], 5.0)


def test_a_snapshot_comes_back_from_json_as_it_was() -> None:
    text = b"""{"node": {"name": null, "version": "1", "python": "3", "epoch": "e", "pid": 1,
        "state": "ready", "serving": true, "serve_until_left_ms": 1, "ready": true, "began_ms": 1,
        "began_unix_s": 1.5, "uptime_s": 2.5, "workers": 1, "fronts": 0, "listen": null,
        "api": null, "clustered": false, "run_dir": "/r", "shm_dir": "/s", "boottime_ms": 3,
        "unix_s": 4.5, "reloads": 0, "reloads_refused": 0}}"""
    told = msgspec.json.decode(text, type=NodeSnapshot)
    assert msgspec.json.decode(msgspec.json.encode(told), type=NodeSnapshot) == told
