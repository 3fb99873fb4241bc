"""One life of a node as this process maps it: its description, control words, shards.

*Process*: every attached one. A `NodeMapping` belongs to one epoch and never changes; when the
node is started anew there is a new one (`kamacache.local.attach`). Old mappings stay readable for
whoever still holds them, and the serve-until word stops them from being believed.
"""

from __future__ import annotations

import logging
import platform
import threading
from collections.abc import Callable, Sequence
from typing import Final

from kamacache.config import GroupSpec
from kamacache.errors import GroupNotFoundError, NodeUnavailableError
from kamacache.local.alink import AsyncWorkerLinks
from kamacache.local.link import WorkerLinks
from kamacache.rundir.control import SERVE_UNTIL, ControlReader
from kamacache.rundir.counters import CounterSlot, open_counters
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

log = logging.getLogger("kamacache.local")

DIRECT_READS: Final = platform.machine() in ("x86_64", "AMD64")
"""Whether this machine orders loads and stores as the readers need (DESIGN.md section 4). Where
it does not, every get goes to its worker."""


class NodeMapping:
    """What this process has of one node; safe for threads."""

    def __init__(self, description: NodeDescription) -> None:
        """Map the control words. Raises `NodeUnavailableError` where they are gone."""
        if description.boot_id != read_boot_id():
            raise NodeUnavailableError("the node that was described ran before the last boot")
        self.description = description
        self.control = ControlReader(description.control_path)
        self._lock = threading.Lock()
        self._arenas: dict[str, list[Arena]] = {}
        self._counting = threading.Lock()  # a slot is for one thread at a time
        self._slots: dict[str, CounterSlot] = {}
        alive = self._alive
        shards = range(description.workers)
        self.links = [WorkerLinks(description.sockets_dir, i, alive=alive) for i in shards]
        self.async_links = [
            AsyncWorkerLinks(description.sockets_dir, i, alive=alive) for i in shards
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

    def claim_counters(self, group: str) -> None:
        """Find the slot where this process counts its hits of a group, one for all its engines.

        Raises `NodeUnavailableError`.
        """
        with self._counting:
            if group not in self._slots:
                counters = open_counters(self.description.counters_path)
                self._slots[group] = counters.claim(self.description.group_index(group))

    def count(self, group: str, increments: Sequence[int]) -> None:
        """Add to this process's counters of a group, in the order of `COUNTER_NAMES`."""
        with self._counting:
            self._slots[group].add(increments)

    def totals(self, group: str) -> dict[str, int]:
        """Return the hits of all processes, living and dead."""
        counters = open_counters(self.description.counters_path)
        return counters.totals(self.description.group_index(group))

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
        """Make the locks anew in the child; links and counter slots see to themselves."""
        self._lock = threading.Lock()
        self._counting = threading.Lock()

    def _alive(self) -> bool:
        return self.control.serving
