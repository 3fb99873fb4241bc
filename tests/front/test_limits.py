"""Clients that a front must bear: slow, silent, many, with too much, with garbage."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from kamacache.front import open_services
from kamacache.limits import METADATA_BYTES_MAX
from kamacache.v1 import kamacache_pb2 as pb
from kamacache.v1.kamacache_pb2_grpc import CacheStub
from tests.front.engines import ShardEngine
from tests.raw_http2 import (
    DATA,
    DEADLINE_S,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    INITIAL_WINDOW_SIZE,
    PING,
    PREFACE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    call,
    connected,
    frame,
    literals,
    message,
)

GET = "/kamacache.v1.Cache/Get"
REQUEST = pb.GetRequest(group="scores", key=b"k").SerializeToString()
MAX_CONCURRENT_STREAMS = 3


@pytest.fixture
def engine() -> ShardEngine:
    made = ShardEngine()
    made.writer.put(b"k", b"value")
    return made


async def answered(channel: grpc.aio.Channel) -> None:
    """Fail unless the front serves."""
    reply = await CacheStub(channel).Get(pb.GetRequest(group="scores", key=b"k"), timeout=10)
    assert reply.value == b"value"


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def test_a_call_by_hand_is_answered(serving: Any, engine: ShardEngine) -> None:
    async with serving(engine) as (server, _), connected(server.port) as client:
        client.begin()
        client.send(call(GET), message(REQUEST))
        assert b"value" in (await client.until(DATA))[3]


async def test_a_call_whose_request_never_comes_ends_and_gives_back_its_place(
    serving: Any, engine: ShardEngine
) -> None:
    async with (
        serving(engine, request_s=0.3, calls_max=2) as (server, channel),
        connected(server.port) as client,
    ):
        client.begin()
        half = message(REQUEST, 3)[9:-3]
        client.send(call(GET, 1), call(GET, 3, (b"x", b"y")), frame(DATA, 0, 3, half))
        ended = [await client.until(HEADERS), await client.until(HEADERS)]
        assert {stream for _, _, stream, _ in ended} == {1, 3}
        # The second is told in the words of the first: HPACK has them in its table.
        assert b"did not arrive within 0.3 s" in ended[0][3]
        await answered(channel)


async def test_what_needs_no_token_holds_no_places_either(
    serving: Any, engine: ShardEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    bounds = {"s": 0.3, "streams_max": 2}
    monkeypatch.setattr(open_services.Reflection.__init__, "__kwdefaults__", bounds)
    health, reflection = "/grpc.health.v1.Health", "/grpc.reflection.v1alpha.ServerReflection"
    methods = (f"{health}/Check", f"{health}/Watch", *[f"{reflection}/ServerReflectionInfo"] * 3)
    async with (
        serving(engine, request_s=0.3, calls_max=5) as (server, channel),
        connected(server.port) as client,
    ):
        client.begin()
        client.send(*(call(method, 1 + 2 * n) for n, method in enumerate(methods)))
        ends = 0
        while ends < len(methods):  # reflection sends its headers first
            _, flags, _, _ = await client.until(HEADERS)
            ends += flags & END_STREAM
        await answered(channel)


async def test_a_call_without_a_request_or_with_garbage_is_a_bad_request(
    serving: Any, engine: ShardEngine
) -> None:
    async with serving(engine) as (server, channel):
        async with connected(server.port) as client:
            client.begin()
            client.send(call(GET, 1), frame(DATA, 1, 1))
            client.send(call(GET, 3), message(b"\xff\xff\xff", 3))
            said = b"".join([(await client.until(HEADERS))[3] for _ in range(2)])
            assert b"without a request" in said
            assert b"no message of this method" in said
        await answered(channel)


async def test_a_connection_that_does_not_speak_http2_in_time_ends(
    serving: Any, engine: ShardEngine
) -> None:
    async with serving(engine, handshake_s=0.5) as (server, channel):
        for said in (b"", PREFACE[:10], PREFACE):  # the last lacks its settings
            async with connected(server.port) as client:
                client.send(said)
                await client.ended()
        await answered(channel)


async def test_a_client_that_answers_no_ping_is_dropped(serving: Any, engine: ShardEngine) -> None:
    async with serving(engine, keepalive_ms=1_000, keepalive_timeout_ms=500) as (server, channel):
        async with connected(server.port) as client:
            client.begin()
            client.send(call(GET))
            await client.until(PING, answer=False)
            await client.ended(answer=False)
        await answered(channel)


async def test_an_idle_connection_is_closed(serving: Any, engine: ShardEngine) -> None:
    async with serving(engine, idle_ms=1_000) as (server, channel):
        async with connected(server.port) as client:
            client.begin()
            client.send(call(GET), message(REQUEST))
            await client.until(GOAWAY)
            await client.ended()
        await answered(channel)


async def test_connections_have_a_bound(serving: Any, engine: ShardEngine) -> None:
    async with serving(engine, connections_max=3) as (server, channel):
        await answered(channel)  # the first
        async with connected(server.port) as second, connected(server.port) as third:
            for client in (second, third):
                client.begin()
                await client.until(SETTINGS)
            async with connected(server.port) as one_too_many:
                one_too_many.begin()
                await one_too_many.ended()
            await answered(channel)
        # Those that went leave their places.
        end_s = time.monotonic() + DEADLINE_S
        while True:
            async with connected(server.port) as client:
                client.begin()
                try:
                    await client.until(SETTINGS)
                    break
                except (EOFError, ConnectionError):
                    assert time.monotonic() < end_s
                    await asyncio.sleep(0.02)


async def test_streams_of_a_connection_have_a_bound_that_it_is_told(
    serving: Any, engine: ShardEngine
) -> None:
    async with serving(engine, calls_max=7) as (server, _), connected(server.port) as client:
        client.begin()
        _, _, _, body = await client.until(SETTINGS)
        told = {
            int.from_bytes(body[at : at + 2], "big"): int.from_bytes(body[at + 2 : at + 6], "big")
            for at in range(0, len(body), 6)
        }
        assert told[MAX_CONCURRENT_STREAMS] == 7
        client.send(*(call(GET, stream) for stream in range(1, 41, 2)))
        refused = [await client.until(RST_STREAM) for _ in range(13)]
        assert {stream for _, _, stream, _ in refused} == set(range(15, 41, 2))


async def test_metadata_has_a_bound(serving: Any, engine: ShardEngine) -> None:
    async with serving(engine) as (_, channel):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await CacheStub(channel).Get(
                pb.GetRequest(group="scores", key=b"k"),
                metadata=(("x-large", "x" * METADATA_BYTES_MAX),),
            )
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        await answered(channel)


async def test_a_flood_of_streams_that_are_taken_back_harms_nobody(
    serving: Any, engine: ShardEngine
) -> None:
    """What is known as rapid reset: streams begun and reset, faster than they are answered."""
    async with serving(engine) as (server, channel), connected(server.port) as client:
        client.begin()
        for start in range(1, 4_000, 100):
            client.send(
                *(
                    call(GET, stream) + frame(RST_STREAM, 0, stream, (8).to_bytes(4, "big"))
                    for stream in range(start, start + 100, 2)
                )
            )
        await client.writer.drain()
        await answered(channel)


async def test_a_client_that_opens_no_window_keeps_one_place_until_it_goes(
    serving: Any, engine: ShardEngine
) -> None:
    async with serving(engine, calls_max=2) as (server, channel):
        async with connected(server.port) as client:
            client.begin(INITIAL_WINDOW_SIZE.to_bytes(2, "big") + bytes(4))
            client.send(call(GET), message(REQUEST))
            await client.until(HEADERS)  # and its value waits for a window
            await answered(channel)
        await answered(channel)


# -- garbage -------------------------------------------------------------------------------------


def garbage(draw: random.Random, size: int) -> bytes:
    """Return bytes that are nothing, or frames that go wrong somewhere."""
    if draw.random() < 0.3:
        return draw.randbytes(size)
    parts = [PREFACE, frame(SETTINGS, 0, 0)]
    for _ in range(draw.randrange(1, 6)):
        stream = draw.choice((0, 1, 1, 2, 3, 5, 0x7FFFFFFF))
        parts.append(
            draw.choice(
                (
                    call(draw.choice((GET, "/x/y", "")), stream),
                    message(draw.randbytes(draw.randrange(40)), stream, end=draw.random() < 0.5),
                    frame(DATA, 1, stream, draw.randbytes(draw.randrange(20))),
                    frame(HEADERS, END_HEADERS, stream, draw.randbytes(draw.randrange(60))),
                    frame(HEADERS, 0, stream, literals([(b"a", b"b")])),
                    frame(draw.randrange(20), draw.randrange(256), stream, draw.randbytes(9)),
                    frame(WINDOW_UPDATE, 0, stream, (0x7FFFFFFF).to_bytes(4, "big")),
                    frame(SETTINGS, 0, 0, draw.randbytes(6)),
                    b"\xff\xff\xff" + draw.randbytes(6),  # a frame of 16 MiB that never comes
                )
            )
        )
    whole = b"".join(parts)
    return whole[: draw.randrange(1, len(whole))] if draw.random() < 0.3 else whole


async def throw(port: int, seed: int, count: int) -> None:
    draw = random.Random(seed)
    for _ in range(count):
        try:
            async with connected(port) as client:
                client.send(garbage(draw, draw.randrange(1, 300)))
                await client.writer.drain()
                async with asyncio.timeout(0.05):
                    while await client.reader.read(1 << 16):
                        pass
        except (ConnectionError, TimeoutError):
            continue


async def test_garbage_harms_nobody(serving: Any, engine: ShardEngine) -> None:
    async with serving(engine, handshake_s=0.3, request_s=0.3) as (server, channel):
        async with asyncio.timeout(30):
            await asyncio.gather(*(throw(server.port, seed, 6) for seed in range(20)))
        await answered(channel)


@pytest.mark.soak
async def test_garbage_for_long_harms_nobody(serving: Any, engine: ShardEngine) -> None:
    async with serving(engine, handshake_s=0.3, request_s=0.3) as (server, channel):
        for seed in range(0, 4_000, 40):
            await asyncio.gather(*(throw(server.port, seed + at, 25) for at in range(40)))
            await answered(channel)
