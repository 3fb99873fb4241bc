"""The figures that ``kamacache stats`` shows, taken from a node's snapshot or from gRPC's Stats.

*Process*: the command's own. Pure: a snapshot in, what is printed or written as JSON out.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from kamacache.local.snapshot import GroupInfo, NodeSnapshot, RoleInfo


class GroupFigures(msgspec.Struct, kw_only=True):
    """One group over all processes of the node; None: not told over gRPC. Counters since start."""

    items: int = 0
    live_bytes: int = 0
    capacity_bytes: int | None = None
    mirror_bytes: int | None = None  # of live_bytes, copies of what other nodes own
    gets: int = 0
    near_hits: int = 0
    memory_hits: int = 0
    negative_hits: int = 0  # "no such key", out of memory
    misses: int | None = None  # asked of a worker
    worker_hits: int | None = None  # found there after all
    hit_ratio: float | None = None  # near, memory and negative hits of all gets; None: no gets
    sets: int = 0
    deletes: int = 0
    loads: int = 0  # calls of the getter
    load_errors: int = 0
    load_timeouts: int = 0
    load_p50_ms: float | None = None  # None: no loads yet
    load_p99_ms: float | None = None
    fetches: int = 0  # asked of the nodes that own the keys
    fetch_errors: int = 0
    mirrors_kept: int = 0
    loads_standing_in: int = 0  # for an owner that was down
    loads_not_owned: int = 0  # by a node that asked, as rings disagree or nobody answered
    evictions: int = 0
    expired: int = 0
    loads_in_flight: int = 0  # now
    loads_queued: int | None = None  # now


RATES: Final = (
    *("gets", "near_hits", "memory_hits", "negative_hits", "misses", "sets", "deletes", "loads"),
    *("load_errors", "fetches", "evictions", "expired"),
)
"""The counters whose rates per second ``--watch`` tells."""


def of_group(info: GroupInfo) -> GroupFigures:
    """Return the figures of a group of a snapshot."""
    told = {name: getattr(info, name) for name in _SHARED}
    hits = info.near_hits + info.memory_hits + info.negative_hits
    return GroupFigures(
        **told,
        capacity_bytes=info.capacity_bytes,
        mirror_bytes=sum([shard.mirror_bytes for shard in info.shards]),
        hit_ratio=hits / info.gets if info.gets else None,
        load_p50_ms=_ms(info.load_seconds.quantile_s(0.5)),
        load_p99_ms=_ms(info.load_seconds.quantile_s(0.99)),
        evictions=sum([shard.evictions for shard in info.shards]),
        expired=sum([shard.expired for shard in info.shards]),
    )


def of_stats(values: dict[str, Any]) -> GroupFigures:
    """Return the figures that a node tells over gRPC."""
    told = {name: values[name] for name in GroupFigures.__struct_fields__ if name in values}
    figures = GroupFigures(**told)
    if figures.gets:
        hits = figures.near_hits + figures.memory_hits + figures.negative_hits
        figures.hit_ratio = hits / figures.gets
    return figures


def rates(now: GroupFigures, before: GroupFigures, seconds: float) -> dict[str, float]:
    """Return how much the counters grew, a second; 0 where one began anew."""
    grown = {name: (getattr(now, name) or 0) - (getattr(before, name) or 0) for name in RATES}
    return {name: round(max(0.0, more / seconds), 3) for name, more in grown.items()}


def of_node(snapshot: NodeSnapshot) -> dict[str, Any]:
    """Return the node as a whole, for JSON."""
    node = snapshot.node
    names = ("name", "version", "epoch", "pid", "state", "ready", "serving", "workers", "fronts")
    return {
        **{name: getattr(node, name) for name in names},
        "uptime_s": round(node.uptime_s, 3),
        "listen": node.listen,
        "api": node.api,
        "run_dir": node.run_dir,
    }


def of_role(role: RoleInfo) -> dict[str, Any]:
    """Return a process, for JSON."""
    names = ("role", "index", "pid", "ready", "restarts", "cpu_s", "rss_bytes", "own_bytes")
    return {name: getattr(role, name) for name in names}


def of_workers(snapshot: NodeSnapshot) -> list[dict[str, Any]]:
    """Return what each worker told, for JSON."""
    names = (
        *("index", "answered", "connections", "loads_running", "loads_queued", "loads_in_flight"),
        *("fetches_in_flight", "getters_hung", "heartbeat_age_s"),
    )
    return [{name: getattr(worker, name) for name in names} for worker in snapshot.workers]


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 4)


_SHARED: Final = (
    *("items", "live_bytes", "gets", "near_hits", "memory_hits", "negative_hits", "misses"),
    *("worker_hits", "sets", "deletes", "loads", "load_errors", "load_timeouts", "fetches"),
    *("fetch_errors", "mirrors_kept", "loads_in_flight", "loads_queued"),
    *("loads_standing_in", "loads_not_owned"),
)
