"""A node's HTTP role (docs/http.md), through httpx: blocking alone, on an event loop for several.

*Process*: the parent looks at it, load processes call. HTTP has no batches; the ``_many`` methods
serve only the storing of keys before a test.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, Final

import httpx

from scripts.loadtest.limits import CHECK_S
from scripts.loadtest.targets.base import (
    AsyncSession,
    Counters,
    ServerProcess,
    SessionOptions,
    SyncSession,
    TargetError,
    sentence_of,
)
from scripts.loadtest.targets.owners import listeners

PATH: Final = "/api"
FOUND, NOT_FOUND = 200, 404
_AT_ONCE: Final = 16  # requests of one ``_many``


class HttpStatusError(Exception):
    """The node answered with an error."""


class HttpTarget:
    """The HTTP role at an address."""

    concurrent = "async"

    def __init__(self, name: str, address: str) -> None:
        self.name = name
        self.client = f"httpx {httpx.__version__}"
        self.server = "kamacache, HTTP"
        self._address = address
        self._loads = False

    def check(self, options: SessionOptions) -> None:
        """Ask whether it is ready, and for a key that nobody set."""
        with httpx.Client(**self._settings(CHECK_S, 1)) as client:
            try:
                ready = client.get("/readyz")
                query = _query(options.group, f"load:probe:{secrets.token_hex(8)}".encode())
                probe = client.get(PATH, params=query)
            except httpx.HTTPError as error:
                raise TargetError(self._unreachable(error)) from error
        if ready.status_code != FOUND:
            raise TargetError(f"{self.name}: /readyz answers {ready.status_code}; is it a node?")
        if probe.status_code == NOT_FOUND and "KeyNotFound" not in probe.text:
            raise TargetError(f"{self.name}: {_said(probe)}; choose the group with --group")
        self._loads = probe.status_code != NOT_FOUND

    def groups(self) -> list[str]:
        """Return none: HTTP does not tell groups."""
        return []

    def loads_misses(self) -> bool:
        """Return whether a value came for a key that nobody set."""
        return self._loads

    def counters(self) -> Counters | None:
        """Return None: HTTP tells no counters."""
        return None

    def processes(self) -> list[ServerProcess]:
        """Return the node's processes where it runs on this machine."""
        from scripts.loadtest.targets.specs import host_and_port

        return listeners([host_and_port(self._address, self.name)])

    def open(self, options: SessionOptions) -> SyncSession:
        """Connect."""
        client = httpx.Client(**self._settings(options.timeout_s, 1))
        try:
            client.get("/healthz", timeout=CHECK_S)
        except httpx.HTTPError as error:
            client.close()
            raise TargetError(self._unreachable(error)) from error
        return HttpSession(client, options.group)

    async def open_async(self, options: SessionOptions) -> AsyncSession:
        """Connect."""
        client = httpx.AsyncClient(**self._settings(options.timeout_s, options.concurrency))
        try:
            await client.get("/healthz", timeout=CHECK_S)
        except httpx.HTTPError as error:
            await client.aclose()
            raise TargetError(self._unreachable(error)) from error
        return AsyncHttpSession(client, options.group)

    def close(self) -> None:
        """Hold nothing."""

    def _settings(self, timeout_s: float, connections: int) -> dict[str, Any]:
        return {
            "base_url": f"http://{self._address}",
            "timeout": httpx.Timeout(timeout_s),
            "limits": httpx.Limits(
                max_connections=connections, max_keepalive_connections=connections
            ),
            "trust_env": False,  # a cache is not reached through a web proxy
        }

    def _unreachable(self, error: httpx.HTTPError) -> str:
        return (
            f"{self.name}: no HTTP at {self._address} ({sentence_of(error)}); "
            f"start the node with --api {self._address}"
        )


class HttpSession:
    """A client that blocks."""

    not_found: type[BaseException] = KeyError

    def __init__(self, client: httpx.Client, group: str) -> None:
        self._client = client
        self._group = group

    def get(self, key: bytes, /) -> object:
        """Return the value or None."""
        answer = self._client.get(PATH, params=_query(self._group, key))
        return _value(answer)

    def set(self, key: bytes, value: bytes, ttl_s: float | None) -> None:
        """Store."""
        _check(self._client.put(PATH, params=_query(self._group, key, ttl_s), content=value))

    def delete(self, key: bytes) -> None:
        """Remove."""
        _check(self._client.delete(PATH, params=_query(self._group, key)))

    def get_many(self, keys: Sequence[bytes]) -> Sequence[bytes]:
        """Read one by one."""
        return [key for key in keys if self.get(key) is None]

    def set_many(self, items: Mapping[bytes, bytes], ttl_s: float | None) -> None:
        """Store one by one."""
        for key, value in items.items():
            self.set(key, value, ttl_s)

    def delete_many(self, keys: Sequence[bytes]) -> None:
        """Remove one by one."""
        for key in keys:
            self.delete(key)

    def memory_hits(self) -> int | None:
        """Return None: this process has no memory."""
        return None

    def close(self) -> None:
        """Disconnect."""
        self._client.close()


class AsyncHttpSession:
    """The same on an event loop."""

    not_found: type[BaseException] = KeyError

    def __init__(self, client: httpx.AsyncClient, group: str) -> None:
        self._client = client
        self._group = group
        self._room = asyncio.Semaphore(_AT_ONCE)

    async def get(self, key: bytes, /) -> object:
        """Return the value or None."""
        answer = await self._client.get(PATH, params=_query(self._group, key))
        return _value(answer)

    async def set(self, key: bytes, value: bytes, ttl_s: float | None) -> None:
        """Store."""
        query = _query(self._group, key, ttl_s)
        _check(await self._client.put(PATH, params=query, content=value))

    async def delete(self, key: bytes) -> None:
        """Remove."""
        _check(await self._client.delete(PATH, params=_query(self._group, key)))

    async def get_many(self, keys: Sequence[bytes]) -> Sequence[bytes]:
        """Read several at once."""

        async def one(key: bytes) -> bool:
            async with self._room:
                return await self.get(key) is None

        missing = await asyncio.gather(*map(one, keys))
        return [key for key, lacks in zip(keys, missing, strict=True) if lacks]

    async def set_many(self, items: Mapping[bytes, bytes], ttl_s: float | None) -> None:
        """Store several at once."""

        async def one(key: bytes, value: bytes) -> None:
            async with self._room:
                await self.set(key, value, ttl_s)

        await asyncio.gather(*(one(key, value) for key, value in items.items()))

    async def delete_many(self, keys: Sequence[bytes]) -> None:
        """Remove one by one."""
        for key in keys:
            await self.delete(key)

    async def memory_hits(self) -> int | None:
        """Return None: this process has no memory."""
        return None

    async def close(self) -> None:
        """Disconnect."""
        await self._client.aclose()


def _query(group: str, key: bytes, ttl_s: float | None = None) -> str:
    from urllib.parse import quote_from_bytes, urlencode

    query = f"{urlencode({'group': group})}&key={quote_from_bytes(key, safe='')}"
    return query if ttl_s is None else f"{query}&ttl={ttl_s:g}"


def _value(answer: httpx.Response) -> bytes | None:
    if answer.status_code == NOT_FOUND and "KeyNotFound" in answer.text:
        return None
    _check(answer)
    return answer.content


def _check(answer: httpx.Response) -> None:
    if answer.is_success:
        return
    try:
        name = str(answer.json()["error"])
    except (ValueError, LookupError, TypeError):
        name = ""
    # Counted by the node's own names, as over gRPC.
    kind = type(name, (HttpStatusError,), {}) if name.isidentifier() else HttpStatusError
    raise kind(_said(answer))


def _said(answer: httpx.Response) -> str:
    return f"HTTP {answer.status_code}: {answer.text[:300].strip()}"
