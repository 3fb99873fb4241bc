"""redis-server, through redis-py: blocking alone, `redis.asyncio` for several at once.

*Process*: the parent looks at it, load processes call. The client is as a user makes it, but does
not try again after an error: a load test counts errors. Batches are MGET, and a pipeline of SETs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import redis
import redis.asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.retry import Retry

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

_SERVERS = ("redis", "valkey", "keydb", "dragonfly")


class RedisTarget:
    """A server at a Unix socket or an address."""

    concurrent = "async"

    def __init__(self, name: str, place: str) -> None:
        self.name = name
        self.client = f"redis-py {redis.__version__}"
        self.server = "redis"
        self._place = place
        self._pid = 0

    def check(self, options: SessionOptions) -> None:
        """Ask who it is."""
        client = redis.Redis(**self._settings(CHECK_S))
        try:
            told = client.info("server")
        except (redis.RedisError, OSError) as error:
            raise TargetError(self._unreachable(error)) from error
        finally:
            client.close()
        self._pid = int(told.get("process_id", 0))
        self.server = f"redis-server {told.get('redis_version', '?')}"

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
        return server_process(self._pid, "redis-server", _SERVERS)

    def open(self, options: SessionOptions) -> SyncSession:
        """Connect."""
        client = redis.Redis(**self._settings(options.timeout_s))
        try:
            client.ping()
        except (redis.RedisError, OSError) as error:
            client.close()
            raise TargetError(self._unreachable(error)) from error
        return RedisSession(client)

    async def open_async(self, options: SessionOptions) -> AsyncSession:
        """Connect."""
        settings = self._settings(options.timeout_s)
        retry = AsyncRetry(NoBackoff(), 0)
        kind = redis.asyncio.Connection
        if path := settings.pop("unix_socket_path", None):
            kind = redis.asyncio.UnixDomainSocketConnection
            settings["path"] = path
        # An open loop has more requests under way than connections: they wait for one.
        pool = redis.asyncio.BlockingConnectionPool(
            connection_class=kind,
            max_connections=options.concurrency,
            **{**settings, "retry": retry, "timeout": options.timeout_s},
        )
        client = redis.asyncio.Redis.from_pool(pool)
        try:
            await client.ping()
        except (redis.RedisError, OSError) as error:
            await client.aclose()
            raise TargetError(self._unreachable(error)) from error
        return AsyncRedisSession(client)

    def close(self) -> None:
        """Hold nothing."""

    def _settings(self, timeout_s: float) -> dict[str, Any]:
        from scripts.loadtest.targets.specs import host_and_port

        settings: dict[str, Any] = {
            "socket_timeout": timeout_s,
            "socket_connect_timeout": timeout_s,
            "retry": Retry(NoBackoff(), 0),
        }
        if "/" in self._place:
            return {**settings, "unix_socket_path": self._place}
        host, port = host_and_port(self._place, self.name)
        return {**settings, "host": host, "port": port}

    def _unreachable(self, error: Exception) -> str:
        return f"{self.name}: no redis-server answers at {self._place} ({error}); start one there"


class RedisSession:
    """A client that blocks."""

    not_found: type[BaseException] = KeyError

    def __init__(self, client: Any) -> None:
        self._client = client
        self.get = client.get

    def set(self, key: bytes, value: bytes, ttl_s: float | None) -> None:
        """Store."""
        self._client.set(key, value, px=_milliseconds(ttl_s))

    def delete(self, key: bytes) -> None:
        """Remove."""
        self._client.delete(key)

    def get_many(self, keys: Sequence[bytes]) -> Sequence[bytes]:
        """Return the keys that came without a value."""
        return _missing(keys, self._client.mget(keys))

    def set_many(self, items: Mapping[bytes, bytes], ttl_s: float | None) -> None:
        """Store all in one round trip."""
        pipeline, ttl_ms = self._client.pipeline(transaction=False), _milliseconds(ttl_s)
        for key, value in items.items():
            pipeline.set(key, value, px=ttl_ms)
        pipeline.execute()

    def delete_many(self, keys: Sequence[bytes]) -> None:
        """Remove all."""
        self._client.delete(*keys)

    def memory_hits(self) -> int | None:
        """Return None: this process has no memory."""
        return None

    def close(self) -> None:
        """Disconnect."""
        self._client.close()


class AsyncRedisSession:
    """The same on an event loop."""

    not_found: type[BaseException] = KeyError

    def __init__(self, client: Any) -> None:
        self._client = client
        self.get = client.get

    async def set(self, key: bytes, value: bytes, ttl_s: float | None) -> None:
        """Store."""
        await self._client.set(key, value, px=_milliseconds(ttl_s))

    async def delete(self, key: bytes) -> None:
        """Remove."""
        await self._client.delete(key)

    async def get_many(self, keys: Sequence[bytes]) -> Sequence[bytes]:
        """Return the keys that came without a value."""
        return _missing(keys, await self._client.mget(keys))

    async def set_many(self, items: Mapping[bytes, bytes], ttl_s: float | None) -> None:
        """Store all in one round trip."""
        pipeline, ttl_ms = self._client.pipeline(transaction=False), _milliseconds(ttl_s)
        for key, value in items.items():
            pipeline.set(key, value, px=ttl_ms)
        await pipeline.execute()

    async def delete_many(self, keys: Sequence[bytes]) -> None:
        """Remove all."""
        await self._client.delete(*keys)

    async def memory_hits(self) -> int | None:
        """Return None: this process has no memory."""
        return None

    async def close(self) -> None:
        """Disconnect."""
        await self._client.aclose(close_connection_pool=True)


def _milliseconds(ttl_s: float | None) -> int | None:
    return None if ttl_s is None else max(1, round(ttl_s * 1000))


def _missing(keys: Sequence[bytes], values: Sequence[object]) -> Sequence[bytes]:
    if None not in values:
        return ()
    return [key for key, value in zip(keys, values, strict=True) if value is None]
