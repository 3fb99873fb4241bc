"""`kamacache.http.server`: on a real port, with clients that are slow, many, or in the way."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from kamacache.errors import NodeUnavailableError
from kamacache.http.server import HttpServer
from kamacache.http.settings import HttpSettings
from tests.attached_estate import Estate
from tests.node_process import NodeProcess

GET = b"GET /api?key=%s HTTP/1.1\r\nhost: node\r\n\r\n"
DEADLINE_S = 20.0


@asynccontextmanager
async def connected(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.close()


async def answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    """Return status, headers and body of one answer."""
    async with asyncio.timeout(DEADLINE_S):
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
        body = await reader.readexactly(int(headers.get("content-length", "0")))
    return int(head[0].split()[1]), headers, body


async def asked(port: int, request: bytes) -> tuple[int, dict[str, str], bytes]:
    async with connected(port) as (reader, writer):
        writer.write(request)
        return await answer(reader)


async def ended(reader: asyncio.StreamReader) -> None:
    """Wait for the other side to end the connection."""
    async with asyncio.timeout(DEADLINE_S):
        try:
            while await reader.read(1 << 16):
                pass
        except ConnectionResetError:
            return


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def test_a_connection_is_used_again(node: NodeProcess, serving: Any) -> None:
    async with serving(node, "scores") as server, connected(server.port) as (reader, writer):
        for key in (b"Tom", b"none-x", b"Tom"):
            writer.write(GET % key)
            status, headers, _ = await answer(reader)
            assert status == (404 if key == b"none-x" else 200)
            assert headers["server"] == "kamacache"
            assert "connection" not in headers
        writer.write((GET % b"Tom") * 3)  # pipelined
        assert [(await answer(reader))[2] for _ in range(3)] == [b"v-Tom"] * 3


async def test_what_is_no_http_is_refused(node: NodeProcess, serving: Any) -> None:
    async with serving(node, "scores") as server:
        long = b"GET /api?key=" + b"k" * 70_000 + b" HTTP/1.1\r\n\r\n"
        for request in (b"nonsense\r\n\r\n", long):
            async with connected(server.port) as (reader, writer):
                writer.write(request)
                async with asyncio.timeout(DEADLINE_S):
                    assert (await reader.readline()).startswith(b"HTTP/1.1 400 ")
        assert (await asked(server.port, GET % b"Tom"))[0] == 200


async def test_too_large_a_body_gets_its_answer_though_it_is_sent_whole(
    node: NodeProcess, serving: Any
) -> None:
    body = b"x" * (2 << 20)
    head = b"PUT /api?key=a HTTP/1.1\r\nhost: node\r\n"
    whole = b"%scontent-length: %d\r\n\r\n%s" % (head, len(body), body)
    chunked = b"%stransfer-encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (
        head,
        len(body),
        body,
    )
    async with serving(node, "plain") as server, connected(server.port) as (reader, writer):
        for request in (whole, chunked):
            writer.write(request)
            await writer.drain()
            assert (await answer(reader))[0] == 413
        writer.write(GET % b"none")  # the connection is still good
        assert (await answer(reader))[0] == 404


async def test_who_waits_for_a_word_before_the_body_is_told_at_once(
    node: NodeProcess, serving: Any
) -> None:
    head = (
        b"PUT /api?key=a HTTP/1.1\r\nhost: node\r\nexpect: 100-continue\r\ncontent-length: %d\r\n"
    )
    async with serving(node, "plain") as server:
        assert (await asked(server.port, head % (1 << 30) + b"\r\n"))[0] == 413
        async with connected(server.port) as (reader, writer):
            writer.write(head % 3 + b"\r\n")
            async with asyncio.timeout(DEADLINE_S):
                assert b" 100 " in await reader.readuntil(b"\r\n\r\n")
            writer.write(b"abc")
            assert (await answer(reader))[0] == 204


async def test_a_request_that_does_not_get_whole_ends(node: NodeProcess, serving: Any) -> None:
    begun = (
        b"",
        b"GET /api?key=Tom HTTP/1.1\r\nx-slow: ",
        b"PUT /api?key=a HTTP/1.1\r\nhost: node\r\ncontent-length: 10\r\n\r\nabc",
    )
    async with serving(node, "scores", request_s=0.2) as server:
        for part in begun:
            async with connected(server.port) as (reader, writer):
                writer.write(part)
                await ended(reader)
        assert (await asked(server.port, GET % b"Tom"))[0] == 200
        gate = server._gate
        await until(gate.idle.is_set)


async def test_a_load_may_take_longer_than_a_request_to_arrive(
    node: NodeProcess, serving: Any, place: Estate
) -> None:
    async with serving(node, "scores", request_s=0.2) as server, connected(server.port) as pair:
        reader, writer = pair
        writer.write(GET % b"gate-long")
        await until(lambda: place.loads("gate-long"))
        await asyncio.sleep(2.5)  # sweeps come and go
        place.open_gate("gate-long")
        assert (await answer(reader))[2] == b"v-gate-long"


async def test_a_client_that_does_not_read_ends_and_gives_back_what_it_held(
    node: NodeProcess, serving: Any
) -> None:
    value = b"x" * (500 << 10)
    put = b"PUT /api?key=l HTTP/1.1\r\nhost: node\r\ncontent-length: %d\r\n\r\n%s"
    bounds: dict[str, Any] = {"unread_stall_s": 0.2, "held_bytes_max": len(value)}
    async with serving(node, "large", **bounds) as server:
        assert (await asked(server.port, put % (len(value), value)))[0] == 204
        with socket.socket() as deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            deaf.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(deaf, ("127.0.0.1", server.port))
            await loop.sock_sendall(deaf, (GET % b"l") * 20)
            await until(lambda: server._gate.in_flight)
            await until(lambda: not server._server.server_state.connections)
        await until(server._gate.idle.is_set)
        status, _, got = await asked(server.port, GET % b"l")
        assert (status, got) == (200, value)


async def test_connections_are_bounded(node: NodeProcess, serving: Any, place: Estate) -> None:
    async with (
        serving(node, "scores", connections_max=1) as server,
        connected(server.port) as (reader, writer),
    ):
        writer.write(GET % b"gate-bounded")
        await until(lambda: place.loads("gate-bounded"))
        async with connected(server.port) as (other, _):
            status, headers, _ = await answer(other)
            assert (status, headers["retry-after"]) == (503, "1")
            await ended(other)
        place.open_gate("gate-bounded")
        assert (await answer(reader))[0] == 200


async def test_who_says_nothing_keeps_out_nobody(node: NodeProcess, serving: Any) -> None:
    async with (
        serving(node, "scores", connections_max=3) as server,
        connected(server.port) as (silent, _),
        connected(server.port) as (half, half_writer),
        connected(server.port) as (reader, writer),
    ):
        half_writer.write(GET[:10])
        writer.write(GET % b"Tom")
        assert (await answer(reader))[0] == 200
        assert (await asked(server.port, GET % b"Tom"))[0] == 200
        await ended(silent)  # which was quiet longest
        writer.write(GET % b"Tom")
        assert (await answer(reader))[0] == 200
        assert not half.at_eof()


async def test_a_drain_finishes_what_is_under_way_and_closes(
    node: NodeProcess, serving: Any, place: Estate
) -> None:
    async with serving(node, "scores", drain_timeout_s=DEADLINE_S) as server:
        async with connected(server.port) as (reader, writer), connected(server.port) as (idle, _):
            writer.write(GET % b"gate-drained")
            await until(lambda: place.loads("gate-drained"))
            draining = asyncio.ensure_future(server.drain())
            await until(lambda: server._gate._readiness.draining)
            status, _, body = await asked(server.port, b"GET /readyz HTTP/1.1\r\nhost: n\r\n\r\n")
            assert (status, b"draining" in body) == (503, True)
            assert (await asked(server.port, GET % b"Tom"))[0] == 503
            assert not draining.done()
            place.open_gate("gate-drained")
            assert (await answer(reader))[2] == b"v-gate-drained"
            await asyncio.wait_for(draining, DEADLINE_S)
            await ended(idle)
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", server.port)


async def test_a_drain_ends_at_its_deadline(node: NodeProcess, serving: Any, place: Estate) -> None:
    async with (
        serving(node, "scores", drain_timeout_s=0.1) as server,
        connected(server.port) as (reader, writer),
    ):
        writer.write(GET % b"gate-never")
        await until(lambda: place.loads("gate-never"))
        began_s = time.monotonic()
        await asyncio.wait_for(server.drain(), DEADLINE_S)
        assert time.monotonic() - began_s < 5
        await ended(reader)
        place.open_gate("gate-never")


async def test_a_stop_ends_all_at_once(node: NodeProcess, serving: Any, place: Estate) -> None:
    async with (
        serving(node, "scores") as server,
        connected(server.port) as (reader, writer),
    ):
        writer.write(GET % b"gate-stop")
        await until(lambda: place.loads("gate-stop"))
        await asyncio.wait_for(server.stop(), DEADLINE_S)
        await ended(reader)
        place.open_gate("gate-stop")


async def test_a_port_that_is_taken_is_said(node: NodeProcess, gate_of: Any) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        server = HttpServer(gate_of(node), HttpSettings(listen=listen))
        with pytest.raises(NodeUnavailableError, match=f"cannot listen on {listen}"):
            await server.start()
        await server.stop()
