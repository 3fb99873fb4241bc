"""A front on a real port, and a channel to it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from kamacache.front.server import FrontServer
from kamacache.front.settings import FrontSettings
from tests.front.engines import ShardEngine


@asynccontextmanager
async def serving(
    *engines: ShardEngine, **settings: Any
) -> AsyncIterator[tuple[FrontServer, grpc.aio.Channel]]:
    """Serve the engines on a free port; yield the server and a channel."""
    server = FrontServer(
        {engine.name: engine for engine in engines},
        FrontSettings(listen="127.0.0.1:0", **settings),
    )
    port = await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield server, channel
    finally:
        await server.stop()
        for engine in engines:
            engine.writer.close()


@pytest.fixture(name="serving")
def _serving() -> Callable[..., Any]:
    return serving
