"""A warm start in a cluster: nothing is served before the others have told what they wrote.

*Process*: worker of a node that took over kept shards, in the loop's thread, before it is ready::

    every request refused, but for ANSWERED ─► each node that was or is a member: told us all?
       told, by all their workers ─────────────────────────────────► serve
       one cannot tell, is not reached, or is not done in time ────► drop all, then serve

*Why asked, and not only waited for*: invalidations come over the links of the other nodes' workers
to this node, and only those know how many are still to come, and whether they lost any.

*Invariant*: where it is not certain that an entry is the latest, it is dropped. That needs three
things of every worker of every node that may have written: it collected all that it wrote since
before this node left; it has been acknowledged all of that; and it knows no node that came and went
meanwhile, which nobody could ask. And of the worker before this one: that all nodes had heard of
its last writes, or the next version that they gave could be below those.
"""

from __future__ import annotations

import asyncio
import logging
import time
from functools import partial
from typing import Any, Final

from kamacache.clock import boottime_ms
from kamacache.cluster.farewell import Farewell
from kamacache.cluster.peers import TOLD_ALL, TOLD_NEVER, TOLD_NOT_YET, TOLD_WATCHED, Link, Peers
from kamacache.errors import NodeUnavailableError
from kamacache.limits import (
    FLUSH_SLOTS,
    WARM_ASK_EVERY_S,
    WARM_ASKED_S,
    WARM_REACH_S,
    WARM_SETTLE_S,
)
from kamacache.rundir.context import Unsettled
from kamacache.wire.messages import (
    PEEK,
    Done,
    Flush,
    Invalidate,
    PeerSeen,
    Ping,
    Reply,
    Request,
    Stats,
    Told,
)
from kamacache.worker.handlers import Handlers, HostedGroup
from kamacache.worker.waiters import Asker

ANSWERED: Final = frozenset((Invalidate, Flush, PeerSeen, Ping, Stats, Told))

log = logging.getLogger("kamacache.worker.settling")


class Settling:
    """One worker's way from kept shards to shards that may be served."""

    def __init__(
        self,
        unsettled: Unsettled,
        life: str,
        farewell: Farewell | None,
        peers: Peers,
        groups: dict[str, HostedGroup],
        handlers: Handlers,
    ) -> None:
        """Refuse requests from now on. ``life`` is the id of the memory that was kept."""
        self._life: Final = life
        self._unsettled: Final = unsettled
        self._farewell: Final = farewell
        self._peers: Final = peers
        self._groups: Final = groups
        self._handlers: Final = handlers
        self._table: Final = dict(handlers.table)
        # In place: connections hold the table itself.
        handlers.table.update({kind: _refuse for kind in handlers.table if kind not in ANSWERED})
        self.served = False
        self._said: dict[str, tuple[int, float]] = {}  # by node: its last answer, and when
        self._asking: set[str] = set()
        self._members: frozenset[str] = frozenset()  # that were asked

    async def settle(self) -> None:
        """Return when what is in the shards may be served."""
        began_s = time.monotonic()
        why = await self._why_cold()
        if why:
            log.warning("cold start: what the last node left is dropped", extra={"why": why})
            await self._drop_all()
            return
        seconds = round(time.monotonic() - began_s, 3)
        log.info("settled", extra={"members": len(self._members), "seconds": seconds})

    def serve(self) -> None:
        """Answer requests from now on."""
        self.served = True
        self._handlers.table.update(self._table)

    # -- what the others say ---------------------------------------------------------------

    async def _why_cold(self) -> str:
        """Return "" when every node has told all, else why that cannot be known."""
        if self._farewell is None:
            return "the worker before this one did not end in order"
        began_s = time.monotonic()
        while True:
            why, final = self._look()
            passed_s = time.monotonic() - began_s
            if not why or final or passed_s >= WARM_SETTLE_S:
                return why
            if passed_s >= WARM_REACH_S and (away := self._not_reached()):
                return f"{away} is not reached"
            await asyncio.sleep(WARM_ASK_EVERY_S)

    def _look(self) -> tuple[str, bool]:
        """Return why it is not settled, and whether waiting does not mend it; ask who must be."""
        peers, own = self._peers, self._peers.own
        links = {link.address: link for link in peers.links}
        members = frozenset((own, *links))
        unheard = [] if self._farewell is None else self._farewell.unheard
        if deaf := sorted(members.intersection(unheard)):
            return f"{deaf[0]} had not heard of the last writes", True
        if gone := sorted(set(self._unsettled.members) - members):
            return f"{gone[0]} is no member any more", True
        if members != self._members:  # each is told of all the others that are asked
            self._members = members
            self._said.clear()
        said = {address: self._latest(address) for address in links}
        for address, link in links.items():
            if said[address] == TOLD_NEVER:
                return f"{address} does not know all that it wrote meanwhile", True
            if said[address] == TOLD_NOT_YET and link.up and address not in self._asking:
                self._ask(link)
        if waiting := sorted(address for address in links if said[address] < TOLD_ALL):
            return f"{waiting[0]} has not told all that it wrote meanwhile", False
        if self._unsettled.discovers and TOLD_WATCHED not in said.values():
            return "no node has seen all that came and went meanwhile", bool(links)
        return "", True

    def _latest(self, address: str) -> int:
        """Return what a node answered of late.

        1. One node has told all; another needs seconds.
        2. The first is cut off meanwhile, and takes writes of keys of this node's.

        So an answer counts for a moment, and then that node is asked again.
        """
        answer, at_s = self._said.get(address, (TOLD_NOT_YET, 0.0))
        fresh = answer == TOLD_NEVER or time.monotonic() - at_s < WARM_ASKED_S
        return answer if fresh else TOLD_NOT_YET

    def _ask(self, link: Link) -> None:
        away_ms = boottime_ms() - self._unsettled.left_ms
        request = Told(
            peer=self._peers.own,
            away_ms=away_ms,
            members=sorted(self._members),
            life=self._life,
        )
        request.flags = PEEK  # which a link takes whose other end does not serve yet either
        self._asking.add(link.address)
        done = partial(self._answered, link.address, self._members)
        link.send(request, done, time.monotonic() + WARM_ASKED_S)

    def _answered(self, address: str, members: frozenset[str], outcome: Any) -> None:
        self._asking.discard(address)
        if type(outcome) is Done and members == self._members:
            self._said[address] = outcome.count, time.monotonic()

    def _not_reached(self) -> str:
        away = (link.address for link in self._peers.links if not link.up)
        return min(away, default="")

    async def _drop_all(self) -> None:
        for group in self._groups.values():
            version, start = group.shard.now(), 0
            while start >= 0:
                start = group.shard.flush_older(version, start, FLUSH_SLOTS)
                await asyncio.sleep(0)


def _refuse(request: Request, asker: Asker) -> Reply | None:
    raise NodeUnavailableError(
        "the node has just come back and asks the others what they wrote meanwhile"
    )
