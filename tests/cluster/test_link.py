"""`kamacache.cluster.link` against a real gRPC server: matching, failures, coming back."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from kamacache.clock import boottime_ms
from kamacache.cluster.breaker import Breaker
from kamacache.cluster.exchange import Outcome, PeerLostError
from kamacache.cluster.invalidations import InvalidationQueue
from kamacache.cluster.link import LinkEnd, PeerLink
from kamacache.cluster.stream import pack
from kamacache.errors import DeadlineExceededError, KamaCacheError, LoadError
from kamacache.limits import (
    PEER_CONNECT_S,
    PEER_PING_EVERY_S,
    PEER_REQUESTS_MAX,
    PEER_RETURN_S,
    PEER_SILENCE_S,
)
from kamacache.wire.messages import (
    FROM_PEER,
    PEEK,
    Absent,
    Answers,
    Done,
    Draining,
    Failure,
    Flush,
    Get,
    GetMany,
    Gets,
    Invalidate,
    KeyFailure,
    Reply,
    Request,
    Set,
    Value,
    Values,
    encode,
)
from tests.cluster.scripted_peer import ScriptedPeer, echo

END = LinkEnd("127.0.0.9:1", "our life", 3)
WAIT_S = 10.0


class Clock:
    def __init__(self) -> None:
        self.now = 1_000

    def __call__(self) -> int:
        self.now += 1
        return self.now


async def until(condition: Callable[[], object], what: str = "") -> None:
    """Wait for something that no event of ours tells; fail when it does not come."""
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, what or "not within the deadline"
        await asyncio.sleep(0.002)


@asynccontextmanager
async def linked(peer: ScriptedPeer, **more: Any) -> AsyncIterator[PeerLink]:
    """A link that dials a peer; ``more`` goes to it."""
    link = PeerLink(
        more.pop("address", peer.address),
        END,
        asyncio.get_running_loop(),
        clock=more.pop("clock", None) or Clock(),
        on_change=more.pop("on_change", lambda link: None),
        **more,
    )
    link.start()
    try:
        yield link
    finally:
        await asyncio.wait_for(link.close(), WAIT_S)


@asynccontextmanager
async def both(answer: Any = None, **more: Any) -> AsyncIterator[tuple[ScriptedPeer, PeerLink]]:
    """A peer that runs, and a link to it that is up."""
    peer = ScriptedPeer(answer)
    await peer.start()
    try:
        async with linked(peer, **more) as link:
            await asyncio.wait_for(link.wait_settled(), WAIT_S)
            assert link.usable
            yield peer, link
    finally:
        await peer.stop()


async def ask(link: PeerLink, request: Request, timeout_s: float = WAIT_S) -> Outcome:
    """Ask, and return what comes of it."""
    answered: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
    link.send(request, answered.set_result, time.monotonic() + timeout_s)
    return await asyncio.wait_for(answered, timeout_s + WAIT_S)


async def ask_all(link: PeerLink, requests: Sequence[Request]) -> list[Outcome]:
    return await asyncio.gather(*(ask(link, request) for request in requests))


# -- asking ----------------------------------------------------------------------------------


async def test_says_who_asks_and_sends_the_clock_the_budget_and_the_mark() -> None:
    async with both() as (peer, link):
        assert await ask(link, Get(group="g", key=b"k"), 5.0) == Value(1, b"k", 7, 8)
    hello = peer.hellos[0]
    assert (hello.node, hello.node_id, hello.worker) == (END.node, END.node_id, END.worker)
    assert (hello.peer, hello.sent > 0) == (peer.address, True)
    got = peer.requests[0]
    assert got.flags == FROM_PEER
    assert got.sent > hello.sent
    assert 4_000 < got.budget_ms <= 5_001


async def test_replies_in_any_order_reach_their_askers_over_few_messages() -> None:
    waiting: list[Get] = []

    def answer(request: Any) -> Reply | None:
        waiting.append(request)
        return None

    async with both(answer) as (peer, link):
        keys = [b"key %d" % number for number in range(500)]
        asking = asyncio.ensure_future(ask_all(link, [Get(group="g", key=key) for key in keys]))
        await until(lambda: len(waiting) == len(keys))
        assert peer.messages <= 5
        random.Random(7).shuffle(waiting)
        await peer.streams[0].send(*(Value(got.id, got.key) for got in waiting))
        assert [getattr(outcome, "value", None) for outcome in await asking] == keys
        assert link.stats()["requests"] == len(keys)


async def test_a_failure_is_an_answer_and_a_reply_without_a_request_is_dropped() -> None:
    failed = Failure(0, "NodeUnavailableError", "the node is stopping", {})

    def answer(request: Any) -> Reply:
        return Failure(request.id, failed.kind, failed.message, failed.fields)

    async with both(answer) as (peer, link):
        outcome = await ask(link, Get(group="g", key=b"k"))
        assert isinstance(outcome, Failure)
        assert outcome.kind == failed.kind
        await peer.streams[0].send(Value(99, b"nobody asked"))
        assert isinstance(await ask(link, Get(group="g", key=b"k")), Failure)
        assert link.usable


async def test_one_reply_that_is_not_understood_fails_its_own_request_alone() -> None:
    async def answer_badly(peer: ScriptedPeer) -> None:
        first, second, third = peer.requests
        bad = b"\x93\x01" + bytes([second.id]) + b"\xa3new"  # a Value of a later version's kind
        bodies = (encode(Value(first.id, b"1")), bad, encode(Value(third.id, b"3")))
        frames = b"".join([len(body).to_bytes(4, "little") + body for body in bodies])
        await peer.streams[0].send_bytes(pack([frames], len(frames)))

    async with both(lambda request: None) as (peer, link):
        gets = [Get(group="g", key=b"%d" % number) for number in range(3)]
        asking = asyncio.ensure_future(ask_all(link, gets))
        await until(lambda: len(peer.requests) == 3)
        await answer_badly(peer)
        one, two, three = await asking
        assert (one, three) == (Value(1, b"1"), Value(3, b"3"))
        assert isinstance(two, Failure)
        assert "not understood" in two.message
        assert link.usable


async def test_an_asker_that_raises_harms_no_other(caplog: pytest.LogCaptureFixture) -> None:
    async with both() as (_, link):

        def bad(outcome: Outcome) -> None:
            raise RuntimeError("asker")

        link.send(Get(group="g", key=b"bad"), bad, time.monotonic() + WAIT_S)
        assert await ask(link, Get(group="g", key=b"good")) == Value(2, b"good", 7, 8)
        assert link.usable
    assert "what waited for a peer's answer failed" in caplog.text


async def test_values_that_were_cut_are_asked_for_and_joined() -> None:
    def answer(request: Any) -> Reply:
        keys = request.keys[:2]
        if request.keys[0] == b"k4":  # too large to share a frame
            return Value(request.id, b"k4", 4, 4)
        errors = [KeyFailure(i, "LoadError", "x", {}) for i, k in enumerate(keys) if k == b"k3"]
        ttls, versions = [int(key[1:]) for key in keys], [int(key[1:]) + 10 for key in keys]
        return Values(request.id, keys, errors, ttls, versions)

    async with both(answer) as (peer, link):
        keys = [b"k%d" % number for number in range(7)]
        outcome = await ask(link, GetMany(group="g", keys=keys))
        assert isinstance(outcome, Values)
        assert outcome.values == keys
        assert [failed.index for failed in outcome.errors] == [3]
        assert outcome.ttls == [0, 1, 2, 3, 4, 5, 6]
        assert outcome.versions == [10, 11, 12, 13, 4, 15, 16]
        assert all(request.flags & FROM_PEER for request in peer.requests)
        assert len({request.sent for request in peer.requests}) == len(peer.requests)


@pytest.mark.parametrize("kind", ["failure", "nothing"])
async def test_a_rest_that_fails_fails_the_whole(kind: str) -> None:
    def answer(request: Any) -> Reply:
        if len(request.keys) == 3:
            return Values(request.id, request.keys[:1])
        if kind == "failure":
            return Failure(request.id, "LoadError", "x", {})
        return Values(request.id, [])

    async with both(answer) as (_, link):
        outcome = await ask(link, GetMany(group="g", keys=[b"1", b"2", b"3"]))
        assert isinstance(outcome, Failure if kind == "failure" else KamaCacheError)


async def ask_each(
    link: PeerLink, keys: list[bytes], timeout_s: float = WAIT_S
) -> asyncio.Queue[Outcome]:
    heard: asyncio.Queue[Outcome] = asyncio.Queue()
    link.send(Gets(group="g", keys=keys), heard.put_nowait, time.monotonic() + timeout_s)
    return heard


async def test_keys_that_are_answered_each_for_itself_come_as_they_are_answered() -> None:
    async with both(lambda request: None) as (peer, link):
        heard = await ask_each(link, [b"1", b"2", b"3"])
        await until(lambda: peer.requests)
        failed = KeyFailure(0, "LoadError", "x", {})
        parts = [Answers(1, [b"b"], [1]), Answers(1, errors=[failed]), Answers(1, [b"c"], [2])]
        for part in parts:
            await peer.streams[0].send(part)
            assert await asyncio.wait_for(heard.get(), WAIT_S) == part
        assert link.stats()["pending"] == 0
        await peer.streams[0].send(parts[0], Value(99, b"unasked"))
        whole = await ask_each(link, [b"1", b"2"])
        await peer.streams[0].send(Answers(2, [b"a", None]))
        assert await asyncio.wait_for(whole.get(), WAIT_S) == Answers(2, [b"a", None])
        assert heard.empty()
        assert link.stats()["pending"] == 0


@pytest.mark.parametrize("how", ["late", "lost", "failed"])
async def test_keys_that_are_not_answered_have_what_comes_in_place_of_it(how: str) -> None:
    async with both(lambda request: None) as (peer, link):
        heard = await ask_each(link, [b"1", b"2"], 0.3 if how == "late" else WAIT_S)
        await until(lambda: peer.requests)
        await peer.streams[0].send(Answers(1, [b"b"], [1]))
        assert isinstance(await asyncio.wait_for(heard.get(), WAIT_S), Answers)
        if how == "lost":
            await peer.stop()
        elif how == "failed":
            await peer.streams[0].send(Failure(1, "NodeUnavailableError", "it stops", {}))
        outcome = await asyncio.wait_for(heard.get(), WAIT_S)
        kinds = {"late": DeadlineExceededError, "lost": PeerLostError, "failed": Failure}
        assert type(outcome) is kinds[how]
        assert link.stats()["pending"] == 0
        assert heard.empty()


async def test_values_of_any_size_cross_and_are_no_silence() -> None:
    sizes = [0, 1, 70_000, 3 << 20, 16 << 20]

    async with both(lambda request: Value(request.id, request.value)) as (_, link):
        values = [random.Random(size).randbytes(size) for size in sizes]
        outcomes = await ask_all(link, [Set(group="g", key=b"k", value=v) for v in values])
        assert [getattr(outcome, "value", None) for outcome in outcomes] == values
        assert link.stats()["connects"] == 1


# -- deadlines and bounds --------------------------------------------------------------------


async def test_a_deadline_ends_its_request_and_the_late_answer_is_dropped() -> None:
    async with both(lambda request: None) as (peer, link):
        outcome = await ask(link, Get(group="g", key=b"k"), 0.05)
        assert isinstance(outcome, DeadlineExceededError)
        assert link.stats()["late"] == 1
        await peer.streams[0].send(Value(1, b"late"))
        peer.answer = echo
        assert await ask(link, Get(group="g", key=b"k2")) == Value(2, b"k2", 7, 8)


async def test_a_deadline_that_has_passed_is_not_sent() -> None:
    async with both() as (peer, link):
        assert isinstance(await ask(link, Get(group="g", key=b"k"), -1.0), DeadlineExceededError)
        assert not peer.requests


async def test_slow_answers_do_not_take_the_link_down() -> None:
    async with both(lambda request: None) as (peer, link):
        asking = asyncio.ensure_future(ask(link, Get(group="g", key=b"slow")))
        await until(lambda: peer.pings * PEER_PING_EVERY_S > 1.5 * PEER_SILENCE_S)
        assert link.usable
        await peer.streams[0].send(Value(1, b"at last"))
        assert await asking == Value(1, b"at last")


async def test_requests_under_way_are_bounded() -> None:
    async with both(lambda request: None) as (_, link):
        outcomes: list[Outcome] = []
        for _ in range(PEER_REQUESTS_MAX + 5):
            link.send(Get(group="g", key=b"k"), outcomes.append, time.monotonic() + WAIT_S)
        assert not outcomes  # never in the call itself
        await until(lambda: len(outcomes) == 5)
        assert all(isinstance(outcome, LoadError) for outcome in outcomes)
        assert link.stats()["pending"] == PEER_REQUESTS_MAX


async def test_bytes_that_wait_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kamacache.cluster.exchange.PEER_UNSENT_BYTES_MAX", 1_000)
    async with both() as (_, link):
        large = [Set(group="g", key=b"k", value=bytes(2_000)) for _ in range(2)]
        first, second = await ask_all(link, large)
        assert isinstance(first, Done)
        assert isinstance(second, LoadError)
        assert isinstance(await ask(link, Get(group="g", key=b"k")), Value)


# -- failures --------------------------------------------------------------------------------


async def test_who_asks_while_the_first_try_is_made_waits_for_it() -> None:
    peer = ScriptedPeer()
    await peer.start()
    try:
        async with linked(peer) as link:
            assert not link.settled
            assert await ask(link, Get(group="g", key=b"k")) == Value(1, b"k", 7, 8)
    finally:
        await peer.stop()


async def test_a_refused_connection_is_known_at_once_and_nobody_waits_for_it() -> None:
    peer = ScriptedPeer()
    await peer.start()
    await peer.stop()
    changes: list[tuple[bool, bool]] = []
    began_s = time.monotonic()
    async with linked(peer, on_change=lambda link: changes.append((link.up, link.settled))) as link:
        first = await ask(link, Get(group="g", key=b"held"))
        assert time.monotonic() - began_s < PEER_CONNECT_S
        second = await ask(link, Get(group="g", key=b"down"))
        for outcome in (first, second):
            assert isinstance(outcome, PeerLostError)
            assert outcome.sent is False
        assert changes == [(False, True)]
        assert not link.up
        told = link.stats()
        assert (told["requests"], told["lost"]) == (2, 2)


async def test_a_peer_that_accepts_and_says_nothing_is_given_up_and_holds_nobody_for_long() -> None:
    peer = ScriptedPeer()
    peer.silent = True
    await peer.start()
    try:
        began_s = time.monotonic()
        async with linked(peer) as link:
            outcome = await ask(link, Get(group="g", key=b"k"))
            assert isinstance(outcome, PeerLostError)
            assert PEER_CONNECT_S * 0.9 < time.monotonic() - began_s < PEER_CONNECT_S + 2
            await until(lambda: len(peer.hellos) > 1, "it dials again")
            peer.silent = False
            await until(lambda: link.usable)
    finally:
        await peer.stop()


async def test_when_the_stream_breaks_all_who_wait_are_told_and_it_is_dialled_again() -> None:
    changes: list[bool] = []
    async with both(lambda request: None, on_change=lambda link: changes.append(link.usable)) as (
        peer,
        link,
    ):
        asking = [asyncio.ensure_future(ask(link, Get(group="g", key=b"k"))) for _ in range(3)]
        await until(lambda: len(peer.requests) == 3)
        await peer.stop()
        for outcome in await asyncio.gather(*asking):
            assert isinstance(outcome, PeerLostError)
            assert outcome.sent is True
        peer.answer = echo
        await peer.start()
        await until(lambda: link.usable)
        assert isinstance(await ask(link, Get(group="g", key=b"k")), Value)
        assert changes == [True, False, False, True]  # up first, and a moment later usable
        assert link.stats()["connects"] == 2
        assert link.stats()["lost"] == 3


async def test_a_peer_that_comes_back_with_its_memory_is_asked_again_after_a_moment() -> None:
    async with both() as (peer, link):
        await peer.stop()
        await until(lambda: not link.up)
        await peer.start()
        await until(lambda: link.up)
        came_s = time.monotonic()
        assert not link.usable  # others may still have to tell it what they wrote meanwhile
        assert isinstance(await ask(link, Get(group="g", key=b"k", flags=PEEK)), Value)
        assert isinstance(await ask(link, Get(group="g", key=b"k")), PeerLostError)
        await until(lambda: link.usable)
        assert time.monotonic() - came_s > PEER_RETURN_S * 0.9


async def test_a_peer_that_was_started_anew_is_asked_at_once() -> None:
    async with both() as (peer, link):
        await peer.stop()
        await until(lambda: not link.up)
        peer.welcome.node_id = "their next life"
        await peer.start()
        await until(lambda: link.up)
        assert link.usable


async def test_a_peer_that_is_first_reached_late_drops_what_others_may_have_overwritten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kamacache.cluster.link.PEER_STRANGE_S", 0.05)
    peer = ScriptedPeer()
    await peer.start()
    await peer.stop()
    try:
        async with linked(peer) as link:
            await asyncio.wait_for(link.wait_settled(), WAIT_S)
            await asyncio.sleep(0.1)
            await peer.start()
            await until(lambda: link.usable)
        (flush,) = peer.requests
        assert isinstance(flush, Flush)
        assert (flush.group, flush.version > 0) == ("", True)
    finally:
        await peer.stop()


async def test_what_a_peer_is_still_to_be_told_goes_to_the_next_link_to_it() -> None:
    async with both() as (peer, link):
        await peer.stop()
        await until(lambda: not link.up)
        link.invalidate("g", [(b"k", 7)])
        queue, life = link.hand_over()
        assert life == "their life"
        await peer.start()
        async with linked(peer, invalidations=queue, life=life) as following:
            await until(lambda: following.up)
            told = [request for request in peer.requests if isinstance(request, Invalidate)]
            assert [request.items for request in told] == [[(b"k", 7)]]
            assert not following.usable  # the same life: it waits a moment


async def test_a_request_says_when_it_is_given_up_by_the_peers_clock() -> None:
    async with both() as (peer, link):
        before_ms = boottime_ms()
        await ask(link, Get(group="g", key=b"k"), timeout_s=2.0)
        (request,) = peer.requests
        assert before_ms + 1_500 < request.until_ms <= boottime_ms() + 2_000


async def test_what_was_not_yet_written_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    async with both(lambda request: None) as (peer, link):
        outcomes: list[Outcome] = []
        link.send(Get(group="g", key=b"k"), outcomes.append, time.monotonic() + WAIT_S)
        await until(lambda: len(peer.requests) == 1)
        link.send(Get(group="g", key=b"k"), outcomes.append, time.monotonic() + WAIT_S)
        link._turn("the stream broke before the next turn of the loop")
        await until(lambda: len(outcomes) == 2)
        assert [getattr(outcome, "sent", None) for outcome in outcomes] == [True, False]


async def test_a_peer_that_falls_silent_is_given_up() -> None:
    async with both() as (peer, link):
        peer.silent = True
        asking = asyncio.ensure_future(ask(link, Get(group="g", key=b"k")))
        began_s = time.monotonic()
        outcome = await asking
        assert isinstance(outcome, PeerLostError)
        assert PEER_SILENCE_S * 0.5 < time.monotonic() - began_s < PEER_SILENCE_S + 3
        assert peer.pings >= 1
        assert not link.up


@pytest.mark.parametrize(
    "garbage", [b"nothing", b"\x0a\x08\xff\xff\xff\xffabcd", b"\x0a\x05\x01\0\0\0x"]
)
async def test_garbage_ends_the_stream_with_a_line_in_the_log(
    garbage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with both() as (peer, link):
        await peer.streams[0].send_bytes(garbage)
        await until(lambda: link.stats()["connects"] == 2 and link.usable)
        assert isinstance(await ask(link, Get(group="g", key=b"k")), Value)
    reasons = [getattr(record, "reason", "") for record in caplog.records]
    assert any("FrameError" in reason for reason in reasons)


async def test_retry_now_dials_at_once() -> None:
    peer = ScriptedPeer()
    await peer.start()
    await peer.stop()
    breaker = Breaker(first_s=3_600.0, max_s=3_600.0)
    try:
        async with linked(peer, breaker=breaker) as link:
            await asyncio.wait_for(link.wait_settled(), WAIT_S)
            await peer.start()
            assert not link.up
            link.retry_now()
            await until(lambda: link.usable)
    finally:
        await peer.stop()


async def test_a_link_that_is_closed_tells_who_waits_and_takes_no_more() -> None:
    async with both(lambda request: None) as (_, link):
        outcomes: list[Outcome] = []
        link.send(Get(group="g", key=b"k"), outcomes.append, time.monotonic() + WAIT_S)
        await link.close()
        link.send(Get(group="g", key=b"k"), outcomes.append, time.monotonic() + WAIT_S)
        await until(lambda: len(outcomes) == 2)
        assert all(isinstance(outcome, PeerLostError) for outcome in outcomes)
        assert not link.up


# -- who is there ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [("node_id", END.node_id, "--advertise"), ("format", 99, "use one version")],
)
async def test_ourselves_and_another_format_are_never_used_and_dialled_seldom(
    field: str, value: object, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    peer = ScriptedPeer()
    await peer.start()
    setattr(peer.welcome, field, value)
    try:
        async with linked(peer) as link:
            assert isinstance(await ask(link, Get(group="g", key=b"k")), PeerLostError)
            assert not link.up
            link.retry_now()
            await until(lambda: len(peer.hellos) == 2)
    finally:
        await peer.stop()
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 1
    assert told in getattr(errors[0], "reason", "")
    assert peer.requests == []


async def test_a_peer_that_calls_itself_otherwise_is_used_and_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    peer = ScriptedPeer()
    peer.welcome.node = "cache-2:8001"
    await peer.start()
    try:
        async with linked(peer) as link:
            assert isinstance(await ask(link, Get(group="g", key=b"k")), Value)
    finally:
        await peer.stop()
    assert "calls itself otherwise" in caplog.text


async def test_a_server_without_the_service_is_said_to_be_no_member(
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    peer = ScriptedPeer()
    try:
        async with linked(peer, address=f"127.0.0.1:{port}") as link:
            await asyncio.wait_for(link.wait_settled(), WAIT_S)
            assert not link.up
    finally:
        await server.stop(None)
    # Others: a loop of an earlier test, closed under grpc's poller.
    told = [record for record in caplog.records if record.name == "kamacache.cluster"]
    assert "--peers" in getattr(told[0], "reason", "")


# -- draining --------------------------------------------------------------------------------


async def test_a_peer_that_drains_is_asked_no_more_but_for_peeks_and_told_that_we_know() -> None:
    changes: list[tuple[bool, bool]] = []

    def answer(request: Any) -> Reply | None:
        return Absent(request.id) if request.flags & PEEK else None

    def note(link: PeerLink) -> None:
        changes.append((link.up, link.usable))

    async with both(answer, on_change=note) as (peer, link):
        asking = asyncio.ensure_future(ask(link, Get(group="g", key=b"before")))
        await until(lambda: len(peer.requests) == 1)
        await peer.streams[0].send(Draining(0))
        await until(lambda: not link.usable)
        assert link.up
        outcome = await ask(link, Get(group="g", key=b"after"))
        assert isinstance(outcome, PeerLostError)
        assert outcome.sent is False
        assert isinstance(await ask(link, Get(group="g", key=b"after", flags=PEEK)), Absent)
        await until(lambda: len(peer.hellos) == 2, "the second hello")
        await peer.streams[0].send(Value(1, b"in time"))
        assert await asking == Value(1, b"in time")
        assert changes == [(True, True), (True, False)]


async def test_a_peer_that_drains_from_the_beginning_is_up_and_not_usable() -> None:
    peer = ScriptedPeer()
    peer.welcome.draining = True
    await peer.start()
    try:
        async with linked(peer) as link:
            held, peek = await ask_all(
                link, [Get(group="g", key=b"k"), Get(group="g", key=b"k", flags=PEEK)]
            )
            assert isinstance(held, PeerLostError)
            assert isinstance(peek, Value)
            assert (link.up, link.usable) == (True, False)
    finally:
        await peer.stop()


# -- invalidations ---------------------------------------------------------------------------


async def test_invalidations_of_one_turn_go_together_and_are_pending_until_answered() -> None:
    async with both(lambda request: None) as (peer, link):
        for number in range(50):
            link.invalidate("g", [(b"%d" % (number % 40), number)])
        await until(lambda: len(peer.requests) == 1)
        assert link.pending_invalidations == 40
        told = peer.requests[0]
        assert isinstance(told, Invalidate)
        assert len(told.items) == 40
        await peer.streams[0].send(Done(told.id, 40))
        await until(lambda: link.pending_invalidations == 0)


async def test_what_was_not_answered_is_told_anew_before_the_link_is_up() -> None:
    gate: list[Invalidate] = []

    def hold(request: Any) -> Reply | None:
        if isinstance(request, Invalidate):
            gate.append(request)
            return None
        return echo(request)

    async with both(hold) as (peer, link):
        link.invalidate("g", [(b"sent", 5)])
        await until(lambda: len(gate) == 1)
        await peer.stop()
        await until(lambda: not link.up)
        link.invalidate("g", [(b"down", 6), (b"sent", 7)])
        assert link.pending_invalidations == 2
        await peer.start()
        await until(lambda: len(gate) == 2)
        assert sorted(gate[1].items) == [(b"down", 6), (b"sent", 7)]
        assert not link.up
        assert isinstance(await ask(link, Get(group="g", key=b"k")), PeerLostError)
        await peer.streams[-1].send(Done(gate[1].id, 2))
        await until(lambda: link.usable)
        assert link.pending_invalidations == 0
        assert isinstance(await ask(link, Get(group="g", key=b"k")), Value)


async def test_one_that_the_peer_could_not_do_is_told_again() -> None:
    failures = 2

    def answer(request: Any) -> Reply:
        nonlocal failures
        if isinstance(request, Invalidate) and failures:
            failures -= 1
            return Failure(request.id, "NodeUnavailableError", "a worker restarts", {})
        return echo(request)

    async with both(answer) as (peer, link):
        link.invalidate("g", [(b"k", 5)])
        await until(lambda: link.pending_invalidations == 0)
        assert [type(request) for request in peer.requests] == [Invalidate] * 3
        assert link.usable


async def test_more_than_the_queue_holds_is_one_flush_before_the_link_is_up() -> None:
    peer = ScriptedPeer()
    await peer.start()
    await peer.stop()
    clock = Clock()
    queue = InvalidationQueue(clock, items_max=100)
    try:
        async with linked(peer, clock=clock, invalidations=queue) as link:
            await asyncio.wait_for(link.wait_settled(), WAIT_S)
            for number in range(150):
                link.invalidate("g", [(b"%d" % number, clock())])
            link.invalidate("other", [(b"k", clock())])
            last = clock.now
            await peer.start()
            await until(lambda: link.usable)
            flush, other = peer.requests
            assert isinstance(flush, Flush)
            assert (flush.group, flush.version > last) == ("g", True)
            assert isinstance(other, Invalidate)
            assert other.group == "other"
            assert link.pending_invalidations == 0
            assert link.stats()["flushes_sent"] == 1
    finally:
        await peer.stop()
