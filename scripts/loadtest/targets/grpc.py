"""A cluster over gRPC, through `kamacache.Client`: blocking alone, on an event loop for several.

*Process*: the parent looks at it, load processes call.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import kamacache
from kamacache.errors import KamaCacheError, KeyNotFoundError
from scripts.loadtest.limits import CHECK_S
from scripts.loadtest.targets.base import (
    AsyncSession,
    Counters,
    ServerProcess,
    SessionOptions,
    SyncSession,
    TargetError,
)
from scripts.loadtest.targets.owners import listeners


class GrpcTarget:
    """The nodes at some addresses."""

    concurrent = "async"

    def __init__(self, name: str, addresses: list[str]) -> None:
        self.name = name
        self.client = f"kamacache {kamacache.__version__}, gRPC client"
        self.server = "kamacache"
        self._addresses = addresses
        self._client: kamacache.Client | None = None
        self._group = ""
        self._loads = False

    def check(self, options: SessionOptions) -> None:
        """Ask for a key that nobody set; a group with a getter counts a load then."""
        self._group = options.group
        try:
            self._client = kamacache.Client(self._addresses, timeout=CHECK_S)
            group = self._client.group(options.group)
            before = group.stats()
            found = group.get(f"load:probe:{secrets.token_hex(8)}", default=None)
            after = group.stats()
        except KamaCacheError as error:
            raise TargetError(f"{self.name}: {error}") from error
        self._loads = found is not None or after["loads"] > before["loads"]
        nodes = after["nodes"]
        self.server = f"kamacache, {nodes} node{'s' if nodes > 1 else ''}"

    def groups(self) -> list[str]:
        """Return none: the client does not ask for groups."""
        return []

    def loads_misses(self) -> bool:
        """Return whether a load was counted for a key that nobody set."""
        return self._loads

    def counters(self) -> Counters | None:
        """Return how many loads all nodes have counted."""
        if self._client is None or not self._loads:
            return None
        try:
            stats = self._client.stats(self._group, timeout=CHECK_S)
        except KamaCacheError:
            return None
        return Counters(missed=int(stats["loads"]))

    def processes(self) -> list[ServerProcess]:
        """Return the processes of those nodes that run on this machine."""
        from scripts.loadtest.targets.specs import host_and_port

        known = self._client.addresses if self._client is not None else ()
        return listeners(
            host_and_port(address, self.name) for address in {*self._addresses, *known}
        )

    def open(self, options: SessionOptions) -> SyncSession:
        """Connect."""
        client = kamacache.Client(self._addresses, timeout=options.timeout_s)
        try:
            client.stats(options.group, timeout=CHECK_S)
        except KamaCacheError as error:
            raise TargetError(f"{self.name}: {error}") from error
        return GrpcSession(client, options.group)

    async def open_async(self, options: SessionOptions) -> AsyncSession:
        """Connect."""
        client = kamacache.Client(self._addresses, timeout=options.timeout_s)
        try:
            await client.astats(options.group, timeout=CHECK_S)
        except KamaCacheError as error:
            raise TargetError(f"{self.name}: {error}") from error
        return AsyncGrpcSession(client, options.group)

    def close(self) -> None:
        """Disconnect."""
        if self._client is not None:
            self._client.close()
            self._client = None


class GrpcSession:
    """A client that blocks."""

    not_found: type[BaseException] = KeyNotFoundError

    def __init__(self, client: kamacache.Client, group: str) -> None:
        self._client = client
        self._group = client.group(group)
        self.get = self._group.get

    def set(self, key: bytes, value: bytes, ttl_s: float | None) -> None:
        """Store."""
        self._group.set(key, value, ttl=ttl_s)

    def delete(self, key: bytes) -> None:
        """Remove."""
        self._group.delete(key)

    def get_many(self, keys: Sequence[bytes]) -> Sequence[bytes]:
        """Return the keys that came without a value."""
        return _missing(keys, self._group.get_many(keys))

    def set_many(self, items: Mapping[bytes, bytes], ttl_s: float | None) -> None:
        """Store all."""
        self._group.set_many(items, ttl=ttl_s)

    def delete_many(self, keys: Sequence[bytes]) -> None:
        """Remove all."""
        self._group.delete_many(keys)

    def memory_hits(self) -> int | None:
        """Return None: this process has no memory."""
        return None

    def close(self) -> None:
        """Disconnect."""
        self._client.close()


class AsyncGrpcSession:
    """The same on an event loop."""

    not_found: type[BaseException] = KeyNotFoundError

    def __init__(self, client: kamacache.Client, group: str) -> None:
        self._client = client
        self._group = client.group(group)
        self.get = self._group.aget

    async def set(self, key: bytes, value: bytes, ttl_s: float | None) -> None:
        """Store."""
        await self._group.aset(key, value, ttl=ttl_s)

    async def delete(self, key: bytes) -> None:
        """Remove."""
        await self._group.adelete(key)

    async def get_many(self, keys: Sequence[bytes]) -> Sequence[bytes]:
        """Return the keys that came without a value."""
        return _missing(keys, await self._group.aget_many(keys))

    async def set_many(self, items: Mapping[bytes, bytes], ttl_s: float | None) -> None:
        """Store all."""
        await self._group.aset_many(items, ttl=ttl_s)

    async def delete_many(self, keys: Sequence[bytes]) -> None:
        """Remove all."""
        await self._group.adelete_many(keys)

    async def memory_hits(self) -> int | None:
        """Return None: this process has no memory."""
        return None

    async def close(self) -> None:
        """Disconnect."""
        await self._client.aclose()


def _missing(keys: Sequence[bytes], found: Mapping[bytes, Any]) -> Sequence[bytes]:
    return () if len(found) == len(keys) else [key for key in keys if key not in found]
