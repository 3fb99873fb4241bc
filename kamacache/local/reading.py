"""Parts of a snapshot out of a node's meters, its shards' headers and its workers' answers.

*Process*: as `kamacache.local.observing`, which asks for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kamacache.limits import PEER_METERS_MAX
from kamacache.local.snapshot import (
    FrontInfo,
    GroupInfo,
    GrpcMethod,
    Histogram,
    HttpInfo,
    HttpRequests,
    MembershipInfo,
    PeerInfo,
    ShardInfo,
    WorkerInfo,
)
from kamacache.rundir.meters import (
    GRPC_CODES,
    GRPC_METHODS,
    HTTP_CODES,
    HTTP_HANDLERS,
    HTTP_METHODS,
    OTHER_PEERS,
    Region,
    WorkerMeters,
)
from kamacache.store import Arena, published_counters
from kamacache.wire.messages import LinkNow, StatsReply

_LINK_STATES = ("usable", "draining", "returning", "down", "connecting")


def worker_of(
    index: int,
    took_s: float,
    reply: StatsReply | None,
    meters: WorkerMeters,
    seen_ms: int,
    now_ms: int,
) -> WorkerInfo:
    """Return one worker: what it counted, and what it told of now if it did."""
    counts = meters.own.counts()
    told = WorkerInfo(
        index=index,
        answered=reply is not None,
        answer_s=took_s,
        connections_refused=counts["connections_refused"],
        getters_given_up=counts["getters_replaced"],
        writes_sent=counts["writes_sent"],
        invalidations_received=counts["invalidations_taken"],
        flushes_received=counts["flushes_taken"],
        heartbeat_age_s=max(0, now_ms - seen_ms) / 1000 if seen_ms else None,
    )
    if reply is not None:
        told.connections = reply.stats.get("connections", 0)
        told.getters_hung = reply.stats.get("getters_hung", 0)
        told.loads_running = reply.stats.get("loads_running", 0)
        for in_flight, queued, fetches, *_ in reply.groups:
            told.loads_in_flight += in_flight
            told.loads_queued += queued
            told.fetches_in_flight += fetches
    return told


def add_loads(group: GroupInfo, region: Region) -> None:
    """Add what one worker counted of a group's loads and fetches."""
    for name, count in region.counts().items():
        if name == "load_queue_us":
            group.load_queue_s += count / 1e6
        elif name != "fetches_detached":
            setattr(group, name, getattr(group, name) + count)
    sum_s, buckets = region.histogram()
    group.load_seconds.add(
        Histogram(bounds_s=group.load_seconds.bounds_s, counts=buckets, sum_s=sum_s)
    )


def shard_of(worker: int, arena: Arena) -> ShardInfo:
    """Return what a shard's writer published last."""
    published: dict[str, Any] = {
        name: count
        for name, count in published_counters(arena).items()
        if name in ShardInfo.__struct_fields__
    }
    return ShardInfo(worker=worker, capacity_bytes=arena.geometry.total_bytes, **published)


def peers_of(
    meters: list[WorkerMeters],
    replies: list[StatsReply | None],
    membership: MembershipInfo | None,
) -> list[PeerInfo]:
    """Return the other nodes, as all workers see them together."""
    members = []
    if membership is not None:
        members = [m.address for m in membership.members if m.address != membership.own]
    slots = [[(slot.address, slot) for slot in worker.peers[:-1]] for worker in meters]
    apart = _apart([{address for address, _ in of_worker} for of_worker in slots], members)
    found = {address: PeerInfo(address=address, member=address in members) for address in apart}

    def peer(address: str) -> PeerInfo:
        if address not in found:
            address = OTHER_PEERS
            found.setdefault(address, PeerInfo(address=address, member=False))
        return found[address]

    for address in members:
        peer(address)
    for of_worker in slots:
        for address, slot in of_worker:
            if address:
                _add_calls(peer(address), slot)
    for worker in meters:
        for others in worker.peers[-1:]:
            if any(others.counts().values()):
                _add_calls(peer(OTHER_PEERS), others)
    for reply in replies:
        for link in reply.links if reply is not None else ():
            _add_link(peer(link.address), link)
    return sorted(found.values(), key=lambda info: info.address)


def _apart(named: list[set[str]], members: list[str]) -> set[str]:
    """Return the nodes that have numbers of their own; ``named`` has the slots of each worker.

    A worker keeps a member's slot, and frees that of a node that has left when another needs it.
    Were what is left of that one in the other workers' slots still told apart, its counters would
    go down; so it goes over to the others whole, with the first slot that is freed.
    """
    apart = {
        address
        for address in set().union(*named) - {""}
        if address in members or all(address in names or "" in names for names in named)
    }
    for address in members:  # that no worker has named yet
        if len(apart) < PEER_METERS_MAX and all("" in names for names in named):
            apart.add(address)
    return apart


def _add_calls(peer: PeerInfo, region: Region) -> None:
    counts = region.counts()
    peer.calls += counts["requests"]
    peer.lost += counts["lost"]
    peer.late += counts["late"]
    peer.refused += counts["overloaded"]
    peer.failures += counts["failures"]
    peer.connects += counts["connects"]
    peer.invalidations_sent += counts["invalidation_keys_sent"]
    peer.flushes_sent += counts["flushes_sent"]
    sum_s, buckets = region.histogram()
    peer.seconds.add(Histogram(bounds_s=peer.seconds.bounds_s, counts=buckets, sum_s=sum_s))


def _add_link(peer: PeerInfo, link: LinkNow) -> None:
    peer.links += 1
    if link.state in _LINK_STATES:
        setattr(peer, link.state, getattr(peer, link.state) + 1)
    peer.breaker_failures = max(peer.breaker_failures, link.failures)
    peer.in_flight += link.in_flight
    peer.invalidations_pending += link.pending
    peer.invalidation_lag_s = max(peer.invalidation_lag_s, link.lag_ms / 1000)


def _sum_histograms(regions: Sequence[Region], number: int) -> Histogram | None:
    """Return one histogram over several regions; None where nothing was counted."""
    summed: Histogram | None = None
    for region in regions:
        sum_s, buckets = region.histogram(number)
        one = Histogram(bounds_s=region.kind.bounds_s, counts=buckets, sum_s=sum_s)
        if summed is None:
            summed = one
        else:
            summed.add(one)
    return summed if summed is not None and summed.count else None


def http_of(region: Region) -> HttpInfo:
    """Return what the HTTP role has counted."""
    counts = region.counts()
    told = HttpInfo(in_flight=counts["in_flight"], connections=counts["connections"])
    for handler in HTTP_HANDLERS:
        for method in HTTP_METHODS:
            for code in HTTP_CODES:
                if count := counts[f"{handler} {method} {code}"]:
                    told.requests.append(
                        HttpRequests(handler=handler, method=method, code=code, count=count)
                    )
    for number, handler in enumerate(HTTP_HANDLERS):
        seconds = _sum_histograms([region], number)
        if seconds is not None:
            told.seconds[handler] = seconds
    return told


def grpc_of(fronts: Sequence[Region]) -> list[GrpcMethod]:
    """Return what the fronts together have counted, but for methods that nobody called."""
    counts = [front.counts() for front in fronts]
    methods = []
    for number, method in enumerate(GRPC_METHODS):
        codes = {code: sum(count[f"{method} {code}"] for count in counts) for code in GRPC_CODES}
        seconds = _sum_histograms(fronts, number)
        if seconds is not None:
            kept = {code: count for code, count in codes.items() if count}
            methods.append(GrpcMethod(method=method, codes=kept, seconds=seconds))
    return methods


def fronts_of(fronts: Sequence[Region]) -> list[FrontInfo]:
    """Return what is under way in each front."""
    return [
        FrontInfo(
            index=index,
            calls_in_flight=front.words[front.kind.at("in_flight")],
            peer_streams=front.words[front.kind.at("peer_streams")],
        )
        for index, front in enumerate(fronts)
    ]


def expiry_of(fronts: Sequence[Region], http: Region) -> int | None:
    """Return when the first certificate that a process serves with expires; None: no TLS."""
    name = "certificate_expires_unix_s"
    told = [region.words[region.kind.at(name)] for region in (*fronts, http)]
    return min(filter(None, told), default=None)
