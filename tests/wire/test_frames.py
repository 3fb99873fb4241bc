"""Frames cut out of a stream, whatever pieces it comes in."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kamacache.limits import FRAME_BYTES_MAX
from kamacache.wire import messages
from kamacache.wire.frames import VIEW_BYTES_MIN, FrameError, FrameReader, body_length, frame
from kamacache.wire.messages import (
    Delete,
    DeleteMany,
    Done,
    Failure,
    Get,
    GetMany,
    KeyFailure,
    Ping,
    Set,
    SetMany,
    Stats,
    StatsReply,
    Value,
    Values,
    decode_reply,
    decode_request,
    salvage_id,
)

REQUESTS = [
    Get(id=1, group="g", budget_ms=5, depth=2, chain=(("a", b"\xff"), ("b", b"x")), key=b"k"),
    GetMany(id=2, group="g", keys=[b"a", b""]),
    Set(id=3, group="g", key=b"k", value=b"", ttl_ms=None),
    Set(id=3, group="g", key=b"k", value=b"\x00" * 300, ttl_ms=1),
    SetMany(id=4, group="g", items=[(b"a", b"1"), (b"b", b"")], ttl_ms=7),
    Delete(id=5, group="g", key=b"k"),
    DeleteMany(id=6, group="g", keys=[b"k"]),
    Stats(id=7, group="g"),
    Ping(id=8),
]
REPLIES = [
    Value(1, b""),
    Value(1, None),
    Values(2, [b"", None, b"x"], [KeyFailure(1, "LoadError", "no", {"key": b"\xff"})]),
    Done(3, 2),
    StatsReply(4, {"items": 3}),
    Failure(5, "LoadError", "message", {"group": "g", "key": b"\xff", "known": ["a"]}),
]


@pytest.mark.parametrize("message", REQUESTS, ids=lambda message: type(message).__name__)
def test_requests_come_out_as_they_went_in(message: messages.AnyRequest) -> None:
    assert decode_request(frame(message)[4:]) == message


@pytest.mark.parametrize("message", REPLIES, ids=lambda message: type(message).__name__)
def test_replies_come_out_as_they_went_in(message: messages.Reply) -> None:
    assert decode_reply(frame(message)[4:]) == message


@given(
    st.lists(st.binary(min_size=1, max_size=300), max_size=8),
    st.lists(st.integers(min_value=1, max_value=400), min_size=1, max_size=60),
    st.booleans(),
)
def test_any_cutting_of_the_stream_gives_the_same_bodies(
    bodies: list[bytes], cuts: list[int], large: bool
) -> None:
    if large:
        bodies = [body * (VIEW_BYTES_MIN // len(body) + 1) for body in bodies]
    stream = b"".join(len(body).to_bytes(4, "little") + body for body in bodies)
    reader, found, pos, turn = FrameReader(), [], 0, 0
    while pos < len(stream):
        step = cuts[turn % len(cuts)] * (1000 if large else 1)
        turn += 1
        reader.feed(stream[pos : pos + step])
        pos += step
        while (body := reader.next()) is not None:
            found.append(bytes(body))
            del body
    assert found == bodies
    assert reader.held_bytes == 0


@pytest.mark.parametrize("length", [0, FRAME_BYTES_MAX + 1, 0xFFFFFFFF])
def test_a_length_out_of_bounds_is_a_frame_error(length: int) -> None:
    reader = FrameReader()
    reader.feed(length.to_bytes(4, "little"))
    with pytest.raises(FrameError):
        reader.next()


def test_the_largest_length_is_allowed() -> None:
    assert body_length(FRAME_BYTES_MAX.to_bytes(4, "little")) == FRAME_BYTES_MAX


@pytest.mark.parametrize(
    ("body", "found"),
    [
        (messages.encode([99, 7]), 7),
        (messages.encode([99, "x"]), 0),
        (messages.encode(5), 0),
        (b"", 0),
        (b"\xc1", 0),
    ],
)
def test_the_id_of_a_request_that_is_not_understood(body: bytes, found: int) -> None:
    assert salvage_id(body) == found
