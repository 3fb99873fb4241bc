"""The link to one other node: dialled, greeted, watched, dialled again.

*Process*: worker, in the loop's thread. *Owns*: the channel and its one stream::

    send ──► frames that wait ── one message at a time ──► the peer's front
    done ◄── by id ◄─────────── one message at a time ◄────────┘

    dial ─► Hello / Welcome ─► what was to be invalidated, answered ─► usable ─┬─► Draining ─┐
      ▲                                                                        │             │
      └──── jittered back-off ◄── refused, broken, nothing heard for PEER_SILENCE_S ◄────────┘

*Invariants*: ``done`` is called once for each `PeerLink.send`, later and in the loop; for a `Gets`
once for each part of its answer. While the link is down nobody waits for it, but for its first try.
It is down only when nothing is heard, never because answers take long: a link on which nothing
comes is pinged, and the peer's front answers that whatever its workers do. Bytes that are no frames
end the stream.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

import grpc

from kamacache.cluster.breaker import Breaker
from kamacache.cluster.channel import PLAIN, Dialler
from kamacache.cluster.exchange import (
    DoneCall,
    Exchange,
    Outcome,
    PeerLostError,
    finish,
    lost,
    overloaded,
)
from kamacache.cluster.greeting import Greeting, LinkEnd, RefusedError
from kamacache.cluster.handshake import why_no_handshake
from kamacache.cluster.invalidations import InvalidationQueue
from kamacache.cluster.linklog import LinkLog
from kamacache.cluster.proving import Proving
from kamacache.cluster.silence import Silence, Verdict
from kamacache.cluster.stream import LINK_METHOD, FrameSender, FrameSplitter, pack
from kamacache.limits import (
    PEER_CONNECT_S,
    PEER_LOOK_EVERY_S,
    PEER_REFUSED_RETRY_S,
    PEER_REQUESTS_MAX,
    PEER_RETURN_S,
    PEER_SILENCE_S,
    PEER_STRANGE_S,
    PEER_TELL_S,
)
from kamacache.repeated import RepeatedLog
from kamacache.rundir.meters import PEER, PeerRegion
from kamacache.wire.frames import FrameError, frame
from kamacache.wire.messages import (
    FROM_PEER,
    PEEK,
    Challenge,
    DecodeError,
    Done,
    Draining,
    Invalidate,
    LinkNow,
    Ping,
    Proven,
    Reply,
    Request,
    Welcome,
    decode_reply,
)

__all__ = ["LinkEnd", "Outcome", "PeerLink", "PeerLostError"]

TELLS_MAX: Final = 4  # invalidations under way; what comes meanwhile goes together in the next
CLOSED: Final = "closed"
_REFUSALS: Final = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.FAILED_PRECONDITION)
REQUESTS: Final = PEER.at("requests")
LOST: Final = PEER.at("lost")
OVERLOADED: Final = PEER.at("overloaded")
CONNECTS: Final = PEER.at("connects")
INVALIDATIONS: Final = PEER.at("invalidations_sent")
INVALIDATED: Final = PEER.at("invalidation_keys_sent")
FLUSHES: Final = PEER.at("flushes_sent")

log = RepeatedLog(logging.getLogger("kamacache.cluster"))


class PeerLink:
    """The link of this worker to the node of one address."""

    def __init__(
        self,
        address: str,
        end: LinkEnd,
        loop: asyncio.AbstractEventLoop,
        *,
        clock: Callable[[], int],
        on_change: Callable[[PeerLink], None],
        on_greeted: Callable[[PeerLink], None] = lambda link: None,
        breaker: Breaker | None = None,
        invalidations: InvalidationQueue | None = None,
        life: str = "",
        dial: Dialler = PLAIN,
        meters: PeerRegion | None = None,
    ) -> None:
        """Make it; `start` dials.

        ``clock`` returns a fresh version. ``on_change`` is called when `usable`, `up`, or `settled`
        has changed, ``on_greeted`` when the peer has said which `life` it is of.
        ``invalidations`` and ``life`` are those of an earlier link to the address (`hand_over`).
        ``dial`` returns a new channel to an address. ``meters`` are this peer's in this worker;
        None: as in a test.
        """
        self.address: Final = address
        self.settled = False  # the first try has ended, either way
        self.up = False  # greeted, and all invalidations answered
        self.usable = False  # up, and the peer neither drains nor has just come back
        self._greeting: Final = Greeting(address, end)
        self._loop: Final = loop
        self._clock: Final = clock
        self._on_change: Final = on_change
        self._on_greeted: Final = on_greeted
        self._dial: Final = dial
        self._breaker: Final = breaker or Breaker()
        self._invalidations = invalidations or InvalidationQueue(clock)
        self._sender: FrameSender | None = None  # while there is a stream, greeted
        self._exchange: Exchange | None = None  # as long
        self._held: list[tuple[Request, DoneCall, float]] = []  # until settled
        self._draining = False
        self._life = life  # of the peer's node, as it said last
        self._started_s = 0.0
        self._ahead_ms = 0
        self._returning: asyncio.TimerHandle | None = None  # until when it is not asked again
        self._failed: asyncio.Future[str] | None = None  # set by who finds that the stream failed
        self._silence = Silence(0.0)
        self._look_timer: asyncio.TimerHandle | None = None
        self._telling = False
        self._tell_after_s = 0.0
        self._hurry = asyncio.Event()
        self._settled = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._log: Final = LinkLog(address)
        self._meters: Final = meters or PeerRegion()
        self._counts: Final = self._meters.words  # add to a word by its place
        self._sent = {"messages": 0, "bytes": 0}  # by the streams before this one

    # -- for the worker --------------------------------------------------------------------

    def start(self) -> None:
        """Begin to dial; call once, in the loop."""
        self._started_s = time.monotonic()
        self._task = self._loop.create_task(self._run())

    async def close(self) -> None:
        """End the link; who waits is told that it failed."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait((task,))
        self._turn(CLOSED)
        self._settle()

    def hand_over(self) -> tuple[InvalidationQueue, str]:
        """Give a new link what the peer is still to be told, and in which life of its node."""
        queue, self._invalidations = self._invalidations, InvalidationQueue(self._clock)
        queue.take_back()
        return queue, self._life

    async def wait_settled(self) -> None:
        """Wait until the first try has ended."""
        await self._settled.wait()

    def retry_now(self) -> None:
        """Dial at once if the link is down, and quickly again for a while: the peer is there."""
        self._breaker.hurry()
        self._hurry.set()

    def prove_anew(self) -> None:
        """Show the peer that this node knows the secret that a reload has brought."""
        proving, exchange = self._greeting.proving, self._exchange
        if not self.up:
            self.retry_now()
        if exchange is None or not proving.stale:
            return
        proof = proving.renew()
        if proof is None:
            self._fail("the nodes know each other by a secret from now on")
            return
        proof.flags |= FROM_PEER
        proof.sent = self._clock()
        done = partial(self._proved_anew, proving)
        exchange.ask(proof, done, time.monotonic() + PEER_TELL_S)

    def _proved_anew(self, proving: Proving, outcome: Outcome) -> None:
        if type(outcome) is Proven:
            proving.renewed(outcome)
        if proving is self._greeting.proving and proving.revoked:
            self._fail("the peer does not know the new secret, and the old one is gone")

    @property
    def life(self) -> str:
        """The id of the memory that was greeted last, "" where none was."""
        return self._life

    @property
    def pending_invalidations(self) -> int:
        """Keys and flushes that the peer has not answered."""
        return self._invalidations.pending

    def stats(self) -> dict[str, int]:
        """Return what the link has done."""
        counts = self._meters.counts() | self._sent
        if self._sender is not None:
            counts["messages"] += self._sender.messages
            counts["bytes"] += self._sender.bytes_written
        counts["pending"] = len(self._exchange) if self._exchange is not None else 0
        counts["pending_invalidations"] = self._invalidations.pending
        return counts

    def now(self) -> LinkNow:
        """Return how the link stands."""
        if not self.up:
            state = "down" if self.settled else "connecting"
        else:
            returning = "returning" if self._returning is not None else "draining"
            state = "usable" if self.usable else returning
        return LinkNow(
            self.address,
            state,
            self._breaker.failures if not self.up else 0,
            len(self._exchange) if self._exchange is not None else 0,
            self._invalidations.pending,
            int(self._invalidations.lag_s * 1000),
        )

    def send(self, request: Request, done: DoneCall, deadline_s: float) -> None:
        """Ask the peer; ``done`` is called once, later, in the loop (a `Gets`: once for each part).

        It gets the reply, a `Failure` included, or a `PeerLostError`, a `DeadlineExceededError`,
        or a `LoadError` where too much waits already. ``deadline_s`` is a time.monotonic(). The
        link fills in the request's id, budget, clock and `FROM_PEER`.
        """
        request.flags |= FROM_PEER
        request.sent = self._clock()
        self._counts[REQUESTS] += 1
        exchange = self._exchange
        if exchange is not None and (self.usable or (self.up and request.flags & PEEK)):
            exchange.ask(request, done, deadline_s)
        elif self.settled or self._task is None:
            self._refuse(done)
        elif len(self._held) < PEER_REQUESTS_MAX:
            self._held.append((request, done, deadline_s))
        else:
            self._counts[OVERLOADED] += 1
            self._loop.call_soon(finish, done, overloaded(self.address, request), self.address)

    def invalidate(self, group: str, items: Sequence[tuple[bytes, int]]) -> None:
        """Have the peer drop records older than these versions: now, or when the link is back."""
        self._invalidations.add(group, items)
        if not self._telling and self._exchange is not None:
            self._telling = True  # all that this turn of the loop adds goes together
            self._loop.call_soon(self._tell)

    def flush(self) -> None:
        """Have the peer drop all that is older than the moment at which it is told."""
        self._invalidations.flush_all()

    def flush_whole(self, group: str) -> None:
        """Have the peer drop all that it holds of a group ("": of all) when it is told."""
        self._invalidations.flush_whole(group)
        if not self._telling and self._exchange is not None:
            self._telling = True
            self._loop.call_soon(self._tell)

    # -- invalidations ---------------------------------------------------------------------

    def _tell(self) -> None:
        """Send what is to be invalidated, as far as it may go out now."""
        self._telling = False
        queue, exchange = self._invalidations, self._exchange
        now_s = time.monotonic()
        if exchange is None or now_s < self._tell_after_s:
            return
        while queue.under_way < TELLS_MAX and not exchange.full:
            following = queue.next()
            if following is None:
                break
            ticket, told = following
            told.flags |= FROM_PEER
            told.sent = self._clock()
            self._counts[REQUESTS] += 1
            if type(told) is Invalidate:
                self._counts[INVALIDATIONS] += 1
                self._counts[INVALIDATED] += len(told.items)
            else:
                self._counts[FLUSHES] += 1
            exchange.ask(told, partial(self._told, exchange, ticket), now_s + PEER_TELL_S)

    def _told(self, exchange: Exchange, ticket: int, outcome: Outcome) -> None:
        if exchange is not self._exchange:
            return  # of an earlier stream: it was taken back
        if type(outcome) is Done:
            self._invalidations.acknowledged(ticket)
        else:  # such as from a worker of the peer's that restarts
            self._invalidations.failed(ticket)
            self._tell_after_s = time.monotonic() + PEER_LOOK_EVERY_S
        self._tell()
        self._catch_up()

    def _catch_up(self) -> None:
        """Be up once the peer has dropped all that it was to drop while the link was down."""
        if not self.up and self._exchange is not None and self._invalidations.caught_up:
            self._turn("")

    # -- the life of a stream --------------------------------------------------------------

    async def _run(self) -> None:
        """Dial, serve, dial again; until cancelled."""
        early = self._loop.call_later(PEER_CONNECT_S, self._settle)
        try:
            while True:
                began_s = time.monotonic()
                self._hurry.clear()
                least_s = 0.0
                try:
                    reason = await self._stream()
                except RefusedError as error:
                    reason, least_s = str(error), PEER_REFUSED_RETRY_S
                except (grpc.RpcError, OSError, DecodeError, asyncio.InvalidStateError) as error:
                    reason, least_s = _reason(error, tls=self._dial.tls)
                except Exception as error:
                    peer = self.address
                    log.exception("a peer link failed unexpectedly", about=peer, peer=peer)
                    reason = type(error).__name__
                was_up_s = time.monotonic() - began_s if self.up else 0.0
                self._turn(reason, refused=least_s > 0)
                self._settle()
                wait_s = max(self._breaker.failed(was_up_s), least_s)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._hurry.wait(), wait_s)
        finally:
            early.cancel()

    async def _stream(self) -> str:
        """Be linked once; return why it ended. Raises what grpc raises, and `RefusedError`."""
        failed: asyncio.Future[str] = self._loop.create_future()
        self._failed = failed
        channel = self._dial(self.address)
        tasks: list[asyncio.Task[None]] = []
        try:
            call: Any = channel.stream_stream(LINK_METHOD)()
            frames = FrameSplitter()
            # In tasks, since a call that ends cancels who reads from it.
            tasks.append(self._loop.create_task(self._greet(call, frames)))
            await asyncio.wait(tasks, timeout=PEER_CONNECT_S)
            if not tasks[0].done():
                return f"no answer within {PEER_CONNECT_S} s"
            if not tasks[0].cancelled():
                tasks[0].result()
                sender = self._begin()
                tasks.append(self._loop.create_task(sender.run(call.write)))
                tasks.append(self._loop.create_task(self._receive(call, frames)))
                self._look()
                self._tell()
                self._catch_up()
                parts: tuple[asyncio.Future[Any], ...] = (*tasks[1:], failed)
                await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
            if failed.done():
                return failed.result()
            for task in reversed(tasks):  # the reading one knows more than the writing one
                if task.done() and not task.cancelled():
                    task.result()
            return "the stream ended"
        finally:
            self._failed = None
            if self._look_timer is not None:
                self._look_timer.cancel()
            for task in tasks:
                task.cancel()
            await channel.close()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _begin(self) -> FrameSender:
        """Make what serves a stream that was greeted."""
        sender = self._sender = FrameSender(self._loop)
        self._exchange = Exchange(
            self.address,
            sender,
            self._loop,
            clock=self._clock,
            ahead_ms=self._ahead_ms,
            meters=self._meters,
            on_draining=self._drain,
        )
        self._invalidations.restart()
        self._counts[CONNECTS] += 1
        self._silence = Silence(time.monotonic())
        self._tell_after_s = 0.0
        return sender

    async def _greet(self, call: Any, frames: FrameSplitter) -> None:
        """Say hello, and hear who it is."""
        welcome, *more = await _exchange_words(call, frames, self._greeting.begin(self._clock()))
        if type(welcome) is Challenge:
            proof = self._greeting.proving.prove(welcome)
            welcome, *more = await _exchange_words(call, frames, proof)
        if type(welcome) is not Welcome:
            raise FrameError("the peer did not say who it is")
        self._greeting.check(welcome)
        # Read before it travelled here, so it is behind by its way: the peer gives up too early.
        self._ahead_ms = welcome.clock_ms - int(time.monotonic() * 1000)
        if not self._life and time.monotonic() - self._started_s > PEER_STRANGE_S:
            # It may have been cut off for long. Then a worker before this one, or another node,
            # may have stood in for it and died with what it had to tell.
            self._invalidations.flush_all()
        if welcome.node_id == self._life:
            # It kept its memory. Other nodes' links have to come back, too, and tell it what they
            # wrote while they stood in for it, before anyone reads there again.
            self._returning = self._loop.call_later(PEER_RETURN_S, self._returned)
        self._life = welcome.node_id
        self._on_greeted(self)
        self._draining = welcome.draining or any(type(reply) is Draining for reply in more)

    def _returned(self) -> None:
        """Ask the peer again, as it has had time to hear from all others."""
        self._returning = None
        if self.up:
            self._turn("")

    async def _receive(self, call: Any, frames: FrameSplitter) -> None:
        """Take what the peer says, until the stream ends."""
        exchange = self._exchange
        if exchange is None:
            return
        read, take = call.read, exchange.take
        while (message := await read()) is not grpc.aio.EOF:
            self._silence.heard = True
            exchange.heard_s = time.monotonic()
            for body in frames.bodies(message):
                take(body)
                del body  # a view would keep a buffer from growing

    def _drain(self) -> None:
        """The peer is about to stop. Say that we know, behind all that is on its way there."""
        if not self._draining and self._exchange is not None:
            self._draining = True
            self._exchange.say(self._greeting.hello())
            self._log.draining()
            if self.up:
                self._turn("")

    def _fail(self, why: str) -> None:
        """End the stream; another is dialled."""
        if self._failed is not None and not self._failed.done():
            self._failed.set_result(why)

    def _look(self) -> None:
        """Look at what no event tells: silence, deadlines, invalidations to be told again."""
        sender, exchange = self._sender, self._exchange
        if sender is None or exchange is None:
            return
        now_s = time.monotonic()
        if sender.progressed:
            sender.progressed = False
            self._silence.heard = True
        verdict = self._silence.look(now_s)
        if verdict is Verdict.DEAD:
            self._fail(f"nothing was heard for {PEER_SILENCE_S} s")
            return
        if verdict is Verdict.PING:
            exchange.say(Ping())
        self._look_timer = self._loop.call_later(PEER_LOOK_EVERY_S, self._look)
        exchange.end_late(now_s)
        self._tell()

    # -- states ----------------------------------------------------------------------------

    def _turn(self, failed: str, *, refused: bool = False) -> None:
        """Be up ("") or down, for a reason; tell who waits."""
        was_up, was_usable = self.up, self.usable
        if failed:
            drained = self._draining
            self._lose()
            if refused:
                self._log.refused(failed)
            elif failed != CLOSED:
                self._log.down(failed, drained=drained)
        elif not was_up:
            self._log.up()
        self.up = not failed
        self.usable = self.up and not self._draining and self._returning is None
        if self.up and not self.settled:
            self._settle()
        elif (self.up, self.usable) != (was_up, was_usable):
            self._on_change(self)

    def _lose(self) -> None:
        """Tell all who wait that the link failed."""
        sender, self._sender = self._sender, None
        exchange, self._exchange = self._exchange, None
        self._draining = False
        if self._returning is not None:
            self._returning.cancel()
            self._returning = None
        if sender is not None and exchange is not None:
            self._sent["messages"] += sender.messages
            self._sent["bytes"] += sender.bytes_written
            exchange.lose()
            self._invalidations.take_back()

    def _settle(self) -> None:
        """Let those go on who wait for the first try's end."""
        if self.settled:
            return
        self.settled = True
        self._settled.set()
        held, self._held = self._held, []
        for request, done, deadline_s in held:
            exchange = self._exchange
            if exchange is not None and (self.usable or (self.up and request.flags & PEEK)):
                exchange.ask(request, done, deadline_s)
            else:
                self._refuse(done)
        self._on_change(self)

    def _refuse(self, done: DoneCall) -> None:
        """Tell one who asks that nobody can be asked here."""
        self._counts[LOST] += 1
        error = lost(self.address, sent=False)
        self._loop.call_soon(finish, done, error, self.address)


async def _exchange_words(call: Any, frames: FrameSplitter, said: Request) -> list[Reply]:
    """Say one word of a greeting, and return what is answered in one message."""
    word = frame(said)
    await call.write(pack([word], len(word)))
    message = await call.read()
    if message is grpc.aio.EOF:
        raise ConnectionResetError("the peer ended the stream at once")
    answers = list(map(decode_reply, frames.bodies(message)))
    if not answers:
        raise FrameError("the peer did not say who it is")
    return answers


def _reason(error: BaseException, *, tls: bool) -> tuple[str, float]:
    """Return what an error of grpc says, in short, and how long to wait at least, in seconds."""
    if isinstance(error, grpc.aio.AioRpcError):
        if error.code() is grpc.StatusCode.UNIMPLEMENTED:
            what = "the node is not part of a cluster: start it with --peers or --discover"
            return what, PEER_REFUSED_RETRY_S
        if error.code() in _REFUSALS:
            what = "".join(filter(str.isprintable, error.details() or ""))
            return what[:300], PEER_REFUSED_RETRY_S
        trouble = why_no_handshake(error.details() or "", tls=tls)
        if trouble is not None:
            return trouble.what, PEER_REFUSED_RETRY_S if trouble.certain else 0.0
        # What gRPC says ends with what the system said: "... connect: Connection refused (111)".
        return f"{error.code().name}: {(error.details() or '').rpartition(': ')[2]}"[:200], 0.0
    return f"{type(error).__name__}: {error}"[:200], 0.0
