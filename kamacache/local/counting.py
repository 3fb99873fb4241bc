"""What an attached process counts of a group, when it publishes it, and the group's numbers.

*Process*: attached ones. Counts are private until `publish` adds them to the process's slot of
the node's counters (`kamacache.rundir.counters`), so that a hit writes no shared memory.

*Invariants*: one thread publishes at a time, and who comes second leaves it to the first. A
forked child begins at nothing: what was counted before the fork is the parent's to publish.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from kamacache.errors import KamaCacheError
from kamacache.limits import COUNTER_FLUSH_S
from kamacache.local.mapping import NodeMapping
from kamacache.store import NearCache
from kamacache.wire.messages import Reply, StatsReply

_OWN: Final = ("near_hits", "memory_hits", "negative_hits")
_SUMMED: Final = ("items", "live_bytes", "evictions", "expired", "loads", "load_errors")
_RENAMED: Final = {  # what a worker says, as single-instance mode says it
    "loads_joined": "joined",
    "loads_detached": "detached",
    "loads_in_flight": "loading",
}


class UnpublishedReads:
    """The hits that a lookup counted and that are not in this process's counter slot yet."""

    __slots__ = ("_lookup", "_published", "_served")

    def __init__(
        self,
        lookup: Callable[[], tuple[int, int, int]],
        served: Callable[[], tuple[int, int, int]] = lambda: (0, 0, 0),
    ) -> None:
        """Count from now on what these tell; ``served`` is for other nodes, who count the gets."""
        self._lookup = lookup
        self._served = served
        self._published = self.seen()

    def seen(self) -> tuple[int, ...]:
        """Return near, memory and negative hits of this process so far, then peers' hits."""
        return *self._lookup(), sum(self._served())

    def take(self) -> tuple[int, ...]:
        """Return the same since the last time."""
        reads = self.seen()
        fresh = tuple(now - before for now, before in zip(reads, self._published, strict=True))
        self._published = reads
        return fresh

    def forget(self) -> None:
        """Publish nothing of what was counted so far."""
        self._published = self.seen()


class GroupCounts:
    """What one engine counts beside its lookups; add to ``fresh`` by name."""

    __slots__ = ("_group", "_publishing", "due_s", "fresh")

    def __init__(self, group: str) -> None:
        self._group = group
        self.due_s = time.monotonic() + COUNTER_FLUSH_S  # when it is time to publish
        self.reset()

    def reset(self) -> None:
        """Begin anew, as a forked child must."""
        self._publishing = threading.Lock()
        self.fresh = _nothing()

    def publish(self, mapping: NodeMapping, reads: UnpublishedReads) -> None:
        """Add what was counted since the last time to this process's slot."""
        if not self._publishing.acquire(blocking=False):
            return
        try:
            self.due_s = time.monotonic() + COUNTER_FLUSH_S
            *hits, peer_hits = reads.take()
            counts, self.fresh = self.fresh, _nothing()
            mapping.count(
                self._group,
                (
                    0,
                    *hits,
                    counts["socket_gets"],
                    counts["sets"],
                    counts["deletes"],
                    counts["fallback_loads"],
                    peer_hits,
                ),
            )
        finally:
            self._publishing.release()


def group_stats(
    group: str,
    mapping: NodeMapping,
    replies: Sequence[Reply | KamaCacheError],
    *,
    reads: UnpublishedReads,
    near: NearCache | None,
) -> dict[str, Any]:
    """Return a group's numbers: counters, what the workers said, what this process keeps."""
    totals = mapping.totals(group)
    # Those of single-instance mode are there even while no worker answers.
    names = (*_SUMMED, *_RENAMED.values(), "loads_not_kept")
    summed: dict[str, int] = dict.fromkeys(names, 0)
    answered = 0
    for reply in replies:
        if isinstance(reply, StatsReply):
            answered += 1
            for said, count in reply.stats.items():
                name = _RENAMED.get(said, said)
                summed[name] = summed.get(name, 0) + count
    hits = totals["near_hits"] + totals["memory_hits"]
    arenas = mapping.arenas(group)
    return {
        "mode": "attached",
        "workers": len(replies),
        "workers_answered": answered,
        "gets": hits + totals["negative_hits"] + totals["socket_gets"],
        "hits": hits,
        "misses": totals["socket_gets"],  # what memory did not answer: a worker was asked
        **{name: count for name, count in totals.items() if name != "gets"},
        **summed,
        "capacity_bytes": sum(arena.geometry.total_bytes for arena in arenas),
        "value_bytes_max": arenas[0].geometry.value_bytes_max,
        # Of this process alone, in the node's present life.
        "own": dict(zip(_OWN, reads.seen()[:3], strict=True)),
        "near_items": len(near.entries) if near else 0,
        "near_bytes": near.bytes if near else 0,
    }


def _nothing() -> dict[str, int]:
    return dict.fromkeys(("socket_gets", "sets", "deletes", "fallback_loads"), 0)
