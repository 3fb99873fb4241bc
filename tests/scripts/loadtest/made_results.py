"""Results as a load test makes them, with real histograms of latencies that a test chooses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from scripts.loadtest.histogram import Histogram
from scripts.loadtest.results import (
    ALL_PROCESSES,
    Interval,
    NodeUse,
    OpResult,
    RoundResult,
    TestResult,
)

SLOT_S = 0.5


def histogram(latencies_us: Iterable[float]) -> Histogram:
    """Return a histogram of these latencies."""
    made = Histogram()
    made.record([round(us * 1000) for us in latencies_us])
    return made


def op(kind: str, latencies_us: Iterable[float]) -> OpResult:
    """Return the operations of one kind."""
    made = histogram(latencies_us)
    return OpResult(kind=kind, count=made.count, histogram=made.encode())


def interval(
    latencies_us: Sequence[float] = (),
    *,
    slot: int = 0,
    process: int = ALL_PROCESSES,
    seconds: float = SLOT_S,
    errors: int = 0,
    hits: int | None = None,
    misses: int | None = None,
    target: str = "local:/run/kamacache",
    round_: int = 1,
) -> Interval:
    """Return what ended in one slot: an operation for each latency."""
    made = histogram(latencies_us)
    p50_us, p99_us = made.percentiles_us((50.0, 99.0))
    return Interval(
        target=target,
        round=round_,
        process=process,
        slot=slot,
        at_s=slot * SLOT_S,
        seconds=seconds,
        operations=len(latencies_us),
        errors=errors,
        found=len(latencies_us),
        hits=hits,
        misses=misses,
        p50_us=p50_us,
        p99_us=p99_us,
        max_us=made.max_us,
        histogram=made.encode(),
    )


def node_use(role: str, pid: int, cpu_s: float = 1.0, private_bytes: int = 1 << 20) -> NodeUse:
    """Return what one process of a server used."""
    return NodeUse(
        role=role, pid=pid, cpu_s=cpu_s, rss_bytes=4 * private_bytes, private_bytes=private_bytes
    )


def round_result(target: str, round_: int = 1, **changes: Any) -> RoundResult:
    """Return a round of 1 s: two reads of 100 us, unless ``changes`` say otherwise."""
    ops = changes.pop("ops", [op("read", [100.0, 100.0])])
    operations = sum(one.count for one in ops)
    values: dict[str, Any] = {
        "target": target,
        "round": round_,
        "seconds": 1.0,
        "operations": operations,
        "keys": operations,
        "found": operations,
        "hits": None,
        "misses": None,
        "errors": {},
        "first_errors": [],
        "ops": ops,
        "intervals": [],
        "use": [],
        "start_delay": "",
        "behind": 0,
        "behind_s": 0.0,
        "client_cpu_s": 0.5,
        "generator_us": 0.1,
    }
    return RoundResult(**{**values, **changes})


def whole_test(*rounds: RoundResult, **changes: Any) -> TestResult:
    """Return a test of these rounds."""
    values: dict[str, Any] = {
        "arguments": {"keys": 1000},
        "machine": {"cpus": 2},
        "versions": {"kamacache": "0"},
        "began": "2026-01-02T03:04:05+00:00",
        "rounds": list(rounds),
    }
    return TestResult(**{**values, **changes})
