"""A real node, this process attached to it as the HTTP role is, and clients of the role's app."""

from __future__ import annotations

import gc
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from kamacache.http.api import Gate
from kamacache.http.readiness import Readiness
from kamacache.http.server import HttpServer
from kamacache.http.settings import HttpSettings
from kamacache.http.tls import TlsDoor
from kamacache.local.attach import role_engines
from tests.attached_estate import Estate
from tests.node_process import NodeProcess


def gate_of(node: NodeProcess, *groups: str, **settings: Any) -> Gate:
    """Return the role's app over a node's groups, all of them where none is named."""
    about = node.description()
    engines = role_engines(node.run_dir, about)
    chosen = {name: engines[name] for name in groups or engines}
    return Gate(chosen, Readiness(about), HttpSettings(listen="127.0.0.1:0", **settings))


@asynccontextmanager
async def asking(gate: Gate) -> AsyncIterator[httpx.AsyncClient]:
    """Yield a client of the app, without a socket between them."""
    transport = httpx.ASGITransport(app=gate, raise_app_exceptions=True)
    async with httpx.AsyncClient(transport=transport, base_url="http://node") as client:
        yield client


@asynccontextmanager
async def serving(
    node: NodeProcess, *groups: str, door: TlsDoor | None = None, **settings: Any
) -> AsyncIterator[HttpServer]:
    """Serve on a free port."""
    told = HttpSettings(listen="127.0.0.1:0", **settings)
    about = node.description()
    engines = role_engines(node.run_dir, about)
    chosen = {name: engines[name] for name in groups or engines}
    server = HttpServer(Gate(chosen, Readiness(about), told), told, door)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


@pytest.fixture(autouse=True)
def _no_attachment_left() -> Iterator[None]:
    """An attachment is some 80 descriptors, until the garbage collector comes by."""
    yield
    gc.collect()


@pytest.fixture(name="gate_of")
def _gate_of() -> Callable[..., Gate]:
    return gate_of


@pytest.fixture(name="asking")
def _asking() -> Callable[..., Any]:
    return asking


@pytest.fixture(name="serving")
def _serving() -> Callable[..., Any]:
    return serving


@pytest.fixture(scope="module")
def place(environment: None) -> Iterator[Estate]:
    """The node's folder, with its trace and gates."""
    folder = Path(tempfile.mkdtemp(prefix="kc-", dir="/tmp"))
    yield Estate(folder)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def node(place: Estate) -> Iterator[NodeProcess]:
    """A node for all tests of a module."""
    with place.node("--group", "large:128MiB") as found:  # values of up to 635 KiB
        found.await_ready()
        yield found
        assert found.stop() == 0
