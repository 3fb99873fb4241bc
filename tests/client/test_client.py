"""The remote client against scripted nodes: values, errors, owners, batches, nodes that fail."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

import kamacache
from kamacache.cluster.membership import Member
from kamacache.cluster.ring import Ring
from kamacache.cluster.status import BatchRangeError
from kamacache.limits import (
    BATCH_KEYS_MAX,
    CLIENT_PATIENCE_S,
    CLIENT_PROBE_S,
    CLIENT_RETRY_FIRST_S,
    VALUE_BYTES_CEILING,
)
from tests.client.conftest import Caller, MakeNodes
from tests.client.fakes import FakeNode, Nowhere, introduce

WaitUntil = Callable[..., None]
KEYS = [f"user:{i}" for i in range(300)]
A_DEAD_NODE_S = CLIENT_PATIENCE_S + CLIENT_PROBE_S + 0.5


def ring_of(nodes: list[FakeNode]) -> Ring:
    return Ring(Member(node.address) for node in nodes)


def keys_of(ring: Ring, address: str, count: int = 1) -> list[str]:
    found = (key for i in range(100_000) if ring.owner((key := f"k{i}").encode()) == address)
    return [next(found) for _ in range(count)]


# -- values and errors --------------------------------------------------------------------------


def test_sets_gets_and_deletes_one_key(caller: Caller, make_nodes: MakeNodes) -> None:
    client = caller.client(*(node.address for node in make_nodes(2)))
    with pytest.raises(kamacache.KeyNotFoundError) as caught:
        caller(client, "get", "scores", "Tom")
    assert (caught.value.group, caught.value.key) == ("scores", b"Tom")
    assert caller(client, "get", "scores", "Tom", None) is None
    assert caller(client, "get", "scores", "Tom", default=5) == 5
    caller(client, "set", "scores", "Tom", b"630")
    assert caller(client, "get", "scores", b"Tom") == b"630"
    assert caller(client, "delete", "scores", "Tom") is True
    assert caller(client, "delete", "scores", "Tom") is False


def test_an_empty_value_is_found_and_keys_may_be_any_bytes(
    caller: Caller, make_nodes: MakeNodes
) -> None:
    client = caller.client(make_nodes(1)[0].address)
    for key in (b"\xff\x00", b"x" * 1024, "ü"):
        caller(client, "set", "scores", key, b"")
        assert caller(client, "get", "scores", key) == b""
        assert caller(client, "get_many", "scores", [key, "none"]) == {key: b""}


@pytest.mark.parametrize(("ttl", "ttl_ms"), [(None, None), (1.5, 1500), (0.0001, 1)])
def test_a_ttl_travels_in_milliseconds(
    caller: Caller, make_nodes: MakeNodes, ttl: float | None, ttl_ms: int | None
) -> None:
    (node,) = make_nodes(1)
    seen: list[int | None] = []

    def note(request: Any, context: object) -> None:
        seen.append(request.ttl_ms if request.HasField("ttl_ms") else None)

    node.on = {"Set": note, "BatchSet": note}
    client = caller.client(node.address)
    caller(client, "set", "scores", "Tom", b"1", ttl=ttl)
    caller(client, "set_many", "scores", {"Tom": b"1"}, ttl=ttl)
    assert seen == [ttl_ms, ttl_ms]


def test_what_is_wrong_is_said_before_anything_is_sent(
    caller: Caller, make_nodes: MakeNodes
) -> None:
    (node,) = make_nodes(1)
    client = caller.client(node.address)
    wrong: list[tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]] = [
        (TypeError, "get", (5,), {}),
        (ValueError, "get", ("",), {}),
        (kamacache.KeyTooLongError, "get", ("x" * 1025,), {}),
        (TypeError, "set", ("Tom", "text"), {}),
        (kamacache.ConfigError, "set", ("Tom", b"1"), {"ttl": 0}),
        (kamacache.ConfigError, "get", ("Tom",), {"timeout": 0}),
        (TypeError, "get_many", ("Tom",), {}),
        (TypeError, "set_many", ([("Tom", b"1")],), {}),
        (TypeError, "set_many", ({"Tom": b"1", "Jack": "text"},), {}),
        (kamacache.ValueTooLargeError, "set", ("Tom", bytes(VALUE_BYTES_CEILING + 1)), {}),
    ]
    for kind, method, args, kwargs in wrong:
        with pytest.raises(kind):
            caller(client, method, "scores", *args, **kwargs)
    with pytest.raises(kamacache.ConfigError):
        caller(client, "get", "", "Tom")
    assert not node.asked


@pytest.mark.parametrize(
    "error",
    [
        kamacache.LoadError(
            "the getter raised", group="scores", key=b"Tom", cause_type="ValueError"
        ),
        kamacache.GroupNotFoundError("no such group", group="scores", known=["others"]),
        kamacache.ValueTooLargeError("too large", value_bytes=9, limit_bytes=8, group="scores"),
    ],
)
def test_a_nodes_error_is_final_and_of_the_class_a_local_caller_gets(
    caller: Caller, make_nodes: MakeNodes, error: kamacache.KamaCacheError
) -> None:
    nodes = make_nodes(3)

    def fail(request: object, context: object) -> None:
        raise error

    for node in nodes:
        node.on = dict.fromkeys(("Get", "BatchGet", "Set"), fail)
    client = caller.client(*(node.address for node in nodes))
    for method, args in (("get", ("Tom",)), ("get_many", (["Tom"],)), ("set", ("Tom", b"1"))):
        with pytest.raises(type(error), match=str(error)) as caught:
            caller(client, method, "scores", *args)
        assert vars(caught.value) == vars(error)
    assert sum(node.count("Get") for node in nodes) == 1
    assert all(node.usable for node in client._nodes.view.nodes.values() if node.heard_s > 0)


def test_a_group_has_a_codec_and_the_ways_of_a_dict(caller: Caller, make_nodes: MakeNodes) -> None:
    client = caller.client(make_nodes(1)[0].address)
    scores = client.group("scores", codec="json")
    assert scores.name == "scores"
    caller(scores, "set", "Tom", {"points": 630})
    assert caller(scores, "get", "Tom") == {"points": 630}
    assert caller(client, "get", "scores", "Tom") == b'{"points":630}'
    caller(scores, "set_many", {"Jack": [1], b"Sam": None})
    assert caller(scores, "get_many", ["Jack", b"Sam", "none"]) == {"Jack": [1], b"Sam": None}
    caller(client, "set", "scores", "Tom", b"{")
    with pytest.raises(kamacache.LoadError, match="another codec"):
        caller(scores, "get", "Tom")
    with pytest.raises(kamacache.ConfigError):
        client.group("scores", codec="nothing")


def test_a_group_is_indexed_but_not_searched(make_nodes: MakeNodes) -> None:
    with kamacache.Client([make_nodes(1)[0].address]) as client:
        scores = client.group("scores")
        scores["Tom"] = b"630"
        assert scores["Tom"] == b"630"
        del scores["Tom"]
        with pytest.raises(KeyError):
            scores["Tom"]
        with pytest.raises(kamacache.KeyNotFoundError):
            del scores["Tom"]
        with pytest.raises(TypeError):
            "Tom" in scores  # type: ignore[misc] # noqa: B015
        with pytest.raises(TypeError):
            iter(scores)  # type: ignore[call-overload]


# -- owners and batches -------------------------------------------------------------------------


def test_each_key_goes_to_its_owner(caller: Caller, make_nodes: MakeNodes) -> None:
    nodes = make_nodes(3)
    client = caller.client(nodes[0].address)  # one seed: the others are learnt
    caller.await_usable(client, *nodes)
    assert client.addresses == tuple(sorted(node.address for node in nodes))
    ring = ring_of(nodes)
    for key in KEYS[:60]:
        caller(client, "set", "scores", key, b"1")
        assert caller(client, "get", "scores", key) == b"1"
    caller(client, "get_many", "scores", KEYS)
    for node in nodes:
        own = [key.encode() for key in KEYS if ring.owner(key.encode()) == node.address]
        assert node.keys("BatchGet") == own
        assert node.count("BatchGet") == 1
        assert node.keys("Get") == node.keys("Set") == [k for k in own if k.decode() in KEYS[:60]]


def test_weights_are_those_that_the_nodes_tell(caller: Caller, make_nodes: MakeNodes) -> None:
    nodes = make_nodes(2)
    for node in nodes:
        node.members = sorted([(nodes[0].address, 3), (nodes[1].address, 1)])
    client = caller.client(nodes[0].address)
    caller.await_usable(client, *nodes)
    caller(client, "get_many", "scores", KEYS)
    ring = Ring([Member(nodes[0].address, 3), Member(nodes[1].address)])
    for node in nodes:
        own = [key.encode() for key in KEYS if ring.owner(key.encode()) == node.address]
        assert node.keys("BatchGet") == own


def test_many_keys_come_back_as_they_were_given(caller: Caller, make_nodes: MakeNodes) -> None:
    client = caller.client(*(node.address for node in make_nodes(2)))
    items: dict[str | bytes, bytes] = {"Tom": b"1", b"Jack": b"", "Sam": b"3"}
    caller(client, "set_many", "scores", items)
    found = caller(client, "get_many", "scores", ["Tom", b"Tom", b"Jack", "Sam", "none", "Tom"])
    assert found == {"Tom": b"1", b"Tom": b"1", b"Jack": b"", "Sam": b"3"}
    assert caller(client, "delete_many", "scores", ["Tom", b"Tom", "none", b"Jack"]) == 2
    assert caller(client, "get_many", "scores", (key for key in ["Tom", "Sam"])) == {"Sam": b"3"}


def test_no_keys_ask_nobody(caller: Caller, make_nodes: MakeNodes) -> None:
    (node,) = make_nodes(1)
    client = caller.client(node.address)
    assert caller(client, "get_many", "scores", []) == {}
    caller(client, "set_many", "scores", {})
    assert caller(client, "delete_many", "scores", []) == 0
    assert not node.asked


def test_a_batch_is_cut_by_keys(caller: Caller, make_nodes: MakeNodes) -> None:
    (node,) = make_nodes(1)
    client = caller.client(node.address)
    keys = [f"{i}" for i in range(2 * BATCH_KEYS_MAX + 1)]
    caller(client, "set_many", "scores", dict.fromkeys(keys, b"v"))
    assert caller(client, "get_many", "scores", keys) == dict.fromkeys(keys, b"v")
    assert caller(client, "delete_many", "scores", keys) == len(keys)
    for method in ("BatchSet", "BatchGet", "BatchDelete"):
        assert node.count(method) == 3
        assert sorted(node.keys(method)) == sorted(key.encode() for key in keys)


def test_a_batch_is_cut_by_bytes(caller: Caller, make_nodes: MakeNodes) -> None:
    (node,) = make_nodes(1)
    client = caller.client(node.address)
    items = {f"{i}": bytes(3 << 20) for i in range(4)} | {"large": bytes(VALUE_BYTES_CEILING)}
    caller(client, "set_many", "scores", items)
    assert node.count("BatchSet") == 3  # 2, 2 and 1
    assert node.values[b"large"] == items["large"]


def test_a_reply_that_would_be_too_large_is_asked_for_in_halves(
    caller: Caller, make_nodes: MakeNodes
) -> None:
    (node,) = make_nodes(1)

    def bounded(request: Any, context: object) -> None:
        if len(request.keys) > 100:
            raise BatchRangeError("ask for fewer keys at once")

    def never(request: Any, context: Any) -> None:
        context.abort(grpc.StatusCode.OUT_OF_RANGE, "even one is too much")

    node.on["BatchGet"] = bounded
    node.values.update({key.encode(): b"v" for key in KEYS})
    client = caller.client(node.address)
    assert caller(client, "get_many", "scores", KEYS) == dict.fromkeys(KEYS, b"v")
    assert node.count("BatchGet") == 7  # 300, 2 of 150, 4 of 75
    node.on["BatchGet"] = never
    with pytest.raises(kamacache.KamaCacheError, match="even one"):
        caller(client, "get_many", "scores", KEYS[:2])


def test_batches_to_several_nodes_run_side_by_side(caller: Caller, make_nodes: MakeNodes) -> None:
    nodes = make_nodes(3)
    client = caller.client(*(node.address for node in nodes))
    caller.await_usable(client, *nodes)
    together = threading.Barrier(3)

    def meet(request: object, context: object) -> None:
        together.wait(10)

    for node in nodes:
        node.on["BatchGet"] = meet
    assert caller(client, "get_many", "scores", KEYS) == {}


def test_where_some_keys_fail_the_others_are_finished_first(
    caller: Caller, make_nodes: MakeNodes
) -> None:
    nodes = make_nodes(2)
    client = caller.client(*(node.address for node in nodes))
    caller.await_usable(client, *nodes)

    def fail(request: object, context: object) -> None:
        raise kamacache.LoadError("the getter raised")

    nodes[0].on["BatchSet"] = fail
    with pytest.raises(kamacache.LoadError):
        caller(client, "set_many", "scores", dict.fromkeys(KEYS, b"1"))
    ring = ring_of(nodes)
    own = {key.encode() for key in KEYS if ring.owner(key.encode()) == nodes[1].address}
    assert set(nodes[1].values) == own


def test_stats_are_summed_over_the_nodes_that_answer(caller: Caller, make_nodes: MakeNodes) -> None:
    nodes = make_nodes(3)
    client = caller.client(*(node.address for node in nodes))
    caller(client, "set", "scores", "Tom", b"1")
    assert caller(client, "stats", "scores") == {
        "items": 3,  # these nodes share their values
        "nodes_seen": 3,
        "nodes": 3,
        "nodes_answered": 3,
    }
    nodes[0].stop()
    found = caller(client, "stats", "scores")
    assert (found["nodes"], found["nodes_answered"], found["items"]) == (3, 2, 2)


# -- nodes that fail ----------------------------------------------------------------------------


def test_a_node_that_refuses_is_passed_over_at_once_and_taken_back(
    caller: Caller, make_nodes: MakeNodes, wait_until: WaitUntil
) -> None:
    nodes = make_nodes(3)
    client = caller.client(*(node.address for node in nodes))
    caller.await_usable(client, *nodes)
    ring = ring_of(nodes)
    key = keys_of(ring, nodes[0].address)[0]
    heir = list(ring.owners(key.encode()))[1]
    nodes[0].stop()
    caller(client, "set", "scores", key, b"1")
    for _ in range(20):
        value, took_s = caller.timed(client, "get", "scores", key)
        assert value == b"1"
        assert took_s < CLIENT_PATIENCE_S
    (next_node,) = [node for node in nodes if node.address == heir]
    assert next_node.keys("Get") == [key.encode()] * 20
    nodes[0].start()

    def taken_back() -> bool:
        caller(client, "get", "scores", key)
        caller.idle()
        return nodes[0].count("Get") > 0

    wait_until(taken_back)


def test_a_batch_moves_the_keys_of_a_dead_node_to_those_who_are_next(
    caller: Caller, make_nodes: MakeNodes
) -> None:
    nodes = make_nodes(3)
    client = caller.client(*(node.address for node in nodes))
    caller.await_usable(client, *nodes)
    nodes[0].stop()
    caller(client, "set_many", "scores", dict.fromkeys(KEYS, b"v"))
    ring = ring_of(nodes)
    for node in nodes[1:]:
        mine = [
            key.encode()
            for key in KEYS
            if next(a for a in ring.owners(key.encode()) if a != nodes[0].address) == node.address
        ]
        assert sorted(node.keys("BatchSet")) == sorted(mine)
    assert caller(client, "get_many", "scores", KEYS) == dict.fromkeys(KEYS, b"v")
    assert caller(client, "delete_many", "scores", KEYS) == len(KEYS)


def test_a_silent_node_costs_one_bounded_wait(caller: Caller, make_nodes: MakeNodes) -> None:
    nodes = make_nodes(2)
    client = caller.client(*(node.address for node in nodes))
    caller.await_usable(client, *nodes)
    keys = keys_of(ring_of(nodes), nodes[0].address, 5)
    nodes[1].values.update({key.encode(): b"1" for key in keys})
    nodes[0].stop()
    with Nowhere(nodes[0].port):
        took_s = []
        for key in keys:
            value, seconds = caller.timed(client, "get", "scores", key)
            assert value == b"1"
            took_s.append(seconds)
        assert took_s[0] < A_DEAD_NODE_S
        assert max(took_s[1:]) < CLIENT_PATIENCE_S


def test_a_node_that_stops_answering_in_a_call_is_left_for_the_next(
    caller: Caller, make_nodes: MakeNodes
) -> None:
    # Connected, and then neither the call nor a question is answered: a host that froze.
    nodes = make_nodes(2)
    client = caller.client(*(node.address for node in nodes))
    caller.await_usable(client, *nodes)
    (key,) = keys_of(ring_of(nodes), nodes[0].address)
    thaw = threading.Event()

    def freeze(request: object, context: object) -> None:
        thaw.wait(20)

    nodes[0].on = dict.fromkeys(("Get", "Set", "Members"), freeze)
    try:
        for method, args in (("set", (key, b"1")), ("get", (key,))):
            _, took_s = caller.timed(client, method, "scores", *args)
            assert took_s < A_DEAD_NODE_S
        assert nodes[1].keys("Set") == nodes[1].keys("Get") == [key.encode()]
        assert nodes[0].count("Get") == 0  # it was known by then
    finally:
        thaw.set()


def test_a_slow_node_is_waited_for_and_not_lost(caller: Caller, make_nodes: MakeNodes) -> None:
    nodes = make_nodes(2)
    client = caller.client(*(node.address for node in nodes))
    caller.await_usable(client, *nodes)
    (key,) = keys_of(ring_of(nodes), nodes[0].address)
    nodes[0].values[key.encode()] = b"late"

    def slow(request: object, context: object) -> None:
        time.sleep(A_DEAD_NODE_S)  # what is tested is that this much is waited for

    nodes[0].on["Get"] = slow
    assert caller(client, "get", "scores", key) == b"late"
    assert 1 <= nodes[0].count("Get") <= 2  # a thread asks again, once, and joins the load
    assert nodes[1].keys("Get") == []
    assert nodes[0].count("Members") > 0  # it was asked for a sign of life


def test_a_call_ends_with_its_deadline(caller: Caller, make_nodes: MakeNodes) -> None:
    nodes = make_nodes(2)
    client = caller.client(*(node.address for node in nodes), timeout=0.4)
    caller.await_usable(client, *nodes)
    thaw = threading.Event()

    def wait(request: object, context: object) -> None:
        thaw.wait(20)

    for node in nodes:
        node.on = dict.fromkeys(("Get", "BatchGet"), wait)
    try:
        for method, args, kwargs, limit_s in (
            ("get", "Tom", {}, 0.4),
            ("get", "Tom", {"timeout": 0.2}, 0.2),
            ("get_many", KEYS, {"timeout": 0.3}, 0.3),
        ):
            error, took_s = caller.timed(client, method, "scores", args, **kwargs)
            assert isinstance(error, kamacache.DeadlineExceededError)
            assert (error.timeout_s, error.group) == (limit_s, "scores")
            assert limit_s * 0.9 < took_s < limit_s + 1
    finally:
        thaw.set()
    assert all(node.usable for node in client._nodes.view.nodes.values())  # slow is not lost


def test_where_nobody_answers_calls_fail_at_once(caller: Caller, make_nodes: MakeNodes) -> None:
    nodes = make_nodes(2)
    client = caller.client(*(node.address for node in nodes))
    caller.await_usable(client, *nodes)
    for node in nodes:
        node.stop()
    for _ in range(10):
        error, took_s = caller.timed(client, "get", "scores", "Tom")
        assert isinstance(error, kamacache.NodeUnavailableError)
        assert took_s < CLIENT_PATIENCE_S
    nodes[1].start()
    end_s = time.monotonic() + 10
    while isinstance(caller.timed(client, "get", "scores", "Tom", None)[0], Exception):
        assert time.monotonic() < end_s
        caller.idle()


def test_a_silent_cluster_costs_little_more_than_one_wait(caller: Caller) -> None:
    with Nowhere() as one, Nowhere() as two:
        client = caller.client(one.address, two.address)
        spent_s = []
        for _ in range(20):
            error, took_s = caller.timed(client, "get", "scores", "Tom")
            assert isinstance(error, kamacache.NodeUnavailableError)
            spent_s.append(took_s)
        assert spent_s[0] < A_DEAD_NODE_S
        assert sum(spent_s[1:]) < CLIENT_PATIENCE_S  # one wait more would be above


def test_members_that_cannot_be_reached_leave_the_seeds(
    caller: Caller, make_nodes: MakeNodes
) -> None:
    # As with nodes that advertise the addresses of a network inside: no call may wait for those.
    with Nowhere() as inside, Nowhere() as inside_too:
        (node,) = make_nodes(1)
        node.members = sorted([(inside.address, 1), (inside_too.address, 1)])
        client = caller.client(node.address)
        for key in KEYS[:20]:
            value, took_s = caller.timed(client, "get", "scores", key, None)
            assert value is None
            assert took_s < CLIENT_PATIENCE_S * 2  # the first connects
        assert node.count("Get") == 20
        assert client.addresses == tuple(sorted((inside.address, inside_too.address)))


def test_seeds_that_are_no_nodes_are_passed_over(caller: Caller, make_nodes: MakeNodes) -> None:
    stranger = grpc.server(ThreadPoolExecutor(1))
    port = stranger.add_insecure_port("127.0.0.1:0")
    stranger.start()
    try:
        with Nowhere() as dead:
            gone = Nowhere()
            gone.close()
            (node,) = make_nodes(1)
            seeds = (f"127.0.0.1:{port}", dead.address, gone.address, node.address)
            client = caller.client(*seeds)
            for key in KEYS[:10]:
                assert caller(client, "get", "scores", key, None) is None
            assert client.addresses == (node.address,)
            alone = caller.client(f"127.0.0.1:{port}")
            for wait_s in (0, CLIENT_RETRY_FIRST_S):  # by the question, and then by the call
                time.sleep(wait_s)
                with pytest.raises(kamacache.NodeUnavailableError, match="UNIMPLEMENTED"):
                    caller(alone, "get", "scores", "Tom")
    finally:
        stranger.stop(None).wait(5)


@pytest.mark.parametrize(
    "members",
    [[], [("nonsense", 1)], [("127.0.0.1:1", 0)], [("127.0.0.1:1", 1), ("127.0.0.1:1", 2)]],
)
def test_members_that_make_no_sense_are_not_believed(
    caller: Caller, make_nodes: MakeNodes, members: list[tuple[str, int]]
) -> None:
    from kamacache.v1 import kamacache_pb2 as pb

    (node,) = make_nodes(1)
    reply = pb.MembersResponse(number=1)
    for address, weight in members:
        reply.members.add(address=address, weight=weight)
    node.on["Members"] = lambda request, context: reply
    client = caller.client(node.address)
    assert caller(client, "get", "scores", "Tom", None) is None
    assert client.addresses == (node.address,)


def test_a_draining_node_is_left_and_members_are_asked_for_anew(
    caller: Caller, make_nodes: MakeNodes, wait_until: WaitUntil
) -> None:
    nodes = make_nodes(3)
    client = caller.client(*(node.address for node in nodes))
    caller.await_usable(client, *nodes)
    (key,) = keys_of(ring_of(nodes), nodes[0].address)

    def refuse(request: object, context: object) -> None:
        raise kamacache.NodeUnavailableError("the node drains")

    nodes[0].on["Get"] = refuse
    introduce(nodes[1:])
    assert caller(client, "get", "scores", key, None) is None

    def told() -> bool:
        caller(client, "get", "scores", key, None)
        caller.idle()
        return nodes[0].address not in client.addresses

    wait_until(told)


def test_a_worker_that_is_gone_does_not_lose_the_node(
    caller: Caller, make_nodes: MakeNodes
) -> None:
    nodes = make_nodes(2)
    client = caller.client(*(node.address for node in nodes))
    caller.await_usable(client, *nodes)
    (key,) = keys_of(ring_of(nodes), nodes[0].address)

    def refuse(request: object, context: object) -> None:
        raise kamacache.NodeUnavailableError("worker 1 cannot be reached", shard=1)

    nodes[0].on["Get"] = refuse
    assert caller(client, "get", "scores", key, None) is None
    assert nodes[1].keys("Get") == [key.encode()]
    assert client._nodes.view.nodes[nodes[0].address].usable
    nodes[1].on["Get"] = refuse
    with pytest.raises(kamacache.NodeUnavailableError) as caught:
        caller(client, "get", "scores", key)
    assert caught.value.shard == 1


# -- the client itself --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "seeds", [[], "", ["nonsense"], ["127.0.0.1:0"], [5], ["0.0.0.0:8001"], None]
)
def test_seeds_are_checked(seeds: Any) -> None:
    with pytest.raises((kamacache.ConfigError, TypeError)):
        kamacache.Client(seeds)


def test_settings_are_checked() -> None:
    with pytest.raises(kamacache.ConfigError, match="timeout"):
        kamacache.Client(["127.0.0.1:1"], timeout=0)
    with pytest.raises(kamacache.ConfigError, match="64"):
        kamacache.Client([f"127.0.0.1:{i}" for i in range(1, 100)])


def test_seeds_may_be_one_text(make_nodes: MakeNodes) -> None:
    one, two = make_nodes(2)
    with kamacache.Client(f"{one.address}, {two.address}") as client:
        assert client.addresses == tuple(sorted((one.address, two.address)))
        assert client.get("scores", "Tom", None) is None


def test_a_closed_client_says_so(caller: Caller, make_nodes: MakeNodes) -> None:
    (node,) = make_nodes(1)
    client = caller.client(node.address)
    caller(client, "get", "scores", "Tom", None)
    caller(client, "close")
    caller(client, "close")
    with pytest.raises(kamacache.KamaCacheError, match="closed"):
        caller(client, "get", "scores", "Tom", None)
    with pytest.raises(kamacache.KamaCacheError, match="closed"), client:
        pass


def test_closing_ends_the_calls_of_other_threads(make_nodes: MakeNodes) -> None:
    (node,) = make_nodes(1)
    asked, thaw = threading.Event(), threading.Event()

    def wait(request: object, context: object) -> None:
        asked.set()
        thaw.wait(20)

    node.on["Get"] = wait
    client = kamacache.Client([node.address])
    try:
        with ThreadPoolExecutor(1) as pool:
            call = pool.submit(client.get, "scores", "Tom")
            assert asked.wait(10)
            client.close()
            with pytest.raises(kamacache.KamaCacheError):
                call.result(5)
    finally:
        thaw.set()


def test_threads_share_one_client(make_nodes: MakeNodes) -> None:
    nodes = make_nodes(3)
    with kamacache.Client([node.address for node in nodes]) as client:

        def work(number: int) -> int:
            for i in range(30):
                key = f"{number}:{i}"
                client.set("scores", key, key.encode())
                assert client.get("scores", key) == key.encode()
            return len(client.get_many("scores", [f"{number}:{i}" for i in range(30)]))

        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(work, range(8))) == [30] * 8


def test_a_node_that_dies_under_threads_fails_no_call(make_nodes: MakeNodes) -> None:
    nodes = make_nodes(3)
    with kamacache.Client([node.address for node in nodes]) as client:
        begun = threading.Barrier(5)

        def work(number: int) -> int:
            begun.wait(10)
            for i in range(60):
                key = f"{number}:{i}"
                client.set("scores", key, key.encode())
                assert client.get("scores", key) == key.encode()
            return number

        with ThreadPoolExecutor(4) as pool:
            calls = [pool.submit(work, number) for number in range(4)]
            begun.wait(10)
            nodes[0].stop()
            assert [call.result(30) for call in calls] == [0, 1, 2, 3]
