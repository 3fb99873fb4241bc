"""memcached, through pymemcache: one blocking client a thread, since it knows no event loop.

*Process*: the parent looks at it, load processes call. Writes wait for their answer
(``default_noreply=False``): pymemcache's default does not, and would measure a send.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pymemcache
from pymemcache.exceptions import MemcacheError

from scripts.loadtest.limits import CHECK_S
from scripts.loadtest.targets.base import (
    AsyncSession,
    Counters,
    ServerProcess,
    SessionOptions,
    SyncSession,
    TargetError,
)
from scripts.loadtest.targets.owners import server_process


class NotStoredError(Exception):
    """The server refused a value: its 1 MiB, or its memory."""


class MemcachedTarget:
    """A server at a Unix socket or an address."""

    concurrent = "threads"

    def __init__(self, name: str, place: str) -> None:
        from importlib.metadata import version

        self.name = name
        self.client = f"pymemcache {version('pymemcache')}"
        self.server = "memcached"
        self._place = place
        self._pid = 0

    def check(self, options: SessionOptions) -> None:
        """Ask who it is."""
        client = self._connect(CHECK_S)
        try:
            told = client.stats()
        except (MemcacheError, OSError) as error:
            raise TargetError(self._unreachable(error)) from error
        finally:
            client.close()
        self._pid = int(told.get(b"pid", 0))
        version = told.get(b"version", b"?")
        self.server = f"memcached {version.decode() if isinstance(version, bytes) else version}"

    def groups(self) -> list[str]:
        """Return none: it has none."""
        return []

    def loads_misses(self) -> bool:
        """Return False: the application loads."""
        return False

    def counters(self) -> Counters | None:
        """Return None: a miss is seen by who asks."""
        return None

    def processes(self) -> list[ServerProcess]:
        """Return the server, if it runs on this machine."""
        return server_process(self._pid, "memcached", ("memcached",))

    def open(self, options: SessionOptions) -> SyncSession:
        """Connect."""
        client = self._connect(options.timeout_s)
        try:
            client.version()
        except (MemcacheError, OSError) as error:
            client.close()
            raise TargetError(self._unreachable(error)) from error
        return MemcachedSession(client)

    async def open_async(self, options: SessionOptions) -> AsyncSession:
        """Raise: pymemcache knows only threads."""
        raise NotImplementedError("pymemcache has no client for event loops")

    def close(self) -> None:
        """Hold nothing."""

    def _connect(self, timeout_s: float) -> Any:
        from scripts.loadtest.targets.specs import host_and_port

        place = self._place
        return pymemcache.Client(
            place if "/" in place else host_and_port(place, self.name),
            timeout=timeout_s,
            connect_timeout=timeout_s,
            no_delay=True,
            default_noreply=False,
        )

    def _unreachable(self, error: Exception) -> str:
        return f"{self.name}: no memcached answers at {self._place} ({error}); start one there"


class MemcachedSession:
    """A client that blocks."""

    not_found: type[BaseException] = KeyError

    def __init__(self, client: Any) -> None:
        self._client = client
        self.get = client.get

    def set(self, key: bytes, value: bytes, ttl_s: float | None) -> None:
        """Store."""
        if not self._client.set(key, value, expire=_seconds(ttl_s)):
            raise NotStoredError(f"memcached did not store a value of {len(value)} bytes")

    def delete(self, key: bytes) -> None:
        """Remove."""
        self._client.delete(key)

    def get_many(self, keys: Sequence[bytes]) -> Sequence[bytes]:
        """Return the keys that came without a value."""
        found = self._client.get_many(keys)
        return () if len(found) == len(keys) else [key for key in keys if key not in found]

    def set_many(self, items: Mapping[bytes, bytes], ttl_s: float | None) -> None:
        """Store all in one round trip."""
        if failed := self._client.set_many(items, expire=_seconds(ttl_s)):
            raise NotStoredError(f"memcached did not store {len(failed)} of {len(items)} values")

    def delete_many(self, keys: Sequence[bytes]) -> None:
        """Remove all."""
        self._client.delete_many(keys)

    def memory_hits(self) -> int | None:
        """Return None: this process has no memory."""
        return None

    def close(self) -> None:
        """Disconnect."""
        self._client.close()


def _seconds(ttl_s: float | None) -> int:
    # It knows whole seconds; 0 means for ever.
    return 0 if ttl_s is None else max(1, math.ceil(ttl_s))
