"""Blocking connections of one process to one worker: for sync callers.

*Process*: applications, fronts, and workers whose sync getters ask other groups. *Owns*: a stack
of idle connections to one worker, at most `LINKS_PER_WORKER_MAX` with those in use.

Safe for threads: a connection belongs to one caller from `_take` to `_release`. Safe for forks:
the child closes what it inherited and connects anew; the parent's connections are not touched.

*Invariants*: a connection on which anything went wrong is closed, never used again, so a reply
that comes late is never taken for another call's. Every wait ends at the call's deadline.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from kamacache.calls import waiting_threads
from kamacache.errors import KamaCacheError, LoadError, NodeUnavailableError
from kamacache.limits import (
    LINK_RESTART_WAIT_S,
    LINK_RETRY_FIRST_S,
    LINK_RETRY_MAX_S,
    LINKS_PER_WORKER_MAX,
    REATTACH_EVERY_S,
)
from kamacache.local.connection import Link
from kamacache.local.exchange import (
    LOST_MAX,
    RESTARTING,
    TRIES_MAX,
    checked,
    late,
    lost,
    unreachable,
    unread,
)
from kamacache.wire.messages import Done, Reply, Request, Value, Values
from kamacache.wire.parts import append, rest_of


class Pending(NamedTuple):
    """A request under way; `WorkerLinks.finish` or `WorkerLinks.abandon` must follow."""

    link: Link | None  # None: it could not be sent; finish tries again
    request: Request
    deadline_s: float


class WorkerLinks:
    """The connections to one worker."""

    __slots__ = (
        "__weakref__",
        "_alive",
        "_answers",
        "_closed",
        "_down_until_s",
        "_freed",
        "_idle",
        "_links_max",
        "_open",
        "_path",
        "_waiting",
        "shard",
    )

    def __init__(
        self,
        sockets_dir: str | os.PathLike[str],
        shard: int,
        *,
        alive: Callable[[], bool] | None = None,
        answers: Callable[[], bool] | None = None,
        links_max: int = LINKS_PER_WORKER_MAX,
    ) -> None:
        """``alive`` tells whether the node is: nobody then waits for a worker to come back.

        ``answers`` tells the same to those who wait for a reply; None: they wait all their time.
        """
        self.shard: Final = shard
        self._path: Final = f"{os.fspath(sockets_dir)}/worker-{shard}.sock"
        self._alive = alive
        self._answers = answers
        self._links_max = links_max
        self._closed = False
        self._down_until_s = 0.0
        self._reset()
        _instances.add(self)

    def call(self, request: Request, deadline_s: float) -> Reply:
        """Ask, and return the reply; ``deadline_s`` is a time.monotonic().

        Sets the request's ``id`` and ``budget_ms``. Raises `DeadlineExceededError`,
        `NodeUnavailableError`, or the error that the worker answers with.
        """
        if request.depth:
            return self._nested(request, deadline_s)
        reply = self._ask(request, deadline_s, 0)
        if type(reply) is Done or type(reply) is Value:
            return reply
        return self._whole(request, reply, deadline_s)

    def start(self, request: Request, deadline_s: float) -> Pending:
        """Send a request whose reply `finish` will wait for.

        Who starts several keeps to the order of the shards, or two threads that each hold the
        last connection to one worker and wait for one to the other stop each other.
        """
        link = self._take(deadline_s)
        try:
            link.send(request, deadline_s, self.shard)
        except OSError as error:
            self._discard(link)
            if isinstance(error, KamaCacheError):
                raise
            self._drop_idle()
            return Pending(None, request, deadline_s)
        except BaseException:
            self._discard(link)
            raise
        return Pending(link, request, deadline_s)

    def finish(self, pending: Pending) -> Reply:
        """Return the reply of a request that was started; raises as `call` does."""
        link, request, deadline_s = pending
        if link is None:
            reply = self._ask(request, deadline_s, 0)
        else:
            try:
                link.limit_wait(deadline_s)
                reply = link.receive(request, deadline_s, self.shard)
            except OSError as error:
                self._discard(link)
                if isinstance(error, KamaCacheError):
                    raise
                self._drop_idle()
                reply = self._ask(request, deadline_s, int(not unread(error)))
            except BaseException:
                self._discard(link)
                raise
            else:
                self._release(link)
        return self._whole(request, reply, deadline_s)

    def abandon(self, pending: Pending) -> None:
        """Forget a request that was started."""
        if pending.link is not None:
            self._discard(pending.link)

    def close(self) -> None:
        """Close idle connections; those in use close when their calls end."""
        self._closed = True
        self._drop_idle()

    # -- one request -----------------------------------------------------------------------

    def _ask(self, request: Request, deadline_s: float, sent_before: int) -> Reply:
        for _ in range(TRIES_MAX):
            link = self._take(deadline_s)
            try:
                link.send(request, deadline_s, self.shard)
                reply = link.receive(request, deadline_s, self.shard)
            except OSError as error:
                self._discard(link)
                if isinstance(error, KamaCacheError):  # DeadlineExceededError is an OSError
                    raise
                # The worker is gone or has restarted: the other idle connections are dead, too.
                self._drop_idle()
                sent_before += link.sent and not unread(error)
                if sent_before >= LOST_MAX:
                    raise lost(request, self.shard) from error
                continue
            except BaseException:
                self._discard(link)
                raise
            self._release(link)
            return reply
        raise unreachable(self._path, self.shard, None)

    def _whole(self, request: Request, reply: Reply, deadline_s: float) -> Reply:
        checked(reply)
        if type(reply) is Values:
            while (rest := rest_of(request, reply)) is not None:
                append(reply, checked(self._ask(rest, deadline_s, 0)))
        return reply

    def _nested(self, request: Request, deadline_s: float) -> Reply:
        refuse_on_loop(request)
        ident = threading.get_ident()
        waiting_threads.add(ident)
        try:
            return self._whole(request, self._ask(request, deadline_s, 0), deadline_s)
        finally:
            waiting_threads.discard(ident)

    # -- connections -----------------------------------------------------------------------

    def _take(self, deadline_s: float) -> Link:
        try:
            return self._idle.pop()  # atomic; last in, first out: the warmest
        except IndexError:
            return self._connect(deadline_s)

    def _release(self, link: Link) -> None:
        if self._closed:
            self._discard(link)
            return
        link.home.append(link)
        # Who waits counts itself before it looks for an idle link, we look after we put one
        # there: one of the two sees the other.
        if self._waiting:
            with self._freed:
                self._freed.notify()

    def _discard(self, link: Link) -> None:
        link.close()
        if link.home is self._idle:  # else made before a fork, and not counted here
            with self._freed:
                self._open -= 1
                self._freed.notify()

    def _drop_idle(self) -> None:
        while True:
            try:
                link = self._idle.pop()
            except IndexError:
                return
            self._discard(link)

    def _connect(self, deadline_s: float) -> Link:
        with self._freed:
            self._waiting += 1
            try:
                while self._open >= self._links_max:
                    try:
                        return self._idle.pop()
                    except IndexError:
                        left = deadline_s - time.monotonic()
                        if left <= 0:
                            raise late("", self.shard) from None
                        self._freed.wait(left)
                self._open += 1
            finally:
                self._waiting -= 1
        try:
            return self._connected(deadline_s)
        except BaseException:
            with self._freed:
                self._open -= 1
                self._freed.notify()
            raise

    def _connected(self, deadline_s: float) -> Link:
        now = time.monotonic()
        # After a wait in vain, one try per call: waits must not pile up while a node is down.
        until_s = now if now < self._down_until_s else min(deadline_s, now + LINK_RESTART_WAIT_S)
        pause_s = LINK_RETRY_FIRST_S
        while True:
            try:
                link = Link(self._path, self._idle, self._answers)
            except OSError as error:
                now = time.monotonic()
                gone = self._closed or (self._alive is not None and not self._alive())
                if gone or error.errno not in RESTARTING or now + pause_s > until_s:
                    self._down_until_s = max(self._down_until_s, now + REATTACH_EVERY_S)
                    raise unreachable(self._path, self.shard, None if gone else error) from error
            else:
                self._down_until_s = 0.0
                return link
            time.sleep(pause_s)
            pause_s = min(pause_s * 2, LINK_RETRY_MAX_S)

    def _reset(self) -> None:
        self._idle: list[Link] = []
        self._open = 0
        self._waiting = 0
        self._freed = threading.Condition(threading.Lock())

    def _forked(self) -> None:
        inherited = self._idle
        self._reset()
        for link in inherited:
            link.close()  # our copy of the descriptor; the parent's goes on


def call_all(
    calls: Sequence[tuple[WorkerLinks, Request]], deadline_s: float
) -> list[Reply | KamaCacheError]:
    """Ask several workers at once: send all requests, then collect the replies, in this order.

    Each request has an outcome of its own: its reply or its error; nothing is raised but what is
    no `KamaCacheError`. At most one request per worker keeps the connections few.
    """
    if not calls:
        return []
    outcomes: list[Reply | KamaCacheError | None] = [None] * len(calls)
    pending: dict[int, Pending] = {}
    nested = calls[0][1].depth > 0
    ident = threading.get_ident()
    if nested:
        refuse_on_loop(calls[0][1])
        waiting_threads.add(ident)
    try:
        for at in sorted(range(len(calls)), key=lambda at: calls[at][0].shard):
            links, request = calls[at]
            try:
                pending[at] = links.start(request, deadline_s)
            except KamaCacheError as error:
                outcomes[at] = error
        gone = False
        for at in list(pending):
            link = pending[at].link
            if gone and link is not None:
                link.look_soon()  # or a whole node that stands still costs a wait per worker
            try:
                outcomes[at] = calls[at][0].finish(pending.pop(at))
            except KamaCacheError as error:
                gone = gone or isinstance(error, NodeUnavailableError)
                outcomes[at] = error
    finally:
        for at, left in pending.items():
            calls[at][0].abandon(left)
        if nested:
            waiting_threads.discard(ident)
    return [outcome for outcome in outcomes if outcome is not None]


def refuse_on_loop(request: Request) -> None:
    """Raise `LoadError` where a sync call would stop the loop that has to serve it."""
    from asyncio import _get_running_loop

    if _get_running_loop() is not None:
        raise LoadError(
            f"group {request.group!r}: an async getter called a blocking method; "
            "await the a... form of it",
            group=request.group,
            cause_type="blocking",
        )


_instances: weakref.WeakSet[WorkerLinks] = weakref.WeakSet()


def _after_fork() -> None:
    for links in list(_instances):
        links._forked()


os.register_at_fork(after_in_child=_after_fork)
