"""`kamacache.cluster.stream`: messages are LinkFrames, frames come out as they went in."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kamacache.cluster.stream import LARGE_BYTES, SLOW_WRITE_S, FrameSender, FrameSplitter, pack
from kamacache.limits import FRAME_BYTES_MAX, PEER_BATCH_BYTES
from kamacache.v1.kamacache_pb2 import LinkFrames
from kamacache.wire.frames import FrameError


def framed(body: bytes) -> bytes:
    return len(body).to_bytes(4, "little") + body


@given(st.lists(st.binary(max_size=300), max_size=20))
def test_a_message_is_what_protobuf_makes_of_it(frames: list[bytes]) -> None:
    joined = b"".join(frames)
    message = pack(frames, len(joined))
    assert LinkFrames.FromString(message).frames == joined
    if joined:
        assert LinkFrames(frames=joined).SerializeToString() == message


@given(st.lists(st.binary(min_size=1, max_size=400), max_size=12), st.data())
def test_frames_come_out_whole_however_they_were_cut(
    bodies: list[bytes], data: st.DataObject
) -> None:
    stream = b"".join(map(framed, bodies))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    splitter = FrameSplitter()
    out: list[bytes] = []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        message = LinkFrames(frames=stream[start:end]).SerializeToString()
        out += map(bytes, splitter.bodies(message))
    assert out == bodies


@pytest.mark.parametrize(
    "message",
    [
        b"\x0a",
        b"\x0a\x05abc",
        b"\x0a\x02abc",
        b"\x12\x02ab",
        b"\x0a\xff\xff\xff\xff\xff\xff",
        pack([bytes(4) + b"x"], 5),
        pack([(FRAME_BYTES_MAX + 1).to_bytes(4, "little")], 4),
    ],
)
def test_what_is_no_frame_is_said(message: bytes) -> None:
    with pytest.raises(FrameError):
        list(FrameSplitter().bodies(message))


def test_a_frame_that_is_not_whole_is_counted_and_let_go_of() -> None:
    splitter = FrameSplitter()
    whole = framed(b"body")
    assert list(splitter.bodies(pack([whole, whole[:6]], len(whole) + 6))) == [b"body"]
    assert splitter.held_bytes == 6
    splitter.drop()
    assert splitter.held_bytes == 0
    assert list(splitter.bodies(pack([whole], len(whole)))) == [b"body"]


class Sink:
    """A stream that takes a message when it is let."""

    def __init__(self) -> None:
        self.messages: list[bytes] = []
        self._came = asyncio.Condition()
        self.allowed = asyncio.Semaphore(0)

    async def write(self, message: bytes) -> None:
        async with self._came:
            self.messages.append(message)
            self._came.notify_all()
        await self.allowed.acquire()

    async def until(self, count: int) -> None:
        async with asyncio.timeout(5), self._came:
            await self._came.wait_for(lambda: len(self.messages) >= count)


async def test_what_comes_while_a_message_is_written_goes_out_together() -> None:
    sender, sink = FrameSender(asyncio.get_running_loop()), Sink()
    task = asyncio.create_task(sender.run(sink.write))
    sender.put(b"a")
    sender.put(b"b")
    await sink.until(1)
    for part in (b"c", b"d", b"e"):
        sender.put(part)
        await asyncio.sleep(0)
    assert (sender.handed, sender.waiting_bytes) == (2, 3)
    sink.allowed.release()
    await sink.until(2)
    assert sink.messages == [pack([b"ab"], 2), pack([b"cde"], 3)]
    assert sender.handed == 5
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


async def test_messages_are_bounded_and_a_large_frame_counts_as_handed_with_its_last_part() -> None:
    sender, sink = FrameSender(asyncio.get_running_loop()), Sink()
    large = bytes(range(256)) * (5 * PEER_BATCH_BYTES // 512)  # two and a half messages
    frames = [b"first", large, b"last", bytes(PEER_BATCH_BYTES), b"end"]
    for part in frames:
        sender.put(part)
    task = asyncio.create_task(sender.run(sink.write))
    handed: list[int] = []
    while sender.waiting_bytes:
        await sink.until(len(handed) + 1)
        handed.append(sender.handed)
        sink.allowed.release()
        await asyncio.sleep(0)
    sink.allowed.release()
    await asyncio.wait_for(sender.emptied(), 5)
    parts = [LinkFrames.FromString(message).frames for message in sink.messages]
    assert b"".join(parts) == b"".join(frames)
    assert max(map(len, parts)) == PEER_BATCH_BYTES
    assert handed[:4] == [1, 1, 1, 2]
    assert sender.handed == len(frames)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


async def test_only_a_large_message_that_had_to_wait_shows_progress() -> None:
    sender = FrameSender(asyncio.get_running_loop())
    pause_s = 0.0

    async def write(message: bytes) -> None:
        await asyncio.sleep(pause_s)

    task = asyncio.create_task(sender.run(write))
    sender.put(bytes(LARGE_BYTES))
    await asyncio.wait_for(sender.emptied(), 5)
    pause_s = SLOW_WRITE_S * 2
    sender.put(bytes(10))
    await asyncio.wait_for(sender.emptied(), 5)
    assert not sender.progressed
    sender.put(bytes(LARGE_BYTES))
    await asyncio.wait_for(sender.emptied(), 5)
    assert sender.progressed
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


async def test_who_waits_for_room_goes_on_when_enough_is_written() -> None:
    sender, sink = FrameSender(asyncio.get_running_loop()), Sink()
    sender.put(bytes(100))
    waiting = asyncio.create_task(sender.room(50))
    await asyncio.sleep(0)
    assert not waiting.done()
    task = asyncio.create_task(sender.run(sink.write))
    sink.allowed.release()
    await asyncio.wait_for(waiting, 5)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
