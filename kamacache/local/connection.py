"""One blocking connection to a worker: a request out, its reply in, each within the deadline.

*Process*: as `kamacache.local.link`, which owns them. *Invariant*: one request at a time, by one
caller; after any error the connection is of no use any more, and its owner closes it.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable
from typing import Final

from kamacache.limits import CONNECT_TIMEOUT_S, REPLY_GRACE_S
from kamacache.local.exchange import budget_ms, late, unreachable
from kamacache.wire.frames import HEADER_BYTES, FrameError, body_length, frame
from kamacache.wire.messages import DecodeError, Reply, Request, decode_reply

RECEIVE_BYTES: Final = 64 << 10
WAIT_MAX_S: Final = 1.0  # one recv() waits no longer before it looks at deadline and node again
SEND_WAIT_S: Final = 0.1
LOOK_SOON_S: Final = 0.001
_TIMEVAL: Final = struct.Struct("@ll")
_NO_SIGNAL: Final = socket.MSG_NOSIGNAL  # an application may have SIGPIPE at its default


def _timeval(seconds: float) -> bytes:
    us = max(1, int(seconds * 1e6))  # 0 would be for ever
    return _TIMEVAL.pack(us // 1_000_000, us % 1_000_000)


class Link:
    """One connection; one request at a time.

    The socket blocks, with the kernel's SO_RCVTIMEO as alarm clock: ``settimeout`` would make
    Python call poll() before each send and recv, two more system calls for every request.
    """

    __slots__ = ("_answers", "_buffer", "_ids", "_path", "_sock", "_view", "_wait_s", "home")

    def __init__(
        self, path: str, home: list[Link], answers: Callable[[], bool] | None = None
    ) -> None:
        """Connect; raises OSError. Who waits gives up where ``answers`` says that nobody will."""
        self.home: Final = home  # where it lies when idle; a forked child has another list
        self._path = path
        self._answers = answers
        self._ids = 0
        self._buffer = bytearray(RECEIVE_BYTES)
        self._view = memoryview(self._buffer)
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
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
        self._ids = request.id = self._ids + 1
        request.budget_ms = budget_ms(request, deadline_s, shard)
        data = frame(request)
        try:
            sent = self._sock.send(data, _NO_SIGNAL)
        except BlockingIOError:
            sent = 0
        if sent < len(data):
            self._send_rest(memoryview(data)[sent:], request, deadline_s, shard)

    def _send_rest(self, left: memoryview, request: Request, deadline_s: float, shard: int) -> None:
        while left:
            if time.monotonic() >= deadline_s:
                raise late(request.group, shard)
            try:
                left = left[self._sock.send(left, _NO_SIGNAL) :]
            except BlockingIOError:
                self._look(shard)  # SEND_WAIT_S is over

    def receive(self, request: Request, deadline_s: float, shard: int) -> Reply:
        """Return the reply of the request just sent; raises as `send`."""
        # The worker ends late loads itself; only a worker that hangs lets the grace run out.
        give_up_s = deadline_s + REPLY_GRACE_S
        if deadline_s - time.monotonic() + REPLY_GRACE_S < self._wait_s:
            self._wait(give_up_s - time.monotonic())
        count = self._recv(self._view, give_up_s, request, shard)
        while count < HEADER_BYTES:
            count += self._recv(self._view[count:], give_up_s, request, shard)
        end = HEADER_BYTES + body_length(self._view[:HEADER_BYTES])
        if count == end:
            return self._decode(self._view[HEADER_BYTES:end], request)
        if count > end:
            raise FrameError(f"worker {shard} sent more than one reply to one request")
        whole = bytearray(end)
        whole[:count] = self._view[:count]
        with memoryview(whole) as view:
            while count < end:
                count += self._recv(view[count:], give_up_s, request, shard)
            return self._decode(view[HEADER_BYTES:], request)

    def look_soon(self) -> None:
        """Look at the node before the next wait, not after it: another worker's is gone."""
        self._wait(LOOK_SOON_S)

    def close(self) -> None:
        """Close."""
        self._sock.close()

    def _decode(self, body: memoryview, request: Request) -> Reply:
        try:
            reply = decode_reply(body)
        except DecodeError as error:
            raise FrameError(f"a worker's reply is not understood: {error}") from error
        if reply.id != request.id:
            raise FrameError(f"reply {reply.id} came to request {request.id}")
        return reply

    def _recv(self, view: memoryview, give_up_s: float, request: Request, shard: int) -> int:
        while True:
            try:
                count = self._sock.recv_into(view)
            except BlockingIOError:
                left = give_up_s - time.monotonic()
                if left <= 0:
                    raise late(request.group, shard) from None
                self._look(shard)
                self._wait(min(left, WAIT_MAX_S))
                continue
            if not count:
                raise ConnectionResetError(f"worker {shard} closed the connection")
            return count

    def _look(self, shard: int) -> None:
        # A node that stands still, or whose host took it away, closes no socket.
        if self._answers is not None and not self._answers():
            raise unreachable(self._path, shard, None)

    def _wait(self, seconds: float) -> None:
        self._wait_s = seconds
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(seconds))
