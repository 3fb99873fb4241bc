"""Discovery through Nacos' open API, against `tests.cluster.discovery.fake_nacos` alone."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import httpx
import pytest

from kamacache.cluster.discovery import nacos as module
from kamacache.cluster.discovery import nacos_client
from kamacache.cluster.discovery.retry import SourceError
from kamacache.cluster.membership import Member
from tests.cluster.discovery.conftest import Follow, until
from tests.cluster.discovery.fake_nacos import INSTANCE, FakeNacos
from tests.cluster.discovery.servers import free_port

A, B, C = "10.0.0.1:8001", "10.0.0.2:8001", "10.0.0.3:8001"
SERVICE = "DEFAULT_GROUP@@cache"
SCALE = 0.1  # a beat every 0.5 s, unhealthy after 1.5 s, removed after 3 s

Begin = Callable[..., FakeNacos]


@pytest.fixture
def begin() -> Iterator[Begin]:
    """Return ``begin(scale=, login=)``, which starts a server."""
    servers: list[FakeNacos] = []

    def start(*, scale: float = SCALE, login: tuple[str, str] | None = None) -> FakeNacos:
        servers.append(FakeNacos(scale=scale, login=login))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture
def server(begin: Begin) -> FakeNacos:
    return begin()


def url(*servers: FakeNacos | str, more: str = "") -> str:
    names = ",".join(s if isinstance(s, str) else s.address for s in servers)
    return f"nacos://{names}/cache?every=0.05{more}"


def ask(server: FakeNacos, method: str, path: str, **given: str) -> httpx.Response:
    return httpx.request(
        method, f"http://{server.address}{path}", params=given, trust_env=False, timeout=5
    )


def test_the_fake_refuses_what_nacos_refuses(begin: Begin) -> None:
    server = begin(login=("u", "p"))
    assert ask(server, "GET", f"{INSTANCE}/list", serviceName="cache").status_code == 403
    wrong = httpx.post(
        f"http://{server.address}/nacos/v1/auth/login",
        data={"username": "u", "password": "x"},
        trust_env=False,
    )
    assert wrong.status_code == 403
    server.login = None
    assert ask(server, "POST", INSTANCE, ip="1.1.1.1", port="1").status_code == 400
    assert ask(server, "POST", INSTANCE, serviceName="cache", port="1").status_code == 400
    assert ask(server, "POST", INSTANCE, serviceName="cache", ip="1.1.1.1").status_code == 400
    assert ask(server, "DELETE", INSTANCE, serviceName="cache", ip="1.1.1.1").status_code == 400
    heavy = {"serviceName": "cache", "ip": "1.1.1.1", "port": "1", "weight": "10001"}
    assert ask(server, "POST", INSTANCE, **heavy).status_code == 400
    assert ask(server, "GET", f"{INSTANCE}/list").status_code == 400
    beat = ask(server, "PUT", f"{INSTANCE}/beat", serviceName="cache", ip="1.1.1.1", port="1")
    assert beat.json()["code"] == 20404
    assert ask(server, "PUT", INSTANCE).status_code == 404


async def test_members_see_each_other_with_weights(server: FakeNacos, follow: Follow) -> None:
    a, b = follow(url(server), A), follow(url(server), f"{B}=3")
    await a.sees(A, f"{B}=3")
    await b.sees(A, f"{B}=3")
    assert server.instances(SERVICE) == [A, B]


async def test_a_node_that_leaves_is_gone_and_stays_gone(server: FakeNacos, follow: Follow) -> None:
    a, b = follow(url(server), A), follow(url(server), B)
    await a.sees(A, B)
    await b.sees(A, B)
    await b.source.leave()  # and it still runs: no beat may bring it back
    assert server.instances(SERVICE) == [A]
    await a.sees(A)
    beats = sum(method == "PUT" for method, _, _ in server.requests)
    await until(lambda: sum(method == "PUT" for method, _, _ in server.requests) > beats + 1)
    assert server.instances(SERVICE) == [A]
    await b.source.leave()


async def test_a_node_that_beats_no_more_is_gone_and_one_that_beats_stays(
    server: FakeNacos, follow: Follow
) -> None:
    a, b = follow(url(server), A), follow(url(server), B)
    await a.sees(A, B)
    await b.sees(A, B)
    await b.stop()
    await a.sees(A)
    await until(lambda: server.instances(SERVICE) == [A])
    lists = len(a.lists)
    await asyncio.sleep(0.5)
    assert len(a.lists) == lists


async def test_an_instance_that_the_server_forgot_is_there_again(
    server: FakeNacos, follow: Follow
) -> None:
    a, b = follow(url(server), A), follow(url(server), B)
    await a.sees(A, B)
    await b.sees(A, B)
    server.forget()
    await until(lambda: server.instances(SERVICE) == [A, B])
    await a.sees(A, B)


async def test_code_20404_registers_again(
    server: FakeNacos, follow: Follow, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = follow(url(server), f"{A}=2")
    await a.sees(f"{A}=2")

    def light(given: dict[str, str]) -> object:
        given.pop("beat", None)  # as a server that does not read the document
        return beat(given)

    beat = server._beat
    with server.lock:
        server._beat = light  # type: ignore[method-assign, assignment]
        server.services.clear()
    await until(lambda: server.instances(SERVICE) == [A])
    await a.sees(f"{A}=2")


async def test_a_server_that_is_down_leaves_the_list_as_it_is(
    server: FakeNacos, follow: Follow, caplog: pytest.LogCaptureFixture
) -> None:
    a, b = follow(url(server), A), follow(url(server), B)
    await a.sees(A, B)
    await b.sees(A, B)
    server.stop()
    server.forget()
    lists = len(a.lists)
    await until(lambda: [r for r in caplog.records if r.name == "kamacache.discovery"])
    await asyncio.sleep(0.5)
    assert len(a.lists) == lists
    server.start()
    await until(lambda: server.instances(SERVICE) == [A, B])
    assert len(a.lists) == lists  # B was kept until it had registered again


async def test_a_node_that_died_with_the_server_goes_a_while_later(
    server: FakeNacos, follow: Follow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "GRACE_S", 1.0)
    a, b = follow(url(server), A), follow(url(server), B)
    await a.sees(A, B)
    await b.sees(A, B)
    server.stop()
    server.forget()
    await b.stop()
    await asyncio.sleep(0.2)
    server.start()
    await until(lambda: server.instances(SERVICE) == [A])
    assert a.addresses == [A, B]
    await a.sees(A)


@pytest.mark.parametrize("broken", [b"", b"null", b"<html>", b'{"hosts": 1}', b'{"hosts": [{}]}'])
async def test_an_answer_that_makes_no_sense_changes_nothing(
    server: FakeNacos, follow: Follow, caplog: pytest.LogCaptureFixture, broken: bytes
) -> None:
    a = follow(url(server), A)
    await a.sees(A)
    lists = len(a.lists)
    server.broken = broken
    await until(lambda: [r for r in caplog.records if r.name == "kamacache.discovery"])
    assert len(a.lists) == lists
    server.broken = None
    await follow(url(server), B).sees(A, B)
    await a.sees(A, B)


async def test_the_next_server_is_asked_when_one_does_not_answer(
    server: FakeNacos, begin: Begin, follow: Follow
) -> None:
    failing = begin()
    failing.status = 503
    nobody = f"127.0.0.1:{free_port()}"
    a = follow(url(nobody, failing, server), A)
    await a.sees(A)
    await a.stop()
    await a.source.leave()
    assert server.instances(SERVICE) == []


async def test_a_server_that_accepts_and_says_nothing_is_passed_over(
    server: FakeNacos, follow: Follow
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # the kernel accepts, nobody reads
        port = silent.getsockname()[1]
        await follow(url(f"127.0.0.1:{port}", server), A).sees(A)


async def test_leaving_a_server_that_is_down_says_so_in_time(
    server: FakeNacos, follow: Follow
) -> None:
    a = follow(url(server), A)
    await a.sees(A)
    await a.stop()
    server.stop()
    with pytest.raises(SourceError):
        await asyncio.wait_for(a.source.leave(), 3)


async def test_a_login_is_done_and_done_again_when_the_token_ends(
    begin: Begin, follow: Follow
) -> None:
    server = begin(login=("nacos", "p&w=+ö"))
    login = "&username=nacos&password=p%26w%3D+%C3%B6"
    a = follow(url(server, more=login), A)
    await a.sees(A)
    server.forget()  # the tokens, too
    b = follow(url(server, more=login), B)
    await a.sees(A, B)
    await b.sees(A, B)
    await b.stop()
    await b.source.leave()
    assert server.instances(SERVICE) == [A]


async def test_a_token_is_renewed_before_it_ends(
    begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = begin(scale=1.0, login=("u", "p"))  # tokens of 18,000 s
    clock: SimpleNamespace = SimpleNamespace(now_s=0.0, monotonic=lambda: clock.now_s)
    monkeypatch.setattr(nacos_client, "time", clock)

    def logins() -> int:
        return sum(path.endswith("login") for _, path, _ in server.requests)

    service = nacos_client.Service("cache", "DEFAULT_GROUP", "")
    client = nacos_client.NacosClient(server.address, service, Member(A), server.login)
    for clock.now_s, so_far in ((0.0, 1), (16_000.0, 1), (16_300.0, 2), (16_400.0, 2)):
        assert await client.list() == []
        assert logins() == so_far
    await client.close()


async def test_neither_password_nor_token_is_logged(
    begin: Begin, follow: Follow, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    server = begin(login=("nacos", "hush"))
    a = follow(url(server, more="&username=nacos&password=hush"), A)
    await a.sees(A)
    token = next(iter(server.tokens))
    server.status = 500
    await until(lambda: [r for r in caplog.records if r.name == "kamacache.discovery"])
    server.stop()
    await asyncio.sleep(0.2)
    refused = follow(url(begin(login=("nacos", "x")), more="&username=nacos&password=hush"), B)
    await until(lambda: any("login" in str(vars(r)) for r in caplog.records))
    text = " ".join(str(vars(r)) for r in caplog.records)
    assert "hush" not in text
    assert token not in text
    assert not refused.lists


async def test_group_and_namespace_are_apart(server: FakeNacos, follow: Follow) -> None:
    a = follow(url(server, more="&group=BLUE&namespace=n1"), A)
    b = follow(url(server, more="&group=GREEN&namespace=n1"), B)
    c = follow(url(server, more="&group=BLUE"), C)
    await a.sees(A)
    await b.sees(B)
    await c.sees(C)
    assert server.instances("BLUE@@cache", "n1") == [A]
    assert server.instances("GREEN@@cache", "n1") == [B]
    assert server.instances("BLUE@@cache") == [C]


async def test_instances_that_operators_took_off_and_odd_ones_are_passed_over(
    server: FakeNacos, follow: Follow
) -> None:
    def put(ip: str, **more: str) -> None:
        given = {"serviceName": "cache", "ip": ip, "port": "8001", "ephemeral": "false"}
        assert ask(server, "POST", INSTANCE, **given, **more).text == "ok"

    await asyncio.to_thread(put, "10.0.0.5", weight="0")
    await asyncio.to_thread(put, "10.0.0.6", enabled="false")
    await asyncio.to_thread(put, "10.0.0.7", healthy="false")
    await asyncio.to_thread(put, "not a host")
    await asyncio.to_thread(put, "10.0.0.8", weight="0.4")
    await asyncio.to_thread(put, "10.0.0.9", weight="2000")
    await asyncio.to_thread(put, "fd00::7", weight="2.6")
    a = follow(url(server), A)
    await a.sees(A, "10.0.0.8:8001", "10.0.0.9:8001=64", "[fd00::7]:8001=3")


async def test_an_ipv6_node_registers_without_brackets(server: FakeNacos, follow: Follow) -> None:
    a = follow(url(server), "[fd00::1]:8001")
    await a.sees("[fd00::1]:8001")
    assert server.instances(SERVICE) == ["fd00::1:8001"]
