"""Merging of what the load processes report."""

from __future__ import annotations

import msgspec
import pytest

from scripts.loadtest.histogram import Histogram
from scripts.loadtest.results import (
    ALL_PROCESSES,
    Interval,
    NodeUse,
    OpResult,
    RoundResult,
    TestResult,
    merge_intervals,
    merge_ops,
)


def encoded(*latencies_us: float) -> str:
    made = Histogram()
    made.record([int(us * 1000) for us in latencies_us])
    return made.encode()


def interval(process: int, slot: int, *latencies_us: float, hits: int | None = 0) -> Interval:
    return Interval(
        target="local:/a",
        round=0,
        process=process,
        slot=slot,
        at_s=slot * 0.5,
        seconds=0.5,
        operations=len(latencies_us),
        errors=1,
        found=3,
        hits=hits,
        misses=2,
        p50_us=0,
        p99_us=0,
        max_us=max(latencies_us, default=0),
        histogram=encoded(*latencies_us),
    )


def round_of(target: str, round_: int = 0, hits: int | None = 60) -> RoundResult:
    return RoundResult(
        target=target,
        round=round_,
        seconds=2.0,
        operations=4,
        keys=8,
        found=7,
        hits=hits,
        misses=None if hits is None else 20,
        errors={"timeout": 2, "ConnectionError": 1},
        first_errors=[],
        ops=[
            OpResult(kind="read", count=3, histogram=encoded(1, 2, 3)),
            OpResult(kind="write", count=1, histogram=encoded(100)),
        ],
        intervals=[],
        use=[NodeUse(role="worker 0", pid=7, cpu_s=0.5, rss_bytes=10 + round_, private_bytes=5)],
        start_delay="",
        behind=2,
        behind_s=0.1,
        client_cpu_s=1.0,
        generator_us=0.5,
    )


def test_intervals_of_a_slot_become_one() -> None:
    merged = merge_intervals([interval(1, 1, 5), interval(0, 0, 1, 2), interval(1, 0, 3, 4)])
    assert [found.slot for found in merged] == [0, 1]
    first = merged[0]
    assert (first.process, first.operations, first.errors, first.found) == (ALL_PROCESSES, 4, 2, 6)
    assert (first.hits, first.misses, first.max_us) == (0, 4, 4)
    assert first.p50_us == pytest.approx(2, rel=0.01)
    assert first.rate == 8


def test_hits_that_one_process_does_not_know_are_not_known() -> None:
    (merged,) = merge_intervals([interval(0, 0, 1), interval(1, 0, 1, hits=None)])
    assert (merged.hits, merged.misses) == (None, 4)


def test_operations_are_merged_by_kind() -> None:
    ops = merge_ops([*round_of("a").ops, *round_of("a").ops])
    assert [(op.kind, op.count) for op in ops] == [("read", 6), ("write", 2)]
    assert Histogram.decode(ops[0].histogram).count == 6


def test_summary_is_of_all_rounds() -> None:
    result = TestResult(
        arguments={"keys": 10},
        machine={},
        versions={},
        began="2026-01-01T00:00:00+00:00",
        rounds=[round_of("a"), round_of("b"), round_of("a", 1)],
    )
    assert result.targets == ["a", "b"]
    found = result.summary("a")
    assert (found.rounds, found.operations, found.seconds) == (2, 8, 4.0)
    assert (found.operations_per_s, found.keys_per_s) == (2.0, 4.0)
    assert found.hit_ratio == 0.75
    assert found.errors == {"timeout": 4, "ConnectionError": 2}
    assert found.error_count == 6
    assert found.p50_us == pytest.approx(2, rel=0.01)
    assert found.max_us == pytest.approx(100, rel=0.01)
    assert [(op.kind, op.count) for op in found.ops] == [("read", 6), ("write", 2)]
    (use,) = found.use
    assert (use.cpu_s, use.cpu_s_per_1000, use.rss_bytes) == (1.0, 125.0, 11)
    assert result.histogram("a").count == 8


def test_hit_ratio_is_unknown_where_a_round_does_not_know() -> None:
    result = TestResult(
        arguments={}, machine={}, versions={}, began="", rounds=[round_of("a", hits=None)]
    )
    assert result.summary("a").hit_ratio is None


def test_survives_json() -> None:
    result = TestResult(
        arguments={"rate": None},
        machine={"cores": 2},
        versions={},
        began="",
        rounds=[round_of("a")],
    )
    text = msgspec.json.encode(result)
    assert msgspec.json.decode(text, type=TestResult) == result
