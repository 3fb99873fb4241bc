"""Reads and writes of workers with peers: `kamacache.worker.fetches`, `kamacache.worker.writes`."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from kamacache.clock import VERSION_MAX
from kamacache.cluster.exchange import overloaded
from kamacache.limits import PEER_WRITE_S
from kamacache.wire.messages import (
    FROM_PEER,
    Delete,
    Done,
    Failure,
    Flush,
    Get,
    GetMany,
    Invalidate,
    Request,
    Set,
)
from tests.worker.linked import Node, key_of

NAMES = ("a:1", "b:1", "c:1")


class Database:
    """Counts loads, and holds those of keys that begin with "held" until they are let go."""

    def __init__(self) -> None:
        self.loads: Counter[str] = Counter()
        self.gate = threading.Event()
        self.began = threading.Event()
        self.missing: set[str] = set()

    def getter(self, node: str) -> Callable[[Any], Any]:
        def load(key: str) -> bytes:
            self.loads[key] += 1
            self.began.set()
            if key in self.missing:
                raise KeyError(key)
            if not self.gate.wait(10):
                raise TimeoutError
            return f"{key}@{node}".encode()

        return load


@pytest.fixture
def database() -> Database:
    database = Database()
    database.gate.set()
    return database


@pytest.fixture
async def nodes(database: Database) -> AsyncIterator[list[Node]]:
    by_name: dict[str, Node] = {}
    made = [
        Node(name, by_name, database.getter(name), handoff_s=0.0, mirror_ttl_ms=60_000)
        for name in NAMES
    ]
    for node in made:
        node.join(*NAMES)
    yield made
    for node in made:
        node.close()


async def until(condition: Callable[[], bool], deadline_s: float = 5.0) -> None:
    end_s = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end_s, "it did not come to pass in time"
        await asyncio.sleep(0.002)


async def test_a_miss_is_loaded_by_the_owner_and_mirrored_where_it_was_asked_for(
    nodes: list[Node], database: Database
) -> None:
    a, b, c = nodes
    key = key_of(b, nodes)
    assert await a.get(key) == key + b"@b:1"
    assert await a.get(key) == await b.get(key) == key + b"@b:1"
    assert database.loads[key.decode()] == 1
    held = a.shard.held(key)
    assert held is not None
    assert held.mirror
    assert c.held(key) is None


async def test_many_askers_on_all_nodes_cause_one_load(
    nodes: list[Node], database: Database
) -> None:
    database.gate.clear()
    key = key_of(nodes[1], nodes)
    asking = [asyncio.ensure_future(node.get(key)) for node in nodes for _ in range(16)]
    await until(database.began.is_set)
    database.gate.set()
    assert set(await asyncio.gather(*asking)) == {key + b"@b:1"}
    assert database.loads[key.decode()] == 1


async def test_what_the_owner_does_not_find_is_not_looked_for_again(
    nodes: list[Node], database: Database
) -> None:
    key = key_of(nodes[2], nodes)
    database.missing.add(key.decode())
    assert await nodes[0].get(key) is None
    assert database.loads[key.decode()] == 1


async def test_a_getters_error_comes_from_the_owner_as_it_is(nodes: list[Node]) -> None:
    a, b, _ = nodes
    key = key_of(b, nodes)
    b.group.loader.loadable.load = _raise  # type: ignore[union-attr,method-assign]
    failed = await a.get(key)
    assert isinstance(failed, Failure)
    assert failed.kind == "LoadError"


def _raise(key: bytes) -> bytes:
    raise ValueError("the database is on fire")


async def test_many_keys_go_to_their_owners_in_one_request_each(
    nodes: list[Node], database: Database
) -> None:
    keys = [b"many-%d" % number for number in range(60)]
    values = await nodes[0].get_many(keys)
    assert all(
        value is not None and value.startswith(key) for key, value in zip(keys, values, strict=True)
    )
    assert max(database.loads.values()) == 1
    assert [len(nodes[0].link(name).sent) for name in NAMES[1:]] == [1, 1]


async def test_a_request_from_a_peer_is_never_sent_on(
    nodes: list[Node], database: Database
) -> None:
    a, b, _ = nodes
    key = key_of(b, nodes)
    assert await a.get(key, flags=FROM_PEER) == key + b"@a:1"
    assert all(not link.sent for link in map(a.link, NAMES[1:]))
    held = a.shard.held(key)
    assert held is not None
    assert held.mirror
    assert a.group.reads.stats()["loads_not_owned"] == 1


async def test_two_nodes_that_take_each_other_for_the_owner_do_not_wait_for_each_other(
    database: Database,
) -> None:
    by_name: dict[str, Node] = {}
    a, b = (Node(name, by_name, database.getter(name), handoff_s=0.0) for name in NAMES[:2])
    a.join(*NAMES[:2])
    b.join(*NAMES[:2])
    key = b"disputed"
    a.peers.route = lambda key: a.link("b:1")  # type: ignore[method-assign]
    b.peers.route = lambda key: b.link("a:1")  # type: ignore[method-assign]
    values = await asyncio.wait_for(asyncio.gather(a.get(key), b.get(key)), 5)
    assert set(values) <= {b"disputed@a:1", b"disputed@b:1"}
    assert database.loads["disputed"] == 2
    a.close()
    b.close()


async def test_a_set_reaches_the_owner_and_replaces_all_copies(nodes: list[Node]) -> None:
    a, b, c = nodes
    key = key_of(b, nodes)
    await a.get(key)
    await c.get(key)
    reply = await a.set(key, b"new")
    assert isinstance(reply, Done)
    assert (reply.count, reply.version) == (1, b.shard.held(key).version)  # type: ignore[union-attr]
    assert b.held(key) == b"new"
    assert a.held(key) == b"new"  # its own mirror, in the same step
    await until(lambda: c.held(key) is None)
    assert await c.get(key) == b"new"


async def test_a_set_at_the_owner_drops_the_mirrors(nodes: list[Node]) -> None:
    a, b, _ = nodes
    key = key_of(b, nodes)
    await a.get(key)
    await b.set(key, b"new")
    await until(lambda: a.held(key) is None)
    assert await a.get(key) == b"new"


async def test_a_mirror_is_kept_again_after_a_set_and_its_invalidations(nodes: list[Node]) -> None:
    a, b, c = nodes
    keys = [key_of(b, nodes), *(key + b"x" for key in (b"1", b"2", b"3"))]
    await a.set_many(dict.fromkeys(keys, b"v"))
    for node in (a, b, c):
        assert await node.get_many(keys) == [b"v"] * len(keys)
        assert [node.held(key) for key in keys] == [b"v"] * len(keys)


async def test_delete_tells_whether_the_owner_had_it(nodes: list[Node]) -> None:
    a, b, c = nodes
    key = key_of(b, nodes)
    assert await a.delete(key) == 0
    await c.set(key, b"v")
    assert await a.delete(key) == 1
    assert (a.held(key), b.held(key)) == (None, None)
    await until(lambda: c.held(key) is None)
    assert await a.delete(key) == 0


async def test_batches_are_split_by_owner_and_counted_together(nodes: list[Node]) -> None:
    items = {b"batch-%d" % number: b"%d" % number for number in range(50)}
    reply = await nodes[0].set_many(items)
    assert isinstance(reply, Done)
    assert reply.count == 50
    assert await nodes[1].get_many(list(items)) == list(items.values())
    assert await nodes[2].delete_many([*items, b"never"]) == 50


async def test_a_load_that_a_write_overtakes_stores_nothing_anywhere(
    nodes: list[Node], database: Database
) -> None:
    a, b, c = nodes
    key = key_of(b, nodes)
    database.gate.clear()
    slow = asyncio.ensure_future(a.get(key))
    await until(database.began.is_set)
    await c.set(key, b"new")
    database.gate.set()
    assert await slow == key + b"@b:1"  # who asked before gets what was loaded
    assert b.held(key) == b"new"
    assert a.held(key) in (None, b"new")
    assert await a.get(key) == b"new"


async def test_a_standins_slow_load_loses_against_a_write_at_the_owner(
    nodes: list[Node], database: Database
) -> None:
    a, b, c = nodes
    key = key_of(b, nodes, then="c:1")
    c.link("b:1").cut()
    database.gate.clear()
    slow = asyncio.ensure_future(c.get(key))
    await until(database.began.is_set)
    await a.set(key, b"new")  # reaches b; c learns of it when the link b -> c delivers
    database.gate.set()
    await slow
    await until(lambda: c.held(key) in (None, b"new"))
    c.link("b:1").heal()
    assert await c.get(key) == b"new"


async def test_the_next_node_serves_the_keys_of_one_that_is_gone(
    nodes: list[Node], database: Database
) -> None:
    a, b, c = nodes
    key = key_of(b, nodes, then="c:1")
    for node in (a, c):
        node.link("b:1").cut()
    assert await a.get(key) == key + b"@c:1"
    assert await c.get(key) == key + b"@c:1"
    assert database.loads[key.decode()] == 1
    held = c.shard.held(key)
    assert held is not None
    assert not held.mirror  # c owns it while b is away
    assert c.group.reads.stats()["loads_standing_in"] == 1


async def test_a_get_under_way_goes_on_to_the_next_node_when_the_link_fails(
    nodes: list[Node], database: Database
) -> None:
    a, b, _ = nodes
    key = key_of(b, nodes, then="c:1")
    a.link("b:1").swallow = True
    asking = asyncio.ensure_future(a.get(key))
    await until(lambda: bool(a.link("b:1").sent))
    a.link("b:1").cut()
    assert await asking == key + b"@c:1"


async def test_with_all_peers_gone_a_node_serves_and_loads(nodes: list[Node]) -> None:
    a, b, _ = nodes
    for name in NAMES[1:]:
        a.link(name).cut()
    key = key_of(b, nodes)
    assert await a.get(key) == key + b"@a:1"
    await a.set(key, b"mine")
    assert await a.get(key) == b"mine"


async def test_a_write_under_way_when_the_link_fails_waits_until_the_owner_refuses_it(
    nodes: list[Node],
) -> None:
    a, b, c = nodes
    key = key_of(b, nodes, then="c:1")
    a.link("b:1").swallow = True
    began_s = time.monotonic()
    writing = asyncio.ensure_future(a.set(key, b"v1"))
    await until(lambda: bool(a.link("b:1").sent))
    a.link("b:1").cut()
    c.link("b:1").cut()
    reply = await writing
    assert isinstance(reply, Done)
    assert time.monotonic() - began_s >= PEER_WRITE_S - 0.05
    assert c.held(key) == b"v1"
    # The copy that the owner has not read until now comes too late.
    late = a.link("b:1").sent[0]
    assert isinstance(late, Set)
    refused = await b.ask(late)
    assert isinstance(refused, Failure)
    assert refused.kind == "DeadlineExceededError"
    assert b.held(key) is None


async def test_what_the_owner_missed_while_it_was_cut_off_is_dropped_before_it_is_asked(
    nodes: list[Node],
) -> None:
    a, b, c = nodes
    key = key_of(b, nodes, then="c:1")
    await b.set(key, b"old")
    a.link("b:1").cut()
    c.link("b:1").cut()
    await a.set(key, b"new")
    assert c.held(key) == b"new"
    assert b.held(key) == b"old"
    c.link("b:1").heal()
    a.link("b:1").heal()
    assert await a.get(key) in (b"new", key + b"@b:1")
    await asyncio.sleep(0)  # from memory, the answer may come before what was sent first
    assert b.held(key) != b"old"


async def test_a_node_that_gains_keys_asks_who_had_them_before_the_database(
    database: Database,
) -> None:
    by_name: dict[str, Node] = {}
    a, b, c = (Node(name, by_name, database.getter(name)) for name in NAMES)
    for node in (a, b):
        node.join(*NAMES[:2])
    keys = [b"moved-%d" % number for number in range(200)]
    await a.get_many(keys)
    loads = sum(database.loads.values())
    assert loads == 200
    for node in (a, b, c):
        node.join(*NAMES, number=2)
    values = await c.get_many(keys)
    assert all(
        value is not None and value.startswith(key) for key, value in zip(keys, values, strict=True)
    )
    assert sum(database.loads.values()) == loads
    gained = [key for key in keys if c.peers.owns(key)]
    assert gained
    held = [c.shard.held(key) for key in gained]
    assert all(one is not None and not one.mirror for one in held)
    for node in (a, b, c):
        node.close()


async def test_a_write_from_a_peer_that_is_not_ours_to_keep_is_a_mirror(nodes: list[Node]) -> None:
    a, b, _ = nodes
    key = key_of(b, nodes)
    reply = await a.ask(Set(key=key, value=b"v", flags=FROM_PEER))
    assert isinstance(reply, Done)
    held = a.shard.held(key)
    assert held is not None
    assert (held.value, held.mirror) == (b"v", True)
    assert a.writes.stats()["writes_not_owned"] == 1
    assert not a.link("b:1").sent


async def test_without_mirrors_every_read_asks_the_owner(database: Database) -> None:
    by_name: dict[str, Node] = {}
    a, b = (
        Node(name, by_name, database.getter(name), handoff_s=0.0, mirror_ttl_ms=0)
        for name in NAMES[:2]
    )
    for node in (a, b):
        node.join(*NAMES[:2])
    key = key_of(b, [a, b])
    for _ in range(3):
        assert await a.get(key) == key + b"@b:1"
    await a.set(key, b"new")
    assert a.held(key) is None
    assert await a.get(key) == b"new"
    assert len(a.link("b:1").sent) == 5
    for node in (a, b):
        node.close()


async def test_the_writers_node_tells_the_owner_too_of_what_another_took_for_it(
    nodes: list[Node],
) -> None:
    a, b, c = nodes
    key = key_of(b, nodes, then="c:1")
    await a.set(key, b"old")
    a.link("b:1").cut()
    c.link("b:1").cut()
    await a.set(key, b"new")
    assert c.held(key) == b"new"
    a.link("b:1").heal()  # c, which took it, may be late, or gone
    await until(lambda: b.held(key) is None)


async def test_a_node_that_joins_is_told_what_was_written_by_who_did_not_know_it(
    database: Database,
) -> None:
    by_name: dict[str, Node] = {}
    a, b, c = (Node(name, by_name, database.getter(name)) for name in NAMES)
    a.join(*NAMES[:2])
    b.join(*NAMES[:2])
    c.join(*NAMES)
    keys = [key for key in (b"former-%d" % n for n in range(300)) if c.peers.owns(key)]
    for key in keys:
        c.shard.put(key, b"old")
    await a.set_many(dict.fromkeys(keys, b"new"))  # neither a nor b knows c
    for node in (a, b):
        node.join(*NAMES, number=2)
    await until(lambda: not any(c.held(key) for key in keys))
    for node in (a, b, c):
        node.close()


async def test_a_mirror_is_not_handed_back_to_its_owner(database: Database) -> None:
    by_name: dict[str, Node] = {}
    a, b = (Node(name, by_name, database.getter(name)) for name in NAMES[:2])
    for node in (a, b):
        node.join(*NAMES[:2])
    key = key_of(b, [a, b])
    await a.get(key)
    assert a.held(key) is not None
    b.shard.delete(key)  # and its invalidation is lost with the worker
    loads = database.loads[key.decode()]
    await b.get(key)
    assert database.loads[key.decode()] == loads + 1
    for node in (a, b):
        node.close()


async def test_a_node_that_left_the_list_and_came_back_has_dropped_what_was_written_meanwhile(
    nodes: list[Node],
) -> None:
    a, b, c = nodes
    key = key_of(b, nodes, then="c:1")
    await a.set(key, b"old")
    for node in (a, c):  # b's lease was lost for a moment; b itself lives on
        node.join("a:1", "c:1", number=2)
    await a.set(key, b"new")
    assert c.held(key) == b"new"
    assert b.held(key) == b"old"
    for node in (a, c):
        node.join(*NAMES, number=3)
    await until(lambda: b.held(key) is None)
    a.shard.delete(key)
    assert await a.get(key) != b"old"


async def test_a_key_of_a_batch_need_not_wait_for_the_slowest_of_it(
    nodes: list[Node], database: Database
) -> None:
    a, b, _ = nodes
    fast = key_of(b, nodes)
    slow = next(
        k for k in (b"slow-%d" % n for n in range(1000)) if a.peers.route(k) is a.link("b:1")
    )
    await b.set(fast, b"there")
    await until(lambda: a.held(fast) is None)
    database.gate.clear()
    batch = asyncio.ensure_future(a.get_many([slow, fast]))
    await until(database.began.is_set)
    assert await a.get(fast) == b"there"
    database.gate.set()
    assert await batch == [slow + b"@b:1", b"there"]


async def test_a_group_that_the_owner_has_not_got_is_loaded_where_it_is_asked_for(
    nodes: list[Node], database: Database
) -> None:
    a, b, _ = nodes
    key = key_of(b, nodes)
    del b.groups["g"]
    assert await a.get(key) == key + b"@a:1"
    held = a.shard.held(key)
    assert held is not None
    assert held.mirror
    failed = await a.set(key, b"v")
    assert isinstance(failed, Failure)
    assert (failed.kind, "owner has not got" in failed.message) == ("GroupNotFoundError", True)


async def test_what_a_node_lost_goes_in_the_sweep(nodes: list[Node]) -> None:
    a = nodes[0]
    keys = [b"swept-%d" % number for number in range(100)]
    for key in keys:
        a.shard.put(key, b"v")
    start = 0
    while start >= 0:
        start = a.shard.sweep(a.peers.owns, start, 512)
    assert {key for key in keys if a.held(key)} == {key for key in keys if a.peers.owns(key)}


async def test_a_flush_drops_all_that_is_older(nodes: list[Node]) -> None:
    a = nodes[0]
    key = key_of(a, nodes)
    await a.set(key, b"old")
    version = a.shard.now()
    await a.set(key + b"2", b"new")
    newer = key_of(a, nodes) + b"2"
    reply = await a.ask(Flush(version=version, flags=FROM_PEER))
    assert isinstance(reply, Done)
    assert a.held(key) is None
    assert a.held(newer) == b"new" or not a.peers.owns(newer)


@pytest.mark.parametrize(
    "request_",
    [
        Get(key=b"k", sent=1 << 56),
        GetMany(keys=[b"k"], sent=1 << 62),
        Set(key=b"k", value=b"w", sent=VERSION_MAX),
        Delete(key=b"k", sent=VERSION_MAX),
        Invalidate(items=[(b"k", 5), (b"k", VERSION_MAX)]),
        Flush(version=VERSION_MAX),
    ],
    ids=lambda request: type(request).__name__,
)
async def test_a_clock_that_cannot_be_is_not_believed_and_writes_go_on(
    nodes: list[Node], request_: Request
) -> None:
    a = nodes[0]
    request_.flags = FROM_PEER
    failed = await a.ask(request_)
    assert isinstance(failed, Failure)
    assert "clock is not believed" in failed.message
    key = key_of(a, nodes)
    assert isinstance(await a.set(key, b"v"), Done)
    assert a.held(key) == b"v"
    assert a.shard.last_version < VERSION_MAX


async def test_nobody_is_asked_for_what_this_nodes_invalidations_are_still_to_drop(
    database: Database,
) -> None:
    by_name: dict[str, Node] = {}
    a, b = (Node(name, by_name, database.getter(name)) for name in NAMES[:2])
    for node in (a, b):
        node.join(*NAMES[:2])
    key = key_of(a, [a, b])
    await b.get(key)
    assert a.peers.holder_before(key) is a.link("b:1")
    a.link("b:1").swallow = True
    await a.set(key, b"v")
    assert a.peers.holder_before(key) is None
    a.close()
    b.close()


async def test_a_deeper_asker_of_a_fetch_asks_the_owner_from_its_depth(
    nodes: list[Node], database: Database
) -> None:
    a, b, _ = nodes
    key = key_of(b, nodes)
    database.gate.clear()
    first = asyncio.ensure_future(a.get(key))
    await until(database.began.is_set)
    second = asyncio.ensure_future(a.get(key, depth=2, chain=(("g", b"other"),)))
    await until(lambda: len(a.link("b:1").sent) == 2)
    deeper = a.link("b:1").sent[1]
    assert isinstance(deeper, Get)
    assert deeper.depth == 2
    database.gate.set()
    assert await first == await second == key + b"@b:1"
    assert database.loads[key.decode()] == 1


async def test_a_key_of_a_batch_that_is_answered_first_moves_no_value_to_another_key(
    database: Database,
) -> None:
    # Only the last key of the batch waits; the first is asked for again, from a deeper getter.
    def load(key: str) -> bytes:
        if key == keys[2].decode():
            database.began.set()
            assert database.gate.wait(10)
        return key.encode()

    database.gate.clear()
    by_name: dict[str, Node] = {}
    a, b = (Node(name, by_name, load, handoff_s=0.0) for name in NAMES[:2])
    for node in (a, b):
        node.join(*NAMES[:2])
    keys = [key for key in (b"batch-%d" % i for i in range(100)) if not a.peers.owns(key)][:3]
    batch = asyncio.ensure_future(a.get_many(keys))
    await until(database.began.is_set)
    assert await a.get(keys[0], depth=1, chain=(("g", b"other"),)) == keys[0]
    database.gate.set()
    assert await batch == keys
    assert [a.held(key) for key in keys] == keys
    a.close()
    b.close()


async def test_a_mirror_that_cannot_be_stored_keeps_nobody_waiting(
    nodes: list[Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    a = nodes[0]
    keys = [b"refused-%d" % number for number in range(20)]

    def put(*args: object, **kwargs: object) -> bool:
        raise OSError("the shard is broken")

    monkeypatch.setattr(a.shard, "put", put)
    values = await a.get_many(keys)
    assert all(v is not None and v.startswith(k) for k, v in zip(keys, values, strict=True))
    assert not a.group.reads.fetches  # type: ignore[union-attr]


@pytest.mark.parametrize("newer", [b"newer", None])
async def test_an_answer_that_comes_after_a_newer_writes_invalidation_is_not_kept(
    nodes: list[Node], monkeypatch: pytest.MonkeyPatch, newer: bytes | None
) -> None:
    a, b, c = nodes
    key = key_of(b, nodes)
    link = a.link("b:1")
    answers: list[tuple[int, Any]] = []
    with monkeypatch.context() as slow:
        slow.setattr(link, "_end", lambda *answer: answers.append(answer))
        setting = asyncio.ensure_future(a.set(key, b"older"))
        await until(lambda: len(answers) == 1)
        taken = a.writes.stats()["invalidations_taken"]
        await (c.delete(key) if newer is None else c.set(key, newer))
        await until(lambda: a.writes.stats()["invalidations_taken"] > taken)
    link._end(*answers[0])
    assert isinstance(await setting, Done)
    assert await a.get(key) == (newer or key + b"@b:1")
    assert not a.group.reads.setting  # type: ignore[union-attr]


async def test_a_write_that_leaves_no_record_still_drops_all_copies(nodes: list[Node]) -> None:
    a, b, _ = nodes
    key = key_of(b, nodes)
    await b.set(key, b"v")
    await a.get(key)
    b.shard.put = lambda *args, **kwargs: False  # type: ignore[method-assign]
    await b.set(key, b"expired at once", ttl_ms=1)
    await until(lambda: a.held(key) is None)


async def test_a_write_for_which_its_link_has_no_room_says_so(
    nodes: list[Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b, _ = nodes
    key = key_of(b, nodes)

    def send(request: Any, done: Callable[[Any], None], deadline_s: float) -> None:
        a.loop.call_soon(done, overloaded("b:1", request))

    monkeypatch.setattr(a.link("b:1"), "send", send)
    failed = await a.set(key, b"v")
    assert isinstance(failed, Failure)
    assert failed.kind == "NodeUnavailableError"
    assert "overloaded" in failed.message
