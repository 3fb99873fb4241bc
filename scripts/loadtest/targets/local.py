"""A node of this machine, whose hits this process reads from shared memory: `kamacache.attach`.

*Process*: the parent looks at it, load processes attach. *Invariant*: grpc is never imported here.
One request at a time uses `Group.get`, several use `Group.aget` on one event loop.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import kamacache
from kamacache.errors import KamaCacheError, KeyNotFoundError
from scripts.loadtest.limits import STATS_S
from scripts.loadtest.targets.base import (
    AsyncSession,
    Counters,
    ServerProcess,
    SessionOptions,
    SyncSession,
    TargetError,
)
from scripts.loadtest.targets.owners import node_processes


class LocalTarget:
    """The node of a run directory."""

    concurrent = "async"

    def __init__(self, name: str, run_dir: str) -> None:
        from kamacache.rundir.layout import default_run_dir

        self.name = name
        self.client = f"kamacache {kamacache.__version__}, attached"
        self.server = ""
        self._run_dir = run_dir or os.environ.get("KAMACACHE_RUN_DIR") or str(default_run_dir())
        self._loads = False

    def check(self, options: SessionOptions) -> None:
        """Look for the node and its group."""
        from kamacache.local.attach import attach_group
        from kamacache.rundir.description import read_description

        try:
            found = read_description(self._run_dir)
            specs = {spec.name: spec for spec in found.groups}
            if options.group not in specs:
                raise TargetError(
                    f"{self.name}: the node has no group {options.group!r}; choose one of "
                    f"{', '.join(specs) or 'none'} with --group, or start it with "
                    f"--group {options.group}:64MiB"
                )
            attach_group(self._run_dir, options.group).stats()
        except KamaCacheError as error:
            raise TargetError(f"{self.name}: {error}") from error
        self._loads = specs[options.group].has_getter
        self.server = f"kamacache {found.version}, {found.workers} workers"

    def groups(self) -> list[str]:
        """Return the names of the node's groups; of none where it cannot be asked."""
        from kamacache.rundir.description import read_description

        try:
            return [spec.name for spec in read_description(self._run_dir).groups]
        except KamaCacheError:
            return []

    def loads_misses(self) -> bool:
        """Return whether the group has a getter."""
        return self._loads

    def counters(self) -> Counters | None:
        """Return None: each load process knows what its own memory answered."""
        return None

    def processes(self) -> list[ServerProcess]:
        """Return the supervisor and its roles."""
        from kamacache.rundir.description import read_description

        try:
            return node_processes(read_description(self._run_dir).pid)
        except KamaCacheError:
            return []

    def open(self, options: SessionOptions) -> SyncSession:
        """Attach this process."""
        session = LocalSession(self._attached(options))
        try:
            session.memory_hits()
        except KamaCacheError as error:
            raise TargetError(f"{self.name}: {error}") from error
        return session

    async def open_async(self, options: SessionOptions) -> AsyncSession:
        """Attach this process."""
        session = AsyncLocalSession(self._attached(options))
        try:
            await session.memory_hits()
        except KamaCacheError as error:
            raise TargetError(f"{self.name}: {error}") from error
        return session

    def close(self) -> None:
        """Hold nothing."""

    def _attached(self, options: SessionOptions) -> kamacache.Group:
        kamacache.attach(self._run_dir)
        # Without its node a group would call a getter here; a load test wants the error.
        return kamacache.Group(options.group, fallback="error", load_timeout=options.timeout_s)


class LocalSession:
    """The group of an attached process."""

    not_found: type[BaseException] = KeyNotFoundError

    def __init__(self, group: kamacache.Group) -> None:
        self._group = group
        self.get = group.get  # as it is: a wrapper would cost as much as a hit
        self._hits: int | None = None

    def set(self, key: bytes, value: bytes, ttl_s: float | None) -> None:
        """Store."""
        self._group.set(key, value, ttl=ttl_s)

    def delete(self, key: bytes) -> None:
        """Remove."""
        self._group.delete(key)

    def get_many(self, keys: Sequence[bytes]) -> Sequence[bytes]:
        """Return the keys that came without a value."""
        found = self._group.get_many(keys)
        return () if len(found) == len(keys) else [key for key in keys if key not in found]

    def set_many(self, items: Mapping[bytes, bytes], ttl_s: float | None) -> None:
        """Store all."""
        self._group.set_many(items, ttl=ttl_s)

    def delete_many(self, keys: Sequence[bytes]) -> None:
        """Remove all."""
        self._group.delete_many(keys)

    def memory_hits(self) -> int | None:
        """Return how many gets this process answered from memory."""
        try:
            self._hits = _hits(self._group.stats(timeout=STATS_S))
        except KamaCacheError:
            if self._hits is None:
                raise  # the first time; later its requests tell what is wrong with the node
        return self._hits

    def close(self) -> None:
        """Detach."""
        kamacache.detach()


class AsyncLocalSession:
    """The same on an event loop."""

    not_found: type[BaseException] = KeyNotFoundError

    def __init__(self, group: kamacache.Group) -> None:
        self._group = group
        self.get = group.aget
        self._hits: int | None = None

    async def set(self, key: bytes, value: bytes, ttl_s: float | None) -> None:
        """Store."""
        await self._group.aset(key, value, ttl=ttl_s)

    async def delete(self, key: bytes) -> None:
        """Remove."""
        await self._group.adelete(key)

    async def get_many(self, keys: Sequence[bytes]) -> Sequence[bytes]:
        """Return the keys that came without a value."""
        found = await self._group.aget_many(keys)
        return () if len(found) == len(keys) else [key for key in keys if key not in found]

    async def set_many(self, items: Mapping[bytes, bytes], ttl_s: float | None) -> None:
        """Store all."""
        await self._group.aset_many(items, ttl=ttl_s)

    async def delete_many(self, keys: Sequence[bytes]) -> None:
        """Remove all."""
        await self._group.adelete_many(keys)

    async def memory_hits(self) -> int | None:
        """Return how many gets this process answered from memory."""
        try:
            self._hits = _hits(await self._group.astats(timeout=STATS_S))
        except KamaCacheError:
            if self._hits is None:
                raise  # the first time; later its requests tell what is wrong with the node
        return self._hits

    async def close(self) -> None:
        """Detach."""
        kamacache.detach()


def _hits(stats: Mapping[str, Any]) -> int:
    own = stats["own"]
    return int(own["near_hits"] + own["memory_hits"])
