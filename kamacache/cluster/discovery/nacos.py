"""``nacos://HOST:PORT/SERVICE``: nodes that are ephemeral instances of a Nacos service.

*Process*: agent. A node registers and beats; Nacos holds an instance for unhealthy after 15 s
without a beat and removes it after 30 s (its defaults). The list is asked for every ``every``
seconds: what Nacos pushes, it pushes over its own gRPC protocol, which is not its open API. One
session is one server, until it fails::

    list ──► publish ──┬── every `every` seconds: list ──► publish
                       └── register ──► beat every 5 s ──► (20404: register)

    any failure: back off, the next server, all of it again

*Invariants*: as `kamacache.cluster.discovery.etcd`'s: every session registers and lists anew, and
what vanished while none lived stays for `GRACE_S`, in which all others have beaten again.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sequence
from typing import Final

from kamacache.cluster.discovery.lists import Roster, changes_only
from kamacache.cluster.discovery.nacos_client import Instance, NacosClient, Service
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
from kamacache.limits import DISCOVERY_LEAVE_S, WEIGHT_MAX

BEAT_EVERY_S: Final = 5.0
BEAT_LEAST_S: Final = 0.05  # whatever a server asks for
EVERY_S: Final = 2.0
GRACE_S: Final = 15.0
GROUP: Final = "DEFAULT_GROUP"
_NAME: Final = re.compile(r"[A-Za-z0-9._:-]{1,128}", re.ASCII)

_Say = Callable[[Sequence[Member]], None]


class NacosDiscovery:
    """Registers this node in Nacos and publishes who else is."""

    def __init__(self, source: Source, own: Member) -> None:
        """Check the URL. Raises `ConfigError`."""
        source.allow_options("namespace", "group", "username", "password", "every")
        if not source.servers:
            raise source.refused("it names no server")
        name = source.path.strip("/")
        group, namespace = source.options.get("group", GROUP), source.options.get("namespace", "")
        for text in filter(None, (name, group, namespace)):
            if not _NAME.fullmatch(text):
                raise source.refused(f"{text!r} is not a name in Nacos")
        if not (name and group):
            raise source.refused("service and group must have names")
        self._servers = source.servers
        self._service = Service(name, group, namespace)
        self._every_s = source.seconds("every", EVERY_S, 0.05, 3600.0)
        self._login = source.login()
        self._own = own
        self._left = False
        self._registered = False
        self._registering = asyncio.Lock()  # so that leaving does not meet half a registration
        self._roster = Roster(GRACE_S)
        self._report = Report(source.shown)
        self._backoff = Backoff()
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
        """Deregister. Raises `SourceError` where no server could be told."""
        self._left = True
        try:
            async with asyncio.timeout(DISCOVERY_LEAVE_S), self._registering:
                if self._registered:
                    await self._deregister()
                    self._registered = False
        except TimeoutError as error:
            raise SourceError("no Nacos answered; it notices the missing beats") from error

    async def _deregister(self) -> None:
        share_s = DISCOVERY_LEAVE_S / len(self._servers)
        failed = SourceError("Nacos was not asked")
        for turn in range(len(self._servers)):
            client = self._client(self._servers[(self._turn + turn) % len(self._servers)])
            try:
                async with asyncio.timeout(share_s):
                    await client.deregister()
                    return
            except SourceError as error:
                failed = error
            except TimeoutError:
                failed = SourceError(f"{client.server} did not answer")
            finally:
                await to_the_end(client.close())
        raise failed

    def _client(self, server: str) -> NacosClient:
        return NacosClient(server, self._service, self._own, self._login)

    async def _session(self, server: str, say: _Say) -> None:
        client = self._client(server)
        try:
            await self._list(client, say)
            await until_first(self._keep_listing(client, say), self._stay_registered(client))
        finally:
            await to_the_end(client.close())

    async def _keep_listing(self, client: NacosClient, say: _Say) -> None:
        while True:
            await asyncio.sleep(self._every_s)
            await self._list(client, say)

    async def _list(self, client: NacosClient, say: _Say) -> None:
        instances = await client.list()
        try:
            self._roster.listed(filter(None, map(self._member, instances)))
        except ConfigError as error:
            raise SourceError(f"the list cannot be used: {error}") from error
        say(self._roster.members())

    def _member(self, instance: Instance) -> Member | None:
        host = f"[{instance.ip}]" if ":" in instance.ip else instance.ip
        if instance.weight <= 0:
            return None  # an operator's way to say: no traffic
        weight = min(WEIGHT_MAX, max(1, round(instance.weight)))
        try:
            return check_address(f"{host}:{instance.port}={weight}", "discover")
        except ConfigError as error:
            self._report.odd(f"an instance is passed over: {error}")
            return None

    async def _stay_registered(self, client: NacosClient) -> None:
        while not self._left:
            await self._register(client)
            self._report.works()
            self._backoff.reset()
            wait_s: float | None = 0.0
            while wait_s is not None and not self._left:
                await asyncio.sleep(wait_s)
                wait_s = await self._beat(client)
            await asyncio.sleep(BEAT_LEAST_S)
        await for_ever()

    async def _register(self, client: NacosClient) -> None:
        async with self._registering:
            if not self._left:
                self._registered = True  # before it is: an answer that got lost counts, too
                await client.register()

    async def _beat(self, client: NacosClient) -> float | None:
        async with self._registering:  # a beat after leaving would register again
            if self._left:
                return None
            asked_s = await client.beat()
        return None if asked_s is None else min(BEAT_EVERY_S, max(BEAT_LEAST_S, asked_s))
