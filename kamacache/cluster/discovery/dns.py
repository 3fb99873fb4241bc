"""``dns:NAME:PORT`` and ``dns:_SERVICE._tcp.NAME``: the addresses of a name, asked for again.

*Process*: agent. A name's A and AAAA records are members at one port; SRV records (a name that
begins with ``_``) are members each with a port and a weight, and their targets are not resolved:
a member is a name, here and on its own node (``--advertise`` must give the same text)::

    dns:cache.default.svc:8001        10.1.0.7:8001, [fd00::7]:8001
    dns:_cache._tcp.cache.default.svc cache-0.cache.default.svc:8001

Asked every ``every`` seconds, sooner where the answer's time to live ends sooner, at once a second
at most. Names without a final dot go through the search list of resolv.conf.

*Invariant*: an answer that names nobody, and none at all, change nothing: a resolver without data
must not take a cluster apart. A and AAAA fail apart, and the one that fails keeps what it said.
"""

from __future__ import annotations

import asyncio
import ipaddress
import math
from collections.abc import Callable, Sequence
from typing import Final

import dns.asyncresolver
import dns.exception
import dns.name
import dns.resolver

from kamacache.cluster.discovery.lists import changes_only, distinct
from kamacache.cluster.discovery.retry import Backoff, Report, SourceError
from kamacache.cluster.discovery.urls import Source
from kamacache.cluster.membership import Member, check_address
from kamacache.errors import ConfigError
from kamacache.limits import DISCOVERY_RETRY_MAX_S, DISCOVERY_TIMEOUT_S, WEIGHT_MAX

EVERY_S: Final = 5.0
EVERY_LEAST_S: Final = 0.1
TTL_LEAST_S: Final = 1.0  # an answer of a shorter life is still kept for so long

_Answer = tuple[tuple[Member, ...], float]  # and its time to live in seconds


class DnsDiscovery:
    """Publishes what a name's records say."""

    def __init__(self, source: Source) -> None:
        """Check the name. Raises `ConfigError`."""
        source.allow_options("server", "every")
        self._every_s = source.seconds("every", EVERY_S, EVERY_LEAST_S, 3600.0)
        self._server = _server(source)
        self._name, self._port = _name(source)
        self._report = Report(source.shown)
        self._backoff = Backoff(longest_s=min(self._every_s, DISCOVERY_RETRY_MAX_S))
        # What each kind of record said last.
        self._said: dict[str, tuple[Member, ...]] = {}

    async def run(self, publish: Callable[[Sequence[Member]], None]) -> None:
        """Publish the records whenever they change."""
        say = changes_only(publish)
        while True:
            try:
                members, ttl_s = await self._ask()
            except SourceError as error:
                self._report.failed(str(error))
                await asyncio.sleep(self._backoff.next_s())
                continue
            say(members)
            await asyncio.sleep(min(self._every_s, max(ttl_s, TTL_LEAST_S)))

    async def leave(self) -> None:
        """Do nothing: whoever keeps the zone takes this node off it."""

    async def _ask(self) -> _Answer:
        """Ask for all kinds of records once. Raises `SourceError` where none can be had."""
        kinds = ("SRV",) if self._port is None else ("A", "AAAA")
        resolver = self._resolver()
        asked = await asyncio.gather(*(self._records(resolver, kind) for kind in kinds))
        failed = [found for found in asked if isinstance(found, SourceError)]
        answers = {
            kind: found
            for kind, found in zip(kinds, asked, strict=True)
            if not isinstance(found, SourceError)
        }
        said = {**self._said, **{kind: members for kind, (members, _) in answers.items()}}
        members = _joined(said)
        if failed and (not answers or not members):
            raise failed[0]
        if not members:
            raise SourceError(f"{self._name} has no {' or '.join(kinds)} records")
        self._said = said
        for error in failed:
            self._report.failed(str(error))
        if not failed:
            self._report.works()
            self._backoff.reset()
        return members, min(ttl_s for found, ttl_s in answers.values())

    def _resolver(self) -> dns.asyncresolver.Resolver:
        # Made anew each time: resolv.conf may have changed.
        try:
            resolver = dns.asyncresolver.Resolver(configure=self._server is None)
        except (dns.resolver.NoResolverConfiguration, OSError, ValueError) as error:
            raise SourceError(f"there is no resolver: {error}") from error
        if self._server is not None:
            address, port = self._server
            resolver.nameservers = [address]
            resolver.port = port
        resolver.timeout = DISCOVERY_TIMEOUT_S / 2  # of one server; then the next, or once more
        return resolver

    async def _records(
        self, resolver: dns.asyncresolver.Resolver, kind: str
    ) -> _Answer | SourceError:
        try:
            async with asyncio.timeout(DISCOVERY_TIMEOUT_S * 2):
                answer = await resolver.resolve(
                    self._name,
                    kind,
                    lifetime=DISCOVERY_TIMEOUT_S,
                    search=self._server is None and not self._name.endswith("."),
                )
        except dns.resolver.NoAnswer:
            return (), math.inf  # the name is there, records of this kind are not
        except dns.resolver.NXDOMAIN:
            return SourceError(f"{self._name} does not exist (NXDOMAIN)")
        except (dns.exception.DNSException, OSError, TimeoutError) as error:
            kind_of = type(error).__name__
            return SourceError(f"{self._name} {kind} cannot be resolved ({kind_of})")
        rrset = answer.rrset
        ttl_s = float(rrset.ttl) if rrset is not None else 0.0
        try:
            if kind == "SRV":
                found = srv_members([(str(r.target), r.port, r.weight) for r in answer])
            else:
                found = distinct(_at(str(record.address), self._port) for record in answer)
        except ConfigError as error:
            return SourceError(f"{self._name} {kind}: {error}")
        return found, ttl_s


def srv_members(records: Sequence[tuple[str, int, int]]) -> tuple[Member, ...]:
    """Return the members of SRV records ``(target, port, weight)``. Raises `ConfigError`.

    Weights are shares: they are brought to the smallest whole numbers of the same ratio, at most
    `WEIGHT_MAX` and at least 1 (RFC 2782's 0 is "no choice to be made"). Kubernetes gives all
    endpoints 100 divided by their count, which is 1 each. Priorities do not count: all nodes work.
    """
    kept = [record for record in records if record[0] != "."]  # "." says that there is none
    weights = [weight for _, _, weight in kept if weight]
    unit = math.gcd(*weights) or 1
    most = max(weights, default=1) // unit
    scale = min(1.0, WEIGHT_MAX / most)
    return distinct(
        Member(
            check_address(f"{target.rstrip('.')}:{port}", "discover").address,
            max(1, round(weight // unit * scale)),
        )
        for target, port, weight in kept
    )


def _joined(said: dict[str, tuple[Member, ...]]) -> tuple[Member, ...]:
    return tuple(sorted(member for members in said.values() for member in members))


def _at(address: str, port: int | None) -> Member:
    host = f"[{address}]" if ":" in address else address
    return check_address(f"{host}:{port}", "discover")


def _server(source: Source) -> tuple[str, int] | None:
    text = source.options.get("server")
    if text is None:
        return None
    try:
        host, _, port = check_address(text, "discover").address.rpartition(":")
        return str(ipaddress.ip_address(host.strip("[]"))), int(port)
    except ValueError as error:  # ConfigError is one
        raise source.refused(f"server is {text!r}, and must be IP:PORT") from error


def _name(source: Source) -> tuple[str, int | None]:
    """Return the name to ask for, and the port unless the records give it."""
    host, colon, port = source.path.rpartition(":")
    if source.path.startswith("_"):
        if colon:
            raise source.refused("SRV records give the ports, so the URL must not")
        host, port = source.path, "1"
    try:
        address = check_address(f"{host}:{port}", "discover").address
        dns.name.from_text(host)
    except (ConfigError, dns.exception.DNSException) as error:
        raise source.refused(f"{source.path!r} is not a name to look up") from error
    checked, _, number = address.rpartition(":")
    if "=" in port:
        raise source.refused("records of addresses have no weight")
    if checked.startswith("[") or checked.replace(".", "").isdecimal():
        raise source.refused(f"{checked} is an address already; use static:")
    return checked, int(number) if colon else None
