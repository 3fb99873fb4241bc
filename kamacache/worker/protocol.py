"""The worker's Unix socket: frames in, replies out, and the bounds that keep a client in check.

*Process*: worker, in the loop's thread. *Owns*: the connections.

    data_received ─► frames ─► handler ─► replies of this read ─► one write
                       ▲                    │ None: a waiter answers later, in a batch of its own
                       └── not read on while too many replies or loads are outstanding

Hits and writes are answered inside ``data_received``: no task, no future. *Invariants*: per
connection at most `REQUESTS_PER_CONNECTION_MAX` loads wait and `UNREAD_BYTES_MAX` of replies lie
unread; half frames hold at most `PARTIAL_BYTES_MAX` over all connections; a client that stalls in
the middle of a frame or does not read its replies is cut off.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any, Final, cast

from kamacache.errors import KamaCacheError
from kamacache.limits import (
    CONNECTIONS_MAX,
    FRAME_STALL_S,
    PARTIAL_BYTES_MAX,
    REQUESTS_PER_CONNECTION_MAX,
    UNREAD_BYTES_MAX,
    UNREAD_STALL_S,
    WRITE_BUFFER_BYTES_MAX,
)
from kamacache.repeated import RepeatedLog
from kamacache.rundir.meters import WORKER, Region
from kamacache.wire.frames import HEADER_BYTES, FrameError, FrameReader
from kamacache.wire.messages import DecodeError, Failure, Reply, decode_request, encode, salvage_id
from kamacache.worker.handlers import Handlers
from kamacache.worker.replies import failure
from kamacache.worker.waiters import Leaver

REFUSED: Final = WORKER.at("connections_refused")
FLUSH_BYTES: Final = 1 << 20  # replies are written when they come to this
from_bytes: Final = int.from_bytes

log = RepeatedLog(logging.getLogger("kamacache.worker.protocol"))


class Server:
    """What the connections of one worker share."""

    __slots__ = ("_counts", "connections", "connections_max", "handlers", "loop", "partial_bytes")

    def __init__(
        self,
        handlers: Handlers,
        loop: asyncio.AbstractEventLoop,
        *,
        connections_max: int = CONNECTIONS_MAX,
        meters: Region | None = None,
    ) -> None:
        """``meters`` are the worker's; None: as in a test."""
        self.handlers: Final = handlers
        self.loop: Final = loop
        self.connections: set[Connection] = set()
        self.connections_max: Final = connections_max
        self.partial_bytes = 0
        self._counts: Final = (meters or Region(WORKER)).words

    @property
    def refused(self) -> int:
        """Connections that were one too many, for the workers before this one, too."""
        return self._counts[REFUSED]

    def refuse(self) -> None:
        """Count a connection too many."""
        self._counts[REFUSED] += 1

    def connection(self) -> Connection:
        """Return the protocol of a new connection."""
        return Connection(self)

    def sweep(self) -> None:
        """Cut off clients that stall; call about once a second."""
        now = time.monotonic()
        for connection in [*self.connections]:
            connection.check(now)

    def close(self) -> None:
        """Close all connections once their replies are written."""
        for connection in [*self.connections]:
            connection.close()

    def abort(self) -> None:
        """Close all connections at once."""
        for connection in [*self.connections]:
            connection.abort()


class Connection(asyncio.Protocol):
    """One client."""

    __slots__ = (
        "_blocked",
        "_held",
        "_out",
        "_out_bytes",
        "_partial_since_s",
        "_paused_since_s",
        "_reader",
        "_server",
        "_table",
        "_transport",
        "waiters",
    )

    def __init__(self, server: Server) -> None:
        self._server = server
        self._table = server.handlers.table
        self._reader = FrameReader()
        self._held = 0  # bytes of ours in server.partial_bytes
        self._out: list[bytes] = []
        self._out_bytes = 0
        self._blocked = False  # reading is paused
        self._paused_since_s = 0.0  # > 0: the client does not read its replies
        self._partial_since_s = 0.0  # > 0: a frame is not whole since then
        self._transport: asyncio.Transport | None = None
        self.waiters: dict[Leaver, None] = {}

    # -- from the transport ----------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the connection, or refuse it."""
        server = self._server
        stream = cast(asyncio.Transport, transport)  # uvloop's is one by its methods only
        if len(server.connections) >= server.connections_max:
            server.refuse()
            log.warning("a connection too many is refused", limit=server.connections_max)
            stream.abort()
            return
        self._transport = stream
        stream.set_write_buffer_limits(high=WRITE_BUFFER_BYTES_MAX)
        server.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Let go of what waits; the loads go on."""
        self._transport = None
        self._server.connections.discard(self)
        self._hold(0)
        waiters, self.waiters = self.waiters, {}
        for waiter in waiters:
            waiter.leave()
        self._reader = FrameReader()
        self._out.clear()

    def data_received(self, data: bytes) -> None:
        """Answer the requests in what came; write their replies together."""
        transport = self._transport
        if transport is None:
            return
        whole = from_bytes(data[:HEADER_BYTES], "little") == len(data) - HEADER_BYTES
        if not whole or self._held or self._blocked:
            self._reader.feed(data)
            self._read_on()
            return
        # One whole frame, as nearly always: a reply that is there already is written at once.
        reply = self._reply_to(data[HEADER_BYTES:])
        if reply is None or self._out or self._transport is None:
            if reply is not None:
                self._put(reply)  # behind what the handler answered before
            if self._out:
                self._flush()
            self._block_or_go_on()
            return
        body = encode(reply)
        transport.write(len(body).to_bytes(HEADER_BYTES, "little") + body)
        if self._paused_since_s:  # in write(), by what a client does not read
            self._look_at_unread(transport)
            self._block_or_go_on()

    def eof_received(self) -> bool:
        """Close when the client did: a half-closed client could not be told from a dead one."""
        return False

    def pause_writing(self) -> None:
        """Stop reading: the client must read first."""
        self._paused_since_s = time.monotonic()

    def resume_writing(self) -> None:
        """Go on with what was left unread."""
        self._paused_since_s = 0.0
        self._read_on()

    # -- requests --------------------------------------------------------------------------

    def _read_on(self) -> None:
        reader = self._reader
        served = False
        try:
            while self._transport is not None and not self._must_wait():
                body = reader.next()
                if body is None:
                    break
                self._serve(body)
                served = True
                del body  # a view would keep the reader's buffer from growing
                if self._out_bytes >= FLUSH_BYTES:
                    self._flush()
        except FrameError as error:
            self._give_up("a client sent what is no frame", detail=str(error))
            return
        if self._out:
            self._flush()
        held = reader.held_bytes
        self._hold(held)
        if self._server.partial_bytes > PARTIAL_BYTES_MAX:
            self._give_up("half frames take too much memory", limit=PARTIAL_BYTES_MAX)
            return
        if not held or self._must_wait():
            self._partial_since_s = 0.0
        elif served or not self._partial_since_s:
            self._partial_since_s = time.monotonic()
        self._block_or_go_on()

    def _serve(self, body: bytes | bytearray | memoryview) -> None:
        """Handle one request; its reply, if there is one yet, goes to ``_out``."""
        reply = self._reply_to(body)
        if reply is not None and self._transport is not None:
            self._put(reply)

    def _reply_to(self, body: bytes | bytearray | memoryview) -> Reply | None:
        """Handle one request; None: a waiter will answer, or the connection was given up."""
        try:
            request = decode_request(body)
        except DecodeError as error:
            return self._not_understood(body, str(error))
        try:
            return self._table[type(request)](request, self)
        except KamaCacheError as error:
            return failure(request.id, error)
        except Exception as error:
            log.warning("a request failed unexpectedly", exc_info=True)
            return Failure(
                request.id, "KamaCacheError", f"the worker failed: {type(error).__name__}", {}
            )

    def _not_understood(self, body: bytes | bytearray | memoryview, error: str) -> Reply | None:
        request_id = salvage_id(body)
        if not request_id:
            self._give_up("a client sent a frame that is no message", detail=error)
            return None
        log.warning("a client sent a request that is not understood", detail=error)
        return Failure(
            request_id,
            "KamaCacheError",
            f"the worker does not understand this request ({error}); "
            "use one version of kamacache on both sides",
            {},
        )

    # -- replies ---------------------------------------------------------------------------

    def answer(self, reply: Reply) -> None:
        """Send the reply of a load; those of one turn of the loop go out together."""
        if self._transport is None:
            return
        if not self._out:
            self._server.loop.call_soon(self._flush_loads)
        body = encode(reply)
        self._out += (len(body).to_bytes(HEADER_BYTES, "little"), body)
        self._out_bytes += len(body)

    def _put(self, reply: Reply) -> None:
        body = encode(reply)
        self._out.append(len(body).to_bytes(HEADER_BYTES, "little"))
        self._out.append(body)
        self._out_bytes += len(body)

    def _flush(self) -> None:
        transport = self._transport
        out, self._out = self._out, []
        self._out_bytes = 0
        if transport is None:
            return
        transport.write(b"".join(out))
        self._look_at_unread(transport)

    def _flush_loads(self) -> None:
        if self._out:
            self._flush()
        if self._blocked:
            self._read_on()

    # -- bounds ----------------------------------------------------------------------------

    def _must_wait(self) -> bool:
        return self._paused_since_s > 0 or len(self.waiters) >= REQUESTS_PER_CONNECTION_MAX

    def _block_or_go_on(self) -> None:
        if self._transport is None or self._must_wait() == self._blocked:
            return
        self._blocked = not self._blocked
        if self._blocked:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    def _look_at_unread(self, transport: asyncio.Transport) -> None:
        if transport.get_write_buffer_size() > UNREAD_BYTES_MAX:
            self._give_up("a client does not read its replies", limit=UNREAD_BYTES_MAX)

    def _hold(self, count: int) -> None:
        self._server.partial_bytes += count - self._held
        self._held = count

    def check(self, now_s: float) -> None:
        """Cut the client off when it stalls."""
        if self._paused_since_s and now_s - self._paused_since_s > UNREAD_STALL_S:
            self._give_up("a client does not read its replies", stalled_s=UNREAD_STALL_S)
        elif (
            self._partial_since_s
            and not self._blocked
            and now_s - self._partial_since_s > FRAME_STALL_S
        ):
            self._give_up("a client stalls in the middle of a frame", stalled_s=FRAME_STALL_S)

    def close(self) -> None:
        """Close when the replies are written."""
        if self._transport is not None:
            if self._out:
                self._flush()
            if self._transport is not None:
                self._transport.close()

    def abort(self) -> None:
        """Close at once."""
        if self._transport is not None:
            self._transport.abort()
            self._transport = None

    def _give_up(self, message: str, **fields: Any) -> None:
        log.warning(message, **fields)
        self.abort()
