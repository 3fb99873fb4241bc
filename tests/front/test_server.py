"""`kamacache.front.server` and `health`: readiness, reflection, drain, a port that is taken."""

from __future__ import annotations

import asyncio
import socket
import time
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from kamacache.errors import NodeUnavailableError
from kamacache.front.server import FrontServer
from kamacache.front.settings import FrontSettings
from kamacache.v1 import kamacache_pb2 as pb
from kamacache.v1.kamacache_pb2_grpc import CacheStub
from tests.front.engines import ShardEngine

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


async def test_health_says_serving_for_the_server_and_the_service(serving: Any) -> None:
    async with serving(ShardEngine()) as (_, channel):
        check = health_pb2_grpc.HealthStub(channel).Check
        for service in ("", "kamacache.v1.Cache"):
            reply = await check(health_pb2.HealthCheckRequest(service=service))
            assert reply.status == SERVING
        listed = await health_pb2_grpc.HealthStub(channel).List(health_pb2.HealthListRequest())
        assert {name: reply.status for name, reply in listed.statuses.items()} == {
            "": SERVING,
            "kamacache.v1.Cache": SERVING,
        }
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await check(health_pb2.HealthCheckRequest(service="other"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_reflection_names_the_services(serving: Any) -> None:
    async with serving(ShardEngine()) as (_, channel):
        call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo()
        await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        reply = await call.read()
        await call.done_writing()
    names = {service.name for service in reply.list_services_response.service}
    assert names >= {"kamacache.v1.Cache", "grpc.health.v1.Health"}


async def test_a_drain_tells_the_watchers_and_lets_calls_in_flight_finish(serving: Any) -> None:
    gate = asyncio.Event()
    asked = asyncio.Event()

    async def getter(key: bytes) -> bytes | None:
        asked.set()
        await gate.wait()
        return b"v"

    async with serving(ShardEngine(getter=getter), drain_timeout_s=30) as (server, channel):
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        other = health_pb2_grpc.HealthStub(channel).Watch(
            health_pb2.HealthCheckRequest(service="other")
        )
        assert (await watch.read()).status == SERVING
        assert (await other.read()).status == SERVICE_UNKNOWN
        get = CacheStub(channel).Get
        waiting = asyncio.ensure_future(get(pb.GetRequest(group="scores", key=b"k")))
        await asyncio.wait_for(asked.wait(), 5)
        began_s = time.monotonic()
        draining = asyncio.ensure_future(server.drain())
        assert (await watch.read()).status == NOT_SERVING
        assert await watch.read() is grpc.aio.EOF
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await get(pb.GetRequest(group="scores", key=b"late"), timeout=5)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert not draining.done()
        gate.set()
        assert (await waiting).value == b"v"
        await draining
        assert time.monotonic() - began_s < 10


async def test_a_drain_ends_at_its_deadline(serving: Any) -> None:
    asked = asyncio.Event()

    async def getter(key: bytes) -> bytes | None:
        asked.set()
        await asyncio.Event().wait()
        return None

    async with serving(ShardEngine(getter=getter), drain_timeout_s=0.2) as (server, channel):
        get = CacheStub(channel).Get
        waiting = asyncio.ensure_future(get(pb.GetRequest(group="scores", key=b"k")))
        await asyncio.wait_for(asked.wait(), 5)
        await asyncio.wait_for(server.drain(), 5)
        with pytest.raises(grpc.aio.AioRpcError):
            await waiting


async def test_watchers_are_bounded(serving: Any) -> None:
    async with serving(ShardEngine(), watchers_max=1) as (_, channel):
        watch = health_pb2_grpc.HealthStub(channel).Watch
        first = watch(health_pb2.HealthCheckRequest())
        assert (await first.read()).status == SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await watch(health_pb2.HealthCheckRequest()).read()
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        first.cancel()


async def test_two_fronts_share_a_port() -> None:
    first = FrontServer({}, FrontSettings(listen="127.0.0.1:0"))
    port = await first.start()
    second = FrontServer({}, FrontSettings(listen=f"127.0.0.1:{port}"))
    try:
        assert await second.start() == port
    finally:
        await second.stop()
        await first.stop()


async def test_a_port_that_is_taken_is_said() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        server = FrontServer({}, FrontSettings(listen=listen))
        with pytest.raises(NodeUnavailableError, match=f"cannot listen on {listen}"):
            await server.start()
        await server.stop()
