"""Bytes that are no peer's: on a stream of the `Peers` service, before a proof and without one."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kamacache.cluster.proving import Trust
from kamacache.cluster.stream import FrameSplitter, pack
from kamacache.wire.frames import FrameError
from kamacache.wire.messages import DecodeError, Get, Hello, Proof, Value, decode_request, encode
from tests.front.test_proving import (
    GROUP,
    OLD,
    Front,
    Stream,
    ask,
    fronting,
    hello,
    linking,
    proof_of,
)

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.binary(max_size=9),
    lambda inner: st.lists(inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.binary(max_size=40) | VALUES.map(encode), max_size=5), st.booleans())
def test_a_message_is_frames_of_requests_or_one_of_two_errors(
    parts: list[bytes], packed: bool
) -> None:
    frames = FrameSplitter()
    for part in parts:
        framed = len(part).to_bytes(4, "little") + part if packed else part
        try:
            for body in frames.bodies(pack([framed], len(framed)) if packed else part):
                decode_request(body)
                del body
        except (FrameError, DecodeError):
            return


def junk(draw: random.Random, said: Hello) -> bytes:
    """Return one message: bytes, a message of bytes, or frames of what is nearly a request."""
    kind = draw.randrange(4)
    if kind == 0:
        return draw.randbytes(draw.randrange(200))
    if kind == 1:
        part = draw.randbytes(draw.randrange(200))
        return pack([part], len(part))
    body = bytearray(
        encode(draw.choice((said, Proof(proof=b"x" * 32), Get(group=GROUP, key=b"k"))))
    )
    for _ in range(draw.randrange(3)):
        body[draw.randrange(len(body))] = draw.randrange(256)
    part = len(body).to_bytes(4, "little") + body[: draw.randrange(1, len(body) + 1)]
    return pack([part], len(part))


async def throw(front: Front, draw: random.Random, count: int, *, proven: bool) -> None:
    async with grpc.aio.insecure_channel(front.address) as channel:
        for _ in range(count):
            said = hello(front, nonce=b"n" * 32 if front.trust.secrets else b"")
            stream = Stream(channel)
            try:
                if proven and front.trust.secrets:
                    await stream.say(await proof_of(stream, said))
                elif proven:
                    await stream.say(said)
                for _ in range(draw.randrange(1, 4)):
                    await stream.call.write(junk(draw, said))
                await stream.call.done_writing()
                while await stream.call.read() is not grpc.aio.EOF:
                    pass
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                continue  # it was ended while we wrote


@pytest.mark.parametrize("secrets", [None, OLD])
@pytest.mark.parametrize("proven", [False, True])
async def test_garbage_on_a_link_harms_nobody(secrets: Any, proven: bool) -> None:
    async with fronting(secrets, proof_s=1.0) as front:
        await throw(front, random.Random(7), 40, proven=proven)
        if not proven and secrets is not None:
            assert not front.worker.asked
        async with linking(front.address, Trust(secrets)) as link:
            assert isinstance(await ask(link, Get(group=GROUP, key=b"k")), Value)
        assert front.peers.porter.unproven == 0
        assert front.peers.partial_bytes == 0
