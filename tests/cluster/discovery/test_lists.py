"""Lists of members: each once, published when changed, and kept a while when a source was blind."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from kamacache.cluster.discovery.lists import Roster, changes_only, distinct
from kamacache.cluster.membership import Member
from kamacache.errors import ConfigError
from kamacache.limits import MEMBERS_MAX

A, B, C = Member("a:1"), Member("b:1", 2), Member("c:1")


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def roster(clock: Clock) -> Roster:
    return Roster(10.0, clock)


def test_a_member_that_is_named_again_counts_once() -> None:
    assert distinct([B, A, B, A]) == (A, B)


def test_two_weights_of_one_member_are_refused() -> None:
    with pytest.raises(ConfigError, match="b:1 is named with two weights, 2 and 3"):
        distinct([A, B, Member("b:1", 3)])


def test_more_members_than_a_cluster_has_are_refused() -> None:
    many = [Member(f"n{i}:1") for i in range(MEMBERS_MAX + 1)]
    assert len(distinct(many[:-1])) == MEMBERS_MAX
    with pytest.raises(ConfigError, match=f"at most {MEMBERS_MAX}"):
        distinct(many)


def test_a_list_is_said_once() -> None:
    said: list[Sequence[Member]] = []
    say = changes_only(said.append)
    for found in ((A,), (A,), (A, B), (A,), (), ()):
        say(found)
    assert said == [(A,), (A, B), (A,), ()]


def test_a_list_that_could_not_be_said_is_said_again() -> None:
    said: list[Sequence[Member]] = []

    def fails_first(members: Sequence[Member]) -> None:
        said.append(members)
        if len(said) == 1:
            raise OSError

    say = changes_only(fails_first)
    with pytest.raises(OSError):  # noqa: PT011
        say((A,))
    say((A,))
    assert said == [(A,), (A,)]


def test_what_vanishes_under_our_eyes_goes_at_once(roster: Roster) -> None:
    roster.listed([A, B, C])
    roster.listed([A, B])
    assert roster.members() == (A, B)
    roster.gone("b:1")
    assert roster.members() == (A,)
    roster.gone("nobody:1")
    assert roster.changes_in_s() is None


def test_what_vanished_unseen_stays_for_the_grace(roster: Roster, clock: Clock) -> None:
    roster.listed([A, B])
    roster.interrupted()
    roster.listed([C])
    assert roster.members() == (A, B, C)
    assert roster.changes_in_s() == 10
    clock.now_s += 4
    roster.came(B)
    roster.listed([B, C])
    clock.now_s += 6
    assert roster.changes_in_s() == 0
    assert roster.members() == (B, C)
    assert roster.changes_in_s() is None


def test_a_second_interruption_does_not_prolong_the_first(roster: Roster, clock: Clock) -> None:
    roster.listed([A, B])
    roster.interrupted()
    roster.listed([A])
    clock.now_s += 9
    roster.interrupted()
    roster.listed([])
    assert roster.members() == (A, B)
    clock.now_s += 1
    assert roster.members() == (A,)
    clock.now_s += 9
    assert roster.members() == ()


def test_a_kept_member_that_is_said_to_be_gone_goes(roster: Roster) -> None:
    roster.listed([A, B])
    roster.interrupted()
    roster.listed([A])
    roster.gone("b:1")
    assert roster.members() == (A,)


def test_a_list_that_cannot_be_used_changes_nothing(roster: Roster) -> None:
    roster.listed([A, B])
    with pytest.raises(ConfigError):
        roster.listed([A, Member("a:1", 5)])
    assert roster.members() == (A, B)
