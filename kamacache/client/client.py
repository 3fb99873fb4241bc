"""Client: a cluster from anywhere, over gRPC.

*Process*: the application's; any thread, any event loop. A client costs nothing until the first
call, which loads grpc and connects.

*After a fork* the child's client connects anew; what the parent's was doing stays the parent's.
That needs gRPC's own fork handlers, which fail while a connection of an event loop is open: its
poller is in gRPC all the time. The child of such a fork would crash inside gRPC, now or later
(grpcio 1.85.1: most did), so that there every call raises instead.
"""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

from kamacache import calls, codecs
from kamacache.client.access import Access
from kamacache.client.group import RAISE, Items, K, RemoteGroup
from kamacache.client.nodes import Nodes
from kamacache.client.operations import Operation
from kamacache.cluster.membership import check_address
from kamacache.errors import ConfigError, KamaCacheError
from kamacache.getters import Key
from kamacache.limits import CLIENT_SEEDS_MAX, LOAD_TIMEOUT_S
from kamacache.security.client_tls import FilePath

if TYPE_CHECKING:
    from kamacache.client.transport import LoopTransport, Transport


class Client:
    """The groups of a cluster, from a process that need not be on one of its hosts.

    Given the addresses of some nodes, it learns who else there is, and sends each key to the node
    that owns it::

        with kamacache.Client(["10.0.0.1:8001", "10.0.0.2:8001"]) as client:
            client.get("scores", "Tom", default=None)
            scores = client.group("scores", codec="json")      # as a Group, without a getter
            scores.set("Tom", {"points": 630}, ttl=60)
            scores.get_many(["Tom", "Jack"])

    Every method has an async form with an ``a`` in front, for any event loop. Values are bytes;
    `group` gives other codecs. Loading is the cluster's: a key that it does not hold is loaded
    there by the group's getter. One client serves a whole process: it is safe for threads, has one
    connection to a node (and one more for each event loop), and is made anew in a forked child.

    A node that is dead costs one bounded wait, then the next on the ring is asked, and it is left
    alone until it answers again. Where no node can be reached, a call raises
    `NodeUnavailableError` at once; where its time is over, `DeadlineExceededError`.
    """

    def __init__(
        self,
        seeds: Iterable[str],
        *,
        timeout: float = LOAD_TIMEOUT_S,
        tls_ca: FilePath | bool | None = None,
        tls_cert: FilePath | None = None,
        tls_key: FilePath | None = None,
        token: str | None = None,
        insecure: bool = False,
    ) -> None:
        """Check the settings and read the files; nothing is connected before the first call.

        ``seeds`` are the addresses (HOST:PORT) of one node or more, in a list or separated by
        commas; ``timeout`` is for calls that give none, in seconds. ``tls_ca`` turns on TLS: the
        file with the CA of the nodes' certificates, or True for the roots of this system; each
        node's must be for the host of its address. ``tls_cert`` and ``tls_key``: this client's
        own, where the nodes demand one. Files that change are read again. ``token`` goes with
        every call; without TLS only to this host, unless ``insecure``. Raises `ConfigError`.
        """
        named = seeds.split(",") if isinstance(seeds, str) else list(seeds)
        known = {seed.address: seed for seed in (_check_seed(text) for text in named)}
        if not 1 <= len(known) <= CLIENT_SEEDS_MAX:
            raise ConfigError(
                f"seeds names {len(known)} nodes; name 1 to {CLIENT_SEEDS_MAX}", setting="seeds"
            )
        calls.deadline_after(timeout, timeout)  # checks it
        self._access: Final = Access(tls_ca, tls_cert, tls_key, token, insecure=insecure)
        for address in known:
            self._access.check_seed(address)
        self._timeout_s: Final = timeout
        self._nodes: Final = Nodes(tuple(known.values()))
        self._lock = threading.Lock()
        self._closed = False
        self._threads: Transport | None = None
        self._loops: dict[asyncio.AbstractEventLoop, LoopTransport] = {}
        _LIVE.add(self)

    def __repr__(self) -> str:
        return f"<kamacache.Client of {', '.join(self._nodes.seeds)}>"

    @property
    def addresses(self) -> tuple[str, ...]:
        """The nodes of the cluster, as far as known: the seeds, until one of them has answered."""
        return self._nodes.view.ring.addresses

    def group(self, name: str, *, codec: str | codecs.Codec = "bytes") -> RemoteGroup:
        """Return the cluster's group of that name; nothing is asked. Raises `ConfigError`."""
        return RemoteGroup(self, name, codec)

    # -- groups of bytes, by name ---------------------------------------------------------------

    def get(
        self, group: str, key: Key, default: Any = RAISE, *, timeout: float | None = None
    ) -> Any:
        """Return a key's value, loaded if need be; see `RemoteGroup.get`."""
        return RemoteGroup(self, group).get(key, default, timeout=timeout)

    async def aget(
        self, group: str, key: Key, default: Any = RAISE, *, timeout: float | None = None
    ) -> Any:
        """As `get`."""
        return await RemoteGroup(self, group).aget(key, default, timeout=timeout)

    def set(
        self,
        group: str,
        key: Key,
        value: Any,
        *,
        ttl: float | None = None,
        timeout: float | None = None,
    ) -> None:
        """Keep a value; see `RemoteGroup.set`."""
        RemoteGroup(self, group).set(key, value, ttl=ttl, timeout=timeout)

    async def aset(
        self,
        group: str,
        key: Key,
        value: Any,
        *,
        ttl: float | None = None,
        timeout: float | None = None,
    ) -> None:
        """As `set`."""
        await RemoteGroup(self, group).aset(key, value, ttl=ttl, timeout=timeout)

    def delete(self, group: str, key: Key, *, timeout: float | None = None) -> bool:
        """Drop a key; tell whether a value was there."""
        return RemoteGroup(self, group).delete(key, timeout=timeout)

    async def adelete(self, group: str, key: Key, *, timeout: float | None = None) -> bool:
        """As `delete`."""
        return await RemoteGroup(self, group).adelete(key, timeout=timeout)

    def get_many(
        self, group: str, keys: Iterable[K], *, timeout: float | None = None
    ) -> dict[K, Any]:
        """Return a dict of those found, by the keys as they were given."""
        return RemoteGroup(self, group).get_many(keys, timeout=timeout)

    async def aget_many(
        self, group: str, keys: Iterable[K], *, timeout: float | None = None
    ) -> dict[K, Any]:
        """As `get_many`."""
        return await RemoteGroup(self, group).aget_many(keys, timeout=timeout)

    def set_many(
        self, group: str, items: Items, *, ttl: float | None = None, timeout: float | None = None
    ) -> None:
        """Keep several values; see `RemoteGroup.set_many`."""
        RemoteGroup(self, group).set_many(items, ttl=ttl, timeout=timeout)

    async def aset_many(
        self, group: str, items: Items, *, ttl: float | None = None, timeout: float | None = None
    ) -> None:
        """As `set_many`."""
        await RemoteGroup(self, group).aset_many(items, ttl=ttl, timeout=timeout)

    def delete_many(self, group: str, keys: Iterable[K], *, timeout: float | None = None) -> int:
        """Drop several keys; return how many had a value."""
        return RemoteGroup(self, group).delete_many(keys, timeout=timeout)

    async def adelete_many(
        self, group: str, keys: Iterable[K], *, timeout: float | None = None
    ) -> int:
        """As `delete_many`."""
        return await RemoteGroup(self, group).adelete_many(keys, timeout=timeout)

    def stats(self, group: str, *, timeout: float | None = None) -> dict[str, Any]:
        """Return a group's counters over the cluster; see `RemoteGroup.stats`."""
        return RemoteGroup(self, group).stats(timeout=timeout)

    async def astats(self, group: str, *, timeout: float | None = None) -> dict[str, Any]:
        """As `stats`."""
        return await RemoteGroup(self, group).astats(timeout=timeout)

    # -- calls, for `RemoteGroup` ---------------------------------------------------------------

    def _run(self, operation: Operation, timeout: float | None, *, everywhere: bool = False) -> int:
        """Run an operation; returns how many nodes the cluster has."""
        deadline_s = calls.deadline_after(timeout, self._timeout_s)
        transport = self._threads or self._start()
        if self._nodes.must_join():
            transport.join(deadline_s)
        exchange = self._exchange(operation, deadline_s, timeout, everywhere)
        transport.run(exchange)
        return len(self._nodes.view.members)

    async def _arun(
        self, operation: Operation, timeout: float | None, *, everywhere: bool = False
    ) -> int:
        deadline_s = calls.deadline_after(timeout, self._timeout_s)
        loop = asyncio.get_running_loop()
        transport = self._loops.get(loop) or self._start_in(loop)
        if self._nodes.must_join():
            await transport.join(deadline_s)
        exchange = self._exchange(operation, deadline_s, timeout, everywhere)
        await transport.run(exchange)
        return len(self._nodes.view.members)

    def _exchange(
        self, operation: Operation, deadline_s: float, timeout: float | None, everywhere: bool
    ) -> Any:
        from kamacache.client.exchange import Exchange

        given_s = self._timeout_s if timeout is None else timeout
        return Exchange(operation, self._nodes, deadline_s, given_s, everywhere=everywhere)

    def _start(self) -> Transport:
        from kamacache.client.transport import Transport

        with self._lock:
            self._check_open()
            if self._threads is None:
                self._threads = Transport(self._nodes, self._access)
            return self._threads

    def _start_in(self, loop: asyncio.AbstractEventLoop) -> LoopTransport:
        from kamacache.client.transport import LoopTransport

        with self._lock:
            self._check_open()
            for old in [old for old in self._loops if old.is_closed()]:
                del self._loops[old]
            made = LoopTransport(self._nodes, self._access, loop)
            return self._loops.setdefault(loop, made)

    def _check_open(self) -> None:
        if self._closed:
            raise KamaCacheError("this client is closed")
        if _why_not is not None:
            raise KamaCacheError(_why_not)

    # -- the end --------------------------------------------------------------------------------

    def close(self) -> None:
        """End all calls and connections; those of event loops as soon as these run on."""
        for transport in self._take_transports():
            transport.close()

    async def aclose(self) -> None:
        """As `close`, and the connections of this loop are gone when it returns."""
        loop = asyncio.get_running_loop()
        own = self._loops.get(loop)
        for transport in self._take_transports():
            if transport is own:
                await own.aclose()
            else:
                transport.close()

    def _take_transports(self) -> list[Transport | LoopTransport]:
        with self._lock:
            self._closed = True
            found: list[Transport | LoopTransport] = [*self._loops.values()]
            if self._threads is not None:
                found.append(self._threads)
            self._loops = {}
            self._threads = None
        return found

    def __enter__(self) -> Self:
        self._check_open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        self._check_open()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()

    def _connected(self) -> tuple[bool, bool]:
        """Tell whether threads have connections, and whether event loops have."""
        return self._threads is not None, bool(self._loops)

    def _after_fork(self) -> None:
        self._lock = threading.Lock()
        # The parent's channels: closing them here could wait for threads that only it has.
        _ABANDONED.extend((self._threads, self._loops))
        self._threads = None
        self._loops = {}
        self._nodes.after_fork()
        self._access.after_fork()


def _check_seed(text: object) -> Any:
    if not isinstance(text, str):
        raise ConfigError(f"a seed is {text!r}; give HOST:PORT", setting="seeds", value=repr(text))
    return check_address(text, "seeds")


_LIVE: Final[weakref.WeakSet[Client]] = weakref.WeakSet()
_ABANDONED: Final[list[object]] = []
_FORK_SUPPORT: Final = "GRPC_ENABLE_FORK_SUPPORT"
_why_not: str | None = None  # why gRPC cannot be used in this process


def _after_fork_in_child() -> None:
    global _why_not
    clients = list(_LIVE)
    connected = [client._connected() for client in clients]
    if any(loops for _, loops in connected):
        _why_not = (
            "this process was forked while a client had connections of an event loop, which gRPC "
            "does not survive; await aclose() before the fork, fork before the first call, or "
            "start the process by spawn"
        )
    elif any(threads for threads, _ in connected) and not _fork_support():
        _why_not = (
            f"this process was forked after a client had connected, and {_FORK_SUPPORT} is off; "
            "leave it unset, fork before the first call, or start the process by spawn"
        )
    elif any(threads for threads, _ in connected) and _crossed():
        _why_not = (
            "this process was forked while a thread waited for a slow load, which gRPC does not "
            "survive; fork when no call is under way, or start the process by spawn"
        )
    for client in clients:
        client._after_fork()


def _crossed() -> bool:
    from kamacache.client.forks import gate  # a client that has connected has loaded it

    return gate.crossed


def _fork_support() -> bool:
    return os.environ.get(_FORK_SUPPORT, "1").strip().lower() in (
        "1",
        "true",
        "yes",
        "on",
        "t",
        "y",
    )


os.register_at_fork(after_in_child=_after_fork_in_child)
