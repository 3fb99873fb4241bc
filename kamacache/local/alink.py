"""One pipelined connection per worker and event loop: for asyncio callers.

*Process*: applications, fronts, and workers whose async getters ask other groups. Replies are
matched by id; requests of one turn of the loop go out in one write.

*Invariants*: a caller that is cancelled or late takes its id with it, and the reply that still
comes is dropped; nobody else notices. At most `REQUESTS_PER_CONNECTION_MAX` requests are under
way per connection, further callers wait their turn until their deadline. Loops in several threads
share nothing but the dict of connections, whose single operations the GIL makes atomic.
"""

from __future__ import annotations

import asyncio
import os
import time
import weakref
from collections import deque
from collections.abc import AsyncGenerator, Callable
from typing import Any, Final, cast

from kamacache.errors import NodeUnavailableError
from kamacache.limits import (
    LINK_RESTART_WAIT_S,
    LINK_RETRY_FIRST_S,
    LINK_RETRY_MAX_S,
    REATTACH_EVERY_S,
    REPLY_GRACE_S,
    REQUESTS_PER_CONNECTION_MAX,
)
from kamacache.local.exchange import (
    LOST_MAX,
    RESTARTING,
    TRIES_MAX,
    budget_ms,
    checked,
    late,
    lost,
    unreachable,
    unread,
)
from kamacache.wire.frames import FrameError, FrameReader, frame
from kamacache.wire.messages import DecodeError, Reply, Request, Values, decode_reply
from kamacache.wire.parts import append, rest_of

LOOK_EVERY_S: Final = 1.0  # how often those who wait look whether the node still answers


class _Lost(Exception):  # noqa: N818 -- never leaves this module
    """The connection ended before the reply; ``taken``: the worker may have read the request."""

    def __init__(self, taken: bool) -> None:
        super().__init__()
        self.taken = taken


class AsyncWorkerLinks:
    """The connections to one worker, one for each event loop."""

    __slots__ = (
        "__weakref__",
        "_alive",
        "_by_loop",
        "_in_flight_max",
        "_path",
        "answers",
        "closed",
        "shard",
    )

    def __init__(
        self,
        sockets_dir: str | os.PathLike[str],
        shard: int,
        *,
        alive: Callable[[], bool] | None = None,
        answers: Callable[[], bool] | None = None,
        in_flight_max: int = REQUESTS_PER_CONNECTION_MAX,
    ) -> None:
        """``alive`` and ``answers`` as in `kamacache.local.link.WorkerLinks`."""
        self.shard: Final = shard
        self._path: Final = f"{os.fspath(sockets_dir)}/worker-{shard}.sock"
        self._alive = alive
        self.answers: Final = answers
        self._in_flight_max = in_flight_max
        self.closed = False
        self._by_loop: dict[asyncio.AbstractEventLoop, LoopLink] = {}
        _instances.add(self)

    async def call(self, request: Request, deadline_s: float) -> Reply:
        """Ask, and return the reply; as `kamacache.local.link.WorkerLinks.call`."""
        link = self._by_loop.get(asyncio.get_running_loop()) or self._new_link()
        reply = checked(await link.ask(request, deadline_s))
        if type(reply) is Values:
            while (rest := rest_of(request, reply)) is not None:
                append(reply, checked(await link.ask(rest, deadline_s)))
        return reply

    async def ask(self, request: Request, deadline_s: float) -> Reply:
        """Ask; return the reply as it is: a `Failure`, and a `Values` that was cut, too."""
        link = self._by_loop.get(asyncio.get_running_loop()) or self._new_link()
        return await link.ask(request, deadline_s)

    def close(self) -> None:
        """Close all connections; may be called from any thread. Callers get an error."""
        self.closed = True
        links, self._by_loop = self._by_loop, {}
        for loop, link in links.items():
            if not loop.is_closed():
                loop.call_soon_threadsafe(link.close)

    def gone(self) -> bool:
        """Tell whether there is nothing to wait for."""
        return self.closed or (self._alive is not None and not self._alive())

    def _new_link(self) -> LoopLink:
        for loop in list(self._by_loop):
            if loop.is_closed():
                self._by_loop.pop(loop, None)
        loop = asyncio.get_running_loop()
        link = LoopLink(self, self._path, loop, self._in_flight_max)
        self._by_loop[loop] = link
        return link

    def _forked(self) -> None:
        # The child must neither use nor free what belongs to the parent's loops: closing a
        # transport would take its descriptor out of the epoll set that both share.
        _graveyard.append(self._by_loop)
        self._by_loop = {}


class _Stream(asyncio.Protocol):
    """One connection of a `LoopLink`; what an old one still reports is not the new one's."""

    def __init__(self, link: LoopLink) -> None:
        self._link = link
        self._reader = FrameReader()
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
        self._reader.feed(data)
        try:
            while (body := self._reader.next()) is not None:
                link.take(decode_reply(body))
                del body
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
        self._waiters: dict[int, asyncio.Future[Reply]] = {}
        self._turns: deque[asyncio.Future[None]] = deque()  # callers waiting to be allowed to send
        self._out: list[bytes] = []
        self._paused = False
        self._down_until_s = 0.0
        self._watch: asyncio.TimerHandle | None = None  # set while any request is under way
        self._connecting: asyncio.Task[NodeUnavailableError | None] | None = None
        self._keeper: AsyncGenerator[None, None] | None = None

    async def ask(self, request: Request, deadline_s: float) -> Reply:
        """Send a request and return its reply, of whatever kind."""
        shard = self._links.shard
        sent = 0
        for _ in range(TRIES_MAX):
            if self._transport is None:
                await self._connected(request, deadline_s)
            if self._must_wait():
                await self._turn(request, deadline_s)
            if self._transport is None:
                continue
            request.budget_ms = budget_ms(request, deadline_s, shard)
            self._ids = request.id = ticket = self._ids + 1
            waiter: asyncio.Future[Reply] = self._loop.create_future()
            self._waiters[ticket] = waiter
            if self._watch is None and self._links.answers is not None:
                self._watch = self._loop.call_later(LOOK_EVERY_S, self._look)
            timer = self._loop.call_later(
                request.budget_ms / 1000 + REPLY_GRACE_S, self._late, ticket, request.group
            )
            self._send(frame(request))
            try:
                return await waiter
            except _Lost as error:
                sent += error.taken
                if sent >= LOST_MAX:
                    raise lost(request, shard) from error
            finally:
                timer.cancel()
                self._waiters.pop(ticket, None)
                if self._turns:
                    self._next_turn()
        raise unreachable(self._path, shard, None)

    def close(self) -> None:
        """Close; whoever waits gets an error."""
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
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
        waiter = self._waiters.pop(reply.id, None)
        if waiter is not None and not waiter.done():
            waiter.set_result(reply)

    def pause(self, paused: bool) -> None:
        """Stop callers from sending, or let them."""
        self._paused = paused
        if not paused:
            self._next_turn()

    def lose(self, taken: bool = True) -> None:
        """Wake all who wait; they ask again on a new connection, once."""
        self.stream = None
        self._transport = None
        waiters, self._waiters = self._waiters, {}
        for waiter in waiters.values():
            if not waiter.done():
                waiter.set_exception(_Lost(taken))
        self._next_turn()

    # -- sending ---------------------------------------------------------------------------

    def _send(self, data: bytes) -> None:
        if not self._out:
            self._loop.call_soon(self._flush)
        self._out.append(data)

    def _flush(self) -> None:
        out, self._out = self._out, []
        if self._transport is not None and out:
            transport, stream = self._transport, self.stream
            transport.write(b"".join(out))
            # asyncio tries at once, and closes where that fails; of a loop that tries later it
            # is taken to be sent.
            if stream is not None and not transport.is_closing():
                stream.wrote = True

    def _must_wait(self) -> bool:
        return self._paused or len(self._waiters) >= self._in_flight_max

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
            room = max(room, self._in_flight_max - len(self._waiters))
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
        if answers is None or not (self._waiters or self._turns):
            return
        if answers():
            self._watch = self._loop.call_later(LOOK_EVERY_S, self._look)
            return
        waiters, self._waiters = self._waiters, {}
        for waiter in waiters.values():
            if not waiter.done():
                waiter.set_exception(unreachable(self._path, links.shard, None))
        self.close()  # who waited for a turn finds that there is no connection

    def _late(self, ticket: int, group: str) -> None:
        waiter = self._waiters.pop(ticket, None)
        if waiter is not None and not waiter.done():
            waiter.set_exception(late(group, self._links.shard))

    # -- connecting ------------------------------------------------------------------------

    async def _connected(self, request: Request, deadline_s: float) -> None:
        """Wait for a connection that all callers share; one who is cancelled does not end it."""
        if self._links.closed:  # nobody would close a connection made now
            raise unreachable(self._path, self._links.shard, None)
        connecting = self._connecting
        if connecting is None:
            connecting = self._connecting = self._loop.create_task(self._connect(deadline_s))
        left = deadline_s - time.monotonic()
        done, _ = await asyncio.wait((connecting,), timeout=max(0.0, left))
        if not done:
            raise late(request.group, self._links.shard)
        error = connecting.result()
        if error is not None:
            raise NodeUnavailableError(error.message, shard=error.shard) from error.__cause__

    async def _connect(self, deadline_s: float) -> NodeUnavailableError | None:
        try:
            return await self._try_until(deadline_s)
        finally:
            self._connecting = None

    async def _try_until(self, deadline_s: float) -> NodeUnavailableError | None:
        links = self._links
        now = time.monotonic()
        until_s = now if now < self._down_until_s else now + LINK_RESTART_WAIT_S
        pause_s = LINK_RETRY_FIRST_S
        while True:
            try:
                await self._loop.create_unix_connection(lambda: _Stream(self), self._path)
            except OSError as error:
                now = time.monotonic()
                gone = links.gone()
                if gone or error.errno not in RESTARTING or now + pause_s > until_s:
                    self._down_until_s = now + REATTACH_EVERY_S
                    failed = unreachable(self._path, links.shard, None if gone else error)
                    failed.__cause__ = error
                    return failed
            else:
                self._down_until_s = 0.0
                if self._keeper is None:
                    self._keeper = self._keep()
                    await anext(self._keeper)
                return None
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, LINK_RETRY_MAX_S)

    async def _keep(self) -> AsyncGenerator[None, None]:
        """Close the connection with its loop.

        ``asyncio.run`` closes async generators before it closes the loop; that is the one hook
        a library has, since nobody tells us that a loop ends.
        """
        try:
            while True:
                yield
        finally:
            self.close()
            await asyncio.sleep(0)


_instances: weakref.WeakSet[AsyncWorkerLinks] = weakref.WeakSet()
_graveyard: list[Any] = []


def _after_fork() -> None:
    for links in list(_instances):
        links._forked()


os.register_at_fork(after_in_child=_after_fork)
