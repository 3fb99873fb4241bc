"""The six calls of etcd's v3 API that discovery needs, each bounded in time.

*Process*: agent. Over the stubs that aetcd generates (`aetcd.rpc`), not over its client, whose
watcher (aetcd 1.0) tells nobody when the server cancels a watch or ends its stream, and cannot ask
for a watch that ends when its server has lost the others. One `EtcdClient` is one channel to one
server and does not come back: after a failure it is closed, and the next one dials anew without
gRPC's own back-off, which grows to two minutes.

*Invariant*: every failure leaves here as a `SourceError`, cancellation of the caller excepted.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

from aetcd import rpc

from kamacache.cluster.discovery.retry import SourceError
from kamacache.limits import DISCOVERY_BYTES_MAX, DISCOVERY_TIMEOUT_S

_OPTIONS: Final = (
    ("grpc.use_local_subchannel_pool", 1),  # a closed channel's back-off is not inherited
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_receive_message_length", DISCOVERY_BYTES_MAX),
)
# As etcd's own client with WithRequireLeader: a server that lost its cluster ends the watch.
_NEEDS_LEADER: Final = ("hasleader", "true")
_DELETE: Final = 1


@dataclass(frozen=True, slots=True)
class Entry:
    """A key as etcd has it, or had it: ``value`` is None where it was deleted."""

    key: str
    value: bytes | None
    lease: int


class EtcdClient:
    """One connection to one server."""

    def __init__(self, server: str) -> None:
        self.server = server
        self._channel: Any = rpc.insecure_channel(server, options=_OPTIONS)
        self._keys: Any = rpc.KVStub(self._channel)
        self._leases: Any = rpc.LeaseStub(self._channel)
        self._watches: Any = rpc.WatchStub(self._channel)
        self._token: tuple[tuple[str, str], ...] = ()

    async def close(self) -> None:
        """End the connection and every call on it."""
        await self._channel.close(None)

    async def login(self, name: str, password: str) -> None:
        """Get the token that every later call carries."""
        auth: Any = rpc.AuthStub(self._channel)
        answer = await self._ask(
            "login", auth.Authenticate, rpc.AuthenticateRequest(name=name, password=password)
        )
        self._token = (("token", answer.token),)

    async def list(self, prefix: str) -> tuple[int, Sequence[Entry]]:
        """Return the revision and all keys that begin with ``prefix``."""
        key, end = _range(prefix)
        answer = await self._ask("list", self._keys.Range, rpc.RangeRequest(key=key, range_end=end))
        return answer.header.revision, [_entry(kv) for kv in answer.kvs]

    async def grant(self, ttl_s: int) -> int:
        """Return a new lease."""
        answer = await self._ask("grant", self._leases.LeaseGrant, rpc.LeaseGrantRequest(TTL=ttl_s))
        return int(answer.ID)

    async def put(self, key: str, value: bytes, lease: int) -> bool:
        """Write a key that lives as long as its lease; False where etcd has no such lease."""
        request = rpc.PutRequest(key=key.encode(), value=value, lease=lease)
        return await self._ask("put", self._keys.Put, request, missing=True) is not None

    async def revoke(self, lease: int) -> None:
        """End a lease and with it its keys; one that etcd does not have is ended."""
        request = rpc.LeaseRevokeRequest(ID=lease)
        await self._ask("revoke", self._leases.LeaseRevoke, request, missing=True)

    async def keep_alive(self, lease: int, every_s: float) -> None:
        """Keep a lease for as long as etcd has it; returns when it has it no more."""
        async with self._errors("keep-alive"):
            stream = self._leases.LeaseKeepAlive(metadata=self._token)
            try:
                while True:
                    async with asyncio.timeout(DISCOVERY_TIMEOUT_S):
                        await stream.write(rpc.LeaseKeepAliveRequest(ID=lease))
                        answer = await stream.read()
                    if not isinstance(answer, rpc.LeaseKeepAliveResponse):
                        raise SourceError(f"{self.server} ended the keep-alive")
                    if answer.TTL <= 0:
                        return
                    await asyncio.sleep(every_s)
            finally:
                stream.cancel()

    async def watch(
        self, prefix: str, revision: int, on_change: Callable[[Sequence[Entry]], None]
    ) -> None:
        """Call ``on_change`` with what changes under ``prefix`` after ``revision``, for ever.

        Raises `SourceError` when the watch ends: for a compaction, a lost leader, a lost server.
        """
        key, end = _range(prefix)
        create = rpc.WatchCreateRequest(key=key, range_end=end, start_revision=revision + 1)
        async with self._errors("watch"):
            stream = self._watches.Watch(metadata=(*self._token, _NEEDS_LEADER))
            try:
                async with asyncio.timeout(DISCOVERY_TIMEOUT_S):
                    await stream.write(rpc.WatchRequest(create_request=create))
                    answer = await stream.read()
                while isinstance(answer, rpc.WatchResponse) and not answer.canceled:
                    if answer.events:
                        on_change([_event(event) for event in answer.events])
                    answer = await stream.read()
                raise SourceError(f"{self.server} ended the watch{_why(answer)}")
            finally:
                stream.cancel()

    async def _ask(self, what: str, call: Any, request: Any, *, missing: bool = False) -> Any:
        async with self._errors(what), asyncio.timeout(DISCOVERY_TIMEOUT_S + 0.5):
            try:
                return await call(request, timeout=DISCOVERY_TIMEOUT_S, metadata=self._token)
            except rpc.AioRpcError as error:
                if missing and error.code() is rpc.StatusCode.NOT_FOUND:
                    return None
                raise

    @asynccontextmanager
    async def _errors(self, what: str) -> AsyncIterator[None]:
        try:
            yield
        except rpc.AioRpcError as error:
            why = f"{error.code().name}: {error.details()}"
            raise SourceError(f"{self.server} {what}: {why}") from error
        except TimeoutError as error:
            raise SourceError(f"{self.server} {what}: no answer") from error
        except (rpc.BaseError, asyncio.InvalidStateError) as error:
            raise SourceError(f"{self.server} {what}: {error}") from error
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            # gRPC cancels calls whose stream broke under them; nobody cancelled us.
            raise SourceError(f"{self.server} {what}: the call was cancelled") from error


def _range(prefix: str) -> tuple[bytes, bytes]:
    key = prefix.encode()
    return key, key[:-1] + bytes((key[-1] + 1,))  # a prefix ends in "/", never in 0xff


def _entry(kv: Any) -> Entry:
    return Entry(kv.key.decode(errors="replace"), kv.value, kv.lease)


def _event(event: Any) -> Entry:
    if event.type == _DELETE:  # carries no value: the key must say who is gone
        return Entry(event.kv.key.decode(errors="replace"), None, 0)
    return _entry(event.kv)


def _why(answer: Any) -> str:
    if not isinstance(answer, rpc.WatchResponse):
        return ""
    if answer.compact_revision:
        return f": compacted at revision {answer.compact_revision}"
    return f": {answer.cancel_reason}"
