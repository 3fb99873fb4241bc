"""One blocking connection to a worker: a request out, its reply in, each within the deadline.

*Process*: as `kamacache.local.link`, which owns them. *Invariant*: one request at a time, by one
caller; after any error the connection is of no use any more, and its owner closes it.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable
from time import monotonic
from typing import Final

from kamacache.limits import CONNECT_TIMEOUT_S, REPLY_GRACE_S
from kamacache.local.exchange import late, unreachable
from kamacache.wire.frames import HEADER_BYTES, FrameError, body_length
from kamacache.wire.messages import DecodeError, Reply, Request, decode_reply, encode

RECEIVE_BYTES: Final = 64 << 10
WAIT_MAX_S: Final = 1.0  # one recv() waits no longer before it looks at deadline and node again
SEND_WAIT_S: Final = 0.1
LOOK_SOON_S: Final = 0.001
_TIMEVAL: Final = struct.Struct("@ll")
from_bytes: Final = int.from_bytes
_NO_SIGNAL: Final = socket.MSG_NOSIGNAL  # an application may have SIGPIPE at its default


def _closed(shard: int) -> ConnectionResetError:
    return ConnectionResetError(f"worker {shard} closed the connection")


def _timeval(seconds: float) -> bytes:
    us = max(1, int(seconds * 1e6))  # 0 would be for ever
    return _TIMEVAL.pack(us // 1_000_000, us % 1_000_000)


class Link:
    """One connection; one request at a time.

    The socket blocks, with the kernel's SO_RCVTIMEO as alarm clock: ``settimeout`` would make
    Python call poll() before each send and recv, two more system calls for every request.
    """

    __slots__ = (
        "_answers",
        "_buffer",
        "_head",
        "_ids",
        "_path",
        "_recv_into",
        "_send",
        "_sock",
        "_view",
        "_wait_s",
        "home",
        "sent",
    )

    def __init__(
        self, path: str, home: list[Link], answers: Callable[[], bool] | None = None
    ) -> None:
        """Connect; raises OSError. Who waits gives up where ``answers`` says that nobody will."""
        self.home: Final = home  # where it lies when idle; a forked child has another list
        self._path = path
        self._answers = answers
        self._ids = 0
        self.sent = False  # the last request, whole
        self._buffer = bytearray(RECEIVE_BYTES)
        self._view = memoryview(self._buffer)
        self._head = self._view[:HEADER_BYTES]
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._send: Final = self._sock.send
        self._recv_into: Final = self._sock.recv_into
        try:
            sock = self._sock
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(CONNECT_TIMEOUT_S))
            sock.connect(path)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(SEND_WAIT_S))
            self._wait(WAIT_MAX_S)
        except BaseException:
            self._sock.close()
            raise

    def send(self, request: Request, deadline_s: float, shard: int) -> None:
        """Send a request whole. Raises `DeadlineExceededError`, `NodeUnavailableError`, OSError."""
        left_s = deadline_s - monotonic()
        if left_s <= 0:
            raise late(request.group, shard)
        self.sent = False
        self._ids = request.id = self._ids + 1
        request.budget_ms = int(left_s * 1000) + 1
        if left_s + REPLY_GRACE_S < self._wait_s:
            self.limit_wait(deadline_s)
        body = encode(request)
        data = len(body).to_bytes(HEADER_BYTES, "little") + body
        try:
            count = self._send(data, _NO_SIGNAL)
        except BlockingIOError:
            count = 0
        if count < len(data):
            self._send_rest(memoryview(data)[count:], request, deadline_s, shard)
        self.sent = True

    def _send_rest(self, left: memoryview, request: Request, deadline_s: float, shard: int) -> None:
        while left:
            if monotonic() >= deadline_s:
                raise late(request.group, shard)
            try:
                left = left[self._sock.send(left, _NO_SIGNAL) :]
            except BlockingIOError:
                self._look(shard)  # SEND_WAIT_S is over

    def receive(self, request: Request, deadline_s: float, shard: int) -> Reply:
        """Return the reply of the request just sent; raises as `send`."""
        try:
            count = self._recv_into(self._buffer)
        except BlockingIOError:
            count = self._recv(self._view, deadline_s, request, shard, waited=True)
        if count < HEADER_BYTES or from_bytes(self._head, "little") != count - HEADER_BYTES:
            body = self._receive_rest(count, request, deadline_s, shard)
        else:
            body = self._view[HEADER_BYTES:count]
        try:
            reply = decode_reply(body)
        except DecodeError as error:
            raise FrameError(f"a worker's reply is not understood: {error}") from error
        if reply.id != request.id:
            raise FrameError(f"reply {reply.id} came to request {request.id}")
        return reply

    def _receive_rest(
        self, count: int, request: Request, deadline_s: float, shard: int
    ) -> memoryview:
        if not count:
            raise _closed(shard)
        while count < HEADER_BYTES:
            count += self._recv(self._view[count:], deadline_s, request, shard)
        end = HEADER_BYTES + body_length(self._head)
        if count > end:
            raise FrameError(f"worker {shard} sent more than one reply to one request")
        view = self._view
        if end > len(view):
            view = memoryview(bytearray(end))
            view[:count] = self._view[:count]
        while count < end:
            count += self._recv(view[count:end], deadline_s, request, shard)
        return view[HEADER_BYTES:end]

    def limit_wait(self, deadline_s: float) -> None:
        """Wait no longer than until the deadline; for who receives long after he sent."""
        left_s = deadline_s + REPLY_GRACE_S - monotonic()
        if left_s < self._wait_s:
            self._wait(left_s)

    def look_soon(self) -> None:
        """Look at the node before the next wait, not after it: another worker's is gone."""
        self._wait(LOOK_SOON_S)

    def close(self) -> None:
        """Close."""
        self._sock.close()

    def _recv(
        self,
        view: memoryview,
        deadline_s: float,
        request: Request,
        shard: int,
        *,
        waited: bool = False,
    ) -> int:
        """Receive something; ``waited`` tells that one wait is over already."""
        while True:
            if waited:
                # The worker ends late loads itself; only one that hangs lets the grace run out.
                left_s = deadline_s + REPLY_GRACE_S - monotonic()
                if left_s <= 0:
                    raise late(request.group, shard)
                self._look(shard)
                self._wait(min(left_s, WAIT_MAX_S))
            try:
                count = self._recv_into(view)
            except BlockingIOError:
                waited = True
                continue
            if not count:
                raise _closed(shard)
            return count

    def _look(self, shard: int) -> None:
        # A node that stands still, or whose host took it away, closes no socket.
        if self._answers is not None and not self._answers():
            raise unreachable(self._path, shard, None)

    def _wait(self, seconds: float) -> None:
        self._wait_s = seconds
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(seconds))
