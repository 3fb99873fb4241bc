"""The connection to one worker on one loop: what is asked on it, and who waits for what.

*Process*: as `kamacache.local.alink`::

    gather, ask ──► frames of this turn of the loop ──► one write
    take ◄── replies ◄── data_received

*Coalescing*: gets of one turn go in one `Gets`, and while nothing has come of the last one, later
gets wait for its answer, at most twice as long as answers took of late and `HOLD_MAX_S`. With 64
callers over 8 workers (scripts/bench/remote.py) that makes 4.2 to 4.5 keys a message to the owner
where it would be 1.4 to 1.9, and takes a third to a half off what a get costs all processes.

One timer serves the deadlines of all: a timer for each get costs more than all else that is done
here for it.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final, cast

from kamacache.errors import KamaCacheError, to_fields
from kamacache.limits import (
    REPLY_GRACE_S,
)
from kamacache.local.dialling import Dialling
from kamacache.local.exchange import (
    LOST_MAX,
    TRIES_MAX,
    budget_ms,
    late,
    lost,
    unreachable,
    unread,
)
from kamacache.local.waiting import (
    SPREAD_S,
    LostError,
    One,
    Parts,
    Turn,
    Waiting,
    one_answer,
)
from kamacache.wire.frames import HEADER_BYTES, FrameError, FrameReader, frame
from kamacache.wire.messages import (
    Answers,
    DecodeError,
    Failure,
    Get,
    Gets,
    Reply,
    Request,
    decode_reply,
)

if TYPE_CHECKING:
    from kamacache.local.alink import AsyncWorkerLinks

LOOK_EVERY_S: Final = 1.0  # how often those who wait look whether the node still answers
CLOCK_STEP_S: Final = 0.002  # a loop's own clock is in milliseconds, and behind
TURNS_UNHEARD: Final = 1  # turns' gets of which nothing came, beside which later ones are held
HOLD_MAX_S: Final = 0.01
ANSWER_GROWTH: Final = 1.125
NEVER_S: Final = float("inf")


class _Stream(asyncio.Protocol):
    """One connection of a `LoopLink`; what an old one still reports is not the new one's."""

    def __init__(self, link: LoopLink) -> None:
        self._link = link
        self._reader = FrameReader()
        self._held = 0  # bytes in the reader
        self._answered = False
        self.wrote = False  # whether the kernel may have taken any request

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self._link.connected(self, cast(asyncio.Transport, transport))

    def connection_lost(self, exc: Exception | None) -> None:
        """Wake all who wait."""
        if self._link.stream is self:
            # Of requests sent one after the other the first may have been read. What a dying
            # worker's queue of connections took was not; nothing was ever answered there. Nor
            # was what could not be sent, where the worker's end closed before the first write.
            self._link.lose(taken=self._answered or (self.wrote and not unread(exc)))

    def data_received(self, data: bytes) -> None:
        """Hand replies to those who wait for them."""
        link = self._link
        if link.stream is not self:
            return
        self._answered = True
        reader = self._reader
        try:
            if (
                not self._held
                and len(data) > HEADER_BYTES
                and int.from_bytes(data[:HEADER_BYTES], "little") == len(data) - HEADER_BYTES
            ):
                link.take(decode_reply(data[HEADER_BYTES:]))  # one whole frame, as nearly always
                return
            reader.feed(data)
            while (body := reader.next()) is not None:
                link.take(decode_reply(body))
                del body
            self._held = reader.held_bytes
        except (FrameError, DecodeError):
            link.close()

    def pause_writing(self) -> None:
        """Let no more callers send."""
        self._link.pause(True)

    def resume_writing(self) -> None:
        """Let callers send again."""
        self._link.pause(False)


class LoopLink:
    """The connection to one worker on one loop; connects when first asked, and again."""

    def __init__(
        self,
        links: AsyncWorkerLinks,
        path: str,
        loop: asyncio.AbstractEventLoop,
        in_flight_max: int,
    ) -> None:
        self._links = links
        self._path = path
        self._loop = loop
        self._in_flight_max = in_flight_max
        self.stream: _Stream | None = None
        self._transport: asyncio.Transport | None = None
        self._ids = 0
        self._pending: dict[int, Waiting] = {}
        self._under_way = 0  # callers in `_pending` and `_gathered`
        self._turns: deque[asyncio.Future[None]] = deque()  # callers waiting to be allowed to send
        self._out: list[bytes] = []
        self._gathered: dict[str, Turn] = {}  # gets of this turn of the loop, by group
        self._unheard = 0  # turns' gets of which nothing came yet
        self._asked_s = 0.0  # when the last of all turns' left; 0 once anything came of it
        self._answer_s = 0.0005  # in which the first of an answer comes
        self._held: asyncio.TimerHandle | None = None  # set while gets may wait for more of them
        self._flushing = False
        self._earliest_s = NEVER_S  # no deadline under way is before
        self._deadline: asyncio.TimerHandle | None = None  # set for then
        self._paused = False
        self._watch: asyncio.TimerHandle | None = None  # set while any request is under way
        self._dialling: Final = Dialling(links, path, loop, lambda: _Stream(self), self.close)

    def gather(
        self, group: str, key: bytes, deadline_s: float
    ) -> asyncio.Future[bytes | None] | None:
        """Ask for one key with others of this turn; None where that cannot be sent now."""
        if self._transport is None or self._paused or self._under_way >= self._in_flight_max:
            return None
        turn = self._gathered.get(group)
        if turn is None:
            turn = self._gathered[group] = Turn(group, deadline_s)
            if not self._flushing and (self._unheard < TURNS_UNHEARD or not self._hold()):
                self._flushing = True
                self._loop.call_soon(self._flush)
        elif not -SPREAD_S < deadline_s - turn.first_until_s < SPREAD_S:
            return None
        elif deadline_s > turn.until_s:
            turn.until_s = deadline_s
        waiter: asyncio.Future[bytes | None] = self._loop.create_future()
        turn.keys.append(key)
        turn.waiters.append(waiter)
        self._under_way += 1
        return waiter

    async def ask(self, request: Request, deadline_s: float, sent: int = 0) -> Reply:
        """Send a request and return its reply, of whatever kind; it was lost ``sent`` times."""
        shard = self._links.shard
        for _ in range(TRIES_MAX):
            await self._ready(request, deadline_s)
            if self._transport is None:
                continue
            request.budget_ms = budget_ms(request, deadline_s, shard)
            waiter: asyncio.Future[Reply] = self._loop.create_future()
            ticket = self._begin(One(waiter, request.group, deadline_s))
            request.id = ticket
            self._send(frame(request))
            try:
                return await waiter
            except LostError as error:
                sent += error.taken
                if sent >= LOST_MAX:
                    raise lost(request, shard) from error
            finally:
                self._end(ticket)
        raise unreachable(self._path, shard, None)

    async def ask_each(
        self, request: Gets, deadline_s: float, part: Callable[[Answers], None]
    ) -> Reply | None:
        """As `AsyncWorkerLinks.ask_each`."""
        shard = self._links.shard
        parts: Parts | None = None
        taken = False
        await self._ready(request, deadline_s)
        if self._transport is not None:
            request.budget_ms = budget_ms(request, deadline_s, shard)
            parts = Parts(self._loop.create_future(), request, deadline_s, part)
            ticket = request.id = self._begin(parts)
            self._send(frame(request))
            try:
                return await parts.waiter
            except LostError as error:
                taken = error.taken
            finally:
                self._end(ticket)

        async def alone(index: int) -> None:
            # Each for itself: one of them may be what the worker dies of.
            get = Get(
                group=request.group,
                key=request.keys[index],
                depth=request.depth,
                chain=request.chain,
                flags=request.flags,
                sent=request.sent,
                until_ms=request.until_ms,
            )
            try:
                reply = await self.ask(get, deadline_s, int(taken))
            except KamaCacheError as error:
                reply = Failure(0, *to_fields(error))
            part(one_answer(index, reply))

        left = range(len(request.keys)) if parts is None else [*parts.left]
        await asyncio.gather(*(alone(index) for index in left))
        return None

    def close(self) -> None:
        """Close; whoever waits gets an error."""
        for timer in (self._watch, self._deadline, self._held):
            if timer is not None:
                timer.cancel()
        self._watch = self._deadline = self._held = None
        self._earliest_s = NEVER_S
        if self._transport is not None:
            self._transport.abort()
            self.lose()

    # -- from the stream -------------------------------------------------------------------

    def connected(self, stream: _Stream, transport: asyncio.Transport) -> None:
        """Begin on a new connection."""
        self.stream = stream
        self._transport = transport
        self._out = []
        self._paused = False

    def take(self, reply: Reply) -> None:
        """Give a reply to its caller, if it still waits."""
        ticket = reply.id  # who takes a reply may pass it on under another
        waiting = self._pending.get(ticket)
        if waiting is None:
            return
        if waiting.take(reply):
            del self._pending[ticket]
            self._under_way -= waiting.count
            if self._turns:
                self._next_turn()
        if waiting.asked_s:
            self._heard(waiting)

    def pause(self, paused: bool) -> None:
        """Stop callers from sending, or let them."""
        self._paused = paused
        if not paused:
            self._next_turn()

    def lose(self, taken: bool = True) -> None:
        """Wake all who wait; they ask again on a new connection, once."""
        self.stream = None
        self._transport = None
        self._fail_all(partial(LostError, taken), partial(LostError, False))
        self._next_turn()

    # -- sending ---------------------------------------------------------------------------

    def _begin(self, waiting: Waiting) -> int:
        """Note who will wait for the replies to the id that is returned."""
        self._ids = ticket = self._ids + 1
        self._pending[ticket] = waiting
        self._under_way += waiting.count
        if waiting.until_s < self._earliest_s:
            self._wake_at(waiting.until_s)
        if self._watch is None and self._links.answers is not None:
            self._watch = self._loop.call_later(LOOK_EVERY_S, self._look)
        return ticket

    def _end(self, ticket: int) -> None:
        waiting = self._pending.pop(ticket, None)
        if waiting is not None:
            self._under_way -= waiting.count
            if self._turns:
                self._next_turn()
            if waiting.asked_s:
                self._heard(waiting)

    def _heard(self, turn: Waiting) -> None:
        """Take note of the first that comes of a turn's gets, and let those go that wait for it."""
        took_s = time.monotonic() - turn.asked_s
        if turn.asked_s == self._asked_s:
            self._asked_s = 0.0  # what is unheard left before it: it is no use to wait for that
        turn.asked_s = 0.0
        self._unheard -= 1
        # The least of late, so that loads among them do not count; slowly up where all take longer.
        self._answer_s = min(took_s, self._answer_s * ANSWER_GROWTH, HOLD_MAX_S)
        if self._gathered and not self._flushing:
            # Behind those whom this reply wakes: what they get next goes with it.
            self._flushing = True
            self._loop.call_soon(self._flush)

    def _hold(self) -> bool:
        """Tell whether gets wait for an answer to come, so that more of them go together.

        A frame costs both ends many times what a key in it does. Where several are under way, one
        more that leaves a moment sooner is answered no sooner by a busy worker.
        """
        wait_s = self._asked_s + 2 * self._answer_s - time.monotonic()
        if wait_s <= 0:  # they take long: loads, which a get of a hit need not wait for
            return False
        if self._held is None:
            self._held = self._loop.call_later(wait_s, self._held_long)
        return True

    def _held_long(self) -> None:
        self._held = None
        if self._gathered and not self._flushing:
            self._flush()

    def _fail_all(
        self, error: Callable[[], Exception], unsent: Callable[[], Exception] | None = None
    ) -> None:
        pending, self._pending = self._pending, {}
        gathered, self._gathered = self._gathered, {}
        self._under_way = self._unheard = 0
        for waiting in pending.values():
            waiting.fail(error)
        for turn in gathered.values():
            turn.fail(unsent or error)

    def _send(self, data: bytes) -> None:
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)
        self._out.append(data)

    def _ask_gathered(self) -> None:
        """Put what this turn gets into frames, one for each group."""
        gathered, self._gathered = self._gathered, {}
        self._asked_s = now_s = time.monotonic()
        for group, turn in gathered.items():
            self._under_way -= len(turn.keys)
            left_ms = int((turn.until_s - now_s) * 1000) + 1
            if left_ms <= 0:
                turn.fail(partial(late, group, self._links.shard))
                self._next_turn()
                continue
            turn.count = len(turn.keys)
            ticket = self._begin(turn)
            self._unheard += 1
            turn.asked_s = now_s
            request: Request
            if turn.count == 1:
                request = Get(id=ticket, group=group, budget_ms=left_ms, key=turn.keys[0])
            else:
                request = Gets(id=ticket, group=group, budget_ms=left_ms, keys=turn.keys)
            self._out.append(frame(request))

    def _flush(self) -> None:
        self._flushing = False
        if self._gathered:
            self._ask_gathered()
        out, self._out = self._out, []
        if self._transport is not None and out:
            transport, stream = self._transport, self.stream
            transport.write(out[0] if len(out) == 1 else b"".join(out))
            # asyncio tries at once, and closes where that fails; of a loop that tries later it
            # is taken to be sent.
            if stream is not None and not transport.is_closing():
                stream.wrote = True

    def _must_wait(self) -> bool:
        return self._paused or self._under_way >= self._in_flight_max

    async def _ready(self, request: Request, deadline_s: float) -> None:
        """Wait for a connection, and for room on it; it may be gone again."""
        if self._transport is None:
            await self._dialling.wait(request, deadline_s)
        if self._must_wait():
            await self._turn(request, deadline_s)

    async def _turn(self, request: Request, deadline_s: float) -> None:
        while self._must_wait() and self._transport is not None:
            turn: asyncio.Future[None] = self._loop.create_future()
            self._turns.append(turn)
            left = deadline_s - time.monotonic()
            try:
                done, _ = await asyncio.wait((turn,), timeout=max(0.0, left))
            except BaseException:
                if not turn.cancel():  # it was ours already: the next one's now
                    self._next_turn()
                raise
            if not done:
                turn.cancel()
                raise late(request.group, self._links.shard)

    def _next_turn(self) -> None:
        # As many as there is room for: one that was cancelled meanwhile wakes nobody.
        room = len(self._turns) if self._transport is None else 0
        if not self._paused:
            room = max(room, self._in_flight_max - self._under_way)
        while self._turns and room > 0:
            turn = self._turns.popleft()
            if not turn.done():
                turn.set_result(None)
                room -= 1

    def _look(self) -> None:
        """Give up all who wait where the node answers no more but closes no socket.

        One timer for all requests: it ends when none is under way, and costs a hit nothing.
        """
        self._watch = None
        answers, links = self._links.answers, self._links
        if answers is None or not (self._pending or self._turns):
            return
        if answers():
            self._watch = self._loop.call_later(LOOK_EVERY_S, self._look)
            return
        self._fail_all(partial(unreachable, self._path, links.shard, None))
        self.close()  # who waited for a turn finds that there is no connection

    def _wake_at(self, until_s: float) -> None:
        """Look for who is late when this deadline has passed, and the worker's word on it is."""
        self._earliest_s = until_s
        if self._deadline is not None:
            self._deadline.cancel()
        wait_s = until_s + REPLY_GRACE_S - time.monotonic()
        self._deadline = self._loop.call_later(max(0.0, wait_s), self._end_late)

    def _end_late(self) -> None:
        self._deadline = None
        self._earliest_s = NEVER_S
        before_s = time.monotonic() - REPLY_GRACE_S + CLOCK_STEP_S
        pending = self._pending
        for ticket in [ticket for ticket in pending if pending[ticket].until_s <= before_s]:
            waiting = pending[ticket]
            self._end(ticket)
            waiting.fail(partial(late, waiting.group, self._links.shard))
        if pending:
            self._wake_at(min(waiting.until_s for waiting in pending.values()))
