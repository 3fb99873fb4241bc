"""The worker as a member of a cluster: follows the membership, keeps the links, sweeps.

*Process*: worker of a node that may have peers, in the loop's thread; grpc is imported here, after
the fork, and in no worker of a node without peers. *Owns*: the peers, and three tasks::

    follow   membership's number, every 50 ms ──► links to those who came, none to those who went
    sweep    HANDOFF_S after the last change: what this node no longer owns, a slice at a time
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Final

from kamacache.clock import STAMP_SHIFT
from kamacache.cluster.channel import Dialler
from kamacache.cluster.farewell import farewell_path, say_farewell, take_farewell
from kamacache.cluster.link import LinkEnd, PeerLink
from kamacache.cluster.membership import MembershipReader
from kamacache.cluster.owed import OwedFile
from kamacache.cluster.peers import Link, Peers
from kamacache.cluster.proving import Trust
from kamacache.errors import NodeUnavailableError
from kamacache.limits import (
    FAREWELL_S,
    HANDOFF_S,
    MEMBERSHIP_LOOK_EVERY_S,
    PEER_CONNECT_S,
    SWEEP_EVERY_S,
    SWEEP_SLOTS,
)
from kamacache.repeated import RepeatedLog
from kamacache.rundir.context import Unsettled
from kamacache.rundir.description import NodeDescription
from kamacache.rundir.live import LiveSettings
from kamacache.rundir.meters import WorkerMeters
from kamacache.security.certificates import Certificates
from kamacache.wire.messages import Done, LinkNow, Reply, Told
from kamacache.worker.handlers import Handlers, HostedGroup
from kamacache.worker.settling import Settling
from kamacache.worker.waiters import Asker
from kamacache.worker.writes import Writes

RETIRE_LOOK_EVERY_S: Final = 0.05
FAREWELL_LOOK_EVERY_S: Final = 0.005

log = logging.getLogger("kamacache.worker.member")
repeated = RepeatedLog(log)


async def retire(link: Link) -> None:
    """Close the link to a node that left, when it has answered what it was asked.

    A node that drains leaves the list of peers first, and finishes what it was asked after that.
    """
    until_s = time.monotonic() + HANDOFF_S
    while link.up and link.stats()["pending"] and time.monotonic() < until_s:  # noqa: ASYNC110
        await asyncio.sleep(RETIRE_LOOK_EVERY_S)
    await link.close()


class ClusterMember:
    """One worker's part in the cluster."""

    def __init__(
        self,
        about: NodeDescription,
        worker: int,
        groups: dict[str, HostedGroup],
        loop: asyncio.AbstractEventLoop,
        live: LiveSettings,
        meters: WorkerMeters,
    ) -> None:
        """Make it; raises `ConfigError` where the certificates of ``live`` cannot be used."""
        self._certificates: Final = Certificates(live.security)
        self._dial: Final = Dialler(self._certificates)
        self._meters: Final = meters
        self._reader: Final = MembershipReader(about)
        self._groups: Final = groups
        self._loop: Final = loop
        self._trust: Final = Trust()
        self._trust.apply(live)
        life = about.memory or about.epoch
        self._end: Final = LinkEnd(about.name or "", life, worker, self._trust)
        self._tasks: set[asyncio.Task[None]] = set()
        self._owed: Final = OwedFile(f"{about.shm_dir}/owed.{worker}")
        self._farewell_path: Final = farewell_path(about.shm_dir, worker)
        self._farewell: Final = take_farewell(self._farewell_path)
        self.peers: Final = Peers(
            self._make_link,
            time.monotonic,
            close=self._close,
            owed=self._owed,
            farewell=self._farewell,
        )
        self.writes: Final = Writes(groups, self.peers, loop, meters.own)

    def join(self, handlers: Handlers) -> None:
        """Let the worker's writes be the cluster's, and its links be dialled."""
        self.writes.join(handlers)
        handlers.links_now = self.links_now
        handlers.table[Told] = self._told
        self.peers.update(self._reader.read())
        self.peers.recall()

    def unsettled(self, unsettled: Unsettled, handlers: Handlers) -> Settling:
        """Refuse requests until it is settled what of the shards may be served."""
        life = self._end.node_id
        return Settling(unsettled, life, self._farewell, self.peers, self._groups, handlers)

    def _told(self, request: Told, asker: Asker) -> Reply:
        said = self.peers.told(request.peer, request.away_ms, request.members, request.life)
        return Done(request.id, said)

    async def start(self) -> None:
        """Return when each peer was reached or was not; then follow the membership."""
        if self.peers.links:
            settled = [asyncio.ensure_future(link.wait_settled()) for link in self.peers.links]
            _, late = await asyncio.wait(settled, timeout=PEER_CONNECT_S)
            for task in late:
                task.cancel()
        for upkeep in (self._follow(), self._sweep()):
            self._keep(self._loop.create_task(upkeep))

    async def say_farewell(self) -> None:
        """Let all nodes hear of the last writes, and leave a word to the successor."""
        until_s = time.monotonic() + FAREWELL_S
        while time.monotonic() < until_s and any(  # noqa: ASYNC110
            link.up and link.pending_invalidations for link in self.peers.links
        ):
            await asyncio.sleep(FAREWELL_LOOK_EVERY_S)
        try:
            say_farewell(self._farewell_path, self.peers.farewell())
        except OSError as error:  # the successor will not trust what it finds
            log.warning("a worker's last word cannot be written", extra={"error": str(error)})

    async def close(self) -> None:
        """End the links and the tasks."""
        for task in [*self._tasks]:
            task.cancel()
        await asyncio.gather(*(link.close() for link in self.peers.links), return_exceptions=True)
        self._reader.close()
        self._owed.close()

    def reload(self, live: LiveSettings) -> None:
        """Take the certificates and the peers' secret as they are now.

        Links that are down are dialled at once, and those that stand are proven anew.
        """
        try:
            self._certificates.reload(live)
        finally:
            self._trust.apply(live)
        for link in self.peers.links:
            if isinstance(link, PeerLink):
                link.prove_anew()

    def stats(self) -> dict[str, int]:
        """Return the numbers of the peers and of the writes."""
        return self.peers.stats() | self.writes.stats()

    def links_now(self) -> list[LinkNow]:
        """Return how the link to each peer stands."""
        return [link.now() for link in self.peers.links if isinstance(link, PeerLink)]

    def _clock(self) -> int:
        """Return the wall clock as a version, or the latest that any shard here has seen."""
        latest = time.time_ns() >> STAMP_SHIFT
        for group in self._groups.values():
            seen = group.shard.last_version
            if seen > latest:
                latest = seen
        return latest

    def _make_link(self, address: str, former: Link | None) -> Link:
        queue, life = former.hand_over() if isinstance(former, PeerLink) else (None, "")
        return PeerLink(
            address,
            self._end,
            self._loop,
            clock=self._clock,
            on_change=self.peers.link_changed,
            on_greeted=self.peers.greeted,
            invalidations=queue,
            life=life,
            dial=self._dial,
            meters=self._meters.peer(address, self.peers.addresses),
        )

    def _close(self, link: Link) -> None:
        self._keep(self._loop.create_task(retire(link)))

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(MEMBERSHIP_LOOK_EVERY_S)
            self.peers.settle_owed()
            if not self._reader.changed():
                continue
            try:
                membership = self._reader.read()
            except NodeUnavailableError as error:
                repeated.warning("the membership cannot be read", detail=str(error))
                continue
            self.peers.update(membership)
            log.info("the membership has changed", extra={"members": len(membership.members)})

    async def _sweep(self) -> None:
        peers = self.peers
        while True:
            await asyncio.sleep(1.0)
            if peers.sweep_at_s is None or time.monotonic() < peers.sweep_at_s:
                continue
            began_s, peers.sweep_at_s = peers.sweep_at_s, None
            for group in self._groups.values():
                start = 0
                while start >= 0:
                    start = group.shard.sweep(peers.owns, start, SWEEP_SLOTS)
                    await asyncio.sleep(SWEEP_EVERY_S)
                    if peers.sweep_at_s is not None:  # a change: begin again, later
                        break
            log.info("swept what other nodes own", extra={"due_s": began_s})
