"""Draws follow their distributions; with fixed seeds, so that no test is left to chance."""

from __future__ import annotations

import gzip
import math
import tracemalloc
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from scripts.loadtest.limits import KEYS_MAX
from scripts.loadtest.popularity import (
    HotSet,
    TraceSpec,
    Uniform,
    Zipf,
    parse_popularity,
    read_trace,
)

THETAS = [0.2, 0.5, 0.99, 1.0 - 1e-9, 1.0, 1.0 + 1e-9, 1.2, 2.0, 5.0]


def exact(keys: int, theta: float) -> npt.NDArray[np.float64]:
    """The probabilities, by the definition."""
    weights: npt.NDArray[np.float64] = np.arange(1, keys + 1, dtype=np.float64) ** -theta
    shares: npt.NDArray[np.float64] = weights / weights.sum()
    return shares


def chi_squared(
    drawn: npt.NDArray[np.int64], expected: npt.NDArray[np.float64], least: float = 20.0
) -> float:
    """Pearson's statistic in standard deviations, rare keys taken together."""
    observed = np.bincount(drawn, minlength=expected.size)
    counts = expected * drawn.size
    edges, sums = [0], 0.0
    for index, count in enumerate(counts):
        sums += count
        if sums >= least:
            edges.append(index + 1)
            sums = 0.0
    edges[-1] = expected.size
    seen = np.add.reduceat(observed, edges[:-1])
    wanted = np.add.reduceat(counts, edges[:-1])
    freedom = seen.size - 1
    if not freedom:
        return 0.0
    return float((((seen - wanted) ** 2 / wanted).sum() - freedom) / math.sqrt(2 * freedom))


@pytest.mark.parametrize("theta", THETAS)
@pytest.mark.parametrize("keys", [1, 2, 10, 1000])
def test_zipf_is_exact_for_any_theta(theta: float, keys: int) -> None:
    drawn = Zipf(keys, theta, np.random.default_rng(7)).draw(200_000, 0.0)
    assert drawn.size == 200_000
    assert drawn.min() >= 0
    assert drawn.max() < keys
    assert abs(chi_squared(drawn, exact(keys, theta))) < 5


@pytest.mark.parametrize("theta", [0.5, 0.99, 1.0, 1.3])
def test_zipf_over_a_hundred_million_keys_needs_no_table(theta: float) -> None:
    random = np.random.default_rng(11)
    tracemalloc.start()
    try:
        zipf = Zipf(KEYS_MAX, theta, random)
        drawn = zipf.draw(100_000, 0.0)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 30 << 20
    assert drawn.max() < KEYS_MAX
    # Of the first keys the share is known by Euler and Maclaurin's formula for the sum.
    total = sum((k + 1) ** -theta for k in range(1000))
    rest = (
        math.log(KEYS_MAX / 1000.5)
        if theta == 1
        else ((KEYS_MAX ** (1 - theta) - 1000.5 ** (1 - theta)) / (1 - theta))
    )
    share = total / (total + rest)
    seen = float((drawn < 1000).mean())
    assert abs(seen - share) < 5 * math.sqrt(share * (1 - share) / drawn.size)


def test_theta_of_zero_is_uniform() -> None:
    for theta in (0.0, 1e-12):
        popularity = parse_popularity(f"zipf:{theta}").start(50, np.random.default_rng(3))
        drawn = popularity.draw(100_000, 0.0)
        assert abs(chi_squared(drawn, np.full(50, 1 / 50))) < 5


def test_uniform_reaches_every_key() -> None:
    drawn = Uniform(10, np.random.default_rng(1)).draw(10_000, 0.0)
    assert abs(chi_squared(drawn, np.full(10, 0.1))) < 5


@pytest.mark.parametrize("spec", ["uniform", "zipf:0.99", "hotset:0.9:10:1"])
def test_same_seed_same_draws(spec: str) -> None:
    first, second = (
        parse_popularity(spec).start(1000, np.random.default_rng(5)).draw(1000, 0.5) for _ in "ab"
    )
    assert (first == second).all()


def test_hot_set_gets_its_share_and_moves_on() -> None:
    hot = HotSet(100, 0.8, 10, 2.0, np.random.default_rng(2))
    for at_s, first in ((0.0, 0), (1.9, 0), (2.0, 10), (7.0, 30), (20.0, 0)):
        drawn = hot.draw(50_000, at_s)
        within = (drawn >= first) & (drawn < first + 10)
        assert within.mean() == pytest.approx(0.8, abs=0.01)
        assert set(np.unique(drawn)) == set(range(100))


def test_hot_set_of_all_keys_is_uniform_and_a_still_one_stays() -> None:
    drawn = HotSet(10, 0.5, 50, 0.0, np.random.default_rng(2)).draw(50_000, 1e6)
    assert abs(chi_squared(drawn, np.full(10, 0.1))) < 5


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is no popularity"),
        ("zip", "is no popularity"),
        ("uniform:1", "is no popularity"),
        ("zipf", "THETA"),
        ("zipf:-1", "THETA"),
        ("zipf:nan", "THETA"),
        ("zipf:11", "from 0 to 10"),
        ("hotset:0.5:10", "is no popularity"),
        ("hotset:1.5:10:1", "SHARE"),
        ("hotset:0.5:0:1", "KEYS"),
        ("hotset:0.5:ten:1", "KEYS"),
        ("hotset:0.5:10:-1", "SHIFT_S"),
        ("trace:", "is no popularity"),
    ],
)
def test_mistakes_name_what_is_wrong(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_popularity(text)


def test_trace_is_read_as_replay_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "trace.gz"
    path.write_bytes(gzip.compress(b"b\na\n\n b\n"))
    spec = parse_popularity(f"trace:{path}")
    assert isinstance(spec, TraceSpec)
    assert read_trace(spec.path) == [b"b", b"a", b"b"]


def test_trace_that_cannot_be_used_is_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "trace.gz"
    cases = {
        b"": "no keys|cannot be read",
        b"no gzip": "cannot be read",
        gzip.compress(b"key\n" * 100)[:-9]: "cannot be read",
        gzip.compress(b"x" * 2000): "2000 bytes",
    }
    for data, says in cases.items():
        path.write_bytes(data)
        with pytest.raises(ValueError, match=says):
            read_trace(path)
    with pytest.raises(ValueError, match="No such file"):
        read_trace(tmp_path / "missing")
    path.write_bytes(gzip.compress(b"a\nb\nc\n"))
    with pytest.raises(ValueError, match="3 keys, the limit is 2"):
        read_trace(path, most_keys=2)
