"""``etcd://HOST:PORT/PREFIX?ttl=10``: nodes that write themselves down under a lease.

*Process*: agent. A node is one key, ``PREFIX/HOST:PORT``, bound to a lease that it keeps alive; a
dead node's lease ends and takes the key along. The value is the member in JSON, for its weight; a
delete carries no value, so the address is in the key. One session is one server, until it fails::

    list ──► publish ──┬── watch from the list's revision ──► publish
                       └── lease granted ──► key put ──► kept alive every ttl/3
                                ▲                           │ lease or key gone: expired, revoked,
                                └───────────────────────────┘ etcd restarted without its data

    any failure: back off, the next server, all of it again

*Invariants*: the key is there while the session lives, whoever takes it away; every session lists
anew, so that a broken or compacted watch misses nothing; what vanished while no session lived
stays for ``ttl`` or `GRACE_LEAST_S`, so that an etcd that lost its data does not empty the cluster.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sequence
from typing import Final

import msgspec

from kamacache.cluster.discovery.etcd_client import Entry, EtcdClient
from kamacache.cluster.discovery.lists import Roster, changes_only
from kamacache.cluster.discovery.retry import (
    Backoff,
    Report,
    SourceError,
    for_ever,
    to_the_end,
    until_first,
)
from kamacache.cluster.discovery.urls import Source
from kamacache.cluster.membership import Member, check_address
from kamacache.errors import ConfigError
from kamacache.limits import (
    DISCOVERY_LEAVE_S,
    DISCOVERY_RETRY_FIRST_S,
    DISCOVERY_RETRY_MAX_S,
)

TTL_S: Final = 10
TTL_LEAST_S: Final = 2  # etcd's own least is about that: election timeout times 1.5
TTL_MOST_S: Final = 3600
GRACE_LEAST_S: Final = 2 * DISCOVERY_RETRY_MAX_S  # by then everybody has tried again
_PREFIX: Final = re.compile(r"(/[A-Za-z0-9._-]+)+", re.ASCII)

_Say = Callable[[Sequence[Member]], None]


class EtcdDiscovery:
    """Registers this node in etcd and publishes who else is."""

    def __init__(self, source: Source, own: Member) -> None:
        """Check the URL. Raises `ConfigError`."""
        source.allow_options("ttl", "username", "password")
        if not source.servers:
            raise source.refused("it names no server")
        prefix = source.path.rstrip("/")
        if not _PREFIX.fullmatch(prefix):
            raise source.refused("the prefix must be like /kamacache or /team/cache")
        self._servers = source.servers
        self._prefix = prefix + "/"
        self._ttl_s = round(source.seconds("ttl", TTL_S, TTL_LEAST_S, TTL_MOST_S))
        self._login = source.login()
        self._own = own
        self._own_key = self._prefix + own.address
        self._lease = 0
        self._left = False
        self._registering = asyncio.Lock()  # so that leaving does not meet half a registration
        self._own_key_gone = asyncio.Event()
        self._roster = Roster(max(self._ttl_s, GRACE_LEAST_S))
        self._report = Report(source.shown)
        # Back before the lease ends, which an etcd that restarts begins anew.
        self._backoff = Backoff(longest_s=min(DISCOVERY_RETRY_MAX_S, self._ttl_s / 2))
        self._turn = 0  # which server is, or was last, in use

    async def run(self, publish: _Say) -> None:
        """Register, and publish the others' list whenever it changes."""
        say = changes_only(publish)
        failures = 0
        while True:
            self._roster.interrupted()
            try:
                await self._session(self._servers[self._turn], say)
            except SourceError as error:
                self._report.failed(str(error))
            self._turn = (self._turn + 1) % len(self._servers)
            failures += 1
            if failures % len(self._servers) == 0:
                await asyncio.sleep(self._backoff.next_s())

    async def leave(self) -> None:
        """Revoke the lease, and with it the key. Raises `SourceError` where no server could."""
        self._left = True
        try:
            async with asyncio.timeout(DISCOVERY_LEAVE_S), self._registering:
                if self._lease:
                    await self._revoke(self._lease)
                    self._lease = 0
        except TimeoutError as error:
            raise SourceError(f"no etcd answered; the lease ends in {self._ttl_s} s") from error

    async def _revoke(self, lease: int) -> None:
        share_s = DISCOVERY_LEAVE_S / len(self._servers)
        failed = SourceError("etcd was not asked")
        for turn in range(len(self._servers)):
            server = self._servers[(self._turn + turn) % len(self._servers)]
            client = EtcdClient(server)
            try:
                async with asyncio.timeout(share_s):
                    await self._log_in(client)
                    await client.revoke(lease)
                    return
            except SourceError as error:
                failed = error
            except TimeoutError:
                failed = SourceError(f"{server} did not answer")
            finally:
                await to_the_end(client.close())
        raise failed

    async def _session(self, server: str, say: _Say) -> None:
        client = EtcdClient(server)
        try:
            await self._log_in(client)
            revision, entries = await client.list(self._prefix)
            self._list(entries, say)
            await until_first(
                client.watch(self._prefix, revision, lambda changed: self._change(changed, say)),
                self._stay_registered(client),
                self._drop_what_stayed_gone(say),
            )
        finally:
            await to_the_end(client.close())

    async def _log_in(self, client: EtcdClient) -> None:
        if self._login is not None:
            await client.login(*self._login)

    # The list.

    def _list(self, entries: Sequence[Entry], say: _Say) -> None:
        try:
            self._roster.listed(filter(None, map(self._member, entries)))
        except ConfigError as error:
            raise SourceError(f"the list cannot be used: {error}") from error
        say(self._roster.members())

    def _change(self, entries: Sequence[Entry], say: _Say) -> None:
        for entry in entries:
            if entry.value is None:
                self._roster.gone(entry.key.removeprefix(self._prefix))
                if entry.key == self._own_key:
                    self._own_key_gone.set()
                continue
            if entry.key == self._own_key and entry.lease != self._lease:
                self._report.odd(f"another node registers as {self._own.address}")
            member = self._member(entry)
            if member is not None:
                self._roster.came(member)
        say(self._roster.members())

    def _member(self, entry: Entry) -> Member | None:
        address = entry.key.removeprefix(self._prefix)
        try:
            found = msgspec.json.decode(entry.value or b"", type=Member)
            if check_address(f"{address}={found.weight}", "discover") == found:
                return found
            why = "key and value differ"
        except (ConfigError, msgspec.MsgspecError) as error:
            why = str(error)
        self._report.odd(f"the key {entry.key[:200]} is passed over: {why}")
        return None

    async def _drop_what_stayed_gone(self, say: _Say) -> None:
        wait_s = self._roster.changes_in_s()
        while wait_s is not None:
            await asyncio.sleep(wait_s + 0.01)
            say(self._roster.members())
            wait_s = self._roster.changes_in_s()
        await for_ever()

    # This node's own key.

    async def _stay_registered(self, client: EtcdClient) -> None:
        while not self._left:
            await self._register(client)
            self._report.works()
            self._backoff.reset()
            await until_first(self._keep_lease(client, self._lease), self._own_key_lost())
            # Somebody may take the key away again and again; not faster than this.
            await asyncio.sleep(DISCOVERY_RETRY_FIRST_S)
        await for_ever()

    async def _register(self, client: EtcdClient) -> None:
        value = msgspec.json.encode(self._own)
        async with self._registering:
            if self._left:
                return
            self._own_key_gone.clear()
            if self._lease and await client.put(self._own_key, value, self._lease):
                return
            self._lease = await client.grant(self._ttl_s)
            if not await client.put(self._own_key, value, self._lease):
                self._lease = 0
                raise SourceError(f"{client.server} lost the lease that it had just granted")

    async def _keep_lease(self, client: EtcdClient, lease: int) -> None:
        await client.keep_alive(lease, self._ttl_s / 3)

    async def _own_key_lost(self) -> None:
        await self._own_key_gone.wait()
