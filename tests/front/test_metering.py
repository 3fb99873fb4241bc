"""`kamacache.front.metering` on a real gRPC server: every end of a call is counted, once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from kamacache.front.server import FrontServer
from kamacache.front.settings import FrontSettings
from kamacache.rundir.meters import FRONT, GRPC_CODES, GRPC_METHODS, Region
from kamacache.v1 import kamacache_pb2 as pb
from kamacache.v1.kamacache_pb2_grpc import CacheStub
from tests.front.engines import ShardEngine


@asynccontextmanager
async def counting(engine: ShardEngine, region: Region) -> AsyncIterator[Any]:
    server = FrontServer({"scores": engine}, FrontSettings(listen="127.0.0.1:0"), meters=region)
    port = await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield CacheStub(channel)
    finally:
        await server.stop()
        engine.writer.close()


def counted(region: Region) -> dict[str, int]:
    """Return what is not 0, but for what is of now."""
    return {name: count for name, count in region.counts().items() if count and " " in name}


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


def test_statuses_are_counted_under_their_names() -> None:
    assert [code.name for code in sorted(grpc.StatusCode, key=lambda c: c.value[0])] == [
        *GRPC_CODES
    ]


def test_all_methods_of_the_service_are_known() -> None:
    service = pb.DESCRIPTOR.services_by_name["Cache"]
    assert [method.name for method in service.methods] == [*GRPC_METHODS]


async def test_calls_are_counted_by_method_and_status_with_their_time() -> None:
    region = Region(FRONT)
    async with counting(ShardEngine(), region) as stub:
        await stub.Set(pb.SetRequest(group="scores", key=b"k", value=b"v"))
        for _ in range(3):
            await stub.Get(pb.GetRequest(group="scores", key=b"k"))
        for request in (pb.GetRequest(group="none", key=b"k"), pb.GetRequest(group="scores")):
            with pytest.raises(grpc.aio.AioRpcError):
                await stub.Get(request)
        await until(lambda: not region.counts()["in_flight"])
    assert counted(region) == {
        "Set OK": 1,
        "Get OK": 3,
        "Get NOT_FOUND": 1,
        "Get INVALID_ARGUMENT": 1,
    }
    sum_s, buckets = region.histogram(GRPC_METHODS.index("Get"))
    assert sum(buckets) == 5
    assert 0 < sum_s < 10


async def test_a_call_that_its_caller_gives_up_is_counted_as_cancelled() -> None:
    begun = asyncio.Event()

    async def getter(key: bytes) -> bytes:
        begun.set()
        await asyncio.sleep(60)
        return b""

    region = Region(FRONT)
    async with counting(ShardEngine(getter=getter), region) as stub:
        call = stub.Get(pb.GetRequest(group="scores", key=b"slow"))
        await asyncio.wait_for(begun.wait(), 10)
        assert region.counts()["in_flight"] == 1
        call.cancel()
        await until(lambda: counted(region))
        assert counted(region) == {"Get CANCELLED": 1}
        assert region.counts()["in_flight"] == 0


async def test_a_front_that_begins_has_nothing_under_way_and_counts_on() -> None:
    region = Region(FRONT)
    region.words[FRONT.at("in_flight")] = 3  # of one that was killed
    region.words[FRONT.at("Get OK")] = 7
    async with counting(ShardEngine(), region) as stub:
        assert region.counts()["in_flight"] == 0
        await stub.Get(pb.GetRequest(group="scores", key=b"k"))
        await until(lambda: not region.counts()["in_flight"])
    assert counted(region) == {"Get OK": 8}
