"""`kamacache.front.credentials`: what a front's TLS lets in, before and after a reload."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest

from kamacache.front.credentials import server_credentials
from kamacache.front.server import FrontServer
from kamacache.front.settings import FrontSettings
from kamacache.rundir.live import SecurityFiles
from kamacache.security.certificates import Certificates
from kamacache.v1 import kamacache_pb2 as pb
from kamacache.v1.kamacache_pb2_grpc import CacheStub
from tests.front.engines import ShardEngine
from tests.pki import Pki, changed, live, serial_at, serial_of, spoil

DEADLINE_S = 20.0


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    return Pki(tmp_path)


@asynccontextmanager
async def secure(
    files: SecurityFiles, **settings: float
) -> AsyncIterator[tuple[str, Certificates]]:
    certificates = Certificates(files)
    engine = ShardEngine()
    server = FrontServer(
        {engine.name: engine},
        FrontSettings(listen="127.0.0.1:0", **settings),  # type: ignore[arg-type]
        credentials=server_credentials(certificates),
    )
    port = await server.start()
    try:
        yield f"127.0.0.1:{port}", certificates
    finally:
        await server.stop()
        engine.writer.close()


def channel(address: str, pki: Pki, own: SecurityFiles | None = None) -> grpc.aio.Channel:
    key = cert = None
    if own is not None:
        key, cert = (Path(str(path)).read_bytes() for path in (own.tls_key, own.tls_cert))
    credentials = grpc.ssl_channel_credentials(pki.ca.cert_pem.bytes(), key, cert)
    options = [("grpc.use_local_subchannel_pool", 1)]
    return grpc.aio.secure_channel(address, credentials, options)


async def asked(channel: grpc.aio.Channel) -> None:
    await CacheStub(channel).Set(pb.SetRequest(group="scores", key=b"k", value=b"v"))
    reply = await CacheStub(channel).Get(pb.GetRequest(group="scores", key=b"k"))
    assert reply.value == b"v"


async def refused(channel: grpc.aio.Channel) -> str:
    async with channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await CacheStub(channel).Members(pb.MembersRequest(), timeout=DEADLINE_S)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    return caught.value.details() or ""


async def test_calls_go_over_tls_and_nothing_else_does(pki: Pki) -> None:
    async with secure(pki.issue()) as (address, _):
        async with channel(address, pki) as good:
            await asked(good)
        await refused(grpc.aio.insecure_channel(address))
        await refused(grpc.aio.secure_channel(address, grpc.ssl_channel_credentials()))
    assert server_credentials(Certificates(SecurityFiles())) is None


async def test_where_clients_need_a_certificate_others_are_refused(
    pki: Pki, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    stranger = Pki(tmp_path / "other").issue("client")
    async with secure(changed(pki.issue(), tls_client_ca=pki.ca_path)) as (address, _):
        async with channel(address, pki, pki.issue("client", file="client")) as good:
            await asked(good)
        await refused(channel(address, pki))
        await refused(channel(address, pki, stranger))
        await refused(channel(address, pki, pki.issue("client", file="old", days=-0.5)))


async def test_a_reload_is_for_new_handshakes_and_open_connections_go_on(
    pki: Pki, caplog: pytest.LogCaptureFixture
) -> None:
    files = pki.issue()
    before = serial_of(files)
    async with secure(files) as (address, certificates), channel(address, pki) as kept:
        await asked(kept)

        async def serial() -> int:
            return await asyncio.to_thread(serial_at, address, pki.client_context(), "h2")

        assert await serial() == before
        for number in (1, 2):
            pki.issue()
            assert await serial() != serial_of(files)
            certificates.reload(live(files, number))
            assert await serial() == serial_of(files)
        after = serial_of(files)
        spoil(files)
        with caplog.at_level(logging.ERROR):
            certificates.reload(live(files, 3))
        assert "refused" in caplog.text
        assert await serial() == after
        assert kept.get_state() is grpc.ChannelConnectivity.READY
        await asked(kept)
        async with channel(address, pki) as fresh:
            await asked(fresh)


async def test_whose_certificates_are_taken_changes_with_a_reload(pki: Pki, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    others = Pki(tmp_path / "other")
    client = others.issue("client")
    files = changed(pki.issue(), tls_client_ca=pki.ca_path)
    async with secure(files) as (address, certificates):
        await refused(channel(address, pki, client))
        certificates.reload(live(changed(files, tls_client_ca=others.ca_path)))
        async with channel(address, pki, client) as good:
            await asked(good)
        await refused(channel(address, pki, pki.issue("client", file="own")))


async def test_a_reload_neither_starts_nor_ends_tls(
    pki: Pki, caplog: pytest.LogCaptureFixture
) -> None:
    files = pki.issue()
    async with secure(files) as (address, certificates):
        for other in (SecurityFiles(), changed(files, tls_client_ca=pki.ca_path)):
            caplog.clear()
            certificates.reload(live(other))
            assert "refused" in caplog.text
            async with channel(address, pki) as good:
                await asked(good)


@pytest.mark.parametrize("begin", [b"", b"\x16\x03\x01\x02", b"PRI * HTTP/2.0\r\n\r\n"])
async def test_a_client_that_does_not_finish_its_handshake_is_dropped(
    pki: Pki, begin: bytes
) -> None:
    async with secure(pki.issue(), handshake_s=0.3) as (address, _):
        host, _, port = address.rpartition(":")
        began_s = time.monotonic()
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(begin)
        async with asyncio.timeout(DEADLINE_S):
            try:
                while await reader.read(1 << 16):
                    pass
            except ConnectionResetError:
                pass
        assert time.monotonic() - began_s < DEADLINE_S / 2
        writer.close()
        async with channel(address, pki) as good:
            await asked(good)
