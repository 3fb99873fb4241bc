"""Makes snapshots of a node: from its files and shared memory, and one question to each worker.

*Process*: http, on its loop; the ``kamacache`` command::

    roster.json, control words, membership ──┐
    counters, meters, headers of the shards ─┼──► NodeSnapshot
    /proc of each process ───────────────────┤
    each worker: Stats, of now ── 0.8 s ─────┘  no answer: ``answered`` is False, the rest is there

*Invariants*: every counter comes out of shared memory, so that neither a worker that hangs nor one
that was killed takes one away or back; what a worker is asked for is of the moment. Askers share
one round, and within `SNAPSHOT_EVERY_S` its result.
"""

from __future__ import annotations

import asyncio
import os
import platform
import time
from collections.abc import Sequence

import msgspec
import psutil

from kamacache.clock import boottime_ms
from kamacache.cluster.membership import Membership, MembershipReader
from kamacache.cluster.ring import Ring
from kamacache.errors import KamaCacheError, NodeUnavailableError, StorageError
from kamacache.limits import SNAPSHOT_EVERY_S, WORKER_ASKED_S
from kamacache.local.mapping import NodeMapping
from kamacache.local.reading import (
    add_loads,
    expiry_of,
    fronts_of,
    grpc_of,
    http_of,
    peers_of,
    shard_of,
    worker_of,
)
from kamacache.local.snapshot import (
    GroupInfo,
    MemberInfo,
    MembershipInfo,
    NodeInfo,
    NodeSnapshot,
    RoleInfo,
)
from kamacache.rundir.control import SERVE_UNTIL
from kamacache.rundir.description import NodeDescription, read_description
from kamacache.rundir.layout import RunDir
from kamacache.rundir.meters import Meters, Region, WorkerMeters
from kamacache.rundir.roster import Roster, RosterRole, read_roster
from kamacache.store import Arena, last_maintained_ms
from kamacache.wire.messages import Stats, StatsReply


class Observer:
    """Looks at one life of a node."""

    def __init__(
        self, run_dir: str | os.PathLike[str], description: NodeDescription | None = None
    ) -> None:
        """Map the node of a run directory; raises `NodeUnavailableError` where there is none."""
        self._run_dir = RunDir(run_dir)
        self._about = about = description or read_description(self._run_dir)
        # As one of the node: a question is waited for though serve-until has passed.
        self._mapping = NodeMapping(about, in_node=True)
        self._meters = Meters(about.shm_dir)
        self._membership = MembershipReader(about) if about.clustered else None
        self._members: MembershipInfo | None = None
        self._processes: dict[int, psutil.Process] = {}
        self._began = (0, 0.0)  # CLOCK_BOOTTIME in ms, and Unix time
        self._round: asyncio.Task[NodeSnapshot] | None = None
        self._known: tuple[float, NodeSnapshot] | None = None

    async def snapshot(self) -> NodeSnapshot:
        """Return what the node is and does, as of `SNAPSHOT_EVERY_S` ago at most.

        Raises `NodeUnavailableError` where its files are gone.
        """
        if self._known is not None and time.monotonic() - self._known[0] < SNAPSHOT_EVERY_S:
            return self._known[1]
        if self._round is None:
            self._round = asyncio.get_running_loop().create_task(self._look())
            self._round.add_done_callback(self._end_round)
        return await asyncio.shield(self._round)  # who goes away does not end it for the others

    def close(self) -> None:
        """Close the connections to the workers."""
        if self._round is not None:
            self._round.cancel()
        self._mapping.close()

    def _end_round(self, task: asyncio.Task[NodeSnapshot]) -> None:
        self._round = None
        if not task.cancelled() and task.exception() is None:
            self._known = time.monotonic(), task.result()

    async def _look(self) -> NodeSnapshot:
        answers = await asyncio.gather(*map(self._ask, range(self._about.workers)))
        membership = await self._look_at_members()
        roster = self._roster()
        meters = [self._meters.worker(index) for index in range(self._about.workers)]
        fronts = [self._meters.front(index) for index in range(self._meters.sizes.fronts)]
        now_ms = boottime_ms()
        replies = [reply for _, reply in answers]
        groups, seen_ms = self._groups(meters, replies)
        node = self._node(roster, now_ms, fronts)
        node.ready = node.serving and node.state == "ready" and None not in replies
        return NodeSnapshot(
            node=node,
            roles=self._roles(roster),
            membership=membership,
            peers=peers_of(meters, replies, membership),
            workers=[
                worker_of(index, took_s, reply, meters[index], seen_ms[index], now_ms)
                for index, (took_s, reply) in enumerate(answers)
            ],
            groups=groups,
            grpc=grpc_of(fronts),
            fronts=fronts_of(fronts),
            http=None if self._about.api is None else http_of(self._meters.http),
        )

    async def _ask(self, worker: int) -> tuple[float, StatsReply | None]:
        began_s = time.monotonic()
        try:
            links = self._mapping.async_links[worker]
            reply = await links.call(Stats(), began_s + WORKER_ASKED_S)
        except KamaCacheError:
            reply = None
        return time.monotonic() - began_s, reply if isinstance(reply, StatsReply) else None

    # -- the node --------------------------------------------------------------------------

    def _roster(self) -> Roster:
        try:
            return read_roster(self._about.sockets_dir)
        except NodeUnavailableError:
            if not os.path.isdir(self._about.sockets_dir):
                raise
            return Roster(state="starting", pid=self._about.pid, began_ms=boottime_ms())

    def _node(self, roster: Roster, now_ms: int, fronts: Sequence[Region]) -> NodeInfo:
        about = self._about
        until_ms = self._mapping.control.words[SERVE_UNTIL]
        return NodeInfo(
            name=about.name,
            version=about.version,
            python=platform.python_version(),
            epoch=about.epoch,
            pid=roster.pid,
            state=roster.state,
            serving=now_ms < until_ms,
            serve_until_left_ms=max(0, until_ms - now_ms),
            ready=False,
            began_ms=roster.began_ms,
            began_unix_s=self._began_unix_s(roster.began_ms, now_ms),
            uptime_s=max(0.0, (now_ms - roster.began_ms) / 1000),
            workers=about.workers,
            fronts=self._meters.sizes.fronts,
            listen=about.listen,
            api=about.api,
            clustered=about.clustered,
            run_dir=str(self._run_dir.path),
            shm_dir=about.shm_dir,
            boottime_ms=now_ms,
            unix_s=time.time(),
            reloads=roster.reloads,
            reloads_refused=roster.reloads_refused,
            certificate_expires_unix_s=expiry_of(fronts, self._meters.http),
        )

    def _began_unix_s(self, began_ms: int, now_ms: int) -> float:
        if began_ms != self._began[0]:  # once: the two clocks are read one after the other
            self._began = began_ms, round(time.time() - (now_ms - began_ms) / 1000, 3)
        return self._began[1]

    def _roles(self, roster: Roster) -> list[RoleInfo]:
        supervisor = RosterRole(
            role="supervisor",
            index=0,
            pid=roster.pid,
            ready=roster.state == "ready",
            restarts=0,
            started_ms=roster.began_ms,
        )
        places = [supervisor, *roster.roles]
        pids = {place.pid for place in places}
        self._processes = {p: process for p, process in self._processes.items() if p in pids}
        return [self._role(place) for place in places]

    def _role(self, place: RosterRole) -> RoleInfo:
        told = RoleInfo(
            role=place.role,
            index=place.index,
            pid=place.pid,
            ready=place.ready,
            restarts=place.restarts,
            started_ms=place.started_ms,
        )
        if not place.pid:
            told.cpu_s = place.cpu_before_s
            return told
        try:
            process = self._processes.get(place.pid)
            if process is None:
                process = self._processes[place.pid] = psutil.Process(place.pid)
            with process.oneshot():
                times, memory = process.cpu_times(), process.memory_info()
                told.threads = process.num_threads()
                told.open_files = process.num_fds()
        except (psutil.Error, OSError):  # it died a moment ago, or is another user's
            return told
        # With those of children that it waited for, as the supervisor counts it when it has died.
        told.cpu_s = place.cpu_before_s + sum(times[:4])
        told.rss_bytes = memory.rss
        told.own_bytes = max(0, memory.rss - memory.shared)
        return told

    async def _look_at_members(self) -> MembershipInfo | None:
        if self._membership is None:
            return None
        if self._members is None or self._membership.changed():
            found = self._membership.current()
            # A ring of 1,000 nodes takes seconds to make.
            self._members = await asyncio.to_thread(_with_shares, found)
        return self._members

    # -- groups ----------------------------------------------------------------------------

    def _groups(
        self, meters: list[WorkerMeters], replies: list[StatsReply | None]
    ) -> tuple[list[GroupInfo], list[int]]:
        """Return the groups, and when each worker's shards were seen to last."""
        totals = self._mapping.counters().all_totals()
        groups, seen_ms = [], [0] * len(meters)
        for index, spec in enumerate(self._about.groups):
            group = GroupInfo(name=spec.name, spec=msgspec.to_builtins(spec))
            hits = totals[index]
            for name in ("near_hits", "memory_hits", "negative_hits"):
                setattr(group, name, hits[name])
            group.misses = hits["socket_gets"]
            group.gets = group.near_hits + group.memory_hits + group.negative_hits + group.misses
            group.sets, group.deletes = hits["sets"], hits["deletes"]
            group.fallback_loads, group.peer_hits = hits["fallback_loads"], hits["peer_hits"]
            for worker in meters:
                add_loads(group, worker.groups[index])
            for reply in replies:
                if reply is not None and index < len(reply.groups):
                    in_flight, queued, fetches = reply.groups[index][:3]
                    group.loads_in_flight += in_flight
                    group.loads_queued += queued
                    group.fetches_in_flight += fetches
            for shard, arena in enumerate(self._arenas(spec.name)):
                group.shards.append(shard_of(shard, arena))
                seen_ms[shard] = max(seen_ms[shard], last_maintained_ms(arena))
            groups.append(group)
        return groups, seen_ms

    def _arenas(self, group: str) -> list[Arena]:
        try:
            return self._mapping.arenas(group)
        except (StorageError, NodeUnavailableError):  # a shard is being made anew just now
            return []


def observe(run_dir: str | os.PathLike[str]) -> NodeSnapshot:
    """Return one snapshot of the node of a run directory; blocks for a second at most.

    Raises `NodeUnavailableError`. For commands: there must be no running loop in this thread.
    """

    async def once() -> NodeSnapshot:
        observer = Observer(run_dir)
        try:
            return await observer.snapshot()
        finally:
            observer.close()

    return asyncio.run(once())


def _with_shares(membership: Membership) -> MembershipInfo:
    shares = Ring(membership.members).shares() if membership.members else {}
    return MembershipInfo(
        number=membership.number,
        own=membership.own,
        members=[
            MemberInfo(address=m.address, weight=m.weight, share=shares[m.address])
            for m in membership.members
        ],
    )
