"""`kamacache.http.tls`: HTTP over TLS on a real port, with good clients and bad ones."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
import time
import warnings
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from kamacache.http.server import HttpServer
from kamacache.http.tls import TlsDoor
from kamacache.rundir.live import SecurityFiles
from kamacache.security.certificates import Certificates
from tests.node_process import NodeProcess
from tests.pki import Pki, changed, live, serial_at, serial_of, spoil

DEADLINE_S = 20.0
REQUEST = b"GET /healthz HTTP/1.1\r\nhost: node\r\n\r\n"


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    return Pki(tmp_path)


@pytest.fixture(name="secure")
def _secure(node: NodeProcess, serving: Any) -> Any:
    @asynccontextmanager
    async def secure(
        files: SecurityFiles, *, connections_max: int = 800, handshake_s: float = 10.0
    ) -> AsyncIterator[tuple[HttpServer, TlsDoor]]:
        certificates = Certificates(files)
        assert certificates.material is not None
        door = TlsDoor(
            certificates,
            certificates.material,
            connections_max=connections_max,
            handshake_s=handshake_s,
        )
        async with serving(node, "scores", door=door) as server:
            yield server, door

    return secure


async def health(port: int, context: ssl.SSLContext) -> int:
    async with httpx.AsyncClient(verify=context) as client:
        return (await client.get(f"https://127.0.0.1:{port}/healthz")).status_code


async def test_values_are_read_and_written_over_tls(pki: Pki, secure: Any) -> None:
    async with secure(pki.issue()) as (server, _):
        url = f"https://127.0.0.1:{server.port}/api?group=scores&key=tls"
        async with httpx.AsyncClient(verify=pki.client_context()) as client:
            assert (await client.put(url, content=b"x" * 300_000)).status_code in (204, 413)
            assert (await client.put(url, content=b"630")).status_code == 204
            assert (await client.get(url)).content == b"630"
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            await health(server.port, ssl.create_default_context())


async def test_clear_text_and_old_versions_are_refused(pki: Pki, secure: Any) -> None:
    async with secure(pki.issue()) as (server, door):
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(REQUEST)
        async with asyncio.timeout(DEADLINE_S):
            assert b"HTTP" not in await reader.read()
        writer.close()
        old = pki.client_context()
        old.set_ciphers("ALL:@SECLEVEL=0")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
        with pytest.raises(httpx.TransportError):
            await health(server.port, old)
        assert await health(server.port, pki.client_context()) == 200
        assert not door.pending


async def test_where_clients_need_a_certificate_others_get_no_answer(
    pki: Pki, secure: Any, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    stranger = Pki(tmp_path / "other").issue("client")
    own = pki.issue("client", file="client")
    async with secure(changed(pki.issue(), tls_client_ca=pki.ca_path)) as (server, _):
        for context in (pki.client_context(), pki.client_context(stranger)):
            with pytest.raises(httpx.TransportError):
                await health(server.port, context)
        assert await health(server.port, pki.client_context(own)) == 200


async def test_a_reload_is_for_new_connections_and_open_ones_go_on(
    pki: Pki, secure: Any, caplog: pytest.LogCaptureFixture
) -> None:
    files = pki.issue()
    before = serial_of(files)
    context = pki.client_context()
    async with secure(files) as (server, door):
        address = f"127.0.0.1:{server.port}"
        async with httpx.AsyncClient(verify=context) as kept:
            assert (await kept.get(f"https://{address}/healthz")).status_code == 200
            pki.issue()
            assert await asyncio.to_thread(serial_at, address, context) == before
            door.reload(live(files))
            after = serial_of(files)
            assert after != before
            assert await asyncio.to_thread(serial_at, address, context) == after
            spoil(files)
            with caplog.at_level(logging.ERROR):
                door.reload(live(files, 2))
            assert "refused" in caplog.text
            assert await asyncio.to_thread(serial_at, address, context) == after
            assert (await kept.get(f"https://{address}/healthz")).status_code == 200
            assert len(kept._transport._pool.connections) == 1  # type: ignore[attr-defined]


async def test_a_client_that_is_slow_to_shake_hands_is_dropped(pki: Pki, secure: Any) -> None:
    async with secure(pki.issue(), handshake_s=0.3) as (server, door):
        began_s = time.monotonic()
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"\x16\x03\x01\x02")
        async with asyncio.timeout(DEADLINE_S):
            with contextlib.suppress(ConnectionResetError):
                assert await reader.read() == b""
        assert time.monotonic() - began_s >= 0.25
        writer.close()
        async with asyncio.timeout(DEADLINE_S):
            while door.pending:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        assert await health(server.port, pki.client_context()) == 200


async def test_connections_in_their_handshake_count_and_the_oldest_makes_room(
    pki: Pki, secure: Any
) -> None:
    async with secure(pki.issue(), connections_max=3) as (server, door):
        waiting = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(3)]
        async with asyncio.timeout(DEADLINE_S):
            while len(door.pending) < 3:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        # Who keeps places and says nothing keeps out nobody, probes least of all.
        assert await health(server.port, pki.client_context()) == 200
        async with asyncio.timeout(DEADLINE_S):
            assert await waiting[0][0].read() == b""
        for reader, _ in waiting[1:]:
            assert not reader.at_eof()
        for _, writer in waiting:
            writer.close()


async def test_who_says_nothing_after_the_handshake_makes_room_too(pki: Pki, secure: Any) -> None:
    async with secure(pki.issue(), connections_max=2) as (server, _):
        kept = [
            await asyncio.open_connection("127.0.0.1", server.port, ssl=pki.client_context())
            for _ in range(2)
        ]
        assert await health(server.port, pki.client_context()) == 200
        reader, writer = kept[1]
        writer.write(REQUEST)
        async with asyncio.timeout(DEADLINE_S):
            assert b" 200 " in await reader.readline()
            with contextlib.suppress(OSError, ssl.SSLError):
                assert await kept[0][0].read() == b""
        for _, writer in kept:
            writer.close()


async def test_the_end_of_the_server_does_not_wait_for_handshakes(pki: Pki, secure: Any) -> None:
    async with secure(pki.issue()) as (server, door):
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        async with asyncio.timeout(DEADLINE_S):
            while not door.pending:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        began_s = time.monotonic()
        await server.drain()
        assert time.monotonic() - began_s < 5
        writer.close()


async def test_a_request_in_one_packet_with_the_end_of_the_handshake_is_answered(
    pki: Pki, secure: Any
) -> None:
    async with secure(pki.issue()) as (server, _):
        for _ in range(20):
            incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
            client = pki.client_context().wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            async with asyncio.timeout(DEADLINE_S):
                while True:
                    try:
                        client.do_handshake()
                        break
                    except ssl.SSLWantReadError:
                        writer.write(outgoing.read())
                        incoming.write(await reader.read(1 << 16))
                client.write(REQUEST)
                writer.write(outgoing.read())
                answer = b""
                while b"alive" not in answer:
                    try:
                        answer += client.read(1 << 16)
                    except ssl.SSLWantReadError:
                        incoming.write(await reader.read(1 << 16))
            assert answer.startswith(b"HTTP/1.1 200")
            writer.close()
