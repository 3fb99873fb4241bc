"""`kamacache.worker.flushing`: workers of several nodes in one loop, without a network."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from kamacache.wire.messages import FROM_PEER, Done, Failure, Flush, FlushPeers, PeersFlushed
from tests.worker.linked import Node, key_of

NAMES = ("a:1", "b:1", "c:1")


class Database:
    """Its value counts up with every write; a load reads it first, and then waits for the gate."""

    def __init__(self) -> None:
        self.value = 1
        self.gate = threading.Event()
        self.gate.set()
        self.read = threading.Event()

    def load(self, key: str) -> bytes:
        found = b"%d" % self.value
        self.read.set()
        if not self.gate.wait(10):
            raise TimeoutError
        return found


@pytest.fixture
def database() -> Database:
    return Database()


@pytest.fixture
async def nodes(database: Database) -> AsyncIterator[list[Node]]:
    by_name: dict[str, Node] = {}
    made = [Node(name, by_name, database.load, handoff_s=60.0) for name in NAMES]
    for node in made:
        node.join(*NAMES)
    yield made
    database.gate.set()
    for node in made:
        node.close()


async def until(condition: Callable[[], bool], deadline_s: float = 5.0) -> None:
    end_s = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end_s, "it did not come to pass in time"
        await asyncio.sleep(0.002)


async def flush(node: Node) -> dict[str, str]:
    """Do what the command does; return the reason of each node that was not reached."""
    unreached: dict[str, str] = {}
    version = 0
    for _ in range(2):
        here: Any = await node.ask(Flush(version=version, whole=not version))
        assert isinstance(here, Done), here
        there: Any = await node.ask(FlushPeers(version=version))
        assert isinstance(there, PeersFlushed), there
        version = version or max(here.version, there.version)
        unreached |= {n.address: n.reason for n in there.nodes if not n.reached}
    return unreached


async def test_all_nodes_drop_owned_keys_and_mirrors(nodes: list[Node], database: Database) -> None:
    keys = [b"key-%d" % number for number in range(60)]
    for node in nodes:
        assert set(await node.get_many(keys)) == {b"1"}
    database.value = 2
    assert await flush(nodes[0]) == {}
    assert not any(node.held(key) for node in nodes for key in keys)
    for node in nodes:
        assert set(await node.get_many(keys)) == {b"2"}


async def test_a_load_that_began_before_answers_who_waits_and_is_not_kept(
    nodes: list[Node], database: Database
) -> None:
    owner, other, _ = nodes
    key = key_of(owner, nodes)
    database.gate.clear()
    waiting = [asyncio.ensure_future(node.get(key)) for node in (owner, other)]
    await until(database.read.is_set)
    database.value = 2
    assert await flush(other) == {}
    after = [asyncio.ensure_future(node.get(key)) for node in nodes]
    database.gate.set()
    assert set(await asyncio.gather(*waiting)) == {b"1"}
    assert set(await asyncio.gather(*after)) == {b"2"}
    assert owner.held(key) == b"2"


async def test_records_of_a_clock_that_is_ahead_go_too(nodes: list[Node]) -> None:
    ahead = nodes[1]
    ahead.shard.observe(ahead.shard.now() + (60_000_000_000 >> 8))
    key = key_of(ahead, nodes)
    ahead.shard.put(key, b"old")
    assert await flush(nodes[0]) == {}
    assert ahead.held(key) is None
    await nodes[0].set(key, b"new")
    assert ahead.held(key) == b"new"


async def test_a_node_that_is_away_is_named_and_flushes_when_it_is_back(
    nodes: list[Node], database: Database
) -> None:
    a, b, _ = nodes
    key = key_of(b, nodes)
    assert await b.get(key) == b"1"
    a.link("b:1").cut()
    database.value = 2
    assert await flush(a) == {"b:1": "the link is down"}
    assert b.held(key) == b"1"
    a.link("b:1").heal()
    await until(lambda: b.held(key) is None)
    assert await a.get(key) == b"2"


async def test_what_an_unreached_node_still_has_is_not_kept_elsewhere(
    nodes: list[Node], database: Database
) -> None:
    a, b, c = nodes
    key = key_of(b, nodes)
    assert await b.get(key) == b"1"
    a.link("b:1").cut()
    database.value = 2
    await flush(a)
    assert await c.get(key) == b"1"  # from b, which was not reached
    assert c.held(key) is None


async def test_a_peek_does_not_bring_back_what_was_flushed(
    nodes: list[Node], database: Database
) -> None:
    b = nodes[1]
    key = key_of(b, nodes)
    next_on_ring = next(node for node in nodes if node.name == [*b.peers._ring.owners(key)][1])
    next_on_ring.shard.put(key, b"1")  # as it stood in for b, or owned it before
    database.value = 2
    reply = await b.ask(Flush(version=0, whole=True))  # b alone
    assert isinstance(reply, Done)
    assert await b.get(key) == b"2"
    assert b.held(key) == b"2"


async def test_what_is_set_after_it_stays_and_a_flush_by_version_keeps_later_ones(
    nodes: list[Node],
) -> None:
    a = nodes[0]
    key = key_of(a, nodes)
    await flush(a)
    await a.set(key, b"set")
    reply = await a.ask(Flush(version=1, flags=FROM_PEER))
    assert isinstance(reply, Done)
    assert (reply.count, a.held(key)) == (0, b"set")


async def test_a_group_that_is_not_there_is_an_error_here_and_nothing_at_a_peer(
    nodes: list[Node],
) -> None:
    a = nodes[0]
    answers: list[Any] = []
    request = Flush(version=0, whole=True, group="absent", id=1)
    a.take(request, answers.append)
    assert isinstance(answers[0], Failure)
    request.flags = FROM_PEER
    a.take(request, answers.append)
    await until(lambda: len(answers) == 2)
    assert isinstance(answers[1], Done)


async def test_one_node_without_peers_flushes_itself(database: Database) -> None:
    alone = Node("a:1", {}, database.load)
    alone.join()
    assert await alone.get(b"key") == b"1"
    database.value = 2
    assert await flush(alone) == {}
    assert await alone.get(b"key") == b"2"
    alone.close()


async def test_an_answer_on_its_way_between_two_nodes_is_for_nobody_who_asks_later(
    nodes: list[Node], database: Database
) -> None:
    """It began after the asker was flushed and before the owner was: hence the second round."""
    asker, owner, other = nodes
    key = key_of(owner, nodes)

    async def flush_at(node: Node, version: int) -> int:
        reply = await node.ask(Flush(version=version, whole=not version))
        assert isinstance(reply, Done)
        return reply.version

    version = await flush_at(asker, 0)
    database.gate.clear()
    between = asyncio.ensure_future(asker.get(key))
    await until(database.read.is_set)  # the owner loads for the asker
    database.value = 2
    version = max(version, await flush_at(owner, 0), await flush_at(other, 0))
    for node in nodes:
        await flush_at(node, version)
    after = asyncio.ensure_future(asker.get(key))
    await asyncio.sleep(0)
    database.gate.set()
    assert await between == b"1"
    assert await after == b"2"
    assert asker.held(key) == b"2"
