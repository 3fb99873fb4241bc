"""How frames travel over a peer link: many in one message, large ones in several.

*Process*: worker (asking side) and front (answering side).

The messages of one direction of a stream are its bytes, cut anywhere. Each is a protobuf
``LinkFrames``: one field, of type bytes, so that its encoding is three parts and needs no library::

    0a | length, a varint | up to PEER_BATCH_BYTES of frames as in `kamacache.wire.frames`

*Why coalesced*: a message costs some 100 us on each side, whatever it holds, and a frame 2 us.
While one message is being written, what comes up waits, and goes out in the next together.

*Why cut*: a message is heard of when it is whole. A value of 16 MiB in one would look like silence
for longer than `PEER_SILENCE_S` on a line of 100 Mbit/s, and so would what waits behind it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from itertools import chain
from typing import Final

from kamacache.limits import PEER_BATCH_BYTES
from kamacache.wire.frames import HEADER_BYTES, FrameError, FrameReader
from kamacache.wire.messages import Body

LINK_METHOD: Final = "/kamacache.v1.Peers/Link"

LARGE_BYTES: Final = 64 << 10
SLOW_WRITE_S: Final = 0.02

_TAG: Final = 0x0A  # field 1, length-delimited


def pack(frames: list[bytes], size_bytes: int) -> bytes:
    """Return frames of together ``size_bytes`` as one message."""
    head = bytearray((_TAG,))
    while size_bytes > 0x7F:
        head.append(size_bytes & 0x7F | 0x80)
        size_bytes >>= 7
    head.append(size_bytes)
    return b"".join((head, *frames))


class FrameSplitter:
    """Cuts the messages of one direction of a stream into frames' bodies."""

    __slots__ = ("_holds", "_reader")

    def __init__(self) -> None:
        self._reader = FrameReader()  # of frames that go on in the next message
        self._holds = False

    @property
    def held_bytes(self) -> int:
        """Bytes of a frame that is not whole."""
        return self._reader.held_bytes

    def drop(self) -> None:
        """Let go of a frame that will not become whole."""
        self._reader = FrameReader()
        self._holds = False

    def bodies(self, message: bytes) -> Iterable[Body]:
        """Return what a message makes whole; each is let go of before the next is asked for.

        Raises `FrameError` where the message is none of frames.
        """
        end = len(message)
        if 2 < end < 0x80 and message[0] == _TAG and message[1] == end - 2:
            at = 2  # what `_start` returns for a short one
        else:
            at = _start(message)
        if self._holds:
            return self._joined(message[at:])
        whole: list[Body] = []
        while at + HEADER_BYTES <= end:
            after = at + HEADER_BYTES + int.from_bytes(message[at : at + HEADER_BYTES], "little")
            if after > end or after == at + HEADER_BYTES:
                break
            whole.append(message[at + HEADER_BYTES : after])
            at = after
        return whole if at == end else chain(whole, self._joined(message[at:]))

    def _joined(self, data: bytes) -> Iterator[Body]:
        """Yield what becomes whole of a frame that began before."""
        reader = self._reader
        reader.feed(data)
        self._holds = True
        while (body := reader.next()) is not None:
            yield body
            del body  # a view would keep the reader's buffer from growing
        self._holds = reader.held_bytes > 0


def _start(message: bytes) -> int:
    """Return where the frames in a message begin."""
    if not message:
        return 0
    length = shift = 0
    if message[0] == _TAG:
        for at, byte in enumerate(message[1:6], 2):
            length |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                if at + length == len(message):
                    return at
                break
    raise FrameError("a peer's message is no LinkFrames")


class FrameSender:
    """What waits to be written to one stream, and the task that writes it.

    *Invariants*: frames leave in the order of `put`; one message is under way at a time.
    """

    __slots__ = (
        "_cut",
        "_frames",
        "_idle",
        "_loop",
        "_room",
        "_writing",
        "bytes_written",
        "handed",
        "messages",
        "progressed",
        "waiting_bytes",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop: Final = loop
        self._frames: list[bytes] = []
        self._cut: memoryview | None = None  # what is left of a frame larger than a message
        self._idle: asyncio.Future[None] | None = None  # the writing task waits for it
        self._room: asyncio.Future[None] | None = None  # who waits for `waiting_bytes` to shrink
        self._writing = False
        self.waiting_bytes = 0
        self.handed = 0  # frames of which all bytes were given to the stream
        self.messages = 0
        self.bytes_written = 0
        self.progressed = False  # set when a write shows that the other side reads

    def put(self, frame: bytes) -> None:
        """Let a frame be written, together with all others of this turn of the loop."""
        self._frames.append(frame)
        self.waiting_bytes += len(frame)
        idle = self._idle
        if idle is not None:
            self._idle = None
            if not idle.done():
                idle.set_result(None)

    async def run(self, write: Callable[[bytes], Awaitable[None]]) -> None:
        """Write what is put, until cancelled or the stream breaks."""
        while True:
            if not self.waiting_bytes:
                self._idle = self._loop.create_future()
                await self._idle
            message = self.next_message()
            self._writing = True
            if len(message) < LARGE_BYTES:
                await write(message)
            else:
                begin_s = time.monotonic()
                await write(message)
                # It had to wait for flow control, so the other side took some: it is not silent.
                if time.monotonic() - begin_s > SLOW_WRITE_S:
                    self.progressed = True
            self._writing = False
            self.messages += 1
            self.bytes_written += len(message)
            room = self._room
            if room is not None:
                self._room = None
                if not room.done():
                    room.set_result(None)

    async def room(self, waiting_bytes_max: int) -> None:
        """Wait until no more than this many bytes wait to be written. For one caller."""
        while self.waiting_bytes > waiting_bytes_max:
            self._room = self._loop.create_future()
            await self._room

    async def emptied(self) -> None:
        """Wait until all is written. For one caller, which must put nothing meanwhile."""
        while self.waiting_bytes or self._writing:
            self._room = self._loop.create_future()
            await self._room

    def next_message(self) -> bytes:
        frames = self._frames
        if self.waiting_bytes <= PEER_BATCH_BYTES and self._cut is None:
            size_bytes, self.waiting_bytes = self.waiting_bytes, 0
            self._frames = []
            self.handed += len(frames)
            return pack(frames, size_bytes)
        if self._cut is None and len(frames[0]) > PEER_BATCH_BYTES:
            self._cut = memoryview(frames.pop(0))
        if self._cut is not None:
            part, self._cut = self._cut[:PEER_BATCH_BYTES], self._cut[PEER_BATCH_BYTES:]
            self.waiting_bytes -= len(part)
            if not self._cut:
                self._cut = None
                self.handed += 1
            return pack([bytes(part)], len(part))
        count = size_bytes = 0
        for frame in frames:
            if size_bytes + len(frame) > PEER_BATCH_BYTES:
                break
            count += 1
            size_bytes += len(frame)
        message = pack(frames[:count], size_bytes)
        del frames[:count]
        self.handed += count
        self.waiting_bytes -= size_bytes
        return message
