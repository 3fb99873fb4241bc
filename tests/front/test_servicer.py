"""`kamacache.front.servicer` over a real gRPC server: answers, statuses, bounds, deadlines."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import grpc
import pytest

from kamacache.cluster.status import from_rpc
from kamacache.errors import (
    ConfigError,
    DeadlineExceededError,
    GroupNotFoundError,
    KamaCacheError,
    KeyTooLongError,
    LoadError,
    NodeUnavailableError,
    ValueTooLargeError,
)
from kamacache.limits import KEY_BYTES_MAX
from kamacache.v1 import kamacache_pb2 as pb
from kamacache.v1.kamacache_pb2_grpc import CacheStub
from tests.front.engines import ShardEngine

Code = grpc.StatusCode


async def failing(call: Any) -> tuple[grpc.StatusCode, KamaCacheError]:
    """Return the status code of a failing call, and its error rebuilt."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), from_rpc(caught.value, "the front")


async def test_a_hit_is_read_without_a_worker(serving: Any) -> None:
    engine = ShardEngine()
    engine.writer.put(b"Tom", b"630")
    async with serving(engine) as (_, channel):
        reply = await CacheStub(channel).Get(pb.GetRequest(group="scores", key=b"Tom"))
    assert (reply.found, reply.value) == (True, b"630")
    assert not reply.HasField("ttl_ms")
    assert reply.version > 0
    assert engine.deadlines_s == []


async def test_found_and_empty_and_negative_differ(serving: Any) -> None:
    engine = ShardEngine()
    engine.writer.put(b"empty", b"")
    engine.writer.put(b"nobody", b"", negative=True)
    async with serving(engine) as (_, channel):
        get = CacheStub(channel).Get
        empty = await get(pb.GetRequest(group="scores", key=b"empty"))
        nobody = await get(pb.GetRequest(group="scores", key=b"nobody"))
        absent = await get(pb.GetRequest(group="scores", key=b"absent"))
    assert (empty.found, empty.value) == (True, b"")
    assert not nobody.found
    assert not absent.found
    assert len(engine.deadlines_s) == 1  # "absent" alone asked the worker


async def test_keys_and_values_are_any_bytes_up_to_the_limits(serving: Any) -> None:
    engine = ShardEngine()
    longest = b"\xff" * KEY_BYTES_MAX
    async with serving(engine) as (_, channel):
        stub = CacheStub(channel)
        await stub.Set(pb.SetRequest(group="scores", key=longest, value=b"\x00\xfe"))
        reply = await stub.Get(pb.GetRequest(group="scores", key=longest))
    assert reply.value == b"\x00\xfe"


async def test_a_miss_is_loaded_once_and_then_a_hit(serving: Any) -> None:
    async def getter(key: bytes) -> bytes | None:
        return key * 2

    engine = ShardEngine(getter=getter)
    async with serving(engine) as (_, channel):
        get = CacheStub(channel).Get
        for _ in range(3):
            assert (await get(pb.GetRequest(group="scores", key=b"ab"))).value == b"abab"
    assert engine.loads == [b"ab"]


async def test_set_with_ttl_tells_what_is_left(serving: Any) -> None:
    engine = ShardEngine()
    async with serving(engine) as (_, channel):
        stub = CacheStub(channel)
        await stub.Set(pb.SetRequest(group="scores", key=b"k", value=b"v", ttl_ms=60_000))
        reply = await stub.Get(pb.GetRequest(group="scores", key=b"k"))
    assert 30_000 < reply.ttl_ms <= 60_000


async def test_delete_tells_whether_it_was_there(serving: Any) -> None:
    engine = ShardEngine()
    engine.writer.put(b"k", b"v")
    async with serving(engine) as (_, channel):
        stub = CacheStub(channel)
        request = pb.DeleteRequest(group="scores", key=b"k")
        assert (await stub.Delete(request)).found
        assert not (await stub.Delete(request)).found
        assert not (await stub.Get(pb.GetRequest(group="scores", key=b"k"))).found


async def test_batches_answer_in_the_order_of_the_keys(serving: Any) -> None:
    async def getter(key: bytes) -> bytes | None:
        return b"loaded" if key == b"d" else None

    engine = ShardEngine(getter=getter)
    async with serving(engine) as (_, channel):
        stub = CacheStub(channel)
        items = {"keys": [b"a", b"b", b"a"], "values": [b"1", b"", b"2"]}
        await stub.BatchSet(pb.BatchSetRequest(group="scores", **items, ttl_ms=60_000))
        engine.writer.put(b"n", b"", negative=True)
        keys = [b"a", b"x", b"b", b"n", b"d", b"a", b"x"]
        reply = await stub.BatchGet(pb.BatchGetRequest(group="scores", keys=keys))
        told = await stub.BatchGet(pb.BatchGetRequest(group="scores", keys=keys, meta=True))
        gone = await stub.BatchDelete(
            pb.BatchDeleteRequest(group="scores", keys=[b"a", b"b", b"a", b"x"])
        )
    assert list(reply.values) == [b"2", b"", b"", b"", b"loaded", b"2", b""]
    assert list(reply.missing) == [1, 3, 6]
    assert not reply.ttl_ms
    assert not reply.versions
    assert engine.loads == [b"x", b"d", b"x"]  # each missing key once a batch
    assert [ttl_ms > 0 for ttl_ms in told.ttl_ms] == [True, False, True, False, False, True, False]
    assert [v > 0 for v in told.versions] == [True, False, True, False, True, True, False]
    assert gone.deleted == 2


async def test_stats_of_one_group_and_of_all(serving: Any) -> None:
    first, second = ShardEngine("a"), ShardEngine("b")
    first.writer.put(b"k", b"v")
    async with serving(first, second) as (_, channel):
        stats = CacheStub(channel).Stats
        everything = await stats(pb.StatsRequest())
        one = await stats(pb.StatsRequest(group="b"))
    assert [(g.name, g.values["items"]) for g in everything.groups] == [("a", 1), ("b", 0)]
    assert [g.name for g in one.groups] == ["b"]


async def test_an_unknown_group_is_not_found_and_bounded(serving: Any) -> None:
    engines = [ShardEngine(f"group-{i:02}") for i in range(20)]
    async with serving(*engines) as (_, channel):
        stub = CacheStub(channel)
        calls = [
            stub.Get(pb.GetRequest(group="x" * 10_000, key=b"k")),
            stub.Set(pb.SetRequest(group="", key=b"k")),
            stub.Delete(pb.DeleteRequest(group="no", key=b"k")),
            stub.BatchGet(pb.BatchGetRequest(group="no")),
            stub.BatchSet(pb.BatchSetRequest(group="no")),
            stub.BatchDelete(pb.BatchDeleteRequest(group="no")),
            stub.Stats(pb.StatsRequest(group="no")),
        ]
        for call in calls:
            code, error = await failing(call)
            assert code is Code.NOT_FOUND
            assert isinstance(error, GroupNotFoundError)
            assert len(error.message) < 600
            assert error.known == [f"group-{i:02}" for i in range(16)]


@pytest.mark.parametrize("key", [b"", b"x" * (KEY_BYTES_MAX + 1)])
async def test_a_bad_key_is_an_invalid_argument(serving: Any, key: bytes) -> None:
    engine = ShardEngine()
    async with serving(engine) as (_, channel):
        stub = CacheStub(channel)
        for call in (
            stub.Get(pb.GetRequest(group="scores", key=key)),
            stub.Set(pb.SetRequest(group="scores", key=key, value=b"v")),
            stub.Delete(pb.DeleteRequest(group="scores", key=key)),
            stub.BatchGet(pb.BatchGetRequest(group="scores", keys=[b"ok", key])),
            stub.BatchSet(pb.BatchSetRequest(group="scores", keys=[key], values=[b"v"])),
            stub.BatchDelete(pb.BatchDeleteRequest(group="scores", keys=[b"ok", key])),
        ):
            code, error = await failing(call)
            assert code is Code.INVALID_ARGUMENT
            assert isinstance(error, KeyTooLongError)
            assert error.key_bytes == len(key)
            assert error.limit_bytes == KEY_BYTES_MAX


async def test_bad_ttl_and_keys_without_values_are_invalid_arguments(serving: Any) -> None:
    engine = ShardEngine()
    async with serving(engine) as (_, channel):
        stub = CacheStub(channel)
        for call in (
            stub.Set(pb.SetRequest(group="scores", key=b"k", ttl_ms=0)),
            stub.Set(pb.SetRequest(group="scores", key=b"k", ttl_ms=1 << 63)),
            stub.BatchSet(pb.BatchSetRequest(group="scores", keys=[b"a", b"b"], values=[b"1"])),
        ):
            code, error = await failing(call)
            assert code is Code.INVALID_ARGUMENT
            assert isinstance(error, ConfigError)
        assert not (await stub.Get(pb.GetRequest(group="scores", key=b"a"))).found


async def test_a_value_above_the_shards_limit_is_out_of_range(serving: Any) -> None:
    engine = ShardEngine()
    limit = engine.writer.arena.geometry.value_bytes_max
    async with serving(engine) as (_, channel):
        stub = CacheStub(channel)
        await stub.Set(pb.SetRequest(group="scores", key=b"k", value=b"v" * limit))
        code, error = await failing(
            stub.Set(pb.SetRequest(group="scores", key=b"k", value=b"v" * (limit + 1)))
        )
    assert code is Code.OUT_OF_RANGE
    assert isinstance(error, ValueTooLargeError)
    assert error.limit_bytes == limit


async def test_a_batch_above_the_limits_is_out_of_range(serving: Any) -> None:
    engine = ShardEngine()
    for i in range(8):
        engine.writer.put(b"%d" % i, b"v" * 3_000)
    async with serving(engine, batch_keys_max=8, message_bytes_max=20_000) as (_, channel):
        stub = CacheStub(channel)
        keys = [b"%d" % i for i in range(9)]
        for call in (
            stub.BatchGet(pb.BatchGetRequest(group="scores", keys=keys)),
            stub.BatchSet(pb.BatchSetRequest(group="scores", keys=keys, values=keys)),
            stub.BatchDelete(pb.BatchDeleteRequest(group="scores", keys=keys)),
        ):
            code, error = await failing(call)
            assert code is Code.OUT_OF_RANGE
            assert "9 keys; the limit is 8" in error.message
        code, error = await failing(
            stub.BatchGet(pb.BatchGetRequest(group="scores", keys=keys[:8]))
        )
        assert code is Code.OUT_OF_RANGE
        assert "24000 bytes" in error.message
        reply = await stub.BatchGet(pb.BatchGetRequest(group="scores", keys=keys[:5]))
        assert len(reply.values) == 5


async def test_a_batch_reply_of_exactly_the_limit_is_sent(serving: Any) -> None:
    engine = ShardEngine()
    keys = [b"%03d" % i for i in range(400)]
    for key in keys:
        engine.writer.put(key, b"v" * 50)
    async with serving(engine, batch_keys_max=400, message_bytes_max=20_000) as (_, channel):
        request = pb.BatchGetRequest(group="scores", keys=keys, meta=True)
        reply = await CacheStub(channel).BatchGet(request)
    assert sum(map(len, reply.values)) == 20_000
    assert reply.ByteSize() > 20_000


async def test_a_message_above_the_limit_is_resource_exhausted(serving: Any) -> None:
    engine = ShardEngine()
    async with serving(engine, message_bytes_max=10_000) as (_, channel):
        code, _ = await failing(
            CacheStub(channel).Set(pb.SetRequest(group="scores", key=b"k", value=b"v" * 20_000))
        )
    assert code is Code.RESOURCE_EXHAUSTED


async def test_a_getters_failure_is_told_apart_and_rebuilt(serving: Any) -> None:
    async def getter(key: bytes) -> bytes | None:
        raise LoadError("the database said no", group="scores", key=key, cause_type="OSError")

    engine = ShardEngine(getter=getter)
    async with serving(engine) as (_, channel):
        code, error = await failing(
            CacheStub(channel).Get(pb.GetRequest(group="scores", key=b"\xff"))
        )
    assert code is Code.UNKNOWN
    assert isinstance(error, LoadError)
    assert (error.message, error.key, error.cause_type) == (
        "the database said no",
        b"\xff",
        "OSError",
    )


async def test_a_worker_that_is_away_is_unavailable(serving: Any) -> None:
    async def getter(key: bytes) -> bytes | None:
        raise NodeUnavailableError("worker 3 does not answer", shard=3)

    engine = ShardEngine(getter=getter)
    async with serving(engine) as (_, channel):
        code, error = await failing(
            CacheStub(channel).BatchGet(pb.BatchGetRequest(group="scores", keys=[b"k"]))
        )
    assert code is Code.UNAVAILABLE
    assert isinstance(error, NodeUnavailableError)
    assert error.shard == 3


async def test_a_defect_is_internal_logged_and_says_nothing_of_itself(
    serving: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def getter(key: bytes) -> bytes | None:
        raise ZeroDivisionError("secret")

    engine = ShardEngine(getter=getter)
    async with serving(engine) as (_, channel):
        for _ in range(3):
            code, error = await failing(
                CacheStub(channel).Get(pb.GetRequest(group="scores", key=b"k"))
            )
            assert code is Code.INTERNAL
            assert "secret" not in error.message
    records = [r for r in caplog.records if r.name == "kamacache.front"]
    assert len(records) == 1


async def test_the_callers_deadline_goes_down_and_is_honoured(serving: Any) -> None:
    async def getter(key: bytes) -> bytes | None:
        await asyncio.Event().wait()
        return None

    engine = ShardEngine(getter=getter)
    async with serving(engine) as (_, channel):
        stub = CacheStub(channel)
        began_s = time.monotonic()
        code, error = await failing(stub.Get(pb.GetRequest(group="scores", key=b"k"), timeout=0.3))
        assert time.monotonic() - began_s < 5
        await stub.Set(pb.SetRequest(group="scores", key=b"j", value=b"v"))
    assert code is Code.DEADLINE_EXCEEDED
    assert isinstance(error, DeadlineExceededError)
    deadline_s, without = engine.deadlines_s
    assert deadline_s is not None
    assert 0 < deadline_s - began_s < 1
    assert without is None


async def test_calls_above_the_bound_are_refused_while_those_in_flight_finish(
    serving: Any,
) -> None:
    gate = asyncio.Event()
    asked: asyncio.Queue[bytes] = asyncio.Queue()

    async def getter(key: bytes) -> bytes | None:
        asked.put_nowait(key)
        await gate.wait()
        return b"v"

    engine = ShardEngine(getter=getter)
    async with serving(engine, calls_max=2) as (server, channel):
        get = CacheStub(channel).Get
        waiting = [
            asyncio.ensure_future(get(pb.GetRequest(group="scores", key=key)))
            for key in (b"a", b"b")
        ]
        for _ in waiting:
            await asyncio.wait_for(asked.get(), 5)
        # The connection allows calls_max streams: a third caller comes on its own connection.
        options = [("grpc.use_local_subchannel_pool", 1)]
        target = f"127.0.0.1:{server.port}"
        async with grpc.aio.insecure_channel(target, options=options) as other:
            code, _ = await failing(
                CacheStub(other).Get(pb.GetRequest(group="scores", key=b"c"), timeout=5)
            )
        gate.set()
        replies = await asyncio.gather(*waiting)
    assert code is Code.RESOURCE_EXHAUSTED
    assert [reply.value for reply in replies] == [b"v", b"v"]
