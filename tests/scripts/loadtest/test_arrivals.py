"""When requests are due: at the rate that was asked for, whatever happens to them."""

from __future__ import annotations

import numpy as np
import pytest

from scripts.loadtest.arrivals import EVEN, POISSON, Arrivals

START_NS = 5_000_000_000_000_000  # two months of uptime
S = 1_000_000_000


def arrivals(
    rate: float,
    seconds: float,
    kind: str = POISSON,
    process: int = 0,
    processes: int = 1,
) -> Arrivals:
    return Arrivals(
        start_ns=START_NS,
        end_ns=START_NS + int(seconds * S),
        rate=rate,
        kind=kind,
        process=process,
        processes=processes,
        random=np.random.default_rng([1, process]),
    )


def all_of(source: Arrivals) -> list[int]:
    moments = []
    while (due_ns := source.next()) is not None:
        moments.append(due_ns - START_NS)
    return moments


def test_poisson_arrivals_have_the_rate_and_its_spread() -> None:
    moments = all_of(arrivals(10_000, 10))
    assert moments == sorted(moments)
    assert moments[0] >= 0
    assert moments[-1] < 10 * S
    assert len(moments) == pytest.approx(100_000, abs=5 * 100_000**0.5)
    gaps_s = np.diff(moments) / S
    assert gaps_s.mean() == pytest.approx(1e-4, rel=0.02)
    assert gaps_s.std() == pytest.approx(1e-4, rel=0.02)  # exponential: as its mean
    per_second = np.bincount(np.array(moments) // S)
    assert per_second.var() / per_second.mean() < 5


def test_processes_share_the_rate() -> None:
    together = sum(len(all_of(arrivals(9_000, 5, process=p, processes=3))) for p in range(3))
    assert together == pytest.approx(45_000, abs=5 * 45_000**0.5)


def test_even_arrivals_of_all_processes_are_even() -> None:
    together = sorted(moment for p in range(4) for moment in all_of(arrivals(1_000, 1, EVEN, p, 4)))
    assert len(together) == 1000
    assert np.diff(together).tolist() == pytest.approx([1_000_000] * 999, abs=2)


def test_what_was_not_taken_is_counted() -> None:
    source = arrivals(1_000, 10, EVEN)
    for _ in range(2_500):
        assert source.next() is not None
    assert source.rest(START_NS + 10 * S) == pytest.approx(7_500, abs=1)
    assert source.next() is None
    early = arrivals(1_000, 10, EVEN)
    assert early.rest(START_NS + 4 * S) == pytest.approx(4_000, abs=1)


def test_counting_a_million_does_not_take_as_long() -> None:
    source = arrivals(10_000_000, 3_600)
    assert source.rest(START_NS + 3_600 * S) == pytest.approx(3.6e10, rel=0.001)


def test_a_rate_below_one_in_the_time_may_have_none() -> None:
    assert len(all_of(arrivals(0.001, 1.0, EVEN, 3, 4))) == 0
