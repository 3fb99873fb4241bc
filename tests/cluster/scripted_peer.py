"""The answering side of peer links, in the test's own process; it says what the test wants."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc

from kamacache.clock import boottime_ms
from kamacache.cluster.stream import LINK_METHOD, FrameSplitter, pack
from kamacache.limits import PEER_BATCH_BYTES
from kamacache.wire.frames import frame
from kamacache.wire.messages import (
    PEER_FORMAT,
    AnyRequest,
    Done,
    Get,
    Hello,
    Invalidate,
    Ping,
    Reply,
    Value,
    Welcome,
    decode_request,
)

Answer = Callable[[Any], Reply | None]


class PeerStream:
    """One open link."""

    def __init__(self, context: Any) -> None:
        self.context = context
        self.ended = asyncio.Event()
        self._writing = asyncio.Lock()  # gRPC takes one message at a time

    async def send(self, *replies: Reply) -> None:
        """Send these in one message, or in as many as they need."""
        frames = b"".join([frame(reply) for reply in replies])
        for at in range(0, len(frames), PEER_BATCH_BYTES):
            part = frames[at : at + PEER_BATCH_BYTES]
            await self.send_bytes(pack([part], len(part)))

    async def send_bytes(self, message: bytes) -> None:
        """Send a message of any bytes."""
        async with self._writing:
            await self.context.write(message)


class ScriptedPeer:
    """A server with one method. ``answer`` returns the reply to a request, None for none at all."""

    def __init__(self, answer: Answer | None = None) -> None:
        self.answer = answer or echo
        self.welcome = Welcome(0, PEER_FORMAT, "", "their life", False)
        self.hellos: list[Hello] = []
        self.requests: list[AnyRequest] = []  # pings are left out
        self.pings = 0
        self.messages = 0
        self.silent = False  # reads, and says nothing at all
        self.streams: list[PeerStream] = []
        self.port = 0
        self._server: Any = None

    @property
    def address(self) -> str:
        """Where it listens, or did."""
        return f"127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Listen, at the same port as before if there was one."""
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        self._server.add_generic_rpc_handlers((self,))
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        self.welcome.node = self.welcome.node or self.address
        await self._server.start()

    async def stop(self) -> None:
        """End all streams at once."""
        if self._server is not None:
            await self._server.stop(None)
            self._server = None

    def service(self, details: Any) -> Any:
        """Return what handles a method, as a generic handler of gRPC does."""
        if details.method == LINK_METHOD:
            return grpc.stream_stream_rpc_method_handler(self._link)
        return None

    async def _link(self, _requests: object, context: Any) -> None:
        stream = PeerStream(context)
        splitter = FrameSplitter()
        self.streams.append(stream)
        try:
            while (message := await context.read()) is not grpc.aio.EOF:
                self.messages += 1
                replies = [self._reply(decode_request(body)) for body in splitter.bodies(message)]
                said = [reply for reply in replies if reply is not None]
                if said and not self.silent:
                    await stream.send(*said)
        finally:
            stream.ended.set()

    def _reply(self, request: AnyRequest) -> Reply | None:
        if isinstance(request, Hello):
            self.hellos.append(request)
            welcome = self.welcome
            return Welcome(
                request.id,
                welcome.format,
                welcome.node,
                welcome.node_id,
                welcome.draining,
                boottime_ms(),
            )
        if isinstance(request, Ping):
            self.pings += 1
            return Done(request.id, 0)
        self.requests.append(request)
        return self.answer(request)


def echo(request: AnyRequest) -> Reply:
    """Answer a get with its key, all else with what was done."""
    if isinstance(request, Get):
        return Value(request.id, request.key, 7, 8)
    return Done(request.id, len(request.items) if isinstance(request, Invalidate) else 1, 9)
