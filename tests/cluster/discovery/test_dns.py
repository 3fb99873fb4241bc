"""Discovery through a real dnsmasq: addresses, services, and a resolver that fails."""

from __future__ import annotations

import asyncio

import pytest

from kamacache.cluster.discovery.dns import srv_members
from kamacache.errors import ConfigError
from kamacache.limits import WEIGHT_MAX
from tests.cluster.discovery.conftest import Follow, until
from tests.cluster.discovery.servers import DnsServer

NAME = "cache.test"
ONE, TWO, THREE = f"10.0.0.1 {NAME}", f"10.0.0.2 {NAME}", f"fd00::3 {NAME}"
A, B, C = "10.0.0.1:8001", "10.0.0.2:8001", "[fd00::3]:8001"


def url(server: DnsServer, name: str = f"{NAME}:8001") -> str:
    return f"dns:{name}?server={server.address}&every=0.1"


async def test_addresses_of_both_families_are_members(dnsmasq: DnsServer, follow: Follow) -> None:
    dnsmasq.tell(ONE, TWO, THREE)
    a = follow(url(dnsmasq))
    await a.sees(A, B, C)
    await a.source.leave()


async def test_changes_are_seen(dnsmasq: DnsServer, follow: Follow) -> None:
    dnsmasq.tell(ONE)
    a = follow(url(dnsmasq))
    await a.sees(A)
    dnsmasq.tell(ONE, TWO)
    await a.sees(A, B)
    dnsmasq.tell(TWO, THREE)
    await a.sees(B, C)
    dnsmasq.tell(THREE)  # no A records: the name is there, and that is an answer
    await a.sees(C)


async def test_names_without_records_and_no_answer_leave_the_last_list(
    dnsmasq: DnsServer, follow: Follow, caplog: pytest.LogCaptureFixture
) -> None:
    dnsmasq.tell(ONE, TWO)
    a = follow(url(dnsmasq))
    await a.sees(A, B)

    def reasons() -> str:
        records = [r for r in caplog.records if r.name == "kamacache.discovery"]
        return " ".join(vars(r).get("reason", "") for r in records)

    dnsmasq.tell()
    await until(lambda: "NXDOMAIN" in reasons())
    dnsmasq.restart("--txt-record=cache.test,x")  # the name is there, without addresses
    await until(lambda: "no A or AAAA records" in reasons())
    dnsmasq.stop()
    await until(lambda: "cannot be resolved" in reasons())
    assert len(a.lists) == 1
    dnsmasq.restart()
    dnsmasq.tell(TWO)
    await a.sees(B)


async def test_a_server_that_refuses_leaves_the_last_list(
    dnsmasq: DnsServer, follow: Follow, caplog: pytest.LogCaptureFixture
) -> None:
    dnsmasq.tell("10.0.0.1 cache.elsewhere")
    a = follow(url(dnsmasq, "cache.elsewhere:8001"))
    await a.sees(A)
    dnsmasq.tell()  # REFUSED, from the only server: all have failed
    await until(lambda: [r for r in caplog.records if r.name == "kamacache.discovery"])
    assert "NoNameservers" in str([vars(r) for r in caplog.records])
    assert len(a.lists) == 1


async def test_a_name_may_come_later(dnsmasq: DnsServer, follow: Follow) -> None:
    a = follow(url(dnsmasq))
    await asyncio.sleep(0.3)
    assert not a.lists
    dnsmasq.tell(ONE)
    await a.sees(A)


async def test_services_give_names_ports_and_weights(dnsmasq: DnsServer, follow: Follow) -> None:
    dnsmasq.restart(
        "--srv-host=_cache._tcp.test,cache-0.test,8001,0,10",
        "--srv-host=_cache._tcp.test,Cache-1.test,8002,0,30",
    )
    a = follow(url(dnsmasq, "_cache._tcp.test"))
    await a.sees("cache-0.test:8001", "cache-1.test:8002=3")
    dnsmasq.restart("--srv-host=_cache._tcp.test,cache-1.test,8002,5,30")
    await a.sees("cache-1.test:8002")
    dnsmasq.restart("--srv-host=_cache._tcp.test")  # an empty target: no such service
    await asyncio.sleep(0.5)
    assert a.addresses == ["cache-1.test:8002"]


async def test_an_answer_that_does_not_fit_a_datagram_is_asked_for_by_tcp(
    dnsmasq: DnsServer, follow: Follow
) -> None:
    dnsmasq.tell(*(f"10.0.{i // 200}.{1 + i % 200} {NAME}" for i in range(300)))
    a = follow(url(dnsmasq))
    await until(lambda: len(a.addresses) == 300)


async def test_a_failing_family_keeps_what_it_said(
    dnsmasq: DnsServer, follow: Follow, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dns.asyncresolver import Resolver
    from dns.resolver import NoNameservers

    dnsmasq.tell(ONE, THREE)
    a = follow(url(dnsmasq))
    await a.sees(A, C)
    resolve = Resolver.resolve

    async def no_aaaa(self: Resolver, name: str, kind: str, **more: object) -> object:
        if kind == "AAAA":
            raise NoNameservers
        return await resolve(self, name, kind, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(Resolver, "resolve", no_aaaa)
    dnsmasq.tell(TWO)
    await a.sees(B, C)


async def test_no_resolver_is_a_failure_like_any_other(
    follow: Follow, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from dns.asyncresolver import Resolver
    from dns.resolver import NoResolverConfiguration

    def none(self: Resolver, path: str) -> None:
        raise NoResolverConfiguration

    monkeypatch.setattr(Resolver, "read_resolv_conf", none)
    a = follow(f"dns:{NAME}:8001?every=0.1")
    await until(lambda: [r for r in caplog.records if r.name == "kamacache.discovery"])
    assert not a.task.done()


@pytest.mark.parametrize(
    ("records", "members"),
    [
        ([("a.", 1, 33), ("b.", 1, 33)], ["a:1=1", "b:1=1"]),
        ([("a.", 1, 0), ("b.", 1, 0)], ["a:1=1", "b:1=1"]),
        ([("a.", 1, 0), ("b.", 1, 20), ("c.", 2, 60)], ["a:1=1", "b:1=1", "c:2=3"]),
        ([("a.", 1, 1), ("b.", 1, 65_535)], ["a:1=1", f"b:1={WEIGHT_MAX}"]),
        ([("a.", 1, 100), ("b.", 1, 99)], ["a:1=64", "b:1=63"]),
        ([("a.", 1, 5), ("A.", 1, 5), (".", 0, 0)], ["a:1=1"]),
        ([(".", 0, 0)], []),
    ],
)
def test_weights_of_services_are_the_smallest_of_their_ratio(
    records: list[tuple[str, int, int]], members: list[str]
) -> None:
    assert [f"{m.address}={m.weight}" for m in srv_members(records)] == members


@pytest.mark.parametrize(
    "records", [[("a.", 0, 1)], [("a b.", 1, 1)], [("a.", 1, 1), ("a.", 1, 2)]]
)
def test_services_that_are_no_members_are_refused(records: list[tuple[str, int, int]]) -> None:
    with pytest.raises(ConfigError):
        srv_members(records)
