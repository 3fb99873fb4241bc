"""Frames: how a message's bytes are told apart on a stream.

*Process*: all. No escape, no checksum: both ends are on one host and own the socket file::

    0        4                                   4 + length
    +--------+-----------------------------------+
    | length | msgpack body, 1..FRAME_BYTES_MAX  |      length: u32, little-endian
    +--------+-----------------------------------+

*Invariant*: nothing after a length out of bounds can be told apart, so the connection ends there.
"""

from __future__ import annotations

from typing import Any, Final

from kamacache.limits import FRAME_BYTES_MAX
from kamacache.wire import messages

HEADER_BYTES: Final = 4
VIEW_BYTES_MIN: Final = 64 << 10  # below, copying a body is cheaper than two memoryviews of it


class FrameError(ConnectionError):
    """The stream holds no frame where one must begin, or a frame that is no message."""


def frame(message: Any) -> bytes:
    """Return the bytes of a message as a frame.

    Not ``encode_into`` a buffer that is reused: that took 0.88 us for a set of 100 bytes where
    this takes 0.24 us (timeit, CPython 3.11, msgspec 0.22), since growing and cutting a bytearray
    costs more than the copy.
    """
    body = messages.encode(message)
    return len(body).to_bytes(HEADER_BYTES, "little") + body


def body_length(header: bytes | bytearray | memoryview) -> int:
    """Return the length that a frame's first four bytes announce; `FrameError` out of bounds."""
    length = int.from_bytes(header, "little")
    if not 0 < length <= FRAME_BYTES_MAX:
        raise FrameError(f"a frame announces {length} bytes; 1 to {FRAME_BYTES_MAX} are allowed")
    return length


class FrameReader:
    """Cuts what a stream delivers into frames' bodies.

    *Invariants*: holds at most one frame that is not whole, besides what one read delivered and
    the consumer has not taken; a frame that trickles in costs time linear in its length.
    """

    __slots__ = ("_data", "_need", "_pos")

    def __init__(self) -> None:
        self._data: bytes | bytearray = b""  # a bytearray only while a frame trickles in
        self._pos = 0
        self._need = HEADER_BYTES  # bytes from _pos at which it is worth looking again

    @property
    def held_bytes(self) -> int:
        """Bytes that were delivered and not taken as bodies."""
        return len(self._data) - self._pos

    def feed(self, data: bytes) -> None:
        """Take what a read delivered. The last body must not be held any more."""
        held = self._data
        if self._pos == len(held):
            self._data = data
        elif isinstance(held, bytearray):
            if self._pos:
                del held[: self._pos]
            held += data
        else:
            self._data = bytearray(memoryview(held)[self._pos :])
            self._data += data
        self._pos = 0

    def next(self) -> bytes | bytearray | memoryview | None:
        """Return the next whole frame's body, or None; raises `FrameError`."""
        data = self._data
        body = self._pos + HEADER_BYTES
        if len(data) < self._pos + self._need:
            return None
        length = body_length(data[self._pos : body])
        end = body + length
        if len(data) < end:
            self._need = HEADER_BYTES + length
            return None
        self._pos = end
        self._need = HEADER_BYTES
        if length < VIEW_BYTES_MIN:
            return data[body:end]
        return memoryview(data)[body:end]
