"""Requests under way on one stream: numbered, matched with replies, given up when late or lost.

*Process*: worker, in the loop's thread; one `Exchange` for each life of a stream.

*Invariants*: ids count up from 1 in the order in which frames are sent, so that how many frames the
stream took tells which requests may have left. What waits is bounded in requests and in bytes. An
answer that cannot be understood, and one whose taker raises, are the affair of one request.

*Why no future and no timer for each request*: 64 gets that share two messages cost about 5 us each
on this side; a future and a timer would be as much again. `end_late` looks at all of them, and only
when the earliest deadline has passed.
"""

from __future__ import annotations

import asyncio
import logging
import time
from bisect import bisect_left
from collections.abc import Callable
from typing import Final

from kamacache.cluster.stream import FrameSender
from kamacache.errors import DeadlineExceededError, KamaCacheError, LoadError
from kamacache.limits import (
    CALL_SECONDS_BUCKETS,
    PEER_REQUESTS_MAX,
    PEER_UNSENT_BYTES_MAX,
    REPLY_GRACE_S,
)
from kamacache.repeated import RepeatedLog
from kamacache.rundir.meters import PEER, Region
from kamacache.wire.frames import FrameError, frame
from kamacache.wire.messages import (
    FROM_PEER,
    Answers,
    DecodeError,
    Draining,
    Failure,
    Reply,
    Request,
    Values,
    decode_reply,
    salvage_id,
)
from kamacache.wire.parts import append, rest_of

GRACE_S: Final = 2 * REPLY_GRACE_S  # the peer's front, and its worker, say first who is late
NEVER_S: Final = float("inf")
LOST: Final = PEER.at("lost")
LATE: Final = PEER.at("late")
OVERLOADED: Final = PEER.at("overloaded")
FAILURES: Final = PEER.at("failures")
SECONDS: Final = PEER.histogram_at(0)

log = RepeatedLog(logging.getLogger("kamacache.cluster"))

Outcome = Reply | KamaCacheError
DoneCall = Callable[[Outcome], None]


class PeerLostError(KamaCacheError):
    """The link failed before the answer; ``sent`` False: the request never left this process."""

    fields = ("sent",)
    sent: bool


def lost(address: str, *, sent: bool) -> PeerLostError:
    """Return the error of a request whose link failed."""
    return PeerLostError(f"the link to {address} failed", sent=sent)


def overloaded(address: str, request: Request) -> LoadError:
    """Return the error of a request for which there is no room."""
    return LoadError(
        f"the link to {address} is overloaded: too many requests wait for it",
        group=request.group,
        cause_type="overloaded",
    )


def finish(done: DoneCall, outcome: Outcome, address: str) -> None:
    """Give an outcome to who waits for it; what it raises harms no one else."""
    try:
        done(outcome)
    except Exception:
        log.exception("what waited for a peer's answer failed", about=address, peer=address)


class Exchange:
    """What was asked of one peer over one stream, and is not answered."""

    __slots__ = (
        "_address",
        "_ahead_ms",
        "_clock",
        "_counts",
        "_earliest_s",
        "_ids",
        "_loop",
        "_on_draining",
        "_part_left",
        "_pending",
        "_sender",
        "heard_s",
    )

    def __init__(
        self,
        address: str,
        sender: FrameSender,
        loop: asyncio.AbstractEventLoop,
        *,
        clock: Callable[[], int],
        ahead_ms: int,
        meters: Region,
        on_draining: Callable[[], None],
    ) -> None:
        """``ahead_ms`` is what the peer's CLOCK_BOOTTIME is ahead of our time.monotonic(), or less.

        ``meters`` count for all lives of the stream."""
        self._address: Final = address
        self._sender: Final = sender
        self._loop: Final = loop
        self._clock: Final = clock
        self._ahead_ms: Final = ahead_ms
        self._counts: Final = meters.words
        self._on_draining: Final = on_draining
        self._ids = 0
        self._pending: dict[int, tuple[Request, DoneCall, float, float]] = {}  # the last: asked
        self.heard_s = 0.0  # when what is taken now came; for who reads the stream to set
        self._part_left: dict[int, int] = {}  # of requests that were answered in part: keys
        self._earliest_s = NEVER_S  # none of the deadlines is before

    def __len__(self) -> int:
        """How many requests wait for their answer."""
        return len(self._pending)

    @property
    def full(self) -> bool:
        """Whether the next request would be refused."""
        return (
            len(self._pending) >= PEER_REQUESTS_MAX
            or self._sender.waiting_bytes > PEER_UNSENT_BYTES_MAX
        )

    def ask(self, request: Request, done: DoneCall, deadline_s: float) -> None:
        """Send a request whose flags and clock are filled in; ``done`` is called once, later.

        For a `Gets` it is called with each of the `Answers`, or with what came in place of one.
        """
        asked_s = time.monotonic()
        left_s = deadline_s - asked_s
        if left_s <= 0:
            self._counts[LATE] += 1
            self._loop.call_soon(finish, done, self._late(request), self._address)
            return
        sender, pending = self._sender, self._pending
        if len(pending) >= PEER_REQUESTS_MAX or sender.waiting_bytes > PEER_UNSENT_BYTES_MAX:
            self._counts[OVERLOADED] += 1
            error = overloaded(self._address, request)
            self._loop.call_soon(finish, done, error, self._address)
            return
        self._ids = request.id = ticket = self._ids + 1
        request.budget_ms = int(left_s * 1000) + 1
        request.until_ms = int(deadline_s * 1000) + self._ahead_ms
        pending[ticket] = (request, done, deadline_s, asked_s)
        if deadline_s < self._earliest_s:
            self._earliest_s = deadline_s
        sender.put(frame(request))

    def say(self, request: Request) -> None:
        """Send a request whose answer nobody waits for."""
        self._ids = request.id = self._ids + 1
        request.sent = self._clock()
        self._sender.put(frame(request))

    def take(self, body: bytes | bytearray | memoryview) -> None:
        """Hand a reply to who waits for it. Raises `FrameError` where it is none."""
        try:
            reply = decode_reply(body)
        except DecodeError as error:
            reply = self._not_understood(body, error)
        entry = self._pending.pop(reply.id, None)
        if entry is None:  # it came late, or unasked
            if type(reply) is Draining:
                self._on_draining()
            return
        request, done, deadline_s, asked_s = entry
        if type(reply) is Answers:
            left = self._part_left.pop(reply.id, 0) or len(getattr(request, "keys", ()))
            left -= len(reply.values) + len(reply.errors)
            if left > 0:
                self._part_left[reply.id] = left
                self._pending[reply.id] = entry
                asked_s = NEVER_S  # it is counted with its last part
        # `Region.observe`, spelled out.
        took_s, counts = self.heard_s - asked_s, self._counts
        if took_s > 0:
            counts[SECONDS] += int(took_s * 1e6)
            counts[SECONDS + 1 + bisect_left(CALL_SECONDS_BUCKETS, took_s)] += 1
        if type(reply) is Failure:
            counts[FAILURES] += 1
        elif type(reply) is Values and len(reply.values) < len(getattr(request, "keys", ())):
            self._ask_rest(request, reply, done, deadline_s)
            return
        try:  # not `finish`: one call less for each answer
            done(reply)
        except Exception:
            peer = self._address
            log.exception("what waited for a peer's answer failed", about=peer, peer=peer)

    def end_late(self, now_s: float) -> None:
        """Tell those whose deadline passed; the answers that still come are dropped."""
        if now_s < self._earliest_s + GRACE_S:
            return
        pending = self._pending
        for ticket in [t for t, asked in pending.items() if now_s >= asked[2] + GRACE_S]:
            request, done, _, _ = pending.pop(ticket)
            self._part_left.pop(ticket, None)
            self._counts[LATE] += 1
            finish(done, self._late(request), self._address)
        self._earliest_s = min((asked[2] for asked in pending.values()), default=NEVER_S)

    def lose(self) -> None:
        """Tell all that the stream failed, and which of them may have been read."""
        pending, self._pending = self._pending, {}
        self._part_left.clear()
        self._counts[LOST] += len(pending)
        for ticket, (_, done, _, _) in pending.items():
            error = lost(self._address, sent=ticket <= self._sender.handed)
            self._loop.call_soon(finish, done, error, self._address)

    def _late(self, request: Request) -> DeadlineExceededError:
        return DeadlineExceededError(
            f"group {request.group!r}: {self._address} did not answer before the deadline",
            group=request.group,
        )

    def _not_understood(self, body: bytes | bytearray | memoryview, error: Exception) -> Failure:
        ticket = salvage_id(body)
        if not ticket:
            raise FrameError(f"a frame is no message: {error}") from error
        return Failure(
            ticket,
            "KamaCacheError",
            f"the answer of {self._address} is not understood ({error}); "
            "use one version of kamacache on all nodes",
            {},
        )

    def _ask_rest(self, request: Request, whole: Values, done: DoneCall, deadline_s: float) -> None:
        rest = rest_of(request, whole) if whole.values else None
        if rest is None:
            none = KamaCacheError(f"{self._address} answered a batch with none of its keys")
            finish(done, none, self._address)
            return

        def joined(part: Outcome) -> None:
            if isinstance(part, KamaCacheError | Failure):
                done(part)
                return
            append(whole, part)
            if rest_of(request, whole) is None:
                done(whole)
            else:
                self._ask_rest(request, whole, done, deadline_s)

        rest.flags |= FROM_PEER
        rest.sent = self._clock()
        self.ask(rest, joined, deadline_s)
