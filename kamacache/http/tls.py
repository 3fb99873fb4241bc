"""HTTP over TLS: the handshake of each connection, before it is one of HTTP.

*Process*: http, on its loop. uvicorn can hand its context to the loop, but then a connection is
nobody's until its handshake is over: not counted, and waited for a minute. So it is ours here::

    accepted ─► counted ─► handshake, TLS_HANDSHAKE_S at most ─► HTTP (`kamacache.http.server`)

*Invariants*: connections in a handshake and those after it are together at most as many as without
TLS. A handshake uses the certificates of the last reload that was good; what it has begun with, it
ends with.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Sized
from typing import Final, cast

from kamacache.limits import TLS_HANDSHAKE_S
from kamacache.rundir.live import LiveSettings
from kamacache.security.certificates import Certificates
from kamacache.security.tls import Material, server_context

Make = Callable[[], asyncio.Protocol]


class TlsDoor:
    """Makes the handshakes of one HTTP server."""

    def __init__(
        self,
        certificates: Certificates,
        material: Material,
        *,
        connections_max: int,
        handshake_s: float = TLS_HANDSHAKE_S,
    ) -> None:
        """``material`` is what the certificates hold now."""
        self._certificates: Final = certificates
        self._material = material
        self.context = server_context(material)
        self.connections_max: Final = connections_max
        self.handshake_s: Final = handshake_s
        self.pending: Final[set[Handshake]] = set()

    def protocol(self, make: Make, connections: Sized) -> asyncio.Protocol:
        """Return what meets a new connection; ``make`` returns what it becomes.

        ``connections`` are those that are over their handshake.
        """
        return Handshake(self, make, connections)

    def reload(self, live: LiveSettings) -> None:
        """Take the certificates as they are now, for connections to come."""
        self._certificates.reload(live)
        material = self._certificates.material
        if material is not None and material is not self._material:
            self.context = server_context(material)
            self._material = material

    def close(self) -> None:
        """End the connections that are still in their handshake."""
        for handshake in list(self.pending):
            handshake.abort()


class Handshake(asyncio.Protocol):
    """A connection that is not one of HTTP yet."""

    def __init__(self, door: TlsDoor, make: Make, connections: Sized) -> None:
        self._door: Final = door
        self._make: Final = make
        self._connections: Final = connections
        self._transport: asyncio.Transport | None = None
        self._task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin, where there is room."""
        door = self._door
        if len(self._connections) + len(door.pending) >= door.connections_max:
            transport.abort()  # type: ignore[attr-defined]
            return
        self._transport = cast("asyncio.Transport", transport)
        self._transport.pause_reading()  # the first bytes are the handshake's
        door.pending.add(self)
        self._task = asyncio.get_running_loop().create_task(self._shake())
        self._task.add_done_callback(lambda _: door.pending.discard(self))

    def abort(self) -> None:
        """End it."""
        if self._task is not None:
            self._task.cancel()
        if self._transport is not None:
            self._transport.abort()

    async def _shake(self) -> None:
        loop = asyncio.get_running_loop()
        transport, early = self._transport, _Early()
        assert transport is not None
        try:
            secure = await loop.start_tls(
                transport,
                early,
                self._door.context,
                server_side=True,
                ssl_handshake_timeout=self._door.handshake_s,
            )
        except (OSError, ssl.SSLError, TimeoutError):  # not a line for each: anybody can cause it
            transport.abort()
            return
        if secure is None or early.lost:
            return
        after = self._make()
        secure.set_protocol(after)
        after.connection_made(secure)
        early.pass_on(after)


class _Early(asyncio.Protocol):
    """Keeps what a client sent right behind its handshake, until there is who reads it."""

    def __init__(self) -> None:
        self._data: list[bytes] = []
        self._ended = False
        self.lost = False

    def data_received(self, data: bytes) -> None:
        """Keep it; this goes on for one turn of the loop."""
        self._data.append(data)

    def eof_received(self) -> bool | None:
        """Keep it."""
        self._ended = True
        return None

    def connection_lost(self, error: Exception | None) -> None:
        """Keep it."""
        self.lost = True

    def pass_on(self, after: asyncio.Protocol) -> None:
        """Give what was kept to who reads from now on."""
        for data in self._data:
            after.data_received(data)
        if self._ended:
            after.eof_received()
