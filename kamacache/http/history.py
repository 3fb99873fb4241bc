"""The last minutes of a node: points for the charts, and how fast things went of late.

*Process*: http, on its loop. *Owns*: two bounded queues, made of snapshots::

    snapshot ──► Mark (its counters) ──┬─► marks of the last RECENT_S ──► rates of groups, peers
                                       └─► point: what came since the point before ──► HISTORY_S

A point is a row of numbers, written as JSON once. It is taken every `HISTORY_EVERY_S` while
somebody looks and every `HISTORY_IDLE_EVERY_S` otherwise, so that who opens the page because
something has gone wrong sees how it began. It all goes with the process.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

import msgspec

from kamacache.limits import HISTORY_POINTS_MAX, HISTORY_S, RECENT_S
from kamacache.local.snapshot import (
    GroupInfo,
    Histogram,
    NodeSnapshot,
    PeerInfo,
    call_histogram,
    load_histogram,
)

COLUMNS: Final = (
    "unix_ms",
    "gets_s",
    *("near", "memory", "negative", "worker"),  # shares of the gets; the rest was missed
    *("loads_s", "fetches_s", "load_errors_s", "evictions_s"),
    *("load_p50_ms", "load_p99_ms", "peer_p50_ms", "peer_p99_ms"),
    *("grpc_s", "grpc_p50_ms", "grpc_p99_ms", "http_s", "http_p50_ms", "http_p99_ms"),
    "cpu",
)
"""What a point tells; None where there was nothing to tell. ``cpu``: cores, of all processes."""

_MARK_EVERY_S: Final = RECENT_S / 6


@dataclass(slots=True)
class GroupMark:
    """The counters of a group, or of several together."""

    gets: int = 0
    near: int = 0
    memory: int = 0
    negative: int = 0
    misses: int = 0
    worker: int = 0
    loads: int = 0
    load_errors: int = 0
    fetches: int = 0
    fetch_errors: int = 0
    evictions: int = 0
    seconds: Histogram = field(default_factory=load_histogram)

    def add(self, other: GroupMark) -> None:
        """Count another group in."""
        for name in _GROUP_COUNTERS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.seconds.add(other.seconds)

    def since(self, before: GroupMark) -> GroupMark:
        """Return what came after an earlier state; a shard that was made anew began at 0."""
        came = GroupMark(seconds=_since(self.seconds, before.seconds))
        for name in _GROUP_COUNTERS:
            setattr(came, name, max(0, getattr(self, name) - getattr(before, name)))
        return came

    def shares(self) -> dict[str, float | None]:
        """Return by what share of the gets each layer answered; None: there were no gets.

        What workers found for other nodes counts as found, too, so that is bounded by what this
        node's processes asked them.
        """
        if not self.gets:
            return dict.fromkeys(("near", "memory", "negative", "worker", "hit_ratio"))
        counts = {
            "near": self.near,
            "memory": self.memory,
            "negative": self.negative,
            "worker": min(self.worker, self.misses),
        }
        counts["hit_ratio"] = sum(counts.values())
        return {name: rounded(min(1.0, n / self.gets)) for name, n in counts.items()}


_GROUP_COUNTERS: Final = tuple(GroupMark.__dataclass_fields__.keys() - {"seconds"})


@dataclass(slots=True)
class PeerMark:
    """The counters of the calls to a peer, or to all."""

    calls: int = 0
    failures: int = 0
    seconds: Histogram = field(default_factory=call_histogram)

    def add(self, other: PeerMark) -> None:
        """Count another peer in."""
        self.calls += other.calls
        self.failures += other.failures
        self.seconds.add(other.seconds)

    def since(self, before: PeerMark) -> PeerMark:
        """Return what came after an earlier state."""
        return PeerMark(
            max(0, self.calls - before.calls),
            max(0, self.failures - before.failures),
            _since(self.seconds, before.seconds),
        )


@dataclass(slots=True)
class Mark:
    """The counters of a node at one time."""

    at_s: float  # CLOCK_BOOTTIME
    groups: dict[str, GroupMark]
    peers: dict[str, PeerMark]
    cpu_s: dict[tuple[str, int], float]  # by role and number
    grpc: Histogram
    http: Histogram

    def group_totals(self) -> GroupMark:
        """Return the sum over the groups."""
        total = GroupMark()
        for group in self.groups.values():
            total.add(group)
        return total

    def peer_totals(self) -> PeerMark:
        """Return the sum over the peers."""
        total = PeerMark()
        for peer in self.peers.values():
            total.add(peer)
        return total


def mark_of(snapshot: NodeSnapshot) -> Mark:
    """Return the counters of a snapshot."""
    http = {} if snapshot.http is None else snapshot.http.seconds
    return Mark(
        at_s=snapshot.node.boottime_ms / 1000,
        groups={group.name: _group_mark(group) for group in snapshot.groups},
        peers={peer.address: _peer_mark(peer) for peer in snapshot.peers},
        cpu_s={
            (role.role, role.index): role.cpu_s for role in snapshot.roles if role.cpu_s is not None
        },
        grpc=_sum(method.seconds for method in snapshot.grpc),
        http=_sum(seconds for name, seconds in http.items() if name == "api"),
    )


class History:
    """What is kept of the snapshots."""

    def __init__(self) -> None:
        self._marks: deque[Mark] = deque()  # one each _MARK_EVERY_S, those of RECENT_S
        self._last: Mark | None = None  # of the last point
        self._points: deque[tuple[int, bytes]] = deque(maxlen=HISTORY_POINTS_MAX)

    def recent(self, now: Mark) -> Mark | None:
        """Return the mark from which rates of late are taken; None: there is no earlier one."""
        for mark in self._marks:
            if now.at_s - RECENT_S <= mark.at_s < now.at_s:
                return mark
        return None

    def age_s(self, now: Mark) -> float:
        """Return how long ago the last point was; for ever, where there is none."""
        return float("inf") if self._last is None else now.at_s - self._last.at_s

    def note(self, now: Mark) -> None:
        """Remember counters for rates to come."""
        while self._marks and self._marks[0].at_s < now.at_s - RECENT_S:
            self._marks.popleft()
        if not self._marks or now.at_s - self._marks[-1].at_s >= _MARK_EVERY_S:
            self._marks.append(now)

    def add(self, now: Mark, unix_ms: int) -> None:
        """Add a point: what came since the last one."""
        before, self._last = self._last, now
        if before is not None and now.at_s > before.at_s:
            self._points.append((unix_ms, msgspec.json.encode(_point(before, now, unix_ms))))

    def since(self, unix_ms: int, now_ms: int) -> bytes:
        """Return the points after a time as a JSON array; at most `HISTORY_S` old."""
        oldest_ms = max(unix_ms, now_ms - int(HISTORY_S * 1000))
        return b"[" + b",".join([row for at, row in self._points if at > oldest_ms]) + b"]"


def rounded(number: float | None) -> float | None:
    """Return a number with as many digits as anyone reads."""
    return None if number is None else float(f"{number:.4g}")


def quantile_ms(histogram: Histogram, share: float) -> float | None:
    """Return a quantile in milliseconds, None where nothing was counted."""
    found_s = histogram.quantile_s(share)
    return None if found_s is None else rounded(found_s * 1000)


def cpu_of(now: Mark, before: Mark, role: tuple[str, int]) -> float | None:
    """Return how many cores a role took."""
    if role not in now.cpu_s or role not in before.cpu_s:
        return None
    return rounded(max(0.0, now.cpu_s[role] - before.cpu_s[role]) / (now.at_s - before.at_s))


def _point(before: Mark, now: Mark, unix_ms: int) -> list[float | None]:
    seconds = now.at_s - before.at_s
    groups = now.group_totals().since(before.group_totals())
    peers = now.peer_totals().since(before.peer_totals())
    grpc, http = _since(now.grpc, before.grpc), _since(now.http, before.http)
    shares = groups.shares()
    cpus = [cpu_of(now, before, role) for role in now.cpu_s]
    rates = (groups.loads, groups.fetches, groups.load_errors, groups.evictions)
    row: list[float | None] = [rounded(groups.gets / seconds)]
    row += [shares[name] for name in ("near", "memory", "negative", "worker")]
    row += [rounded(count / seconds) for count in rates]
    row += [quantile_ms(groups.seconds, share) for share in (0.5, 0.99)]
    row += [quantile_ms(peers.seconds, share) for share in (0.5, 0.99)]
    for calls in (grpc, http):
        row += [rounded(calls.count / seconds), quantile_ms(calls, 0.5), quantile_ms(calls, 0.99)]
    row.append(rounded(sum(cpu for cpu in cpus if cpu is not None)))
    return [unix_ms, *row]


def _group_mark(group: GroupInfo) -> GroupMark:
    return GroupMark(
        gets=group.gets,
        near=group.near_hits,
        memory=group.memory_hits,
        negative=group.negative_hits,
        misses=group.misses,
        worker=group.worker_hits,
        loads=group.loads,
        load_errors=group.load_errors,
        fetches=group.fetches,
        fetch_errors=group.fetch_errors,
        evictions=sum(shard.evictions for shard in group.shards),
        seconds=group.load_seconds,
    )


def _peer_mark(peer: PeerInfo) -> PeerMark:
    failures = peer.lost + peer.late + peer.refused + peer.failures
    return PeerMark(peer.calls, failures, peer.seconds)


def _sum(histograms: Iterable[Histogram]) -> Histogram:
    total = call_histogram()
    for histogram in histograms:
        total.add(histogram)
    return total


def _since(now: Histogram, before: Histogram) -> Histogram:
    came = now.since(before)
    came.counts = [max(0, count) for count in came.counts]
    return came
