"""Ratios to the first target."""

from __future__ import annotations

import pytest

from scripts.loadtest.ratios import compare
from tests.scripts.loadtest.made_results import op, round_result, whole_test

LOCAL, REDIS = "local:/run/kamacache", "redis:127.0.0.1:6379"


def reads(count: int, us: float) -> list:
    return [op("read", [us] * count)]


def test_each_round_is_divided_by_the_same_round_of_the_first_target() -> None:
    # The machine gets ten times slower in each round; the ratio of a round does not care.
    result = whole_test(
        *(
            round_result(target, number, ops=reads(count // 10**number, us * 10**number))
            for number, share in ((0, 2), (1, 4), (2, 3))
            for target, count, us in ((LOCAL, 120_000, 10.0), (REDIS, 120_000 // share, 20.0))
        )
    )
    (ratios,) = compare(result)
    assert (ratios.target, ratios.base, ratios.rounds) == (REDIS, LOCAL, 3)
    assert ratios.throughput.median == pytest.approx(1 / 3)
    assert ratios.throughput.least == pytest.approx(1 / 4)
    assert ratios.throughput.greatest == pytest.approx(1 / 2)
    # The histogram's three digits.
    assert ratios.p50.median == pytest.approx(2.0, rel=0.002)
    assert ratios.p99.greatest == pytest.approx(2.0, rel=0.002)


def test_rounds_that_only_one_target_finished_do_not_count() -> None:
    result = whole_test(
        round_result(LOCAL, 1, ops=reads(10, 5.0)),
        round_result(REDIS, 1, ops=reads(20, 5.0)),
        round_result(LOCAL, 2, ops=reads(10, 5.0)),
        round_result(REDIS, 2, ops=reads(1, 5.0), failed="redis is gone"),
        round_result(LOCAL, 3, ops=reads(10, 5.0)),
        round_result(REDIS, 3, ops=[]),
        round_result(LOCAL, 4, ops=reads(10, 5.0)),
    )
    (ratios,) = compare(result)
    assert ratios.rounds == 1
    assert ratios.throughput.median == 2.0


def test_one_target_alone_has_no_ratios() -> None:
    assert compare(whole_test(round_result(LOCAL))) == []
    assert compare(whole_test()) == []


def test_a_target_without_a_common_round_has_none() -> None:
    assert compare(whole_test(round_result(LOCAL, 1), round_result(REDIS, 2))) == []
