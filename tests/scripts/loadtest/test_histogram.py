"""Blocks recorded by numpy are what HdrHistogram records one by one."""

from __future__ import annotations

import random

import pytest
from hdrh.histogram import HdrHistogram

from scripts.loadtest.histogram import Histogram
from scripts.loadtest.limits import LATENCY_NS_MAX

PERCENTILES = (0.1, 50.0, 90.0, 99.0, 99.9, 100.0)


def values(seed: int = 1, count: int = 5_000) -> list[int]:
    draw = random.Random(seed)
    edges = [0, 1, 2047, 2048, 2049, 4095, 4096, LATENCY_NS_MAX - 1, LATENCY_NS_MAX]
    return [int(10 ** draw.uniform(0, 12.5)) for _ in range(count)] + edges


def recorded(latencies: list[int]) -> Histogram:
    made = Histogram()
    made.record(latencies)
    return made


def test_counts_and_percentiles_are_those_of_the_reference() -> None:
    given = values()
    reference = HdrHistogram(1, LATENCY_NS_MAX, 3)
    for value in given:
        assert reference.record_value(value)
    ours = recorded(given)
    assert ours.count == reference.get_total_count()
    assert ours.percentiles_us(PERCENTILES) == [
        reference.get_value_at_percentile(p) / 1000 for p in PERCENTILES
    ]
    assert ours.max_us == reference.get_max_value() / 1000
    assert ours.mean_us == pytest.approx(reference.get_mean_value() / 1000)


def test_percentiles_of_exact_values_are_within_three_digits() -> None:
    given = sorted(values(2))
    found = recorded(given).percentiles_us((50.0, 99.0))
    for percentile, value_us in zip((50, 99), found, strict=True):
        exact_us = given[round(len(given) * percentile / 100) - 1] / 1000
        assert value_us == pytest.approx(exact_us, rel=0.002)


def test_text_opens_in_the_reference_and_merges() -> None:
    one, other = recorded(values(3)), recorded(values(4))
    both = recorded(values(3) + values(4))
    merged = Histogram.merged([one.encode(), "", other.encode()])
    assert merged.percentiles_us(PERCENTILES) == both.percentiles_us(PERCENTILES)
    foreign = HdrHistogram.decode(both.encode().encode())
    assert foreign.get_value_at_percentile(99) / 1000 == both.percentiles_us([99])[0]
    one.add(other)
    assert one.encode() == both.encode()
    decoded = Histogram.decode(both.encode())
    decoded.record([5])
    assert decoded.count == both.count + 1


def test_packed_counts_add_up() -> None:
    total = Histogram()
    total.add_packed(recorded(values(5)).pack())
    total.add_packed(Histogram().pack())
    total.add_packed(recorded(values(6)).pack())
    both = recorded(values(5) + values(6))
    assert total.count == both.count
    assert total.percentiles_us(PERCENTILES) == both.percentiles_us(PERCENTILES)
    assert total.max_us == both.max_us
    assert Histogram.merged([total.encode()]).count == both.count


def test_out_of_range_is_counted_at_the_ends() -> None:
    made = recorded([-5, LATENCY_NS_MAX * 3])
    assert made.count == 2
    assert made.percentiles_us([1.0]) == [0.0]
    assert made.max_us == pytest.approx(LATENCY_NS_MAX / 1000, rel=0.001)


def test_empty_and_cleared_ones_say_zero() -> None:
    empty = Histogram()
    empty.record([])
    assert (empty.count, empty.max_us, empty.mean_us) == (0, 0.0, 0.0)
    assert empty.percentiles_us([50.0, 100.0]) == [0.0, 0.0]
    assert Histogram.decode(empty.encode()).count == 0
    used = recorded(values())
    used.clear()
    assert used.count == 0
    used.record([1000])
    assert used.percentiles_us([50.0]) == [1.0]
    assert used.max_us == 1.0


@pytest.mark.parametrize("text", ["", "nonsense", "HISTFAAAA"])
def test_what_is_no_histogram_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="HDR"):
        Histogram.decode(text)


@pytest.mark.parametrize("packed", [b"12345678", b"x" * 16, b"\xff" * 16])
def test_what_was_not_packed_is_refused(packed: bytes) -> None:
    with pytest.raises(ValueError, match="packed"):
        Histogram().add_packed(packed)
