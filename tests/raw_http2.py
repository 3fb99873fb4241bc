"""HTTP/2 by hand: clients that do what no library does. RFC 9113, and HPACK without its tables."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
END_STREAM, ACK, END_HEADERS = 1, 1, 4
INITIAL_WINDOW_SIZE = 4
DEADLINE_S = 20.0


def frame(kind: int, flags: int, stream: int, body: bytes = b"") -> bytes:
    """Return one frame."""
    return len(body).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + body


def literals(fields: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Return header fields, each spelt out; names and values below 127 bytes, or any value."""
    return b"".join(b"\0" + _text(name) + _text(value) for name, value in fields)


def _text(text: bytes) -> bytes:
    length = len(text)
    if length < 127:
        return bytes((length,)) + text
    head, rest = bytearray((127,)), length - 127
    while rest >= 128:
        head.append(rest & 0x7F | 0x80)
        rest >>= 7
    head.append(rest)
    return bytes(head) + text


def call(method: str, stream: int = 1, *more: tuple[bytes, bytes]) -> bytes:
    """Return the beginning of a gRPC call: its headers, and nothing of a request."""
    fields = (
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", method.encode()),
        (b":authority", b"node"),
        (b"te", b"trailers"),
        (b"content-type", b"application/grpc"),
        *more,
    )
    return frame(HEADERS, END_HEADERS, stream, literals(fields))


def message(body: bytes, stream: int = 1, *, end: bool = True) -> bytes:
    """Return a request, whole."""
    return frame(DATA, END_STREAM * end, stream, b"\0" + struct.pack(">I", len(body)) + body)


class Client:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    def send(self, *parts: bytes) -> None:
        """Write bytes as they are."""
        self.writer.write(b"".join(parts))

    def begin(self, settings: bytes = b"") -> None:
        """Say what a client says first."""
        self.send(PREFACE, frame(SETTINGS, 0, 0, settings))

    async def frame(self) -> tuple[int, int, int, bytes]:
        """Return the next frame: kind, flags, stream, body. EOFError, ConnectionError: the end."""
        async with asyncio.timeout(DEADLINE_S):
            head = await self.reader.readexactly(9)
            body = await self.reader.readexactly(int.from_bytes(head[:3], "big"))
        return head[3], head[4], int.from_bytes(head[5:], "big"), body

    async def until(self, kind: int, *, answer: bool = True) -> tuple[int, int, int, bytes]:
        """Return the first frame of a kind; settings and pings before it are acknowledged."""
        while True:
            found = await self.frame()
            if found[0] == kind:
                return found
            if answer and found[0] in (SETTINGS, PING) and not found[1] & ACK:
                self.send(frame(found[0], ACK, 0, found[3] if found[0] == PING else b""))

    async def ended(self, *, answer: bool = True) -> None:
        """Return when the server has ended the connection."""
        try:
            while True:
                await self.until(-1, answer=answer)
        except (EOFError, ConnectionError):
            return


@asynccontextmanager
async def connected(port: int) -> AsyncIterator[Client]:
    """Connect to a port of this host."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield Client(reader, writer)
    finally:
        writer.close()
