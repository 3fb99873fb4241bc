"""`kamacache.front.peers`: hits answered at once, the rest by workers, streams that end well.

The shard and the workers are this process's own; tests/integration/test_peer_link.py has real ones.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from kamacache.clock import boottime_ms
from kamacache.cluster.exchange import Outcome
from kamacache.cluster.link import LinkEnd, PeerLink
from kamacache.cluster.stream import LINK_METHOD, FrameSplitter, pack
from kamacache.errors import NodeUnavailableError
from kamacache.front.peers import PeersServicer
from kamacache.front.server import FrontServer
from kamacache.front.settings import FrontSettings
from kamacache.rundir.description import NodeDescription
from kamacache.wire.frames import frame
from kamacache.wire.messages import (
    FROM_PEER,
    PEEK,
    PEER_FORMAT,
    Answers,
    Delete,
    DeleteMany,
    Done,
    Draining,
    Failure,
    Flush,
    Get,
    GetMany,
    Gets,
    Hello,
    Invalidate,
    PeerSeen,
    Ping,
    Reply,
    Request,
    Set,
    SetMany,
    Stats,
    Value,
    Values,
    Welcome,
    decode_reply,
)
from kamacache.wire.parts import answered
from tests.front.engines import ShardEngine

WAIT_S = 10.0
NAME = "10.0.0.1:8001"
GROUP = "scores"

Handle = Callable[[Request], Awaitable[Reply]]


class Worker:
    """Stands where a worker's links stand; notes what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.handle: Handle | None = None

    async def ask(self, request: Request, deadline_s: float) -> Reply:
        self.asked.append(request)
        if self.handle is not None:
            return await self.handle(request)
        if isinstance(request, Get):
            return Value(77, b"loaded " + request.key, 50, 60)
        if isinstance(request, GetMany):
            return Values(
                77, [b"loaded " + key for key in request.keys], [], [5] * len(request.keys), []
            )
        return Done(77, 1, 40)

    async def ask_each(
        self, request: Gets, deadline_s: float, part: Callable[[Answers], None]
    ) -> Reply | None:
        self.asked.append(request)
        if self.handle is not None:
            return await self.handle(request)
        for index in reversed(range(len(request.keys))):  # each for itself, and the last first
            part(Answers(77, [b"loaded " + request.keys[index]], [index], [], [5], [6]))
            await asyncio.sleep(0)
        return None


class Front:
    """A front that answers peers, its one worker, and its shard."""

    def __init__(self, **more: Any) -> None:
        self.engine = ShardEngine(GROUP)
        self.worker = Worker()
        about = NodeDescription(
            format=1,
            epoch="the front's life",
            pid=1,
            boot_id="",
            workers=1,
            hash_seed=self.engine.writer._seed,
            shm_dir="",
            sockets_dir="",
            groups=[],
            listen=None,
            version="",
            name=NAME,
            clustered=True,
        )
        self.peers = PeersServicer({GROUP: self.engine}, [self.worker], about, **more)
        self.server = FrontServer(
            {GROUP: self.engine},
            FrontSettings(listen="127.0.0.1:0", drain_timeout_s=30.0),
            peers=self.peers,
        )


@pytest.fixture
async def front() -> AsyncIterator[Front]:
    found = Front()
    await found.server.start()
    yield found
    await found.server.stop()
    found.engine.writer.close()


@asynccontextmanager
async def linked(front: Front) -> AsyncIterator[PeerLink]:
    """A link of another node's worker."""
    ticks = iter(range(1, 1_000_000))
    link = PeerLink(
        f"127.0.0.1:{front.server.port}",
        LinkEnd("10.0.0.2:8001", "another life", 0),
        asyncio.get_running_loop(),
        clock=lambda: next(ticks),
        on_change=lambda link: None,
    )
    link.start()
    try:
        await asyncio.wait_for(link.wait_settled(), WAIT_S)
        yield link
    finally:
        await asyncio.wait_for(link.close(), WAIT_S)


async def ask(link: PeerLink, request: Request) -> Outcome:
    answered: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
    link.send(request, answered.set_result, time.monotonic() + WAIT_S)
    return await asyncio.wait_for(answered, 2 * WAIT_S)


async def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, "not within the deadline"
        await asyncio.sleep(0.002)


class RawStream:
    """A stream whose every message is the test's."""

    def __init__(self, channel: Any) -> None:
        self._channel = channel
        self._made: Any = None
        self._splitter = FrameSplitter()
        self._heard: list[Reply] = []

    @property
    def _call(self) -> Any:
        if self._made is None:  # a call is under way from when it is made
            self._made = self._channel.stream_stream(LINK_METHOD)()
        return self._made

    async def send(self, *requests: Request) -> None:
        frames = b"".join([frame(request) for request in requests])
        await self._call.write(pack([frames], len(frames)))

    async def send_bytes(self, message: bytes) -> None:
        await self._call.write(message)

    async def hear(self) -> Reply | None:
        """Return the next reply; None: the stream has ended."""
        while not self._heard:
            message = await asyncio.wait_for(self._call.read(), WAIT_S)
            if message is grpc.aio.EOF:
                return None
            self._heard += map(decode_reply, self._splitter.bodies(message))
        return self._heard.pop(0)


@asynccontextmanager
async def raw(front: Front) -> AsyncIterator[RawStream]:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{front.server.port}") as channel:
        yield RawStream(channel)


def hello(**more: Any) -> Hello:
    return Hello(format=PEER_FORMAT, node="10.0.0.2:8001", node_id="x", worker=1, peer=NAME, **more)


async def test_a_hit_is_answered_from_memory_with_ttl_and_version_and_is_counted(
    front: Front,
) -> None:
    front.engine.writer.put(b"plain", b"1")
    front.engine.writer.put(b"expires", b"2", boottime_ms() + 60_000)
    async with linked(front) as link:
        plain = await ask(link, Get(group=GROUP, key=b"plain"))
        expires = await ask(link, Get(group=GROUP, key=b"expires"))
    assert isinstance(plain, Value)
    assert isinstance(expires, Value)
    assert (plain.value, plain.ttl_ms, expires.value) == (b"1", 0, b"2")
    assert 50_000 < expires.ttl_ms <= 60_000
    assert 0 < plain.version < expires.version
    assert not [r for r in front.worker.asked if not isinstance(r, PeerSeen)]


async def test_a_miss_goes_to_its_worker_marked_and_comes_back_under_its_own_id(
    front: Front,
) -> None:
    async with linked(front) as link:
        gets = [Get(group=GROUP, key=b"%d" % number, depth=2) for number in range(100)]
        replies = await asyncio.gather(*(ask(link, get) for get in gets))
    assert replies == [
        Value(number + 1, b"loaded %d" % number, 50, 60) for number in range(len(gets))
    ]
    asked = [request for request in front.worker.asked if isinstance(request, Get)]
    assert len(asked) == 100
    assert {(r.flags & FROM_PEER, r.depth) for r in asked} == {(FROM_PEER, 2)}
    assert all(request.sent for request in asked)


async def test_many_keys_are_joined_of_hits_and_what_the_worker_had(front: Front) -> None:
    front.engine.writer.put(b"a", b"1")
    async with linked(front) as link:
        reply = await ask(link, GetMany(group=GROUP, keys=[b"x", b"a", b"x", b"y"]))
        hits = await ask(link, GetMany(group=GROUP, keys=[b"a"]))
    assert isinstance(reply, Values)
    assert reply.values == [b"loaded x", b"1", b"loaded x", b"loaded y"]
    assert isinstance(hits, Values)
    assert hits.values == [b"1"]
    assert hits.versions[0] > 0
    asked = [request.keys for request in front.worker.asked if isinstance(request, GetMany)]
    assert asked == [[b"x", b"y"]]


async def answers_to(link: PeerLink, request: Gets) -> list[Outcome]:
    """Return all that comes, in its order."""
    heard: list[Outcome] = []
    left = len(request.keys)
    ended = asyncio.Event()

    def take(outcome: Outcome) -> None:
        nonlocal left
        heard.append(outcome)
        left -= len(answered(outcome)) if isinstance(outcome, Answers) else left
        if left <= 0:
            ended.set()

    link.send(request, take, time.monotonic() + WAIT_S)
    await asyncio.wait_for(ended.wait(), WAIT_S)
    return heard


async def test_gets_that_are_hits_are_one_answer(front: Front) -> None:
    front.engine.writer.put(b"a", b"1")
    front.engine.writer.put(b"b", b"2", boottime_ms() + 60_000)
    async with linked(front) as link:
        (reply,) = await answers_to(link, Gets(group=GROUP, keys=[b"b", b"a", b"b"]))
    assert isinstance(reply, Answers)
    assert (reply.values, reply.at, reply.errors) == ([b"2", b"1", b"2"], [], [])
    assert reply.ttls[1] == 0 < min(reply.ttls[0], reply.ttls[2])
    assert 0 < reply.versions[1] < reply.versions[0] == reply.versions[2]
    assert not [r for r in front.worker.asked if not isinstance(r, PeerSeen)]


async def test_gets_that_are_hits_do_not_wait_for_those_that_are_none(front: Front) -> None:
    front.engine.writer.put(b"a", b"1")
    async with linked(front) as link:
        heard = await answers_to(link, Gets(group=GROUP, depth=2, keys=[b"x", b"a", b"y"]))
    found: dict[int, bytes | None] = {}
    for reply in heard:
        assert isinstance(reply, Answers)
        found.update(zip(reply.at, reply.values, strict=True))
    assert found == {0: b"loaded x", 1: b"1", 2: b"loaded y"}
    assert isinstance(heard[0], Answers)
    assert heard[0].at == [1]
    (asked,) = [request for request in front.worker.asked if isinstance(request, Gets)]
    assert (asked.keys, asked.flags, asked.depth) == ([b"x", b"y"], FROM_PEER, 2)
    assert asked.sent


async def test_gets_that_a_worker_fails_have_its_error_each(front: Front) -> None:
    front.engine.writer.put(b"a", b"1")

    async def stopping(request: Request) -> Reply:
        return Failure(77, "NodeUnavailableError", "the node is stopping", {})

    async def gone(request: Request) -> Reply:
        raise NodeUnavailableError("worker 0 cannot be reached", shard=0)

    async def defect(request: Request) -> Reply:
        raise RuntimeError

    kinds = ("NodeUnavailableError", "NodeUnavailableError", "KamaCacheError")
    async with linked(front) as link:
        for handle, kind in zip((stopping, gone, defect), kinds, strict=True):
            front.worker.handle = handle
            request = Gets(group=GROUP, keys=[b"x", b"a", b"y"])
            hit, failed = await answers_to(link, request)
            assert isinstance(hit, Answers)
            assert isinstance(failed, Answers)
            assert (hit.values, hit.at) == ([b"1"], [1])
            assert sorted((e.index, e.kind) for e in failed.errors) == [(0, kind), (2, kind)]
        assert link.usable


async def test_gets_behind_an_invalidation_wait_for_it(front: Front) -> None:
    front.engine.writer.put(b"a", b"old")
    front.engine.writer.put(b"b", b"other")
    gate = asyncio.Event()

    async def handle(request: Request) -> Reply:
        await gate.wait()
        return Done(77, 1, 40)

    async with linked(front) as link:
        front.worker.handle = handle
        link.invalidate(GROUP, [(b"a", front.engine.writer.now())])
        await until(lambda: any(isinstance(r, Invalidate) for r in front.worker.asked))
        front.worker.handle = None
        asking = asyncio.ensure_future(answers_to(link, Gets(group=GROUP, keys=[b"a", b"b"])))
        await until(lambda: link.stats()["pending"])
        await ask(link, Get(group=GROUP, key=b"b"))  # what was sent before it was read
        assert not any(isinstance(request, Gets) for request in front.worker.asked)
        gate.set()
        other, late = await asking
    assert isinstance(other, Answers)
    assert isinstance(late, Answers)
    assert (other.values, other.at) == ([b"other"], [1])
    assert (late.values, late.at) == ([b"loaded a"], [0])


async def test_a_peek_is_the_workers_to_answer(front: Front) -> None:
    """It knows a mirror from what it owned."""
    front.engine.writer.put(b"a", b"1")
    async with linked(front) as link:
        await ask(link, Get(group=GROUP, key=b"a", flags=PEEK))
        many = await ask(link, GetMany(group=GROUP, keys=[b"a"], flags=PEEK))
    assert isinstance(many, Failure)
    (asked,) = [request for request in front.worker.asked if not isinstance(request, PeerSeen)]
    assert isinstance(asked, Get)
    assert asked.flags == PEEK | FROM_PEER


async def test_what_a_peer_asks_behind_its_invalidation_waits_for_it(front: Front) -> None:
    front.engine.writer.put(b"a", b"old")
    front.engine.writer.put(b"b", b"other")
    gate = asyncio.Event()

    async def handle(request: Request) -> Reply:
        if isinstance(request, Invalidate):
            await gate.wait()
            return Done(77, 1, 40)
        if isinstance(request, GetMany):
            return Values(77, [b"loaded " + key for key in request.keys], [], [5], [6])
        return Value(77, b"loaded a", 50, 60)

    front.worker.handle = handle
    async with linked(front) as link:
        link.invalidate(GROUP, [(b"a", front.engine.writer.now())])
        await until(lambda: any(isinstance(r, Invalidate) for r in front.worker.asked))
        one = asyncio.ensure_future(ask(link, Get(group=GROUP, key=b"a")))
        many = asyncio.ensure_future(ask(link, GetMany(group=GROUP, keys=[b"a", b"b"])))
        other = await ask(link, Get(group=GROUP, key=b"b"))
        assert isinstance(other, Value)
        assert other.value == b"other"
        assert not one.done()
        gate.set()
        found, both = await one, await many
    assert isinstance(found, Value)
    assert found.value == b"loaded a"
    assert isinstance(both, Values)
    assert both.values == [b"loaded a", b"other"]


async def test_writes_and_invalidations_go_to_the_workers(front: Front) -> None:
    async with linked(front) as link:
        requests = [
            Set(group=GROUP, key=b"k", value=b"v", ttl_ms=5),
            Delete(group=GROUP, key=b"k"),
            SetMany(group=GROUP, items=[(b"k", b"v")]),
            DeleteMany(group=GROUP, keys=[b"k"]),
            Invalidate(group=GROUP, items=[(b"k", 3)]),
            Flush(group=GROUP, version=4),
        ]
        for request in requests:
            reply = await ask(link, request)
            assert isinstance(reply, Done)
            assert (reply.id, reply.count, reply.version) == (request.id, 1, 40)
    asked = [request for request in front.worker.asked if not isinstance(request, PeerSeen)]
    assert [type(request) for request in asked] == [type(request) for request in requests]


async def test_failures_are_passed_on_and_harm_no_other(front: Front) -> None:
    async def handle(request: Request) -> Reply:
        if isinstance(request, Get) and request.key == b"drains":
            return Failure(77, "NodeUnavailableError", "the node is stopping", {})
        if isinstance(request, Get) and request.key == b"gone":
            raise NodeUnavailableError("worker 0 cannot be reached", shard=0)
        if isinstance(request, Get) and request.key == b"defect":
            raise RuntimeError("a defect")
        return Done(77, 1)

    front.worker.handle = handle
    async with linked(front) as link:
        keys = (b"drains", b"gone", b"defect")
        replies = await asyncio.gather(
            *(ask(link, Get(group=GROUP, key=key)) for key in keys),
            ask(link, Delete(group=GROUP, key=b"k")),
            ask(link, Stats(group=GROUP)),
        )
        assert [getattr(reply, "kind", None) for reply in replies] == [
            "NodeUnavailableError",
            "NodeUnavailableError",
            "KamaCacheError",
            None,
            "KamaCacheError",
        ]
        assert link.usable


async def test_the_workers_are_told_once_of_a_node_that_says_hello(front: Front) -> None:
    async with raw(front) as first, raw(front) as second:
        for stream in (first, second):
            await stream.send(hello())
            welcome = await stream.hear()
            assert isinstance(welcome, Welcome)
            assert (welcome.node, welcome.node_id) == (NAME, "the front's life")
            assert (welcome.format, welcome.draining) == (PEER_FORMAT, False)
        await until(lambda: front.worker.asked)
        assert [request.peer for request in front.worker.asked] == ["10.0.0.2:8001"]


async def test_a_ping_is_answered_though_the_workers_hang(front: Front) -> None:
    async def hang(request: Request) -> Reply:
        await asyncio.Event().wait()
        raise AssertionError

    front.worker.handle = hang
    async with raw(front) as stream:
        await stream.send(hello(), Get(group=GROUP, key=b"k", id=1, budget_ms=9_000), Ping(id=2))
        assert isinstance(await stream.hear(), Welcome)
        assert await stream.hear() == Done(2, 0)


@pytest.mark.parametrize(
    "message",
    [b"no message", b"\x0a\x05\xff\xff\xff\xffx", b"\x0a\x05\x01\0\0\0x"],
)
async def test_garbage_ends_its_stream_alone_with_a_line_in_the_log(
    front: Front, message: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with linked(front) as link:
        async with raw(front) as stream:
            await stream.send(hello())
            assert isinstance(await stream.hear(), Welcome)
            await stream.send_bytes(message)
            assert await stream.hear() is None
        assert isinstance(await ask(link, Get(group=GROUP, key=b"k")), Value)
        assert link.stats()["connects"] == 1
    assert "a peer sent what is no frame" in caplog.text


async def test_half_frames_of_all_streams_together_are_bounded_and_let_go_of(
    front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kamacache.front.peer_stream.PARTIAL_BYTES_MAX", 3_000)
    half = (2_000).to_bytes(4, "little") + bytes(1_800)
    async with linked(front) as link:
        async with raw(front) as first, raw(front) as second:
            for stream in (first, second):
                await stream.send(hello())
                assert isinstance(await stream.hear(), Welcome)
            await first.send_bytes(pack([half], len(half)))
            await until(lambda: front.peers.partial_bytes == len(half))
            await second.send_bytes(pack([half], len(half)))
            assert await second.hear() is None
            await first.send_bytes(pack([bytes(200)], 200))  # whole now, and no message
            assert await first.hear() is None
        await until(lambda: not front.peers.partial_bytes)
        assert isinstance(await ask(link, Get(group=GROUP, key=b"k")), Value)
        assert link.stats()["connects"] == 1


async def test_who_does_not_say_hello_first_is_not_answered(front: Front) -> None:
    async with raw(front) as stream:
        await stream.send(Get(group=GROUP, key=b"k", id=1, budget_ms=9))
        assert await stream.hear() is None


async def test_a_request_of_a_later_version_is_refused_by_itself(front: Front) -> None:
    async with raw(front) as stream:
        await stream.send(hello())
        assert isinstance(await stream.hear(), Welcome)
        body = b"\x92\x63\x07"  # [tag 99, id 7]
        message = len(body).to_bytes(4, "little") + body
        await stream.send_bytes(pack([message], len(message)))
        refused = await stream.hear()
        assert isinstance(refused, Failure)
        assert refused.id == 7
        await stream.send(Ping(id=8))
        assert await stream.hear() == Done(8, 0)


async def test_streams_are_bounded(caplog: pytest.LogCaptureFixture) -> None:
    front = Front(streams_max=1)
    await front.server.start()
    try:
        async with raw(front) as first, raw(front) as second:
            await first.send(hello())
            assert isinstance(await first.hear(), Welcome)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await second.hear()  # before it has said anything
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    finally:
        await front.server.stop()
        front.engine.writer.close()


async def test_a_stream_is_not_read_on_while_too_much_is_under_way(
    front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kamacache.front.peer_stream.PEER_REQUESTS_MAX", 3)
    gate = asyncio.Event()

    async def wait(request: Request) -> Reply:
        await gate.wait()
        return Done(77, 1)

    async with linked(front) as link:
        front.worker.handle = wait
        asking = [
            asyncio.ensure_future(ask(link, Delete(group=GROUP, key=b"%d" % number)))
            for number in range(10)
        ]
        await until(lambda: len([r for r in front.worker.asked if isinstance(r, Delete)]) == 3)
        async with raw(front) as other:  # the front has had time for more
            await other.send(hello())
            assert isinstance(await other.hear(), Welcome)
        assert len([r for r in front.worker.asked if isinstance(r, Delete)]) == 3
        gate.set()
        assert all(isinstance(reply, Done) for reply in await asyncio.gather(*asking))


async def test_a_drain_with_an_idle_stream_is_quick(front: Front) -> None:
    async with linked(front) as link:
        began_s = time.monotonic()
        await asyncio.wait_for(front.server.drain(), WAIT_S)
        assert time.monotonic() - began_s < 5.0  # of 30
        await until(lambda: not link.up)


async def test_a_drain_lets_what_peers_wait_for_finish(front: Front) -> None:
    gate = asyncio.Event()

    async def wait(request: Request) -> Reply:
        await gate.wait()
        return Value(77, b"in time", 0, 1)

    async with linked(front) as link:
        front.worker.handle = wait
        asking = asyncio.ensure_future(ask(link, Get(group=GROUP, key=b"k")))
        await until(lambda: any(isinstance(r, Get) for r in front.worker.asked))
        draining = asyncio.ensure_future(front.server.drain())
        await until(lambda: not link.usable)
        assert link.up
        assert not draining.done()
        gate.set()
        assert await asking == Value(1, b"in time", 0, 1)
        await asyncio.wait_for(draining, WAIT_S)


async def test_a_peer_that_does_not_answer_the_drain_holds_it_up_for_a_bounded_time(
    front: Front,
) -> None:
    async with raw(front) as stream:
        await stream.send(hello())
        assert isinstance(await stream.hear(), Welcome)
        began_s = time.monotonic()
        draining = asyncio.ensure_future(front.server.drain())
        assert isinstance(await stream.hear(), Draining)
        assert await stream.hear() is None
        await asyncio.wait_for(draining, WAIT_S)
        assert time.monotonic() - began_s < 5.0
