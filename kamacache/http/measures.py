"""Every metric of a node: its name, type and labels, what it means, how it is read of a snapshot.

*Process*: http; the generator of docs/metrics.md reads the same table. Names are Prometheus's way:
base units, counters end in ``_total``. *Invariants*: a counter never goes down while the node
lives; what is not known just now has no series rather than a 0. Labels are of bounded sets: groups,
places of processes, `PEER_METERS_MAX` nodes and "other", known methods and codes; above
`SHARD_SERIES_MAX` shards their series are sums by group, with ``shard="all"``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final, Literal

from kamacache.limits import SHARD_SERIES_MAX
from kamacache.local.snapshot import (
    GroupInfo,
    Histogram,
    HttpInfo,
    NodeSnapshot,
    PeerInfo,
    RoleInfo,
    ShardInfo,
    WorkerInfo,
)

Kind = Literal["counter", "gauge", "histogram"]
Value = float | Histogram | None  # None: not known just now
Sample = tuple[tuple[str, ...], Value]


@dataclass(frozen=True, slots=True)
class Measure:
    """One metric."""

    name: str
    kind: Kind
    labels: tuple[str, ...]
    meaning: str
    read: Callable[[NodeSnapshot], Iterable[Sample]]

    @property
    def unit(self) -> str:
        """Its unit, "" for a plain count."""
        base = self.name.removesuffix("_total")
        units = ("seconds", "bytes", "ratio")
        return next((unit for unit in units if base.endswith(f"_{unit}")), "")

    @property
    def series(self) -> tuple[str, ...]:
        """The names that its samples have in the text format."""
        if self.kind != "histogram":
            return (self.name,)
        return tuple(f"{self.name}_{part}" for part in ("bucket", "sum", "count"))


def _node(name: str, kind: Kind, meaning: str, read: Callable[[NodeSnapshot], Value]) -> Measure:
    return Measure(f"kamacache_{name}", kind, (), meaning, lambda told: [((), read(told))])


def _role(name: str, kind: Kind, meaning: str, read: Callable[[RoleInfo], Value]) -> Measure:
    def samples(told: NodeSnapshot) -> Iterator[Sample]:
        for role in told.roles:
            yield (role.role, str(role.index)), read(role)

    return Measure(f"kamacache_process_{name}", kind, ("role", "index"), meaning, samples)


def _group(name: str, kind: Kind, meaning: str, read: Callable[[GroupInfo], Value]) -> Measure:
    def samples(told: NodeSnapshot) -> Iterator[Sample]:
        for group in told.groups:
            yield (group.name,), read(group)

    return Measure(f"kamacache_{name}", kind, ("group",), meaning, samples)


def _shard(name: str, kind: Kind, meaning: str, read: Callable[[ShardInfo], int]) -> Measure:
    def samples(told: NodeSnapshot) -> Iterator[Sample]:
        # Not those that were found: where one is made anew, the others keep their labels.
        summed = len(told.groups) * told.node.workers > SHARD_SERIES_MAX
        for group in told.groups:
            if summed:
                yield (group.name, "all"), sum(map(read, group.shards))
                continue
            for shard in group.shards:
                yield (group.name, str(shard.worker)), read(shard)

    return Measure(f"kamacache_shard_{name}", kind, ("group", "shard"), meaning, samples)


def _worker(name: str, kind: Kind, meaning: str, read: Callable[[WorkerInfo], Value]) -> Measure:
    def samples(told: NodeSnapshot) -> Iterator[Sample]:
        for worker in told.workers:
            yield (str(worker.index),), read(worker)

    return Measure(f"kamacache_worker_{name}", kind, ("worker",), meaning, samples)


def _now(name: str, meaning: str, read: Callable[[WorkerInfo], int]) -> Measure:
    """Make one of what only the worker itself knows."""
    return _worker(name, "gauge", meaning, lambda w: read(w) if w.answered else None)


def _peer(name: str, kind: Kind, meaning: str, read: Callable[[PeerInfo], Value]) -> Measure:
    def samples(told: NodeSnapshot) -> Iterator[Sample]:
        for peer in told.peers:
            yield (peer.address,), read(peer)

    return Measure(f"kamacache_{name}", kind, ("peer",), meaning, samples)


def _http(name: str, meaning: str, read: Callable[[HttpInfo], int]) -> Measure:
    def samples(told: NodeSnapshot) -> Iterator[Sample]:
        if told.http is not None:
            yield (), read(told.http)

    return Measure(f"kamacache_http_{name}", "gauge", (), meaning, samples)


def _build(told: NodeSnapshot) -> Iterator[Sample]:
    yield (told.node.version, told.node.python), 1


def _reloads(told: NodeSnapshot) -> Iterator[Sample]:
    yield ("taken",), told.node.reloads
    yield ("refused",), told.node.reloads_refused


def _hits(told: NodeSnapshot) -> Iterator[Sample]:
    for group in told.groups:
        yield (group.name, "near"), group.near_hits
        yield (group.name, "memory"), group.memory_hits
        yield (group.name, "negative"), group.negative_hits


def _links(told: NodeSnapshot) -> Iterator[Sample]:
    for peer in told.peers:
        for state in ("usable", "draining", "returning", "down", "connecting"):
            yield (peer.address, state), getattr(peer, state)


def _call_errors(told: NodeSnapshot) -> Iterator[Sample]:
    for peer in told.peers:
        for reason in ("lost", "late", "refused", "failures"):
            yield (peer.address, reason.removesuffix("s")), getattr(peer, reason)


def _grpc_requests(told: NodeSnapshot) -> Iterator[Sample]:
    for method in told.grpc:
        for code, count in method.codes.items():
            yield (method.method, code), count


def _grpc_seconds(told: NodeSnapshot) -> Iterator[Sample]:
    for method in told.grpc:
        yield (method.method,), method.seconds


def _http_requests(told: NodeSnapshot) -> Iterator[Sample]:
    for asked in told.http.requests if told.http is not None else ():
        yield (asked.handler, asked.method, asked.code), asked.count


def _http_seconds(told: NodeSnapshot) -> Iterator[Sample]:
    for handler, seconds in told.http.seconds.items() if told.http is not None else ():
        yield (handler,), seconds


def _own_share(told: NodeSnapshot) -> Value:
    ring = told.membership
    if ring is None:
        return None
    return next((m.share for m in ring.members if m.address == ring.own), 0.0)


NODE: Final = (
    Measure(
        "kamacache_build_info",
        "gauge",
        ("version", "python"),
        "Always 1; what runs here is in the labels.",
        _build,
    ),
    _node(
        "node_start_time_seconds",
        "gauge",
        "When the supervisor began, in Unix time.",
        lambda t: t.node.began_unix_s,
    ),
    _node(
        "node_ready",
        "gauge",
        "1 while the node serves, no drain has begun, and every worker answers.",
        lambda t: float(t.node.ready),
    ),
    _node(
        "node_serve_until_left_seconds",
        "gauge",
        "For how long shared memory may still be read without the supervisor's next word; "
        "1.5 to 2 in a healthy node, 0: processes do not read it.",
        lambda t: t.node.serve_until_left_ms / 1000,
    ),
    _node("node_workers", "gauge", "Workers that the node was given.", lambda t: t.node.workers),
    _node(
        "tls_certificate_expiry_timestamp_seconds",
        "gauge",
        "When the certificate in force expires (notAfter), in Unix time, the earliest of the "
        "processes that serve; none without TLS.",
        lambda t: t.node.certificate_expires_unix_s,
    ),
    Measure(
        "kamacache_config_reloads_total",
        "counter",
        ("result",),
        "Reloads of the settings, by whether the new ones were taken or refused.",
        _reloads,
    ),
)
PROCESSES: Final = (
    _role("ready", "gauge", "1 while the process that has this place is ready.", lambda r: r.ready),
    _role(
        "restarts_total",
        "counter",
        "Times that the process ended after it had been ready, and was forked again. Tries of one "
        "that does not become ready are not counted: it has process_ready 0.",
        lambda r: r.restarts,
    ),
    _role(
        "cpu_seconds_total",
        "counter",
        "Processor time, user and system, of all processes that have had this place.",
        lambda r: r.cpu_s,
    ),
    _role(
        "resident_memory_bytes",
        "gauge",
        "Resident memory; shards that the process has touched count in each that did.",
        lambda r: r.rss_bytes,
    ),
    _role(
        "private_memory_bytes",
        "gauge",
        "Resident memory less files and shared memory.",
        lambda r: r.own_bytes,
    ),
    _role("open_fds", "gauge", "Open file descriptors.", lambda r: r.open_files),
    _role("threads", "gauge", "Threads.", lambda r: r.threads),
)
GROUPS: Final = (
    _group(
        "gets_total",
        "counter",
        "Gets of processes attached to this node, its own fronts and HTTP included.",
        lambda g: g.gets,
    ),
    Measure(
        "kamacache_hits_total",
        "counter",
        ("group", "layer"),
        "Gets that memory answered: the process's near cache, the shards (memory), or the shards "
        "saying that there is no such key (negative).",
        _hits,
    ),
    _group("misses_total", "counter", "Gets for which a worker was asked.", lambda g: g.misses),
    _group(
        "peer_hits_total",
        "counter",
        "Keys that other nodes asked for and a front found in the shards; not in gets or hits.",
        lambda g: g.peer_hits,
    ),
    _group(
        "worker_hits_total",
        "counter",
        "Keys that a worker was asked for, by this node or a front for a peer, and found in its "
        "shard.",
        lambda g: g.worker_hits,
    ),
    _group("sets_total", "counter", "Sets of attached processes.", lambda g: g.sets),
    _group("deletes_total", "counter", "Deletes of attached processes.", lambda g: g.deletes),
    _group(
        "fallback_loads_total",
        "counter",
        "Gets that attached processes answered with their own getter, for want of a node.",
        lambda g: g.fallback_loads,
    ),
    _group("loads_total", "counter", "Keys for which the getter was called.", lambda g: g.loads),
    _group(
        "load_errors_total",
        "counter",
        "Calls of the getter that failed: it raised, or took longer than load_timeout. One call "
        "may be for many keys: compare with load_duration_seconds_count.",
        lambda g: g.load_errors,
    ),
    _group(
        "load_timeouts_total",
        "counter",
        "Those of load_errors that took longer than load_timeout, in the queue or in the getter.",
        lambda g: g.load_timeouts,
    ),
    _group(
        "load_duration_seconds",
        "histogram",
        "How long calls of the getter took, without the time they waited for a thread.",
        lambda g: g.load_seconds,
    ),
    _group(
        "load_queue_seconds_total",
        "counter",
        "Time that loads waited for a getter thread.",
        lambda g: g.load_queue_s,
    ),
    _group(
        "loads_joined_total",
        "counter",
        "Gets that waited for a load that another get had begun.",
        lambda g: g.loads_joined,
    ),
    _group(
        "loads_refused_total",
        "counter",
        "Loads refused because too many waited already.",
        lambda g: g.loads_refused,
    ),
    _group(
        "loads_detached_total",
        "counter",
        "Loads whose value was not kept because the key was written meanwhile.",
        lambda g: g.loads_detached,
    ),
    _group(
        "loads_not_kept_total",
        "counter",
        "Loaded values that the shard did not take, such as those too large for it.",
        lambda g: g.loads_not_kept,
    ),
    _group("loads_in_flight", "gauge", "Keys that are being loaded.", lambda g: g.loads_in_flight),
    _group(
        "loads_queued", "gauge", "Loads that wait for a getter thread.", lambda g: g.loads_queued
    ),
    _group(
        "fetches_total",
        "counter",
        "Keys that the nodes which own them were asked for.",
        lambda g: g.fetches,
    ),
    _group(
        "fetches_joined_total",
        "counter",
        "Gets that waited for a fetch that another get had begun.",
        lambda g: g.fetches_joined,
    ),
    _group(
        "fetch_errors_total",
        "counter",
        "Fetched keys that came to an error, the owner's or its deadline's.",
        lambda g: g.fetch_errors,
    ),
    _group(
        "fetches_rerouted_total",
        "counter",
        "Keys asked of the next node because their owner could not be reached.",
        lambda g: g.fetches_rerouted,
    ),
    _group(
        "fetches_in_flight",
        "gauge",
        "Keys that other nodes are being asked for.",
        lambda g: g.fetches_in_flight,
    ),
    _group(
        "peeks_total",
        "counter",
        "Keys that this node came to own, asked of the node that had them before.",
        lambda g: g.peeks,
    ),
    _group("peek_hits_total", "counter", "Those of peeks that were there.", lambda g: g.peek_hits),
    _group(
        "loads_standing_in_total",
        "counter",
        "Loads for an owner that was down, next on the ring.",
        lambda g: g.loads_standing_in,
    ),
    _group(
        "loads_not_owned_total",
        "counter",
        "Loads of keys that were another node's when they ended; kept as mirrors.",
        lambda g: g.loads_not_owned,
    ),
)
SHARDS: Final = (
    _shard(
        "items",
        "gauge",
        "Entries, mirrors and known absences included, and those that are over their time and not "
        "removed yet: that is done where room is needed.",
        lambda s: s.items,
    ),
    _shard(
        "live_bytes",
        "gauge",
        "What these entries take, with their keys and headers.",
        lambda s: s.live_bytes,
    ),
    _shard("capacity_bytes", "gauge", "The size of the shard's files.", lambda s: s.capacity_bytes),
    _shard(
        "mirror_bytes", "gauge", "Of live_bytes: other nodes' entries.", lambda s: s.mirror_bytes
    ),
    _shard("puts_total", "counter", "Entries stored.", lambda s: s.puts),
    _shard(
        "mirror_puts_total", "counter", "Of puts: other nodes' entries.", lambda s: s.mirror_puts
    ),
    _shard("deletes_total", "counter", "Values deleted.", lambda s: s.deletes),
    _shard(
        "evictions_total", "counter", "Entries dropped for want of room.", lambda s: s.evictions
    ),
    _shard(
        "mirror_evictions_total",
        "counter",
        "Other nodes' entries dropped for want of room; not in evictions.",
        lambda s: s.mirror_evictions,
    ),
    _shard(
        "expired_total",
        "counter",
        "Entries that were over their time when they were removed; no reader was given one before.",
        lambda s: s.expired,
    ),
    _shard(
        "invalidated_total",
        "counter",
        "Entries dropped because another node wrote the key.",
        lambda s: s.invalidated,
    ),
    _shard(
        "swept_total", "counter", "Entries dropped that another node owns now.", lambda s: s.swept
    ),
)
WORKERS: Final = (
    _worker(
        "answered",
        "gauge",
        "1: the worker told its numbers of now in time. 0: what only it knows is missing here.",
        lambda w: float(w.answered),
    ),
    _worker(
        "heartbeat_age_seconds",
        "gauge",
        "Time since the worker saw to its shards last; about 1 in a healthy one.",
        lambda w: w.heartbeat_age_s,
    ),
    _now("connections", "Open connections of attached processes.", lambda w: w.connections),
    _worker(
        "connections_refused_total",
        "counter",
        "Connections refused because there were too many.",
        lambda w: w.connections_refused,
    ),
    _now("loads_running", "Calls of getters that run.", lambda w: w.loads_running),
    _now(
        "getters_hung",
        "Calls of getters that overran load_timeout and have not ended yet.",
        lambda w: w.getters_hung,
    ),
    _worker(
        "getters_given_up_total",
        "counter",
        "Calls of getters that were given up because they overran load_timeout.",
        lambda w: w.getters_given_up,
    ),
    _worker(
        "writes_sent_total",
        "counter",
        "Sets and deletes sent to the nodes that own the keys.",
        lambda w: w.writes_sent,
    ),
    _worker(
        "invalidations_received_total",
        "counter",
        "Keys that other nodes told this worker to drop.",
        lambda w: w.invalidations_received,
    ),
    _worker(
        "flushes_received_total",
        "counter",
        "Flushes that other nodes told this worker of.",
        lambda w: w.flushes_received,
    ),
)
PEERS: Final = (
    _node(
        "ring_members",
        "gauge",
        "Nodes of the cluster, this one included, as this one knows them.",
        lambda t: None if t.membership is None else len(t.membership.members),
    ),
    _node(
        "ring_own_share_ratio",
        "gauge",
        "The share of all keys that this node owns.",
        _own_share,
    ),
    Measure(
        "kamacache_peer_links",
        "gauge",
        ("peer", "state"),
        "Links of this node's workers to a peer, by state. usable: keys go there; draining: the "
        "peer stops; returning: it has just come back; down: the breaker is open, keys go to the "
        "next node at once; connecting: first try.",
        _links,
    ),
    _peer(
        "peer_breaker_failures",
        "gauge",
        "Failed tries in a row to reach the peer, the most of any worker; 0 while it is up.",
        lambda p: p.breaker_failures,
    ),
    _peer(
        "peer_calls_total",
        "counter",
        "Requests for a peer: gets, writes, invalidations.",
        lambda p: p.calls,
    ),
    Measure(
        "kamacache_peer_call_errors_total",
        "counter",
        ("peer", "reason"),
        "Requests without a good answer. lost: the link failed, or was down; late: no answer "
        "before the deadline; refused: too much waited already; failure: the peer answered with an "
        "error.",
        _call_errors,
    ),
    _peer(
        "peer_call_duration_seconds",
        "histogram",
        "Time to a peer's answer, its getter's included.",
        lambda p: p.seconds,
    ),
    _peer("peer_calls_in_flight", "gauge", "Requests without an answer.", lambda p: p.in_flight),
    _peer("peer_connects_total", "counter", "Links that came up.", lambda p: p.connects),
    _peer(
        "invalidations_sent_total",
        "counter",
        "Keys that the peer was told to drop, each time that it was told.",
        lambda p: p.invalidations_sent,
    ),
    _peer(
        "flushes_sent_total",
        "counter",
        "Flushes that the peer was told of, after it was away for long or was owed too much.",
        lambda p: p.flushes_sent,
    ),
    _peer(
        "invalidations_pending",
        "gauge",
        "Keys and flushes that the peer has not acknowledged.",
        lambda p: p.invalidations_pending,
    ),
    _peer(
        "invalidation_lag_seconds",
        "gauge",
        "Age of the oldest of those; 0: there is none. It grows while the peer is down.",
        lambda p: p.invalidation_lag_s,
    ),
)
REQUESTS: Final = (
    Measure(
        "kamacache_grpc_requests_total",
        "counter",
        ("method", "code"),
        "Calls of kamacache.v1.Cache that have ended, by status.",
        _grpc_requests,
    ),
    Measure(
        "kamacache_grpc_request_duration_seconds",
        "histogram",
        ("method",),
        "Time a front took for a call, from its beginning, before the request is read.",
        _grpc_seconds,
    ),
    Measure(
        "kamacache_grpc_requests_in_flight",
        "gauge",
        ("front",),
        "Calls without an answer.",
        lambda t: (((str(f.index),), f.calls_in_flight) for f in t.fronts),
    ),
    Measure(
        "kamacache_grpc_peer_streams",
        "gauge",
        ("front",),
        "Links of other nodes' workers to this front.",
        lambda t: (((str(f.index),), f.peer_streams) for f in t.fronts),
    ),
    Measure(
        "kamacache_http_requests_total",
        "counter",
        ("handler", "method", "code"),
        "HTTP requests that have ended, by what answered them and status.",
        _http_requests,
    ),
    Measure(
        "kamacache_http_request_duration_seconds",
        "histogram",
        ("handler",),
        "Time to the end of the answer.",
        _http_seconds,
    ),
    _http("requests_in_flight", "Requests without an answer.", lambda h: h.in_flight),
    _http("connections", "Open connections, at most 1 s ago.", lambda h: h.connections),
)
MEASURES: Final = (*NODE, *PROCESSES, *GROUPS, *SHARDS, *WORKERS, *PEERS, *REQUESTS)
SECTIONS: Final = {
    "Node": NODE,
    "Processes": PROCESSES,
    "Groups": GROUPS,
    "Shards": SHARDS,
    "Workers": WORKERS,
    "Cluster": PEERS,
    "Requests": REQUESTS,
}
