"""One life of a node as this process maps it: its description, control words, shards.

*Process*: every attached one. A `NodeMapping` belongs to one epoch and never changes; when the
node is started anew there is a new one (`kamacache.local.attach`). Old mappings stay readable for
whoever still holds them, and the serve-until word stops them from being believed.
"""

from __future__ import annotations

import logging
import os
import platform
import threading
from collections.abc import Callable, Sequence
from typing import Final

from kamacache.config import GroupSpec
from kamacache.errors import GroupNotFoundError, NodeUnavailableError
from kamacache.local.alink import AsyncWorkerLinks
from kamacache.local.link import WorkerLinks
from kamacache.rundir.control import SERVE_UNTIL, ControlReader
from kamacache.rundir.counters import Counters, CounterSlot, open_counters
from kamacache.rundir.description import NodeDescription, read_boot_id
from kamacache.store import (
    Arena,
    GetEnds,
    Lookup,
    NearCache,
    ShardIdentity,
    ShardPaths,
    make_lookup,
    open_for_reading,
    touch_of,
)
from kamacache.store.entries import EntryLookup, make_entry_lookup
from kamacache.store.served import ServedReads, make_served_reads

log = logging.getLogger("kamacache.local")

DIRECT_READS: Final = platform.machine() in ("x86_64", "AMD64")
"""Whether this machine orders loads and stores as the readers need (DESIGN.md section 4). Where
it does not, every get goes to its worker."""


class NodeMapping:
    """What this process has of one node; safe for threads."""

    def __init__(self, description: NodeDescription, *, in_node: bool = False) -> None:
        """Map the control words. Raises `NodeUnavailableError` where they are gone.

        ``in_node``: this process is of the node. It waits for replies though serve-until passed,
        as when its supervisor alone stands still: it has nothing to fall back to.
        """
        if description.boot_id != read_boot_id():
            raise NodeUnavailableError("the node that was described ran before the last boot")
        self.description = description
        self.control = ControlReader(description.control_path)
        self._lock = threading.Lock()
        self._arenas: dict[str, list[Arena]] = {}
        self._counters: Counters | None = None
        alive = self._alive
        answers = None if in_node else alive
        place = description.sockets_dir
        shards = range(description.workers)
        self.links = [WorkerLinks(place, i, alive=alive, answers=answers) for i in shards]
        self.async_links = [
            AsyncWorkerLinks(place, i, alive=alive, answers=answers) for i in shards
        ]

    @property
    def serving(self) -> bool:
        """Whether the node's memory may be believed now."""
        return self.control.serving

    def spec(self, group: str) -> GroupSpec:
        """Return the node's settings of a group. Raises `GroupNotFoundError`."""
        for spec in self.description.groups:
            if spec.name == group:
                return spec
        known = sorted(spec.name for spec in self.description.groups)
        raise GroupNotFoundError(
            f"the node has no group {group!r}; it has {', '.join(known) or 'none'}",
            group=group,
            known=known,
        )

    def lookup(
        self,
        group: str,
        near: NearCache | None,
        renewed: Callable[[], None] | None,
        ends: GetEnds | None = None,
    ) -> Lookup:
        """Return a group's lookup over all shards."""
        return make_lookup(
            self.arenas(group),
            hash_seed=self.description.hash_seed,
            touch=touch_of(self.spec(group).eviction),
            near=near,
            serve_until=self.control.words[SERVE_UNTIL : SERVE_UNTIL + 1],
            renewed=renewed,
            ends=ends,
        )

    def entry_lookup(self, group: str) -> EntryLookup:
        """Return a group's lookup that tells TTL and version too."""
        return make_entry_lookup(
            self.arenas(group),
            hash_seed=self.description.hash_seed,
            serve_until=self.control.words[SERVE_UNTIL : SERVE_UNTIL + 1],
        )

    def served_reads(self, group: str, renewed: Callable[[], None] | None) -> ServedReads:
        """Return a group's reads for whoever answers others."""
        return make_served_reads(
            self.arenas(group),
            hash_seed=self.description.hash_seed,
            touch=touch_of(self.spec(group).eviction),
            serve_until=self.control.words[SERVE_UNTIL : SERVE_UNTIL + 1],
            renewed=renewed,
        )

    def count(self, group: str, increments: Sequence[int]) -> None:
        """Add to this process's counters of a group, in the order of `COUNTER_NAMES`."""
        counters, index = self.counters(), self.description.group_index(group)
        with _counting:
            slot = _slots.get((counters, index))
            if slot is None:
                if not any(increments):
                    return  # slots are few: a process takes one when it has something to count
                slot = _slots[counters, index] = counters.claim(index)
            slot.add(increments)

    def totals(self, group: str) -> dict[str, int]:
        """Return the hits of all processes, living and dead."""
        return self.counters().totals(self.description.group_index(group))

    def counters(self) -> Counters:
        """Return the node's counters, mapped at the first call. Raises `NodeUnavailableError`."""
        # Kept, so that the way of a count has no lock that a fork may find taken.
        if self._counters is None:
            self._counters = open_counters(self.description.counters_path)
        return self._counters

    def arenas(self, group: str) -> list[Arena]:
        """Return a group's shards, mapped at the first call. Raises `StorageError`."""
        with self._lock:
            found = self._arenas.get(group)
            if found is None:
                about = self.description
                spec = self.spec(group)
                found = [
                    open_for_reading(
                        ShardPaths.of(about.shm_dir, group, shard),
                        ShardIdentity(spec, shard, about.workers, about.hash_seed, about.boot_id),
                    )
                    for shard in range(about.workers)
                ]
                self._arenas[group] = found
            return found

    def close(self) -> None:
        """Close idle connections; the maps go with their last holder."""
        for links in self.links:
            links.close()
        for async_links in self.async_links:
            async_links.close()

    def after_fork(self) -> None:
        """Make the lock anew in the child; links see to themselves."""
        self._lock = threading.Lock()

    def _alive(self) -> bool:
        return self.control.serving


# One slot for each group of a node, however many engines and attachments this process makes: it
# keeps a slot until it ends, and there are `COUNTER_SLOTS` for all.
_slots: dict[tuple[Counters, int], CounterSlot] = {}
_counting = threading.Lock()  # a slot is for one thread at a time


def _after_fork_in_child() -> None:
    global _counting
    _counting = threading.Lock()  # another thread may have held it; slots claim anew themselves


os.register_at_fork(after_in_child=_after_fork_in_child)
