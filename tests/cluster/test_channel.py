"""`kamacache.cluster.channel`: which node a link trusts, and what is said of the others."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from kamacache.cluster.channel import PLAIN, Dialler
from kamacache.cluster.handshake import why_no_handshake
from kamacache.front.credentials import server_credentials
from kamacache.front.server import HEALTH_NAME, FrontServer
from kamacache.front.settings import FrontSettings
from kamacache.rundir.live import SecurityFiles
from kamacache.security.certificates import Certificates
from tests.pki import Pki, changed

DEADLINE_S = 20.0


@pytest.fixture
def ours(tmp_path: Path) -> Pki:
    return Pki(tmp_path)


@pytest.fixture
def others(tmp_path: Path) -> Pki:
    folder = tmp_path / "others"
    folder.mkdir()
    return Pki(folder)


@asynccontextmanager
async def peer(files: SecurityFiles | None) -> AsyncIterator[str]:
    """A node with these certificates; None: without any."""
    credentials = None if files is None else server_credentials(Certificates(files))
    server = FrontServer({}, FrontSettings(listen="127.0.0.1:0"), credentials=credentials)
    port = await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop()


async def why_not(dialler: Dialler, address: str) -> str | None:
    """Return what is said of a node that cannot be linked to, None where it can."""
    async with dialler(address) as channel:
        check: Any = channel.unary_unary(f"/{HEALTH_NAME}/Check")
        try:
            await check(b"", timeout=DEADLINE_S)
        except grpc.aio.AioRpcError as error:
            trouble = why_no_handshake(error.details() or "", tls=dialler.tls)
            return str(error) if trouble is None else trouble.what
        return None


async def test_only_a_node_of_our_ca_and_of_its_name_is_linked_to(ours: Pki, others: Pki) -> None:
    own = Dialler(Certificates(ours.mutual(file="own")))
    theirs = changed(others.issue(), tls_ca=ours.ca_path)
    for files, said in (
        (ours.mutual(), None),
        (theirs, "none of those that are trusted here"),
        (ours.issue("10.0.0.9", file="elsewhere"), "not for the name or address"),
        (None, "does not speak TLS"),
    ):
        async with peer(files) as address:
            found = await why_not(own, address)
            assert found == said or (said is not None and said in str(found))


async def test_a_node_that_demands_certificates_takes_those_of_its_ca_alone(
    ours: Pki, others: Pki
) -> None:
    async with peer(ours.mutual()) as address:
        assert await why_not(Dialler(Certificates(ours.mutual(file="own"))), address) is None
        stranger = Certificates(changed(others.issue(), tls_ca=ours.ca_path))
        assert "ended the TLS handshake" in str(await why_not(Dialler(stranger), address))
        assert "tls_ca is needed" in str(await why_not(PLAIN, address))
