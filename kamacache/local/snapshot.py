"""What a node is and does at one moment, in one piece: for /metrics, the status page, the command.

*Process*: http, and the ``kamacache`` command on the same host; `kamacache.local.observing` makes
it. All of it can be written as JSON (``msgspec.json.encode``). Counters count from the node's start
and never go down while it lives, also when a process of it dies and is forked again; what is not a
counter says so by its name or its comment. Units are the last word of a name.
"""

from __future__ import annotations

from typing import Any

import msgspec

from kamacache.limits import CALL_SECONDS_BUCKETS, LOAD_SECONDS_BUCKETS
from kamacache.rundir.roster import State


class Histogram(msgspec.Struct, kw_only=True):
    """How long things took: a count for each bucket, the last one for all above the bounds."""

    bounds_s: tuple[float, ...]
    counts: list[int]  # not cumulative; one more than there are bounds
    sum_s: float = 0.0

    @property
    def count(self) -> int:
        """How many there were."""
        return sum(self.counts)

    def quantile_s(self, share: float) -> float | None:
        """Return the seconds that this share of them stayed below, None where there were none.

        Interpolated within its bucket, as Prometheus does; what is above the last bound is told
        as that bound.
        """
        wanted, before, below_s = share * self.count, 0, 0.0
        if not self.count:
            return None
        for bound_s, count in zip(self.bounds_s, self.counts, strict=False):
            if count and before + count >= wanted:
                return below_s + (bound_s - below_s) * (wanted - before) / count
            before, below_s = before + count, bound_s
        return below_s

    def add(self, other: Histogram) -> None:
        """Add what another one of the same bounds has counted."""
        self.counts = [a + b for a, b in zip(self.counts, other.counts, strict=True)]
        self.sum_s += other.sum_s

    def since(self, before: Histogram) -> Histogram:
        """Return what came after an earlier state of this histogram."""
        counts = [a - b for a, b in zip(self.counts, before.counts, strict=True)]
        return Histogram(bounds_s=self.bounds_s, counts=counts, sum_s=self.sum_s - before.sum_s)


def load_histogram() -> Histogram:
    """Return an empty histogram of the loads' bounds."""
    bounds = LOAD_SECONDS_BUCKETS
    return Histogram(bounds_s=bounds, counts=[0] * (len(bounds) + 1))


def call_histogram() -> Histogram:
    """Return an empty histogram of the bounds of calls: to peers, of gRPC, of HTTP."""
    bounds = CALL_SECONDS_BUCKETS
    return Histogram(bounds_s=bounds, counts=[0] * (len(bounds) + 1))


class NodeInfo(msgspec.Struct, kw_only=True):
    """The node as a whole."""

    name: str | None  # HOST:PORT on the ring
    version: str
    python: str  # that the asker runs; the node runs the same one if it is the http role
    epoch: str
    pid: int  # the supervisor's
    state: State
    serving: bool  # serve-until is ahead of the clock: shared memory may be read
    serve_until_left_ms: int  # 0: it has passed
    ready: bool  # serving, in state "ready", and every worker answered
    began_ms: int  # CLOCK_BOOTTIME
    began_unix_s: float  # the same by the wall clock, as it was when it was looked at first
    uptime_s: float
    workers: int
    fronts: int
    listen: str | None
    api: str | None
    clustered: bool
    run_dir: str
    shm_dir: str
    boottime_ms: int  # when this was taken
    unix_s: float  # the same by the wall clock
    reloads: int
    reloads_refused: int
    # Of the certificate in force, the earliest of all processes that serve; None: no TLS.
    certificate_expires_unix_s: int | None = None


class RoleInfo(msgspec.Struct, kw_only=True):
    """One process of the node, the supervisor included."""

    role: str  # supervisor, worker, front, agent, http
    index: int
    pid: int  # 0: none now
    ready: bool
    restarts: int  # deaths after it had been ready
    started_ms: int  # CLOCK_BOOTTIME; 0: never
    cpu_s: float | None = None  # of all processes that had this place; None: not known just now
    rss_bytes: int | None = None  # shared memory that it touched included
    own_bytes: int | None = None  # rss less what is shared with others: files, shared memory
    open_files: int | None = None
    threads: int | None = None


class MemberInfo(msgspec.Struct, kw_only=True):
    """A node of the cluster."""

    address: str
    weight: int
    share: float  # of the ring's keys, from 0 to 1


class MembershipInfo(msgspec.Struct, kw_only=True):
    """Who belongs to the cluster, as this node knows it."""

    number: int
    own: str
    members: list[MemberInfo] = []


class PeerInfo(msgspec.Struct, kw_only=True):
    """Another node as the workers of this one see it; sums over the workers.

    ``address`` "other" has what was counted of nodes for which there was no room of their own
    (`PEER_METERS_MAX` nodes a worker have).
    """

    address: str
    member: bool  # of the ring now; else it has left, and only counters are left of it
    links: int = 0  # workers that told of their link; those below are parts of them
    usable: int = 0  # up, and asked for keys
    draining: int = 0  # up, but the peer says that it stops
    returning: int = 0  # up, but the peer has just come back and is not asked yet
    down: int = 0  # the breaker is open: keys go to the next node at once
    connecting: int = 0  # the first try has not ended
    breaker_failures: int = 0  # in a row, the most of any worker
    calls: int = 0  # counter; requests of all kinds
    in_flight: int = 0
    lost: int = 0  # counter; the link failed before the answer
    late: int = 0  # counter; no answer before the deadline
    refused: int = 0  # counter; too much waits on the link already
    failures: int = 0  # counter; the peer answered with an error
    seconds: Histogram = msgspec.field(default_factory=call_histogram)  # of those answered
    connects: int = 0  # counter
    invalidations_sent: int = 0  # counter; keys, each time that they were sent
    flushes_sent: int = 0  # counter
    invalidations_pending: int = 0  # keys and flushes that it has not answered
    invalidation_lag_s: float = 0.0  # age of the oldest of those; 0: there is none


class WorkerInfo(msgspec.Struct, kw_only=True):
    """One worker. What has no counter's name is of now, and 0 where it did not answer."""

    index: int
    answered: bool  # within `WORKER_ASKED_S`
    answer_s: float = 0.0  # the time it took
    connections: int = 0
    connections_refused: int = 0  # counter
    loads_running: int = 0  # calls of getters
    loads_queued: int = 0  # that wait for a getter thread
    loads_in_flight: int = 0  # keys that are being loaded
    fetches_in_flight: int = 0  # keys that other nodes were asked for
    getters_hung: int = 0
    getters_given_up: int = 0  # counter; calls of getters that overran load_timeout
    writes_sent: int = 0  # counter; to the nodes that own the keys
    invalidations_received: int = 0  # counter; keys
    flushes_received: int = 0  # counter
    heartbeat_age_s: float | None = None  # since its shards were seen to last; about 1 s


class ShardInfo(msgspec.Struct, kw_only=True):
    """One shard of a group, as its writer told last, at most about 1 s ago."""

    worker: int
    items: int = 0
    live_bytes: int = 0
    capacity_bytes: int = 0
    mirror_bytes: int = 0  # of live_bytes
    puts: int = 0  # counter, as all below
    deletes: int = 0
    evictions: int = 0
    expired: int = 0
    mirror_puts: int = 0
    mirror_evictions: int = 0
    invalidated: int = 0
    swept: int = 0
    records_moved: int = 0
    segments_freed: int = 0


class GroupInfo(msgspec.Struct, kw_only=True):
    """One group over the whole node; counters but for what its comment calls otherwise.

    A get is answered by the near cache, by shared memory, or asked of a worker; there it is found
    after all, or loaded: by the getter, or by the node that owns the key.
    """

    name: str
    spec: dict[str, Any]
    gets: int = 0
    near_hits: int = 0
    memory_hits: int = 0
    negative_hits: int = 0  # "no such key", out of memory
    misses: int = 0  # asked of a worker
    peer_hits: int = 0  # keys that peers asked for and a front found in memory; none of the gets
    worker_hits: int = 0  # keys found there; those that peers asked for included
    sets: int = 0
    deletes: int = 0
    fallback_loads: int = 0  # by attached processes themselves while no node served
    loads: int = 0  # keys for which the getter was called
    load_errors: int = 0  # calls that raised
    load_timeouts: int = 0  # of those
    loads_joined: int = 0  # gets that waited for another's load
    loads_refused: int = 0
    loads_detached: int = 0
    loads_not_kept: int = 0
    load_queue_s: float = 0.0  # counter: that loads waited for a getter thread
    load_seconds: Histogram = msgspec.field(default_factory=load_histogram)  # calls of the getter
    fetches: int = 0  # keys asked of the nodes that own them
    fetches_joined: int = 0
    fetch_errors: int = 0
    fetches_rerouted: int = 0
    mirrors_kept: int = 0
    peeks: int = 0  # keys that this node has just come to own, asked of who had them
    peek_hits: int = 0
    loads_standing_in: int = 0  # for an owner that is down
    loads_not_owned: int = 0
    loads_in_flight: int = 0  # now
    loads_queued: int = 0  # now
    fetches_in_flight: int = 0  # now
    shards: list[ShardInfo] = []

    @property
    def items(self) -> int:
        """How many entries there are now."""
        return sum([shard.items for shard in self.shards])

    @property
    def live_bytes(self) -> int:
        """What they take, keys and headers included."""
        return sum([shard.live_bytes for shard in self.shards])

    @property
    def capacity_bytes(self) -> int:
        """What the shards' files take."""
        return sum([shard.capacity_bytes for shard in self.shards])


class GrpcMethod(msgspec.Struct, kw_only=True):
    """One method of kamacache.v1.Cache over all fronts."""

    method: str
    codes: dict[str, int]  # counters by gRPC status, only those that there were
    seconds: Histogram


class FrontInfo(msgspec.Struct, kw_only=True):
    """One front, now."""

    index: int
    calls_in_flight: int = 0
    peer_streams: int = 0


class HttpRequests(msgspec.Struct, kw_only=True):
    """A counter of HTTP requests."""

    handler: str  # api, metrics, page, status, healthz, readyz, other
    method: str
    code: str
    count: int


class HttpInfo(msgspec.Struct, kw_only=True):
    """The HTTP role."""

    in_flight: int = 0
    connections: int = 0
    requests: list[HttpRequests] = []
    seconds: dict[str, Histogram] = {}  # by handler


class NodeSnapshot(msgspec.Struct, kw_only=True):
    """All of it."""

    node: NodeInfo
    roles: list[RoleInfo] = []
    membership: MembershipInfo | None = None  # None: of no cluster
    peers: list[PeerInfo] = []
    workers: list[WorkerInfo] = []
    groups: list[GroupInfo] = []
    grpc: list[GrpcMethod] = []
    fronts: list[FrontInfo] = []
    http: HttpInfo | None = None
