"""The HTTP server: uvicorn on a port of ours, with bounds on what a client may keep waiting.

*Process*: http, on its loop. *Owns*: the listening socket and its connections.

uvicorn bounds the head of a request (h11: 16 KiB) and how long a connection stays idle. It waits
for ever for the rest of a request, and for a client that does not read: `Connection` says since
when, and one sweep a second ends those that took too long. At the bound on connections the one that
was quiet longest makes room, so that nobody keeps others out by saying nothing; only where all are
being answered a new one is told 503.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
import time
from collections.abc import Iterator
from functools import partial
from typing import Any, ClassVar, Final, cast

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from kamacache.errors import NodeUnavailableError
from kamacache.http.api import Gate
from kamacache.http.settings import HttpSettings
from kamacache.http.tls import TlsDoor

SWEEP_EVERY_S: Final = 1.0
WRITE_OUT_S: Final = 3.0  # in a drain, for clients to read the last answers
STOP_MARGIN_S: Final = 1.0  # for uvicorn to end, beyond the deadline
_FULL: Final = (
    b"HTTP/1.1 503 Service Unavailable\r\nserver: kamacache\r\nretry-after: 1\r\n"
    b"content-length: 0\r\nconnection: close\r\n\r\n"
)


class Connection(H11Protocol):
    """One client."""

    bounds: ClassVar[HttpSettings]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.heard_s = time.monotonic()  # when it last said something
        self._arriving_s: float | None = self.heard_s  # since when a request is incomplete
        self._unread_bytes = 0
        self._unread_s = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin, where there is room."""
        super().connection_made(transport)
        if len(self.connections) > self.bounds.connections_max and not make_room(
            self.connections, self
        ):
            transport.write(_FULL)
            transport.close()

    def data_received(self, data: bytes) -> None:
        """Read on; note whether the request is whole now."""
        self.heard_s = time.monotonic()
        if self._arriving_s is None:
            self._arriving_s = self.heard_s
        super().data_received(data)
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            self._arriving_s = None

    @property
    def waits(self) -> bool:
        """Whether it is the client's turn: to begin a request, or to say the rest of its head."""
        answered = self.cycle is None or self.cycle.response_complete
        return answered and not self.transport.get_write_buffer_size()

    def sweep(self, now_s: float) -> None:
        """End the connection where its client is too slow."""
        bounds, unread = self.bounds, self.transport.get_write_buffer_size()
        arriving_s = self._arriving_s
        if unread == 0 or unread != self._unread_bytes:
            self._unread_bytes, self._unread_s = unread, now_s
        stalled = now_s - self._unread_s > bounds.unread_stall_s
        if stalled or (arriving_s is not None and now_s - arriving_s > bounds.request_s):
            self.transport.abort()


def make_room(connections: set[Any], newest: object = None) -> bool:
    """End the connection that was quiet longest; tell whether there was one to end."""
    waiting = [other for other in connections if other is not newest and other.waits]
    if not waiting:
        return False
    quietest = min(waiting, key=lambda other: other.heard_s)
    connections.discard(quietest)  # as uvicorn will, when it hears of it
    quietest.transport.abort()
    return True


class _Uvicorn(uvicorn.Server):
    """uvicorn's server, without its signal handlers; says when it listens."""

    def __init__(self, config: uvicorn.Config, door: TlsDoor | None) -> None:
        super().__init__(config)
        self._door = door
        self.listening = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        if self._door is None or sockets is None:
            await super().startup(sockets)
        else:
            await super().startup([])  # it opens nothing then
            make = partial(
                cast("type[Connection]", self.config.http_protocol_class),
                config=self.config,
                server_state=self.server_state,
                app_state=self.lifespan.state,
            )
            connections = self.server_state.connections
            for listener in sockets:
                self._door.open(listener, make, connections, partial(make_room, connections))
        self.listening.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class HttpServer:
    """One server over the node's groups. Make it on the loop that will run it."""

    def __init__(self, gate: Gate, settings: HttpSettings, door: TlsDoor | None = None) -> None:
        """``door`` makes the handshakes of TLS; None: plaintext."""
        self._gate = gate
        self._settings = settings
        self._door = door
        self._server = _Uvicorn(_config(gate, settings), door)
        self._serving: asyncio.Task[None] | None = None
        self._sweeping: asyncio.TimerHandle | None = None
        self.port = 0  # until it is bound

    async def start(self) -> int:
        """Bind and serve; return the port. Raises `NodeUnavailableError` where it cannot bind."""
        listener = _listener(self._settings)
        self.port = listener.getsockname()[1]
        loop = asyncio.get_running_loop()
        self._serving = loop.create_task(self._server.serve([listener]))
        listening = loop.create_task(self._server.listening.wait())
        await asyncio.wait((self._serving, listening), return_when=asyncio.FIRST_COMPLETED)
        listening.cancel()
        if self._serving.done():
            await self._serving
            raise NodeUnavailableError(f"cannot serve HTTP on {self._settings.listen}")
        self._sweeping = loop.call_later(SWEEP_EVERY_S, self._sweep)
        return self.port

    async def drain(self) -> None:
        """Refuse new requests, let those in flight finish within the deadline, end.

        The port stays open meanwhile: /readyz says 503, which tells more than a refusal.
        """
        until_s = time.monotonic() + self._settings.drain_timeout_s
        self._gate.drain()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._gate.idle.wait(), self._settings.drain_timeout_s)
        if self._gate.idle.is_set() and self._serving is not None:
            left_s = min(max(0.0, until_s - time.monotonic()), WRITE_OUT_S)
            if self._door is not None:
                self._door.close()
            self._server.config.timeout_graceful_shutdown = math.ceil(left_s)  # whole seconds
            self._server.should_exit = True
            await asyncio.wait((self._serving,), timeout=left_s + STOP_MARGIN_S)
        await self.stop()

    async def stop(self) -> None:
        """End all connections now."""
        if self._sweeping is not None:
            self._sweeping.cancel()
        if self._serving is None:
            return
        self._gate.drain()
        self._serving.cancel()
        for listening in self._server.servers:
            listening.close()
        if self._door is not None:
            self._door.close()
        for connection in list(self._server.server_state.connections):
            connection.transport.abort()
        for task in list(self._server.server_state.tasks):
            task.cancel()
        await asyncio.wait((self._serving, *self._server.server_state.tasks))

    def _sweep(self) -> None:
        now_s = time.monotonic()
        connections = list(self._server.server_state.connections)
        self._gate.meter.connections(len(connections))
        for connection in connections:
            if isinstance(connection, Connection):
                connection.sweep(now_s)
        self._sweeping = asyncio.get_running_loop().call_later(SWEEP_EVERY_S, self._sweep)


def _config(gate: Gate, settings: HttpSettings) -> uvicorn.Config:
    class Bounded(Connection):
        bounds = settings

    return uvicorn.Config(
        gate,
        http=Bounded,
        ws="none",
        lifespan="off",
        interface="asgi3",
        workers=1,  # else uvicorn reads $WEB_CONCURRENCY
        log_config=None,
        log_level="error",  # its warnings are one for each bad request
        access_log=False,
        proxy_headers=False,
        server_header=False,
        headers=[("server", "kamacache")],
        timeout_keep_alive=settings.keep_alive_s,
    )


def _listener(settings: HttpSettings) -> socket.socket:
    if settings.listen_fd is None:
        return _bind(settings.listen)
    passed = socket.socket(fileno=settings.listen_fd)
    passed.setblocking(False)
    return passed


def _bind(listen: str) -> socket.socket:
    host, _, port = listen.rpartition(":")
    host = host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # The supervisor keeps the port bound, so that it stays ours while this role restarts.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        bound.bind((host, int(port)))
        bound.setblocking(False)
    except BaseException as error:
        bound.close()
        if isinstance(error, OSError):
            raise NodeUnavailableError(f"cannot listen on {listen}: {error.strerror}") from error
        raise
    return bound
