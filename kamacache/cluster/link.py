"""The link to one other node: requests out, replies in, over one gRPC stream.

*Process*: worker, in the loop's thread. *Owns*: the stream, and who waits for replies::

    send ──► frames that wait ── one message at a time ──► the peer's front
    done ◄── by id ◄─────────── one message at a time ◄────────┘

    dial ─► Hello / Welcome ─► what was to be invalidated, answered ─► usable ─┬─► Draining ─┐
      ▲                                                                        │             │
      └──── jittered back-off ◄── refused, broken, nothing heard for PEER_SILENCE_S ◄────────┘

*Invariants*: ``done`` is called once for each `PeerLink.send`, later and in the loop. While the
link is down nobody waits for it. It is down only when nothing is heard, never because answers take
long: a link on which nothing comes is pinged, and the peer's front answers that whatever its
workers do. What waits is bounded in requests and in bytes. A reply that cannot be understood fails
its own request; bytes that are no frames end the stream.

*Why no future and no timer per request*: 64 gets that share two messages cost about 4 us each on
this side; a future and a timer would be as much again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import grpc

from kamacache.cluster.breaker import Breaker
from kamacache.cluster.invalidations import InvalidationQueue
from kamacache.cluster.stream import LINK_METHOD, FrameSender, unpack
from kamacache.errors import DeadlineExceededError, KamaCacheError, LoadError
from kamacache.limits import (
    LOG_EVERY_S,
    PEER_BATCH_BYTES,
    PEER_CONNECT_S,
    PEER_LOOK_EVERY_S,
    PEER_PING_EVERY_S,
    PEER_REFUSED_RETRY_S,
    PEER_REQUESTS_MAX,
    PEER_SILENCE_S,
    PEER_TELL_S,
    PEER_UNSENT_BYTES_MAX,
    REPLY_GRACE_S,
)
from kamacache.wire.frames import FrameError, FrameReader, frame
from kamacache.wire.messages import (
    FROM_PEER,
    PEEK,
    PEER_FORMAT,
    DecodeError,
    Done,
    Draining,
    Failure,
    Flush,
    Hello,
    Ping,
    Reply,
    Request,
    Values,
    Welcome,
    decode_reply,
    salvage_id,
)
from kamacache.wire.parts import append, rest_of

CHANNEL_OPTIONS: Final[list[tuple[str, Any]]] = [
    # Each try has a channel of its own, so that when to dial again is ours to say: gRPC waits
    # from 1 s to 2 min.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),  # else gRPC keeps copies of what it sent
    ("grpc.enable_http_proxy", 0),
    ("grpc.service_config_disable_resolution", 1),
    ("grpc.max_receive_message_length", PEER_BATCH_BYTES + (64 << 10)),
    ("grpc.max_send_message_length", PEER_BATCH_BYTES + (64 << 10)),
]
GRACE_S: Final = 2 * REPLY_GRACE_S  # the peer's front, and its worker, say first who is late
TELLS_MAX: Final = 4  # invalidations under way; what comes meanwhile goes together in the next
CLOSED: Final = "closed"
NEVER_S: Final = float("inf")

log = logging.getLogger("kamacache.cluster")

Outcome = Reply | KamaCacheError
DoneCall = Callable[[Outcome], None]


class PeerLostError(KamaCacheError):
    """The link failed before the answer; ``sent`` False: the request never left this process."""

    fields = ("sent",)
    sent: bool


class _RefusedError(Exception):
    """The node at the address cannot be linked to, and waiting does not mend it."""


@dataclass(frozen=True, slots=True)
class LinkEnd:
    """This end of the links: the node's name on the ring, the id of its life, the worker."""

    node: str
    node_id: str
    worker: int


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
        breaker: Breaker | None = None,
        invalidations: InvalidationQueue | None = None,
    ) -> None:
        """``clock`` returns a fresh version; ``on_change`` is called when `usable`, `up` or
        `settled` changed.
        """
        self.address: Final = address
        self.settled = False  # the first try has ended, either way
        self.up = False  # greeted, and all invalidations answered
        self.usable = False  # up, and the peer does not drain
        self._end: Final = end
        self._loop: Final = loop
        self._clock: Final = clock
        self._on_change: Final = on_change
        self._breaker: Final = breaker or Breaker()
        self._invalidations: Final = invalidations or InvalidationQueue(clock)
        self._sender: FrameSender | None = None  # while greeted
        self._ids = 0
        self._ids_before = 0  # of earlier streams: the first frame of this one has the next id
        self._pending: dict[int, tuple[Request, DoneCall, float]] = {}
        self._earliest_s = NEVER_S  # no deadline of those pending is before
        self._held: list[tuple[Request, DoneCall, float]] = []  # until settled
        self._draining = False
        self._heard = False
        self._silent_s = 0.0
        self._pinged = False
        self._looked_s = 0.0
        self._tell_after_s = 0.0
        self._telling = False
        self._failed: asyncio.Future[str] | None = None
        self._hurry = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._settled = asyncio.Event()
        self._logged = ""
        self._mismatch_logged_s = float("-inf")
        self._counts: Final = dict.fromkeys(
            (
                "requests",
                "batches",
                "bytes",
                "connects",
                "lost",
                "overloaded",
                "late",
                "invalidations_sent",
                "flushes_sent",
            ),
            0,
        )

    # -- for the worker --------------------------------------------------------------------

    def start(self) -> None:
        """Begin to dial; call once, in the loop."""
        self._task = self._loop.create_task(self._run())

    async def close(self) -> None:
        """End the link; who waits is told that it failed."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait((task,))
        self._turn(CLOSED)
        self._settle()

    async def wait_settled(self) -> None:
        """Wait until the first try has ended."""
        await self._settled.wait()

    def retry_now(self) -> None:
        """Dial at once if the link is down, and quickly again for a while: the peer is there."""
        self._breaker.hurry()
        self._hurry.set()

    @property
    def pending_invalidations(self) -> int:
        """Keys and flushes that the peer has not answered."""
        return self._invalidations.pending

    def stats(self) -> dict[str, int]:
        """Return what the link has done."""
        counts = dict(self._counts)
        sender = self._sender
        if sender is not None:
            counts["batches"] += sender.messages
            counts["bytes"] += sender.bytes_written
        counts["pending"] = len(self._pending)
        counts["pending_invalidations"] = self._invalidations.pending
        return counts

    def send(self, request: Request, done: DoneCall, deadline_s: float) -> None:
        """Ask the peer; ``done`` is called once, later, in the loop.

        It gets the reply, a `Failure` included, or a `PeerLostError`, a `DeadlineExceededError`,
        or a `LoadError` where too much waits already. ``deadline_s`` is a time.monotonic(). The
        link fills in the request's id, budget, clock and flag.
        """
        request.flags |= FROM_PEER
        request.sent = self._clock()
        if self.usable or (self.up and request.flags & PEEK):
            self._send(request, done, deadline_s)
        elif self.settled or self._task is None:
            self._loop.call_soon(done, self._lost_error(False))
        elif len(self._held) >= PEER_REQUESTS_MAX:
            self._refuse(request, done)
        else:
            self._held.append((request, done, deadline_s))

    def invalidate(self, group: str, items: Sequence[tuple[bytes, int]]) -> None:
        """Have the peer drop records older than these versions: now, or when the link is back."""
        self._invalidations.add(group, items)
        if not self._telling and self._sender is not None:
            self._telling = True  # all that this turn of the loop adds goes together
            self._loop.call_soon(self._tell)

    # -- sending ---------------------------------------------------------------------------

    def _send(self, request: Request, done: DoneCall, deadline_s: float) -> None:
        sender = self._sender
        if (
            sender is None
            or len(self._pending) >= PEER_REQUESTS_MAX
            or sender.waiting_bytes > PEER_UNSENT_BYTES_MAX
        ):
            self._refuse(request, done)
            return
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            self._loop.call_soon(done, self._late_error(request))
            return
        self._ids = request.id = ticket = self._ids + 1
        request.budget_ms = int(left_s * 1000) + 1
        self._pending[ticket] = (request, done, deadline_s)
        if deadline_s < self._earliest_s:
            self._earliest_s = deadline_s
        sender.put(frame(request))
        self._counts["requests"] += 1

    def _refuse(self, request: Request, done: DoneCall) -> None:
        self._counts["overloaded"] += 1
        error = LoadError(
            f"the link to {self.address} is overloaded: too many requests wait for it",
            group=request.group,
            cause_type="overloaded",
        )
        self._loop.call_soon(done, error)

    def _late_error(self, request: Request) -> DeadlineExceededError:
        self._counts["late"] += 1
        return DeadlineExceededError(
            f"group {request.group!r}: {self.address} did not answer before the deadline",
            group=request.group,
        )

    def _lost_error(self, sent: bool) -> PeerLostError:
        return PeerLostError(f"the link to {self.address} failed", sent=sent)

    def _finish(self, done: DoneCall, outcome: Outcome) -> None:
        try:
            done(outcome)
        except Exception:
            log.exception("what waited for a peer's answer failed", extra={"peer": self.address})

    def _tell(self) -> None:
        """Send what is to be invalidated, as far as it may go out now."""
        self._telling = False
        queue, sender = self._invalidations, self._sender
        now_s = time.monotonic()
        while (
            sender is not None
            and queue.unsent
            and now_s >= self._tell_after_s
            and queue.under_way < TELLS_MAX
            and len(self._pending) < PEER_REQUESTS_MAX
            and (following := queue.next()) is not None
        ):
            ticket, told = following
            told.flags |= FROM_PEER
            told.sent = self._clock()
            self._send(told, partial(self._told, ticket), now_s + PEER_TELL_S)
            self._counts["flushes_sent" if type(told) is Flush else "invalidations_sent"] += 1

    def _told(self, ticket: int, outcome: Outcome) -> None:
        if type(outcome) is Done:
            self._invalidations.acknowledged(ticket)
        else:
            # Such as a worker of the peer's that restarts. What the link lost is sent anew.
            self._invalidations.failed(ticket)
            self._tell_after_s = time.monotonic() + PEER_LOOK_EVERY_S
        if self._sender is not None:
            self._tell()
            self._catch_up()

    # -- receiving -------------------------------------------------------------------------

    def _take(self, body: bytes | bytearray | memoryview) -> None:
        """Hand one reply to who waits for it."""
        try:
            reply = decode_reply(body)
        except DecodeError as error:
            ticket = salvage_id(body)
            if not ticket:
                raise FrameError(f"a frame is no message: {error}") from error
            reply = Failure(
                ticket,
                "KamaCacheError",
                f"the answer of {self.address} is not understood ({error}); "
                "use one version of kamacache on all nodes",
                {},
            )
        entry = self._pending.pop(reply.id, None)
        if entry is None:  # it came late, or unasked
            if type(reply) is Draining:
                self._drain()
            return
        request, done, deadline_s = entry
        if type(reply) is Values and len(reply.values) < len(getattr(request, "keys", ())):
            self._ask_rest(request, reply, done, deadline_s)
            return
        try:
            done(reply)
        except Exception:
            log.exception("what waited for a peer's answer failed", extra={"peer": self.address})

    def _ask_rest(self, request: Request, whole: Values, done: DoneCall, deadline_s: float) -> None:
        rest = rest_of(request, whole) if whole.values else None
        if rest is None:
            self._finish(done, KamaCacheError(f"{self.address} answered no key of a batch"))
            return

        def joined(part: Outcome) -> None:
            if isinstance(part, KamaCacheError | Failure):
                done(part)
                return
            append(whole, part)
            if len(whole.values) < len(request.keys):  # type: ignore[attr-defined] # a GetMany
                self._ask_rest(request, whole, done, deadline_s)
            else:
                done(whole)

        rest.flags |= FROM_PEER
        rest.sent = self._clock()
        self._send(rest, joined, deadline_s)

    def _drain(self) -> None:
        """The peer is about to stop. Say that we know, behind all that is on its way there."""
        if self._draining or self._sender is None:
            return
        self._draining = True
        self._put_unanswered(self._hello())
        log.info("a peer drains", extra={"peer": self.address})
        self._turn("")

    def _put_unanswered(self, request: Request) -> None:
        sender = self._sender
        if sender is not None:
            self._ids = request.id = self._ids + 1
            request.sent = self._clock()
            sender.put(frame(request))

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
                    reason = await self._session()
                except _RefusedError as error:
                    reason, least_s = str(error), PEER_REFUSED_RETRY_S
                except (grpc.RpcError, OSError, DecodeError, asyncio.InvalidStateError) as error:
                    reason = _reason(error)
                except Exception as error:
                    log.exception("a peer link failed unexpectedly", extra={"peer": self.address})
                    reason = type(error).__name__
                was_up_s = time.monotonic() - began_s if self.up else 0.0
                self._turn(reason, refused=least_s > 0)
                self._settle()
                wait_s = max(self._breaker.failed(was_up_s), least_s)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._hurry.wait(), wait_s)
        finally:
            early.cancel()

    async def _session(self) -> str:
        """Be linked once; return why it ended. Raises what grpc raises."""
        failed: asyncio.Future[str] = self._loop.create_future()
        self._failed = failed
        channel = grpc.aio.insecure_channel(self.address, options=CHANNEL_OPTIONS)
        tasks: list[asyncio.Task[Any]] = []
        look: list[asyncio.TimerHandle] = []
        try:
            call: Any = channel.stream_stream(LINK_METHOD)()
            reader = FrameReader()
            # A task, since what cancels the call would look like a cancellation of ours.
            greeting = self._loop.create_task(self._greet(call, reader))
            tasks.append(greeting)
            done, _ = await asyncio.wait((greeting,), timeout=PEER_CONNECT_S)
            if not done:
                return f"no answer within {PEER_CONNECT_S} s"
            if greeting.cancelled():
                return "the stream was cancelled"
            greeting.result()
            sender = self._sender = FrameSender(self._loop)
            self._ids_before = self._ids
            self._invalidations.restart()
            self._heard, self._silent_s, self._pinged = True, 0.0, False
            self._tell_after_s = 0.0
            self._counts["connects"] += 1
            tasks += [
                self._loop.create_task(sender.run(call.write)),
                self._loop.create_task(self._receive(call, reader)),
            ]
            self._looked_s = time.monotonic()
            self._look(look)
            self._tell()
            self._catch_up()
            await asyncio.wait((*tasks[1:], failed), return_when=asyncio.FIRST_COMPLETED)
            if failed.done():
                return failed.result()
            for task in reversed(tasks):  # the reading one knows more than the writing one
                if task.done() and not task.cancelled():
                    task.result()
            return "the stream ended"
        finally:
            for handle in look:
                handle.cancel()
            self._failed = None
            for task in tasks:
                task.cancel()
            await channel.close()
            if tasks:
                await asyncio.wait(tasks)
                for task in tasks:
                    if not task.cancelled():
                        task.exception()  # it was seen, or says the same

    def _hello(self) -> Hello:
        end = self._end
        return Hello(
            format=PEER_FORMAT,
            node=end.node,
            node_id=end.node_id,
            worker=end.worker,
            peer=self.address,
        )

    async def _greet(self, call: Any, reader: FrameReader) -> None:
        """Say hello, and hear who it is."""
        hello = self._hello()
        hello.sent = self._clock()
        sender = FrameSender(self._loop)
        sender.put(frame(hello))
        await call.write(sender.next_message())
        while (body := reader.next()) is None:
            message = await call.read()
            if message is grpc.aio.EOF:
                raise ConnectionResetError("the peer ended the stream at once")
            reader.feed(unpack(message))
        welcome = decode_reply(body)
        if type(welcome) is not Welcome:
            raise FrameError("the peer did not say who it is")
        self._check(welcome)
        self._draining = welcome.draining

    def _check(self, welcome: Welcome) -> None:
        if welcome.node_id == self._end.node_id:
            raise _RefusedError(
                "this address is our own node's: name it as the others do, with --advertise"
            )
        if welcome.format != PEER_FORMAT:
            raise _RefusedError(
                f"the node speaks format {welcome.format} and this one {PEER_FORMAT}: "
                "use one version of kamacache on all nodes"
            )
        now_s = time.monotonic()
        if welcome.node != self.address and now_s - self._mismatch_logged_s > LOG_EVERY_S:
            self._mismatch_logged_s = now_s
            log.warning(
                "a peer calls itself otherwise than this node calls it, so that the two disagree "
                "on who owns what: give it --advertise with the name that is in --peers",
                extra={"peer": self.address, "own_name": welcome.node},
            )

    async def _receive(self, call: Any, reader: FrameReader) -> None:
        """Take what the peer says, until the stream ends."""
        read, take, following = call.read, self._take, reader.next
        while (body := following()) is not None:  # what came with the welcome
            take(body)
        while (message := await read()) is not grpc.aio.EOF:
            self._heard = True
            reader.feed(unpack(message))
            while (body := following()) is not None:
                take(body)
                del body  # a view would keep the reader's buffer from growing

    def _look(self, handle: list[asyncio.TimerHandle]) -> None:
        """Look at what no event tells: silence, deadlines, invalidations to be told again."""
        handle[:] = [self._loop.call_later(PEER_LOOK_EVERY_S, self._look, handle)]
        now_s = time.monotonic()
        # Of a process that stood still itself, only what it could have heard counts as silence.
        passed_s = min(now_s - self._looked_s, 2 * PEER_LOOK_EVERY_S)
        self._looked_s = now_s
        sender = self._sender
        if self._heard or (sender is not None and sender.progressed):
            self._heard = self._pinged = False
            self._silent_s = 0.0
            if sender is not None:
                sender.progressed = False
        else:
            self._silent_s += passed_s
            if self._silent_s >= PEER_SILENCE_S:
                self._fail(f"nothing was heard for {PEER_SILENCE_S} s")
                return
            if self._silent_s >= PEER_PING_EVERY_S and not self._pinged:
                self._pinged = True
                self._put_unanswered(Ping())
        if now_s >= self._earliest_s + GRACE_S:
            self._end_late(now_s)
        if self._invalidations.unsent:
            self._tell()

    def _end_late(self, now_s: float) -> None:
        """Tell those whose deadline passed."""
        late = [t for t, (_, _, until_s) in self._pending.items() if now_s >= until_s + GRACE_S]
        for ticket in late:
            request, done, _ = self._pending.pop(ticket)
            self._finish(done, self._late_error(request))
        self._earliest_s = min(
            (until_s for _, _, until_s in self._pending.values()), default=NEVER_S
        )

    def _fail(self, reason: str) -> None:
        if self._failed is not None and not self._failed.done():
            self._failed.set_result(reason)

    # -- states ----------------------------------------------------------------------------

    def _catch_up(self) -> None:
        """Be up once the peer has dropped all that it was to drop while the link was down."""
        if not self.up and self._sender is not None and self._invalidations.caught_up:
            self._turn("")

    def _turn(self, failed: str, *, refused: bool = False) -> None:
        """Be up ("") or down, for a reason; tell who waits."""
        was = (self.up, self.usable)
        self.up = not failed
        self.usable = self.up and not self._draining
        if failed:
            self._lose()
            if failed != CLOSED and (not self._logged or (refused and self._logged != failed)):
                self._logged = failed  # further tries that fail are no news
                log.log(
                    logging.ERROR if refused else logging.WARNING,
                    "the link to a peer is down",
                    extra={"peer": self.address, "reason": failed},
                )
        elif not was[0]:
            self._logged = ""
            log.info("the link to a peer is up", extra={"peer": self.address})
        if self.up and not self.settled:
            self._settle()
        elif was != (self.up, self.usable):
            self._on_change(self)

    def _lose(self) -> None:
        """Tell all who wait that the link failed."""
        sender, self._sender = self._sender, None
        self._draining = False
        if sender is None:
            return
        self._counts["batches"] += sender.messages
        self._counts["bytes"] += sender.bytes_written
        handed = self._ids_before + sender.handed
        pending, self._pending = self._pending, {}
        self._earliest_s = NEVER_S
        self._counts["lost"] += len(pending)
        for ticket, (_, done, _) in pending.items():
            self._loop.call_soon(self._finish, done, self._lost_error(ticket <= handed))

    def _settle(self) -> None:
        """Let those go on who wait for the first try's end."""
        if self.settled:
            return
        self.settled = True
        self._settled.set()
        held, self._held = self._held, []
        for request, done, deadline_s in held:
            if self.usable or (self.up and request.flags & PEEK):
                self._send(request, done, deadline_s)
            else:
                self._loop.call_soon(self._finish, done, self._lost_error(False))
        self._on_change(self)


def _reason(error: BaseException) -> str:
    """Return what an error of grpc says, in short."""
    if isinstance(error, grpc.aio.AioRpcError):
        if error.code() is grpc.StatusCode.UNIMPLEMENTED:
            return "the node is not part of a cluster: start it with --peers or --discover"
        return f"{error.code().name}: {error.details()}"[:200]
    return f"{type(error).__name__}: {error}"[:200]
