"""Links that must prove that they are a node's: who is let in, and what all others are told."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from kamacache.cluster.exchange import Outcome
from kamacache.cluster.link import LinkEnd, PeerLink
from kamacache.cluster.proving import Proving, Trust, meeting_of
from kamacache.cluster.stream import LINK_METHOD, FrameSplitter, pack
from kamacache.front import peers as peers_module
from kamacache.front.peers import PeersServicer
from kamacache.front.proving import Porter
from kamacache.front.server import FrontServer
from kamacache.front.settings import FrontSettings
from kamacache.rundir.description import NodeDescription
from kamacache.rundir.live import LiveSettings
from kamacache.security import peer_secret
from kamacache.security.peer_secret import ANSWERS, ASKS, PeerSecrets
from kamacache.wire.frames import frame
from kamacache.wire.messages import (
    PEER_FORMAT,
    Challenge,
    Done,
    Flush,
    Get,
    Hello,
    Invalidate,
    Ping,
    Proof,
    Reply,
    Request,
    Set,
    Value,
    Welcome,
    decode_reply,
)
from tests.cluster.scripted_peer import ScriptedPeer
from tests.front.engines import ShardEngine

OLD, NEW = PeerSecrets(["the-old-secret-0123456789"]), PeerSecrets(["the-new-secret-0123456789"])
BOTH = PeerSecrets(["the-old-secret-0123456789", "the-new-secret-0123456789"])
TURNED = PeerSecrets(["the-new-secret-0123456789", "the-old-secret-0123456789"])
GROUP, LIFE, ASKER = "scores", "the front's life", "10.0.0.2:8001"
WAIT_S = 10.0
UNKNOWN = grpc.StatusCode.UNAUTHENTICATED


class Worker:
    """Notes what a worker of the node is asked."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    async def ask(self, request: Request, deadline_s: float) -> Reply:
        self.asked.append(request)
        if isinstance(request, Get):
            return Value(77, b"loaded", 50, 60)
        return Done(77, 1, 40)

    async def ask_each(self, request: Any, deadline_s: float, part: Any) -> Reply | None:
        raise NotImplementedError


class Front:
    """A front whose node has a secret, or none; its name is the address that is dialled."""

    def __init__(self, secrets: PeerSecrets | None) -> None:
        self.engine = ShardEngine(GROUP)
        self.engine.writer.put(b"k", b"value")
        self.worker = Worker()
        self.trust = Trust(secrets)
        self.peers: PeersServicer
        self.server: FrontServer
        self.address = ""

    async def start(self, port: int, **bounds: Any) -> None:
        self.address = f"127.0.0.1:{port}"
        about = NodeDescription(
            format=1,
            epoch=LIFE,
            pid=1,
            boot_id="",
            workers=1,
            hash_seed=self.engine.writer._seed,
            shm_dir="",
            sockets_dir="",
            groups=[],
            listen=None,
            version="",
            name=self.address,
            clustered=True,
        )
        self.peers = PeersServicer({GROUP: self.engine}, [self.worker], about, trust=self.trust)
        if bounds:
            self.peers.porter = Porter(self.trust, self.address, **bounds)  # type: ignore[misc]
        self.server = FrontServer(
            {GROUP: self.engine}, FrontSettings(listen=self.address), peers=self.peers
        )
        await self.server.start()

    def reload(self, secrets: PeerSecrets, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(peer_secret, "load", lambda files: secrets)
        self.peers.apply(LiveSettings())


def free_port() -> int:
    import socket

    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        found: int = trial.getsockname()[1]
        return found


@asynccontextmanager
async def fronting(secrets: PeerSecrets | None, **bounds: Any) -> AsyncIterator[Front]:
    front = Front(secrets)
    await front.start(free_port(), **bounds)
    try:
        yield front
    finally:
        await front.server.stop()
        front.engine.writer.close()


@asynccontextmanager
async def linking(
    address: str, trust: Trust, *, node: str = ASKER, life: str = "its life"
) -> AsyncIterator[PeerLink]:
    """A link of a worker of another node."""
    ticks = iter(range(1, 1_000_000))
    link = PeerLink(
        address,
        LinkEnd(node, life, 0, trust),
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
    return await asyncio.wait_for(answered, WAIT_S)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


class Stream:
    """A stream by hand: says what it is told to."""

    def __init__(self, channel: grpc.aio.Channel, **metadata: str) -> None:
        self.call: Any = channel.stream_stream(LINK_METHOD)(metadata=tuple(metadata.items()))
        self._frames = FrameSplitter()

    async def say(self, *requests: Request) -> None:
        said = b"".join(map(frame, requests))
        await self.call.write(pack([said], len(said)))

    async def hear(self) -> Reply:
        async with asyncio.timeout(WAIT_S):
            message = await self.call.read()
        assert message is not grpc.aio.EOF, await self.call.code()
        (body,) = self._frames.bodies(message)
        return decode_reply(body)

    async def refused(self) -> grpc.StatusCode:
        """Return how the stream was ended; nothing may have been said before."""
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async with asyncio.timeout(WAIT_S):
                await self.call.read()
        return caught.value.code()


@asynccontextmanager
async def streaming(address: str, **metadata: str) -> AsyncIterator[Stream]:
    async with grpc.aio.insecure_channel(address) as channel:
        yield Stream(channel, **metadata)


def hello(front: Front, **more: Any) -> Hello:
    told = {"node": ASKER, "node_id": "life", "peer": front.address, "nonce": b"n" * 32, **more}
    return Hello(format=PEER_FORMAT, worker=0, **told)


async def proof_of(stream: Stream, said: Hello, key: bytes = OLD.own, label: bytes = ASKS) -> Proof:
    """Say hello, and return the proof that answers the challenge."""
    await stream.say(said)
    challenge = await stream.hear()
    assert isinstance(challenge, Challenge)
    return Proof(proof=meeting_of(said, challenge.nonce).proof(key, label))


# -- both ends as they are -----------------------------------------------------------------------


async def test_nodes_with_one_secret_link_and_serve(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with fronting(OLD) as front, linking(front.address, Trust(BOTH)) as link:
        assert link.usable
        outcome = await ask(link, Get(group=GROUP, key=b"k"))
        assert isinstance(outcome, Value)
        assert outcome.value == b"value"
        assert front.peers.porter.unproven == 0
    assert OLD.own.hex() not in caplog.text
    assert repr(OLD.own) not in caplog.text


@pytest.mark.parametrize(
    ("theirs", "ours", "front_says", "link_says"),
    [
        (OLD, None, "a link of a node without the peers' secret was refused", "has none"),
        (None, OLD, "a link of a node with a peer secret was refused", "it has no peer secret"),
        (OLD, NEW, "a link of a node with another peer secret was refused", "another peer secret"),
    ],
)
async def test_nodes_that_differ_in_the_secret_refuse_each_other_and_both_say_so(
    theirs: PeerSecrets | None,
    ours: PeerSecrets | None,
    front_says: str,
    link_says: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with fronting(theirs) as front, linking(front.address, Trust(ours)) as link:
        assert not link.up
        for _ in range(3):  # however often it is tried
            link.retry_now()
            await asyncio.sleep(0.05)
        assert not front.worker.asked
    said = [record for record in caplog.records if record.message.startswith(front_says)]
    assert len(said) == 1
    assert vars(said[0])["peer"] == ASKER
    assert vars(said[0])["client"].startswith("ipv4:127.0.0.1:")
    down = [r for r in caplog.records if r.message == "the link to a peer is down"]
    assert len(down) == 1
    assert link_says in vars(down[0])["reason"]


async def test_who_answers_must_prove_itself_too() -> None:
    for forge in (
        lambda said, nonce: b"",  # a node that takes any proof
        lambda said, nonce: meeting_of(said, nonce).proof(NEW.own, ANSWERS),
        lambda said, nonce: b"x" * 32,
        None,  # hands our own proof back
    ):
        peer = ForgingPeer(forge)
        await peer.start()
        try:
            async with linking(peer.address, Trust(OLD)) as link:
                assert not link.up
                outcome = await ask(link, Get(group=GROUP, key=b"k"))
                assert not isinstance(outcome, Value)
                link.invalidate(GROUP, [(b"k", 5)])
            assert not peer.requests
        finally:
            await peer.stop()


class ForgingPeer(ScriptedPeer):
    """An answering end that does not know the secret, and tries."""

    def __init__(self, forge: Any) -> None:
        super().__init__()
        self._forge = forge
        self._said: Any = None

    def _reply(self, request: Any) -> Reply | None:
        if isinstance(request, Hello):
            self._said = request
            return Challenge(request.id, b"c" * 32)
        if isinstance(request, Proof):
            forged = request.proof if self._forge is None else self._forge(self._said, b"c" * 32)
            return Welcome(request.id, PEER_FORMAT, self.address, "life", False, 0, forged)
        return super()._reply(request)


# -- who is no node ------------------------------------------------------------------------------


async def test_nothing_is_done_or_told_before_the_proof() -> None:
    async with fronting(OLD) as front:
        for request in (
            Get(group=GROUP, key=b"k"),
            Set(group=GROUP, key=b"k", value=b"v"),
            Invalidate(group=GROUP, items=[(b"k", 1 << 60)]),
            Flush(group="", version=1 << 60),
            Ping(),
            Proof(proof=b"x" * 32),
            hello(front, nonce=b""),
            hello(front, nonce=b"short"),
        ):
            async with streaming(front.address) as stream:
                await stream.say(request)
                assert await stream.refused() is UNKNOWN
            async with streaming(front.address) as stream:  # behind the hello, with and without it
                await stream.say(hello(front), request)
                assert await stream.refused() is UNKNOWN
            async with streaming(front.address) as stream:
                proof = await proof_of(stream, hello(front), key=NEW.own)
                await stream.say(proof, request)
                assert await stream.refused() is UNKNOWN
        assert not front.worker.asked
        assert front.engine.writer.items == 1
        assert front.peers.porter.unproven == 0


async def test_a_token_for_reading_or_a_guess_opens_no_link() -> None:
    async with fronting(OLD) as front:
        for metadata in (
            {"authorization": "Bearer a-valid-token-0123456789"},
            {"kamacache-peer": "the-old-secret-0123456789"},
        ):
            async with streaming(front.address, **metadata) as stream:
                await stream.say(hello(front, nonce=b""))
                assert await stream.refused() is UNKNOWN


async def test_a_proof_that_was_heard_does_not_open_another_stream() -> None:
    async with fronting(OLD) as front:
        async with streaming(front.address) as stream:
            heard = await proof_of(stream, hello(front))
            await stream.say(heard)
            assert isinstance(await stream.hear(), Welcome)
        async with streaming(front.address) as stream:
            await proof_of(stream, hello(front))  # the same hello, the same nonce
            await stream.say(heard)
            assert await stream.refused() is UNKNOWN


async def test_a_proof_of_the_answering_end_is_none_of_the_asking() -> None:
    async with fronting(OLD) as front, streaming(front.address) as stream:
        await stream.say(await proof_of(stream, hello(front), label=ANSWERS))
        assert await stream.refused() is UNKNOWN


async def test_a_proof_for_another_node_or_of_this_one_is_refused() -> None:
    failed = grpc.StatusCode.FAILED_PRECONDITION
    async with fronting(OLD) as front:
        for said in (
            hello(front, peer="10.0.0.9:8001"),  # handed on by who was dialled there
            hello(front, node=front.address),
            hello(front, node_id=LIFE),  # handed back to who proved it
        ):
            async with streaming(front.address) as stream:
                await stream.say(await proof_of(stream, said))
                assert await stream.refused() is failed
        assert not front.worker.asked


async def test_who_does_not_prove_itself_in_time_is_sent_away_and_many_have_a_bound(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with (
        fronting(OLD, proof_s=1.0, unproven_max=3) as front,
        grpc.aio.insecure_channel(front.address) as channel,
    ):
        silent = [Stream(channel) for _ in range(3)]
        for stream in silent[:2]:
            await stream.say(hello(front))
            assert isinstance(await stream.hear(), Challenge)
        await until(lambda: front.peers.porter.unproven == 3)
        too_many, too_late = grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.DEADLINE_EXCEEDED
        # Whoever keeps a place and proves nothing does not keep out a node.
        async with linking(front.address, Trust(OLD)) as link:
            assert link.up
        assert front.peers.porter.unproven == 2
        codes = [await stream.refused() for stream in silent]
        assert sorted(codes, key=str) == [too_late, too_late, too_many]
        assert front.peers.porter.unproven == 0
    assert "in time" in caplog.text
    assert "too many" in caplog.text


async def test_what_begins_a_link_must_be_short() -> None:
    async with fronting(OLD) as front:
        for message in (b"\x0a\xff\xff\x03" + b"x" * 0xFFFF, b"", b"\x0a\x04\xff\xff\xff\x01"):
            async with streaming(front.address) as stream:
                await stream.call.write(message)
                assert await stream.refused() is UNKNOWN


# -- rotation ------------------------------------------------------------------------------------


async def test_a_secret_changes_under_a_link_that_stands_and_the_link_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(peers_module, "PEER_RENEW_S", 0.3)
    trust = Trust(OLD)
    async with fronting(OLD) as front, linking(front.address, trust) as link:
        for secrets in (BOTH, TURNED, NEW):
            front.reload(secrets, monkeypatch)
            trust.secrets = secrets
            link.prove_anew()
            assert isinstance(await ask(link, Get(group=GROUP, key=b"k")), Value)
        await asyncio.sleep(0.5)  # links that were not proven anew end by now
        assert isinstance(await ask(link, Get(group=GROUP, key=b"k")), Value)
        assert link.usable
        assert link.stats()["connects"] == 1


async def test_a_link_that_knows_only_a_removed_secret_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(peers_module, "PEER_RENEW_S", 0.1)
    async with fronting(OLD) as front, linking(front.address, Trust(OLD)) as link:
        assert link.up
        front.reload(NEW, monkeypatch)
        await until(lambda: not link.up)
        link.retry_now()
        await asyncio.sleep(0.1)
        assert not link.up


async def test_a_link_without_a_proof_is_dialled_again_when_a_secret_comes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trust = Trust()
    async with fronting(None) as front, linking(front.address, trust) as link:
        assert link.up
        front.reload(OLD, monkeypatch)
        trust.secrets = OLD
        link.prove_anew()
        await until(lambda: link.stats()["connects"] == 2)
        assert link.up


def test_a_renewal_with_a_wrong_answer_changes_nothing() -> None:
    trust = Trust(OLD)
    proving = Proving(trust)
    said = proving.begin(
        Hello(format=PEER_FORMAT, node=ASKER, node_id="life", worker=0, peer="10.0.0.1:8001")
    )
    proving.prove(Challenge(0, b"c" * 32))
    trust.secrets = TURNED
    assert proving.stale
    assert not proving.revoked
    from kamacache.wire.messages import Proven

    for wrong in (b"", meeting_of(said, b"c" * 32).proof(NEW.own, ANSWERS)):
        proving.renewed(Proven(0, wrong))
        assert proving.stale
    trust.secrets = NEW
    assert proving.revoked
