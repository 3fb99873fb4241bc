"""One pipelined connection per worker and event loop: for asyncio callers.

*Process*: applications, fronts, and workers whose async getters ask other groups. Replies are
matched by id; requests of one turn of the loop go out in one write (`kamacache.local.looplink`).

*Invariants*: a reply that comes for a caller that was cancelled, or late, is dropped; nobody else
notices. At most `REQUESTS_PER_CONNECTION_MAX` callers are under way per connection, further ones
wait their turn until their deadline. Loops in several threads share nothing but the dict of
connections, whose single operations the GIL makes atomic.
"""

from __future__ import annotations

import asyncio
import os
import weakref
from collections.abc import Callable
from typing import Any, Final

from kamacache.limits import REQUESTS_PER_CONNECTION_MAX
from kamacache.local.exchange import checked, value_of
from kamacache.local.looplink import LoopLink
from kamacache.local.waiting import LostError
from kamacache.wire.messages import Answers, Get, Gets, Reply, Request, Values
from kamacache.wire.parts import append, rest_of


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

    async def get(self, group: str, key: bytes, deadline_s: float) -> bytes | None:
        """Return one key's value, None: not found; in one frame with others of this turn."""
        link = self._by_loop.get(asyncio.get_running_loop()) or self._new_link()
        sent = 0
        waiter = link.gather(group, key, deadline_s)
        if waiter is not None:
            try:
                return await waiter
            except LostError as error:
                # For itself now: another of its turn may be what the worker dies of.
                sent = int(error.taken)
        request = Get(group=group, key=key)
        return value_of(checked(await link.ask(request, deadline_s, sent)))

    async def ask_each(
        self, request: Gets, deadline_s: float, part: Callable[[Answers], None]
    ) -> Reply | None:
        """Ask for keys; ``part`` is given what is known of them as it comes.

        Returns None when all are answered, or the failure of those that are not; raises as `ask`.
        """
        link = self._by_loop.get(asyncio.get_running_loop()) or self._new_link()
        return await link.ask_each(request, deadline_s, part)

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


_instances: weakref.WeakSet[AsyncWorkerLinks] = weakref.WeakSet()
_graveyard: list[Any] = []


def _after_fork() -> None:
    for links in list(_instances):
        links._forked()


os.register_at_fork(after_in_child=_after_fork)
