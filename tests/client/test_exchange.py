"""One call's parts without any I/O: how they are cut, moved, waited for, and what error is told."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from kamacache.client.exchange import Exchange, Part
from kamacache.client.nodes import Nodes, Question
from kamacache.client.operations import Get, GetMany, SetMany
from kamacache.cluster.membership import Member
from kamacache.errors import (
    DeadlineExceededError,
    KamaCacheError,
    LoadError,
    NodeUnavailableError,
)
from kamacache.limits import (
    BATCH_BYTES_SOFT,
    BATCH_KEYS_MAX,
    CLIENT_PARTS_MAX,
    CLIENT_PATIENCE_S,
    CLIENT_PROBE_S,
    CLIENT_TRIES_MAX,
    REPLY_GRACE_S,
)
from kamacache.v1 import kamacache_pb2 as pb

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
LOST = NodeUnavailableError("gone")


class Call:
    """Nodes that all answered, a clock, and an exchange over them."""

    def __init__(self, operation: Any, count: int = 3, timeout_s: float = 10.0) -> None:
        self.now_s = 100.0
        members = [Member(f"10.0.0.{i}:1") for i in range(count)]
        self.nodes = Nodes(members, self.clock)
        for node in self.nodes.view.nodes.values():
            self.nodes.answered(node)
        self.now_s += 1
        self.exchange = Exchange(
            operation, self.nodes, self.now_s + timeout_s, timeout_s, clock_s=self.clock
        )

    def clock(self) -> float:
        return self.now_s

    def send(self) -> list[Part]:
        return list(self.exchange.to_send())

    def wake(self) -> list[Part]:
        """Let the time pass until it wants to look."""
        self.now_s = self.exchange.wake_s
        return self.exchange.overdue()


def test_parts_are_cut_by_keys_and_bytes_and_bounded_in_number() -> None:
    keys = [f"{i}".encode() for i in range(3 * BATCH_KEYS_MAX)]
    call = Call(GetMany("g", keys), count=1)
    assert [len(part.keys) for part in call.send()] == [BATCH_KEYS_MAX] * 3
    large = {f"{i}".encode(): bytes(BATCH_BYTES_SOFT // 2 - 1) for i in range(5)}
    call = Call(SetMany("g", large, None), count=1)
    assert [len(part.keys) for part in call.send()] == [2, 2, 1]
    too_large = {f"{i}".encode(): bytes(BATCH_BYTES_SOFT + 1) for i in range(CLIENT_PARTS_MAX + 5)}
    call = Call(SetMany("g", too_large, None), count=1)
    sent = call.send()
    assert [len(part.keys) for part in sent] == [1] * CLIENT_PARTS_MAX
    assert call.send() == []
    call.exchange.answered(sent[0], pb.BatchSetResponse())
    assert len(call.send()) == 1


def test_nodes_take_turns_where_there_are_more_parts_than_may_run() -> None:
    keys = [f"{i}".encode() for i in range(CLIENT_PARTS_MAX * BATCH_KEYS_MAX)]
    call = Call(GetMany("g", keys), count=2)
    assert len({part.node for part in call.send()[:2]}) == 2


def test_a_moved_part_goes_to_a_bounded_number_of_nodes() -> None:
    call = Call(Get("g", b"k"), count=CLIENT_TRIES_MAX + 3)
    tried = []
    while sent := call.send():
        (part,) = sent
        tried.append(part.node.address)
        call.exchange.failed(part, UNAVAILABLE, LOST)
    assert tried == list(call.nodes.view.ring.owners(b"k"))[:CLIENT_TRIES_MAX]
    with pytest.raises(NodeUnavailableError, match="gone"):
        call.exchange.check()


def test_the_first_error_is_the_one_that_is_told() -> None:
    call = Call(GetMany("g", [f"{i}".encode() for i in range(100)]))
    one, two, three = call.send()
    call.exchange.failed(one, grpc.StatusCode.UNKNOWN, LoadError("first"))
    call.exchange.answered(two, pb.BatchGetResponse(values=[b""] * len(two.keys)))
    call.exchange.failed(three, grpc.StatusCode.UNKNOWN, LoadError("second"))
    assert call.send() == []
    with pytest.raises(LoadError, match="first"):
        call.exchange.check()


def test_a_batch_that_is_too_large_is_halved_and_a_single_key_is_not() -> None:
    call = Call(GetMany("g", [b"a", b"b", b"c"]), count=1)
    sizes = []
    while sent := call.send():
        for part in sent:
            sizes.append(len(part.keys))
            error = KamaCacheError("too large")
            call.exchange.failed(part, grpc.StatusCode.OUT_OF_RANGE, error)
    assert sizes == [3, 1, 2, 1, 1]
    with pytest.raises(KamaCacheError, match="too large"):
        call.exchange.check()


def test_a_silent_node_that_gives_a_sign_is_waited_for_until_the_deadline() -> None:
    call = Call(Get("g", b"k"))
    (part,) = call.send()
    start_s = call.now_s
    assert call.exchange.wake_s == pytest.approx(start_s + CLIENT_PATIENCE_S)
    while call.now_s < start_s + 10:
        assert call.wake() == []
        for question in call.nodes.probes():
            call.now_s += 0.001
            call.nodes.members(question, [], 1)
    call.now_s = start_s + 10 + REPLY_GRACE_S
    assert call.exchange.overdue() == [part]
    assert call.send() == []
    with pytest.raises(DeadlineExceededError) as caught:
        call.exchange.check()
    assert (caught.value.timeout_s, caught.value.group) == (10, "g")


def test_a_silent_node_that_gives_no_sign_is_left_for_the_next() -> None:
    call = Call(Get("g", b"k"))
    (part,) = call.send()
    start_s = call.now_s
    assert call.wake() == []
    (question,) = call.nodes.probes()
    assert question.node is part.node
    assert call.wake() == [part]
    assert call.now_s - start_s == pytest.approx(CLIENT_PATIENCE_S + CLIENT_PROBE_S)
    assert not part.node.usable
    (moved,) = call.send()
    assert moved.tried == (part.node,)
    call.exchange.answered(part, pb.GetResponse(found=True, value=b"late"))  # too late to count
    call.exchange.answered(moved, pb.GetResponse(found=True, value=b"v"))
    assert call.send() == []
    call.exchange.check()


def test_a_short_deadline_leaves_time_for_another_node() -> None:
    call = Call(Get("g", b"k"), timeout_s=1.0)
    (part,) = call.send()
    start_s = call.now_s
    call.wake()
    assert call.wake() == [part]
    assert call.now_s - start_s < 0.5
    assert part.node.usable  # the sign may yet come: it was asked for only a moment ago
    (moved,) = call.send()
    assert moved.node is not part.node


def test_a_part_whose_node_is_lost_to_another_call_moves_too() -> None:
    call = Call(Get("g", b"k"))
    (part,) = call.send()
    call.now_s += 0.1
    call.nodes.lost(part.node, call.now_s, "gone")
    assert call.wake() == [part]


def test_what_is_asked_again_keeps_a_sign_that_came_first() -> None:
    call = Call(Get("g", b"k"))
    (part,) = call.send()
    call.now_s += CLIENT_PATIENCE_S
    call.exchange.unanswered(part)
    (question,) = call.nodes.probes()
    call.nodes.members(question, [], 1)
    (again,) = call.send()
    assert again.node is part.node
    assert call.wake() == []
    assert again.node.usable


def test_a_deadline_that_passed_while_parts_waited_sends_no_more() -> None:
    call = Call(Get("g", b"k"), timeout_s=1.0)
    call.now_s += 1.0
    assert call.send() == []
    with pytest.raises(DeadlineExceededError):
        call.exchange.check()


def test_a_late_answer_by_grpc_has_the_node_probed_in_the_background() -> None:
    call = Call(Get("g", b"k"), timeout_s=0.05)
    (part,) = call.send()
    call.now_s += 0.05
    late = DeadlineExceededError("late")
    call.exchange.failed(part, grpc.StatusCode.DEADLINE_EXCEEDED, late)
    questions: list[Question] = list(call.nodes.probes())
    assert [question.node for question in questions] == [part.node]
    assert part.node.usable
