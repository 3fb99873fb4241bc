"""Whether the node serves: what /readyz answers.

*Process*: http, on its loop. The node is ready while its serve-until word is ahead of the clock,
every worker's loop answers a ping within `READY_PING_S`, and nobody told it to drain. However
often it is asked, workers are pinged once in `READY_EVERY_S`, and askers share one round.
"""

from __future__ import annotations

import asyncio
import time

from kamacache.errors import KamaCacheError
from kamacache.limits import READY_EVERY_S, READY_PING_S
from kamacache.local.alink import AsyncWorkerLinks
from kamacache.rundir.control import ControlReader
from kamacache.rundir.description import NodeDescription
from kamacache.wire.messages import Ping


class Readiness:
    """The readiness of one node."""

    def __init__(self, about: NodeDescription) -> None:
        """Map the control words; raises `NodeUnavailableError` where the node is gone."""
        self.draining = False
        self._control = ControlReader(about.control_path)
        self._links = [
            AsyncWorkerLinks(about.sockets_dir, shard, alive=lambda: self._control.serving)
            for shard in range(about.workers)
        ]
        self._round: asyncio.Task[str | None] | None = None
        self._known: tuple[float, str | None] = (float("-inf"), None)

    async def why_not(self) -> str | None:
        """Return why the node is not ready, None while it is."""
        reason = self._said()
        if reason is not None:
            return reason
        asked_s, known = self._known
        if time.monotonic() - asked_s < READY_EVERY_S:
            return known
        if self._round is None:
            self._round = asyncio.get_running_loop().create_task(self._ping_all())
            self._round.add_done_callback(self._end_round)
        # Shielded: who goes away does not end the round for the others.
        reason = await asyncio.shield(self._round)
        return self._said() or reason

    def close(self) -> None:
        """Close the connections to the workers."""
        for links in self._links:
            links.close()

    def _said(self) -> str | None:
        if self.draining:
            return "the node is draining"
        if not self._control.serving:
            return "the supervisor has not said for 2 s that the node serves"
        return None

    async def _ping_all(self) -> str | None:
        deadline_s = time.monotonic() + READY_PING_S
        pings = [self._ping(links, deadline_s) for links in self._links]
        return next((reason for reason in await asyncio.gather(*pings) if reason), None)

    async def _ping(self, links: AsyncWorkerLinks, deadline_s: float) -> str | None:
        try:
            await links.call(Ping(), deadline_s)
        except KamaCacheError:
            return f"worker {links.shard} answered no ping within {READY_PING_S:g} s"
        return None

    def _end_round(self, task: asyncio.Task[str | None]) -> None:
        self._round = None
        if not task.cancelled() and task.exception() is None:
            self._known = time.monotonic(), task.result()
