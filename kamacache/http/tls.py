"""HTTP over TLS: connections are taken and shake hands here, before they are HTTP's.

*Process*: http, on its loop. *Owns*: the task that accepts, and the connections in a handshake::

    accepted ─► counted ─► handshake, TLS_HANDSHAKE_S at most ─► HTTP (`kamacache.http.server`)

uvicorn can give its context to the loop's server, but then a connection is nobody's until its
handshake is over: it is not counted, and is waited for a minute. (`loop.start_tls` on a connection
that the loop has accepted is no way out: uvloop reads from it before, whatever is paused, and one
client hello in five was lost.)

*Invariants*: connections in a handshake and those after it are together at most as many as without
TLS. Where they are as many, the handshake that has lasted longest makes room: it is of one who
keeps a place and says nothing, and who means it is through in milliseconds. A handshake uses the
certificates of the last reload that was good; what it has begun with, it ends with.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
import ssl
from collections.abc import Callable, Sized
from functools import partial
from typing import Final

from kamacache.limits import TLS_HANDSHAKE_S
from kamacache.repeated import RepeatedLog
from kamacache.rundir.live import LiveSettings
from kamacache.security.certificates import Certificates
from kamacache.security.tls import Material, server_context

ACCEPT_AGAIN_S: Final = 1.0  # after an accept failed, as for want of descriptors
BACKLOG: Final = 2_048

Make = Callable[[], asyncio.Protocol]

log = RepeatedLog(logging.getLogger("kamacache.http"))


class TlsDoor:
    """Takes the connections of one HTTP server."""

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
        self._context = server_context(material)
        self._connections_max: Final = connections_max
        self._handshake_s: Final = handshake_s
        self._accepting: asyncio.Task[None] | None = None
        # Connections in their handshake, the oldest first.
        self.pending: Final[dict[asyncio.Task[None], None]] = {}

    def open(
        self,
        listener: socket.socket,
        make: Make,
        connections: Sized,
        make_room: Callable[[], bool] = lambda: False,
    ) -> None:
        """Take connections from now on; ``make`` returns the protocol of one that is secure.

        ``connections`` are those that are over their handshake, of which ``make_room`` ends one
        that can be spared, where there is one.
        """
        listener.listen(BACKLOG)
        accepting = self._accept(listener, make, connections, make_room)
        self._accepting = asyncio.get_running_loop().create_task(accepting)

    def reload(self, live: LiveSettings) -> None:
        """Take the certificates as they are now, for connections to come."""
        self._certificates.reload(live)
        material = self._certificates.material
        if material is not None and material is not self._material:
            self._context = server_context(material)
            self._material = material

    def close(self) -> None:
        """Take no more connections, and end those that are still in their handshake."""
        if self._accepting is not None:
            self._accepting.cancel()
        for handshake in self.pending:
            handshake.cancel()

    def _end_oldest(self) -> bool:
        """End the oldest handshake; tell whether there was one."""
        oldest = next(iter(self.pending), None)
        if oldest is None:
            return False
        del self.pending[oldest]
        oldest.cancel()
        return True

    async def _accept(
        self,
        listener: socket.socket,
        make: Make,
        connections: Sized,
        make_room: Callable[[], bool],
    ) -> None:
        loop = asyncio.get_running_loop()
        with listener:  # closed with the task, when the loop does not wait for it any more
            while True:
                try:
                    accepted, _ = await loop.sock_accept(listener)
                except OSError as error:
                    if error.errno != errno.ECONNABORTED:
                        log.error("no connection can be accepted", reason=str(error))
                        await asyncio.sleep(ACCEPT_AGAIN_S)
                    continue
                full = len(connections) + len(self.pending) >= self._connections_max
                if full and not (self._end_oldest() or make_room()):
                    accepted.close()
                    continue
                handshake = loop.create_task(self._shake_hands(accepted, make))
                self.pending[handshake] = None
                handshake.add_done_callback(partial(self._shaken, accepted))

    def _shaken(self, accepted: socket.socket, handshake: asyncio.Task[None]) -> None:
        self.pending.pop(handshake, None)
        if handshake.cancelled() or handshake.exception() is not None:
            accepted.close()  # by the loop's transport before, where there was one

    async def _shake_hands(self, accepted: socket.socket, make: Make) -> None:
        with contextlib.suppress(OSError, ssl.SSLError):  # no line for each: anybody can cause it
            await asyncio.get_running_loop().connect_accepted_socket(
                make,
                accepted,
                ssl=self._context,
                ssl_handshake_timeout=self._handshake_s,
                ssl_shutdown_timeout=self._handshake_s,
            )
