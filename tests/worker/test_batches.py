"""Keys asked for together and answered each for itself: `kamacache.worker.batches`, `.each`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from kamacache.wire.messages import (
    FROM_PEER,
    Answers,
    Failure,
    Get,
    GetMany,
    Gets,
    KeyFailure,
    Reply,
)
from kamacache.wire.parts import answered
from tests.worker.linked import Asking, Node
from tests.worker.test_cluster import NAMES, Database, until

WAIT_S = 5.0


@pytest.fixture
def database() -> Database:
    database = Database()
    database.gate.set()
    return database


@pytest.fixture(params=[0, 60_000], ids=["without mirrors", "with mirrors"])
def mirror_ttl_ms(request: pytest.FixtureRequest) -> int:
    found: int = request.param
    return found


@pytest.fixture
async def nodes(database: Database, mirror_ttl_ms: int) -> AsyncIterator[list[Node]]:
    by_name: dict[str, Node] = {}
    made = [
        Node(name, by_name, database.getter(name), handoff_s=0.0, mirror_ttl_ms=mirror_ttl_ms)
        for name in NAMES
    ]
    for node in made:
        node.join(*NAMES)
    yield made
    for node in made:
        node.close()


class Asked:
    """One `Gets`, and what has come of it."""

    def __init__(self, node: Node, keys: list[bytes], **fields: Any) -> None:
        fields.setdefault("budget_ms", int(WAIT_S * 1000))
        self.request = Gets(id=7, group="g", keys=keys, **fields)
        self.replies: list[Reply] = []
        self.outcomes: dict[bytes, Any] = {}
        self.metas: dict[bytes, tuple[int, int]] = {}
        self.failure: Failure | None = None
        self.asking = Asking(self._take)
        reply = node.handlers.table[Gets](self.request, self.asking)
        if reply is not None:
            self._take(reply)

    def _take(self, reply: Reply) -> None:
        assert getattr(reply, "id", None) == 7
        self.replies.append(reply)
        if isinstance(reply, Failure):
            self.failure = reply
            return
        assert isinstance(reply, Answers)
        keys = self.request.keys
        assert len(set(answered(reply))) == len(answered(reply))
        for place, (index, value) in enumerate(
            zip(reply.at or range(len(reply.values)), reply.values, strict=True)
        ):
            self.outcomes[keys[index]] = value
            if reply.versions:
                self.metas[keys[index]] = (reply.ttls[place], reply.versions[place])
        for failed in reply.errors:
            self.outcomes[keys[failed.index]] = failed.kind

    async def all(self) -> dict[bytes, Any]:
        await until(lambda: self.outcomes.keys() >= set(self.request.keys))
        assert not self.asking.waiters
        return self.outcomes


def keys_of(owner: Node, nodes: list[Node], count: int, prefix: str = "key") -> list[bytes]:
    names = (b"%s-%d" % (prefix.encode(), number) for number in range(10_000))
    owned = (key for key in names if owner.peers.owns(key))
    return [next(owned) for _ in range(count)]


async def test_keys_of_one_other_node_are_one_request_and_one_answer(
    nodes: list[Node], database: Database, mirror_ttl_ms: int
) -> None:
    a, b, _ = nodes
    keys = keys_of(b, nodes, 20)
    for key in keys:
        b.shard.put(key, b"held " + key)
    asked = Asked(a, keys)
    assert await asked.all() == {key: b"held " + key for key in keys}
    (sent,) = a.link("b:1").sent
    assert isinstance(sent, Gets)
    assert sent.keys == keys
    assert len(asked.replies) == 1
    assert not database.loads
    assert a.group.reads.stats()["fetches_in_flight"] == 0
    assert [a.held(key) is not None for key in keys] == [mirror_ttl_ms > 0] * len(keys)


async def test_keys_of_all_nodes_known_and_unknown_and_twice_are_all_answered(
    nodes: list[Node], database: Database
) -> None:
    a = nodes[0]
    keys = [b"any-%d" % number for number in range(60)]
    database.missing = {"any-3", "any-4", "any-5"}
    asked = Asked(a, [*keys, *keys[:10]])
    outcomes = await asked.all()
    assert {key: value and value[: len(key)] for key, value in outcomes.items()} == {
        key: None if key.decode() in database.missing else key for key in keys
    }
    indexes = [index for reply in asked.replies for index in answered(reply)]  # type: ignore[arg-type]
    assert sorted(indexes) == list(range(70))
    assert max(database.loads.values()) == 1


async def test_a_slow_key_holds_up_no_other_and_is_loaded_once_for_all_who_ask(
    nodes: list[Node], database: Database
) -> None:
    a, b, _ = nodes
    slow, *fast = keys_of(b, nodes, 5)
    for key in fast:
        b.shard.put(key, b"fast")
    database.gate.clear()
    asked = Asked(a, [slow, *fast])
    await until(lambda: len(asked.outcomes) == 4)
    others = [
        asyncio.ensure_future(a.get(slow)),
        asyncio.ensure_future(a.ask(GetMany(keys=[slow]))),
    ]
    again = Asked(a, [slow, fast[0]])
    await until(lambda: fast[0] in again.outcomes)
    assert not asked.outcomes.keys() & {slow}
    database.gate.set()
    assert (await asked.all())[slow] == slow + b"@b:1"
    assert (await again.all())[slow] == slow + b"@b:1"
    assert await others[0] == slow + b"@b:1"
    await others[1]
    assert database.loads[slow.decode()] == 1
    assert a.group.reads.stats()["fetches_in_flight"] == 0


async def test_a_key_that_is_written_meanwhile_is_fetched_anew(
    nodes: list[Node], database: Database
) -> None:
    a, b, _ = nodes
    keys = keys_of(b, nodes, 3)
    database.gate.clear()
    asked = Asked(a, keys)
    await until(database.began.is_set)
    await a.set(keys[0], b"new")
    assert await a.get(keys[0]) == b"new"
    database.gate.set()
    outcomes = await asked.all()
    assert outcomes[keys[1]] == keys[1] + b"@b:1"
    assert await a.get(keys[0]) == await b.get(keys[0]) == b"new"


async def test_when_the_link_fails_the_keys_go_to_the_next_nodes(
    nodes: list[Node], database: Database
) -> None:
    a, b, _ = nodes
    keys = keys_of(b, nodes, 12)
    link = a.link("b:1")
    link.swallow = True
    asked = Asked(a, keys)
    joined = asyncio.ensure_future(a.get(keys[0]))
    await asyncio.sleep(0)
    link.cut()
    outcomes = await asked.all()
    assert {value.split(b"@")[1] for value in outcomes.values()} == {b"a:1", b"c:1"}
    assert await joined == outcomes[keys[0]]
    assert max(database.loads.values()) == 1
    assert a.group.reads.stats()["fetches_in_flight"] == 0


async def test_what_a_node_that_stops_does_not_load_another_does(
    nodes: list[Node], database: Database
) -> None:
    a, b, _ = nodes
    held, *others = keys_of(b, nodes, 8)
    b.shard.put(held, b"held")
    b.handlers.draining = True
    a.link("b:1").draining = False
    asked = Asked(a, [held, *others])
    await until(lambda: held in asked.outcomes)
    a.link("b:1").draining = True
    outcomes = await asked.all()
    assert outcomes[held] == b"held"
    assert {outcomes[key].split(b"@")[1] for key in others} <= {b"a:1", b"c:1"}


async def test_keys_whose_owner_has_not_got_the_group_are_loaded_here(
    nodes: list[Node], database: Database, mirror_ttl_ms: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b, _ = nodes
    keys = keys_of(b, nodes, 4)
    fields = ("GroupNotFoundError", "the node has no group 'g'", {"group": "g", "known": []})

    def send(request: Any, done: Any, deadline_s: float) -> None:
        assert isinstance(request, Gets)  # the front answers each key, as it has several workers
        errors = [KeyFailure(index, *fields) for index in range(len(request.keys))]
        a.loop.call_soon(done, Answers(1, [b"held"], [0], []))
        a.loop.call_soon(done, Answers(1, errors=errors[1:]))

    monkeypatch.setattr(a.link("b:1"), "send", send)
    outcomes = await Asked(a, keys).all()
    assert outcomes == {keys[0]: b"held"} | {key: key + b"@a:1" for key in keys[1:]}
    assert max(database.loads.values()) == 1
    assert [a.held(key) is not None for key in keys[1:]] == [mirror_ttl_ms > 0] * 3
    stats = a.group.reads.stats()
    assert (stats["fetches_in_flight"], stats["fetch_errors"]) == (0, 0)


async def test_a_getters_error_is_that_keys_alone(nodes: list[Node], database: Database) -> None:
    a, b, _ = nodes
    keys = keys_of(b, nodes, 3)
    loadable = b.group.loader.loadable
    assert loadable is not None
    load = loadable.load

    def fails_once(key: bytes) -> Any:
        if key == keys[1]:
            raise ValueError
        return load(key)

    loadable.load = fails_once  # type: ignore[method-assign]
    outcomes = await Asked(a, keys).all()
    assert outcomes == {
        keys[0]: keys[0] + b"@b:1",
        keys[1]: "LoadError",
        keys[2]: keys[2] + b"@b:1",
    }
    assert a.group.reads.stats()["fetch_errors"] == 1


async def test_at_the_deadline_those_left_fail_and_what_comes_late_harms_nobody(
    nodes: list[Node], database: Database
) -> None:
    a, b, _ = nodes
    slow, fast = keys_of(b, nodes, 2)
    b.shard.put(fast, b"fast")
    database.gate.clear()
    began = time.monotonic()
    asked = Asked(a, [slow, fast], budget_ms=50)
    await until(lambda: asked.failure is not None)
    assert time.monotonic() - began < WAIT_S
    assert asked.failure is not None
    assert asked.failure.kind == "DeadlineExceededError"
    assert asked.outcomes == {fast: b"fast"}
    assert not asked.asking.waiters
    count = len(asked.replies)
    database.gate.set()
    assert await a.get(slow) == slow + b"@b:1"
    await asyncio.sleep(0)
    assert len(asked.replies) == count
    assert a.group.reads.stats()["fetches_in_flight"] == 0


async def test_what_is_known_in_the_turn_of_the_deadline_is_answered_once(
    nodes: list[Node], database: Database
) -> None:
    a, b, _ = nodes
    keys = keys_of(b, nodes, 2)
    database.gate.clear()
    asked = Asked(a, keys)
    (waiter,) = asked.asking.waiters
    waiter.settle_key(keys[0], b"known")
    waiter.late()
    await asyncio.sleep(0)
    answers, failure = asked.replies
    assert isinstance(answers, Answers)
    assert (answers.values, answers.at) == ([b"known"], [0])
    assert failure is asked.failure
    assert not asked.asking.waiters
    database.gate.set()
    await until(lambda: a.group.reads.stats()["fetches_in_flight"] == 0)
    assert len(asked.replies) == 2


async def test_an_asker_that_leaves_is_not_answered_and_the_fetch_ends(
    nodes: list[Node], database: Database
) -> None:
    a, b, _ = nodes
    keys = keys_of(b, nodes, 2)
    database.gate.clear()
    asked = Asked(a, keys)
    await until(database.began.is_set)
    for waiter in [*asked.asking.waiters]:
        waiter.leave()
    database.gate.set()
    await until(lambda: a.group.reads.stats()["fetches_in_flight"] == 0)
    assert not asked.replies


async def test_a_peer_is_told_time_to_live_and_version_of_each(
    nodes: list[Node], database: Database
) -> None:
    a = nodes[0]
    held, loaded = keys_of(a, nodes, 2)
    a.shard.put(held, b"held")
    asked = Asked(a, [held, loaded], flags=FROM_PEER)
    assert await asked.all() == {held: b"held", loaded: loaded + b"@a:1"}
    assert [ttl_ms for ttl_ms, _ in asked.metas.values()] == [0, 0]
    assert all(version > 0 for _, version in asked.metas.values())
    assert not any(a.link(name).sent for name in NAMES[1:])


async def test_a_key_in_its_own_chain_fails_alone(nodes: list[Node], database: Database) -> None:
    a, b, _ = nodes
    keys = keys_of(b, nodes, 3)
    outcomes = await Asked(a, keys, depth=1, chain=(("g", keys[1]),)).all()
    assert outcomes[keys[1]] == "LoadError"
    assert outcomes[keys[0]] == keys[0] + b"@b:1"
    sent = a.link("b:1").sent[0]
    assert (sent.depth, sent.chain) == (1, (("g", keys[1]),))


async def test_who_asks_from_a_greater_depth_is_asked_for_from_there(
    nodes: list[Node], database: Database
) -> None:
    a, b, _ = nodes
    keys = keys_of(b, nodes, 2)
    link = a.link("b:1")
    link.swallow = True
    asked = Asked(a, keys)
    await asyncio.sleep(0)
    link.swallow = False
    assert await a.get(keys[0], depth=1, chain=(("g", b"outer"),)) == keys[0] + b"@b:1"
    assert isinstance(link.sent[-1], Get)
    link.cut()
    assert (await asked.all()).keys() == set(keys)


async def test_without_mirrors_what_this_node_has_from_before_is_not_looked_at(
    nodes: list[Node], database: Database, mirror_ttl_ms: int
) -> None:
    a, b, _ = nodes
    keys = keys_of(b, nodes, 2)
    for key in keys:
        a.shard.put(key, b"old")
        b.shard.put(key, b"new")
    value = b"old" if mirror_ttl_ms else b"new"
    assert await Asked(a, keys).all() == dict.fromkeys(keys, value)
    assert await a.get(keys[0]) == value
    assert await a.get_many(keys) == [value] * 2


async def test_no_keys_have_an_answer_too(nodes: list[Node]) -> None:
    asked = Asked(nodes[0], [])
    assert asked.replies == [Answers(7)]
