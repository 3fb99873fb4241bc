"""`kamacache.cluster.breaker`: the waits grow, are jittered, and begin anew."""

from __future__ import annotations

import pytest

from kamacache.cluster.breaker import Breaker
from kamacache.limits import PEER_RETRY_FIRST_S, PEER_RETRY_MAX_S


def test_waits_double_up_to_a_bound() -> None:
    breaker = Breaker(first_s=1.0, max_s=5.0, jitter=lambda: 1.0)
    assert [breaker.failed() for _ in range(5)] == [1.0, 2.0, 4.0, 5.0, 5.0]


def test_half_of_a_wait_is_left_to_chance() -> None:
    assert Breaker(first_s=1.0, max_s=5.0, jitter=lambda: 0.0).failed() == 0.5
    assert Breaker(first_s=1.0, max_s=5.0, jitter=lambda: 0.5).failed() == 0.75


def test_the_waits_of_two_links_differ() -> None:
    assert len({Breaker().failed() for _ in range(20)}) > 1


def test_waits_stay_within_the_limits_however_often_it_fails() -> None:
    breaker = Breaker()
    for _ in range(2_000):
        assert PEER_RETRY_FIRST_S / 2 <= breaker.failed() <= PEER_RETRY_MAX_S


@pytest.mark.parametrize(("up_s", "wait_s"), [(4.9, 4.0), (5.0, 1.0)])
def test_a_link_that_held_is_dialled_quickly_and_one_that_did_not_is_not(
    up_s: float, wait_s: float
) -> None:
    breaker = Breaker(first_s=1.0, max_s=5.0, jitter=lambda: 1.0)
    breaker.failed()
    breaker.failed()
    assert breaker.failed(up_s) == wait_s


def test_a_sign_of_life_begins_the_waits_anew() -> None:
    breaker = Breaker(first_s=1.0, max_s=5.0, jitter=lambda: 1.0)
    for _ in range(10):
        breaker.failed()
    breaker.hurry()
    assert [breaker.failed(), breaker.failed()] == [1.0, 2.0]
