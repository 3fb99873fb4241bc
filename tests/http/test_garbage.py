"""Bytes that are no HTTP, or nearly: the role goes on."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from tests.node_process import NodeProcess

GET = b"GET /api?key=Tom HTTP/1.1\r\nhost: node\r\n\r\n"
PARTS = (
    *(b"GET /api?key=Tom HTTP/1.1\r\n", b"PUT /api?key=a HTTP/1.1\r\n", b"host: node\r\n"),
    *(b"content-length: 5\r\n", b"content-length: -1\r\n", b"content-length: 99999999999999\r\n"),
    *(b"transfer-encoding: chunked\r\n", b"\r\n", b"\r\n\r\n", b"5\r\nhello\r\n", b"FFFFFFFFF\r\n"),
    *(b"authorization: Basic \xff\xfe\r\n", b"expect: 100-continue\r\n", b": \r\n", b"\0\n\r"),
    *(b"GET * HTTP/1.1\r\n", b"GET /%00%ff?%%%=&&& HTTP/1.0\r\n", b"upgrade: h2c\r\n"),
    *(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"),
)


def garbage(draw: random.Random) -> bytes:
    if draw.random() < 0.2:
        return draw.randbytes(draw.randrange(1, 400))
    return b"".join(draw.choices(PARTS, k=draw.randrange(1, 9)))


async def throw(port: int, seed: int, count: int) -> None:
    draw = random.Random(seed)
    for _ in range(count):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(garbage(draw))
            if draw.random() < 0.5:
                writer.write_eof()
            async with asyncio.timeout(0.05):
                while await reader.read(1 << 16):
                    pass
        except (ConnectionError, TimeoutError):
            continue
        finally:
            writer.close()


async def answered(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(GET)
        async with asyncio.timeout(20):
            assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")
    finally:
        writer.close()


async def test_garbage_harms_nobody(
    node: NodeProcess, serving: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(node, "scores") as server:
        await asyncio.gather(*(throw(server.port, seed, 8) for seed in range(16)))
        await answered(server.port)
    assert "Traceback" not in caplog.text


@pytest.mark.soak
async def test_garbage_for_long_harms_nobody(node: NodeProcess, serving: Any) -> None:
    async with serving(node, "scores") as server:
        for seed in range(0, 4_000, 40):
            await asyncio.gather(*(throw(server.port, seed + at, 25) for at in range(40)))
            await answered(server.port)
