"""Who is asked, and who is left alone for how long: a client's view of nodes, by a set clock."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kamacache.client.nodes import Node, Nodes, Question
from kamacache.cluster.membership import Member
from kamacache.cluster.ring import Ring
from kamacache.limits import (
    CLIENT_JOIN_NODES,
    CLIENT_JOIN_S,
    CLIENT_PROBE_S,
    CLIENT_REFRESH_EVERY_S,
    CLIENT_REFRESH_EVERY_S_MIN,
    CLIENT_RETRY_FIRST_S,
    CLIENT_RETRY_MAX_S,
)

A, B, C = Member("10.0.0.1:1"), Member("10.0.0.2:1"), Member("10.0.0.3:1")
RING = Ring([A, B, C])


def key_of(member: Member) -> bytes:
    return next(k for i in range(1000) if RING.owner(k := f"{i}".encode()) == member.address)


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


MakeNodes = Callable[..., Nodes]


@pytest.fixture
def make(clock: Clock) -> MakeNodes:
    """Return ``make(*usable)``: three nodes that are members and seeds, of which these answered."""

    def made(*usable: Member) -> Nodes:
        nodes = Nodes((A, B, C), clock, lambda: 1.0)
        for member in usable:
            nodes.answered(nodes.view.nodes[member.address])
        return nodes

    return made


def at(nodes: Nodes, member: Member) -> Node:
    return nodes.view.nodes[member.address]


def asked(nodes: Nodes) -> list[str]:
    return sorted(question.node.address for question in nodes.probes())


def test_a_usable_owner_is_asked(make: MakeNodes) -> None:
    nodes = make(A, B, C)
    for member in (A, B, C):
        assert nodes.route(key_of(member)) is at(nodes, member)
    assert asked(nodes) == []


def test_an_untested_owner_is_probed_while_another_takes_its_keys(make: MakeNodes) -> None:
    nodes = make(B)
    assert nodes.route(key_of(A)) is at(nodes, B)
    assert A.address in asked(nodes)
    nodes.route(key_of(A))
    assert A.address not in asked(nodes)  # it is under way
    nodes.members(Question(at(nodes, A), 99, "probe"), [], 1)
    assert nodes.route(key_of(A)) is at(nodes, A)


def test_a_lost_nodes_keys_go_clockwise_and_come_back(make: MakeNodes, clock: Clock) -> None:
    nodes = make(A, B, C)
    key = key_of(A)
    _, heir, _ = RING.owners(key)
    nodes.lost(at(nodes, A), clock.now_s, "gone")
    route = nodes.route(key)
    assert route is not None
    assert route.address == heir
    assert asked(nodes) == []  # left alone
    clock.now_s += CLIENT_RETRY_FIRST_S + 0.001
    nodes.route(key)
    (question,) = nodes.probes()
    nodes.members(question, [A, B, C], 1)
    assert nodes.route(key) is at(nodes, A)


def test_a_node_is_left_alone_ever_longer_up_to_a_bound(make: MakeNodes, clock: Clock) -> None:
    nodes = make(A, B, C)
    node = at(nodes, A)
    waits_s = []
    for _ in range(40):
        nodes.lost(node, clock.now_s, "gone")
        waits_s.append(node.retry_at_s - clock.now_s)
        clock.now_s = node.retry_at_s + 0.001
        nodes.members(Question(node, clock.now_s, "probe"), [], 1)  # answers that, and no call
        clock.now_s += 0.001
    assert waits_s[0] == pytest.approx(CLIENT_RETRY_FIRST_S)
    assert waits_s[1] == pytest.approx(CLIENT_RETRY_FIRST_S * 2)
    assert waits_s[-1] == pytest.approx(CLIENT_RETRY_MAX_S)
    nodes.answered(node)
    nodes.lost(node, clock.now_s, "gone")
    assert node.retry_at_s - clock.now_s == pytest.approx(CLIENT_RETRY_FIRST_S)


def test_the_back_off_is_jittered_down_to_half(clock: Clock) -> None:
    nodes = Nodes((A,), clock, lambda: 0.0)
    nodes.lost(at(nodes, A), clock.now_s, "gone")
    assert at(nodes, A).retry_at_s - clock.now_s == pytest.approx(CLIENT_RETRY_FIRST_S / 2)


def test_calls_that_fail_together_count_as_one_failure(make: MakeNodes, clock: Clock) -> None:
    nodes = make(A, B, C)
    for _ in range(100):
        nodes.lost(at(nodes, A), clock.now_s - 1, "gone")
    assert at(nodes, A).failures == 1


def test_an_answer_to_an_old_question_does_not_bring_a_node_back(
    make: MakeNodes, clock: Clock
) -> None:
    nodes = make(A, B, C)
    sent_s = clock.now_s
    clock.now_s += 1
    nodes.lost(at(nodes, A), clock.now_s, "gone")
    nodes.members(Question(at(nodes, A), sent_s, "probe"), [], 1)
    assert not at(nodes, A).usable


def test_of_nodes_that_refuse_one_call_tries_each_again(make: MakeNodes, clock: Clock) -> None:
    nodes = make(A, B, C)
    for member in (A, B, C):
        nodes.lost(at(nodes, member), clock.now_s, "gone")
    assert nodes.route(key_of(A)) is None
    clock.now_s += CLIENT_RETRY_FIRST_S + 0.001
    tried = [nodes.route(key_of(A)) for _ in range(4)]
    assert [node.address for node in tried[:3] if node] == list(RING.owners(key_of(A)))
    assert tried[3] is None


def test_of_nodes_that_are_silent_no_call_waits_for_any(make: MakeNodes, clock: Clock) -> None:
    nodes = make(A, B, C)
    for member in (A, B, C):
        nodes.lost(at(nodes, member), clock.now_s, "gone", silent=True)
    clock.now_s += CLIENT_RETRY_FIRST_S + 0.001
    assert nodes.route(key_of(A)) is None
    assert asked(nodes) == sorted(RING.addresses)
    assert at(nodes, A).connection == 1  # the old connection may be dead without knowing it


def test_nodes_already_tried_are_not_tried_again(make: MakeNodes) -> None:
    nodes = make(A, B, C)
    order = [at(nodes, Member(address)) for address in RING.owners(key_of(B))]
    for i in range(3):
        assert nodes.route(key_of(B), order[:i]) is order[i]
    assert nodes.route(key_of(B), order) is None


def test_seeds_are_asked_where_no_member_can_be(clock: Clock) -> None:
    nodes = Nodes((A,), clock)
    nodes.answered(at(nodes, A))
    (join,) = nodes.join(lambda: None)
    nodes.members(join, [B, C], 1)
    assert nodes.view.ring.addresses == (B.address, C.address)
    assert nodes.route(b"Tom") is at(nodes, A)
    assert asked(nodes) == [B.address, C.address]
    for member in (B, C):
        nodes.lost(at(nodes, member), clock.now_s, "gone")
    assert nodes.route(b"Tom") is at(nodes, A)


# -- the members --------------------------------------------------------------------------------


def test_the_first_callers_wait_for_one_answer(clock: Clock) -> None:
    nodes = Nodes((A, B), clock)
    woken: list[int] = []
    assert nodes.must_join()
    questions = nodes.join(lambda: woken.append(1))
    assert {q.node.address for q in questions} == {A.address, B.address}
    assert nodes.join(lambda: woken.append(2)) == []
    nodes.no_members(questions[0], "gone", silent=False)
    assert woken == []
    nodes.members(questions[1], [B, C], 1)
    assert woken == [1, 2]
    assert not nodes.must_join()
    assert nodes.join(lambda: woken.append(3)) == []
    assert woken == [1, 2, 3]


def test_where_no_seed_answers_nobody_waits_longer_than_for_all(clock: Clock) -> None:
    nodes = Nodes((A, B), clock)
    woken: list[int] = []
    for question in nodes.join(lambda: woken.append(1)):
        nodes.no_members(question, "gone", silent=True)
    assert woken == [1]
    assert nodes.join(lambda: woken.append(2)) == []
    assert woken == [1, 2]
    clock.now_s += CLIENT_JOIN_S
    assert not nodes.must_join()


def test_few_of_many_seeds_are_asked(clock: Clock) -> None:
    nodes = Nodes([Member(f"10.0.1.{i}:1") for i in range(40)], clock)
    assert len(nodes.join(lambda: None)) == CLIENT_JOIN_NODES


def test_members_are_refreshed_one_question_at_a_time(make: MakeNodes, clock: Clock) -> None:
    nodes = make(A, B, C)
    for question in nodes.join(lambda: None):
        nodes.members(question, [A, B, C], 1)
    assert nodes.refresher() is None
    clock.now_s += CLIENT_REFRESH_EVERY_S * 1.3
    found = nodes.refresher()
    assert found is not None
    clock.now_s += CLIENT_REFRESH_EVERY_S_MIN
    assert nodes.refresher() is None
    clock.now_s += CLIENT_PROBE_S
    assert nodes.refresher() is None  # it was never answered: the next in its time
    nodes.members(found, [A, B], 2)
    assert nodes.view.ring == Ring([A, B])
    assert nodes.view.number == 1


def test_a_failure_brings_the_next_refresh_near(make: MakeNodes, clock: Clock) -> None:
    nodes = make(A, B, C)
    for question in nodes.join(lambda: None):
        nodes.members(question, [A, B, C], 1)
    nodes.lost(at(nodes, A), clock.now_s, "gone")
    assert nodes.refresher() is None
    clock.now_s += CLIENT_REFRESH_EVERY_S_MIN
    found = nodes.refresher()
    assert found is not None
    assert found.node is not at(nodes, A)


def test_a_probe_changes_no_members_and_an_equal_list_changes_nothing(
    make: MakeNodes, clock: Clock
) -> None:
    nodes = make(A, B, C)
    for question in nodes.join(lambda: None):
        nodes.members(question, [C, B, A], 1)
    view = nodes.view
    nodes.members(Question(at(nodes, A), clock.now_s, "probe"), [A], 5)
    nodes.members(Question(at(nodes, A), clock.now_s, "refresh"), [B, A, C], 5)
    assert nodes.view is view


def test_a_node_that_has_just_begun_does_not_shrink_the_ring(make: MakeNodes, clock: Clock) -> None:
    nodes = make(A, B, C)
    for question in nodes.join(lambda: None):
        nodes.members(question, [A, B, C], 1)
    nodes.members(Question(at(nodes, A), clock.now_s, "refresh"), [A], 0)
    assert len(nodes.view.ring) == 3
    nodes.members(Question(at(nodes, A), clock.now_s, "refresh"), [A], 1)
    assert len(nodes.view.ring) == 1  # it says so by its own finding


def test_a_node_keeps_what_is_known_of_it_when_members_change(
    make: MakeNodes, clock: Clock
) -> None:
    nodes = make(A, B)
    before = at(nodes, A)
    for question in nodes.join(lambda: None):
        nodes.members(question, [A, Member("10.0.0.9:1")], 1)
    assert at(nodes, A) is before
    assert set(nodes.view.nodes) == {A.address, B.address, C.address, "10.0.0.9:1"}


def test_a_fork_forgets_what_was_under_way(make: MakeNodes, clock: Clock) -> None:
    nodes = make(B)
    questions = nodes.join(lambda: None)
    assert questions
    nodes.route(key_of(A))
    nodes.after_fork()
    assert asked(nodes) == []
    nodes.route(key_of(A))
    assert A.address in asked(nodes)
    assert len(nodes.join(lambda: None)) == len(questions)
