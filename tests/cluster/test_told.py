"""What a worker says to a node that was away, and leaves to its successor."""

from __future__ import annotations

import os
from pathlib import Path
from typing import cast

import pytest

from kamacache.cluster.farewell import Farewell, say_farewell, take_farewell
from kamacache.cluster.membership import Member, Membership
from kamacache.cluster.owed import OwedFile
from kamacache.cluster.peers import (
    TOLD_ALL,
    TOLD_NEVER,
    TOLD_NOT_YET,
    TOLD_WATCHED,
    Link,
    Peers,
)
from kamacache.limits import HANDOFF_S, NODES_LEFT_MAX, PEERS_DEPARTED_MAX, WARM_MARGIN_MS

ALL = ("a:1", "b:1", "c:1")


class FakeLink:
    """A link that does as it is told."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.usable = self.up = self.settled = True
        self.pending_invalidations = 0
        self.flushes = 0
        self.life = ""

    def start(self) -> None: ...

    def flush(self) -> None:
        self.flushes += 1

    def invalidate(self, group: str, items: object) -> None:
        self.pending_invalidations += 1


class Node:
    """Node a:1's worker, its links, and a clock that is set."""

    def __init__(self, owed: Path, farewell: Farewell | None = None, now_ms: int = 0) -> None:
        self.now_ms = now_ms
        self.links: dict[str, FakeLink] = {}
        self.owed = OwedFile(owed)
        self.peers = Peers(
            self._make,
            lambda: self.now_ms / 1000,
            close=lambda link: None,
            owed=self.owed,
            farewell=farewell,
            clock_ms=lambda: self.now_ms,
        )
        self.number = 0

    def _make(self, address: str, former: Link | None) -> Link:
        self.links[address] = FakeLink(address)
        return cast(Link, self.links[address])

    def know(self, *names: str) -> None:
        self.number += 1
        members = tuple(Member(name) for name in ("a:1", *names))
        self.peers.update(Membership(number=self.number, own="a:1", members=members))

    def told(self, away_ms: int, members: tuple[str, ...] = ALL, life: str = "") -> int:
        return self.peers.told("b:1", away_ms, members, life)

    def greeted(self, life: str) -> None:
        self.links["b:1"].life = life
        self.peers.greeted(cast(Link, self.links["b:1"]))


@pytest.fixture
def node(tmp_path: Path) -> Node:
    found = Node(tmp_path / "owed.0")
    found.know("b:1", "c:1")
    found.now_ms = 100_000
    return found


def test_a_node_is_told_when_its_link_is_up_and_nothing_is_left(node: Node) -> None:
    assert node.told(1_000) == TOLD_WATCHED
    node.links["b:1"].pending_invalidations = 1
    assert node.told(1_000) == TOLD_NOT_YET
    node.links["b:1"].pending_invalidations = 0
    node.links["b:1"].up = False
    assert node.told(1_000) == TOLD_NOT_YET


def test_what_a_worker_does_not_know_it_never_tells(node: Node) -> None:
    assert node.told(100_000 - WARM_MARGIN_MS) == TOLD_WATCHED
    assert node.told(100_001 - WARM_MARGIN_MS) == TOLD_NEVER  # it began within the margin


def test_a_node_that_is_no_member_yet_is_waited_for(node: Node) -> None:
    node.know("c:1")
    assert node.told(1_000) == TOLD_NOT_YET
    node.know("b:1", "c:1")  # with the link it had: it left in the list alone
    assert node.told(1_000) == TOLD_WATCHED


def test_a_node_that_came_and_went_meanwhile_can_be_asked_by_nobody(node: Node) -> None:
    node.know("b:1", "c:1", "d:1")
    assert node.told(1_000) == TOLD_NOT_YET  # who asks must ask d, too
    assert node.told(1_000, (*ALL, "d:1")) == TOLD_WATCHED
    node.now_ms += 5_000
    node.know("b:1", "c:1")
    assert node.told(1_000) == TOLD_NEVER
    assert node.told(1_000, (*ALL, "d:1")) == TOLD_WATCHED
    node.now_ms += 5_000
    assert node.told(1_000) == TOLD_WATCHED  # that was before it left


def test_a_node_that_said_hello_and_is_no_member_must_be_asked_too(node: Node) -> None:
    node.peers.seen("d:1")  # which may write, and be gone before the source is read again
    node.now_ms += 1_000
    assert node.told(500) == TOLD_NOT_YET
    assert node.told(500, (*ALL, "d:1")) == TOLD_WATCHED
    node.now_ms += 5_000
    assert node.told(500) == TOLD_WATCHED  # that was before it left


def test_a_link_made_late_knows_as_far_back_as_writes_are_remembered(tmp_path: Path) -> None:
    node = Node(tmp_path / "owed.0")
    node.know("c:1")
    node.now_ms = 500_000
    node.know("b:1", "c:1")
    handoff_ms = int(HANDOFF_S * 1000)
    assert node.told(handoff_ms - WARM_MARGIN_MS) == TOLD_WATCHED
    assert node.told(handoff_ms - WARM_MARGIN_MS + 1) == TOLD_NEVER


def test_a_node_whose_link_was_forgotten_is_not_told_of_what_was_before(node: Node) -> None:
    node.know("c:1")
    for number in range(PEERS_DEPARTED_MAX + 1):
        node.know("c:1", f"d:{number + 1}")
        node.know("c:1")
    node.now_ms += 500_000
    node.know("b:1", "c:1")
    assert node.told(400_000) == TOLD_NEVER


def test_who_left_is_remembered_within_bounds(node: Node) -> None:
    for number in range(NODES_LEFT_MAX + 9):
        node.know("b:1", f"d:{number + 1}")
    assert len(node.peers.farewell().left_ms) == NODES_LEFT_MAX


def test_a_successor_goes_on_where_a_worker_ended_in_order(node: Node, tmp_path: Path) -> None:
    node.know("b:1", "c:1", "d:1")
    node.know("b:1", "c:1")
    farewell = node.peers.farewell()
    assert farewell.unheard == []
    successor = Node(tmp_path / "owed.1", farewell, now_ms=103_000)
    successor.know("b:1", "c:1")
    assert successor.told(50_000, (*ALL, "d:1")) == TOLD_ALL  # others may have come and gone
    assert successor.told(50_000) == TOLD_NEVER  # d was there
    successor.know("b:1", "c:1", "e:1")  # of this one the worker before knew nothing
    assert successor.peers.told("e:1", 2_000, (*ALL, "e:1"), "") == TOLD_NEVER
    killed = Node(tmp_path / "owed.2", None, now_ms=103_000)
    killed.know("b:1", "c:1")
    assert killed.told(50_000) == TOLD_NEVER


def test_what_another_node_of_that_name_was_told_counts_for_nothing(
    node: Node, tmp_path: Path
) -> None:
    node.greeted("first")
    assert node.told(1_000, life="first") == TOLD_WATCHED
    assert node.told(1_000, life="second") == TOLD_NOT_YET  # our link is to the first still
    node.greeted("second")  # at the same address: of another run directory, or host
    node.now_ms += 5_000
    node.greeted("first")
    node.now_ms += 5_000
    assert node.told(4_000, life="first") == TOLD_NEVER  # not even beside the margin
    assert node.told(3_000, life="first") == TOLD_WATCHED

    node.greeted("second")
    successor = Node(tmp_path / "owed.1", node.peers.farewell(), now_ms=node.now_ms + 5_000)
    successor.know("b:1", "c:1")
    successor.greeted("first")
    assert successor.told(6_000, life="first") == TOLD_NEVER


def test_what_was_not_told_at_the_end_is_owed(node: Node, tmp_path: Path) -> None:
    node.peers.invalidate("g", [(b"key", 1)])
    node.links["c:1"].pending_invalidations = 0
    farewell = node.peers.farewell()
    assert farewell.unheard == ["b:1"]
    node.owed.close()
    successor = Node(tmp_path / "owed.0", farewell)
    successor.know("b:1", "c:1")
    successor.peers.recall()
    assert {a: link.flushes for a, link in successor.links.items()} == {"b:1": 1, "c:1": 0}


def test_a_farewell_is_found_once(tmp_path: Path) -> None:
    path = tmp_path / "farewell.0"
    assert take_farewell(path) is None
    said = Farewell(unheard=["b:1"], since_ms={"b:1": 5}, left_ms={"d:1": 7})
    say_farewell(path, said)
    assert take_farewell(path) == said
    assert take_farewell(path) is None
    for garbage in (b"", b"\xff" * 99, os.urandom(999)):
        path.write_bytes(garbage)
        assert take_farewell(path) is None
        assert not path.exists()
