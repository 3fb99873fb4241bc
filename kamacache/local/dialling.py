"""How a loop's connection to a worker is made: once for all who wait, again while it restarts.

*Process*: as `kamacache.local.alink`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from typing import TYPE_CHECKING, Final

from kamacache.errors import NodeUnavailableError
from kamacache.limits import (
    LINK_RESTART_WAIT_S,
    LINK_RETRY_FIRST_S,
    LINK_RETRY_MAX_S,
    REATTACH_EVERY_S,
)
from kamacache.local.exchange import (
    RESTARTING,
    late,
    unreachable,
)
from kamacache.wire.messages import (
    Request,
)

if TYPE_CHECKING:
    from kamacache.local.alink import AsyncWorkerLinks


class Dialling:
    """Makes the connections of one `kamacache.local.looplink.LoopLink`."""

    __slots__ = (
        "_close",
        "_connecting",
        "_down_until_s",
        "_keeper",
        "_links",
        "_loop",
        "_make",
        "_path",
    )

    def __init__(
        self,
        links: AsyncWorkerLinks,
        path: str,
        loop: asyncio.AbstractEventLoop,
        make: Callable[[], asyncio.Protocol],
        close: Callable[[], None],
    ) -> None:
        """``make`` makes a connection's protocol; ``close`` is called when the loop ends."""
        self._links: Final = links
        self._path: Final = path
        self._loop: Final = loop
        self._make: Final = make
        self._close: Final = close
        self._down_until_s = 0.0
        self._connecting: asyncio.Task[NodeUnavailableError | None] | None = None
        self._keeper: AsyncGenerator[None, None] | None = None

    async def wait(self, request: Request, deadline_s: float) -> None:
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
                await self._loop.create_unix_connection(self._make, self._path)
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
            self._close()
            await asyncio.sleep(0)
