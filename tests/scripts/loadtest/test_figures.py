"""Numbers as a person reads them."""

from __future__ import annotations

import pytest

from scripts.loadtest import figures


@pytest.mark.parametrize(
    ("us", "shown"),
    [
        (None, figures.NOTHING),
        (0.0, "0 µs"),
        (0.85, "0.85 µs"),
        (9.99, "9.99 µs"),
        (9.996, "10.0 µs"),
        (99.96, "100 µs"),
        (999.4, "999 µs"),
        (999.6, "1.00 ms"),
        (52_340.0, "52.3 ms"),
        (999_600.0, "1.00 s"),
        (3_600_000_000.0, "3,600 s"),
    ],
)
def test_a_latency_has_three_digits_and_the_unit_that_fits(us: float | None, shown: str) -> None:
    assert figures.latency(us) == shown


@pytest.mark.parametrize(
    ("per_s", "shown"),
    [(None, figures.NOTHING), (0.0, "0.0"), (12.34, "12.3"), (99.96, "100"), (45_678.9, "45,679")],
)
def test_a_rate_is_exact_below_a_million(per_s: float | None, shown: str) -> None:
    assert figures.rate(per_s) == shown


def test_a_rate_above_a_million_is_short() -> None:
    assert figures.rate(999_999.4) == "999,999"
    assert figures.rate(1_234_567.0) == "1.23M"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, figures.NOTHING),
        (0.0, "0.0%"),
        (0.0001, "<0.1%"),
        (0.9876, "98.8%"),
        (0.99999, ">99.9%"),
        (1.0, "100.0%"),
    ],
)
def test_a_share_is_all_or_nothing_only_where_it_is(value: float | None, shown: str) -> None:
    assert figures.share(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [(999_999, "999,999"), (1_234_567, "1.23M"), (999_400_000, "999M"), (1_500_000_000, "1.50G")],
)
def test_an_amount_is_exact_below_a_million(value: int, shown: str) -> None:
    assert figures.amount(value) == shown


@pytest.mark.parametrize(
    ("size", "shown"), [(30 << 20, "30.0 MiB"), (1536 << 20, "1.50 GiB"), (1 << 18, "0.25 MiB")]
)
def test_memory_is_in_mib_or_gib(size: int, shown: str) -> None:
    assert figures.memory(size) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.04, "0.0 s"),
        (7.5, "7.5 s"),
        (99.96, "1:40 min"),
        (3599, "59:59 min"),
        (3725, "1:02:05 h"),
    ],
)
def test_a_duration_reads_as_on_a_clock(value: float, shown: str) -> None:
    assert figures.seconds(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.01234, "0.012"), (0.0994, "0.099"), (0.98, "0.98"), (9.996, "10.0"), (1234.0, "1,234")],
)
def test_a_ratio_has_two_or_three_digits(value: float, shown: str) -> None:
    assert figures.ratio(value) == shown


def test_a_long_name_loses_its_middle() -> None:
    assert figures.shorten("redis:/var/run/redis.sock", 11) == "redis….sock"
    assert figures.shorten("redis", 5) == "redis"


def test_targets_are_named_by_scheme_and_numbered_where_it_is_the_same() -> None:
    assert figures.labels(["local:/a", "redis:/b", "redis:/c"]) == {
        "local:/a": "local",
        "redis:/b": "redis 1",
        "redis:/c": "redis 2",
    }
