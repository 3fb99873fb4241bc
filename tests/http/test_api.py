"""`kamacache.http.api` over a real node: each method, each error, bounds, drain."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest

from kamacache.http.api import Gate
from tests.attached_estate import Estate
from tests.node_process import NodeProcess

BINARY = bytes(range(256))


def failure(reply: httpx.Response) -> tuple[int, str]:
    """Return the status and the error's name, whatever its sentence is."""
    body = reply.json()
    assert set(body) == {"error", "message"}
    assert body["message"]
    return reply.status_code, body["error"]


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


@pytest.fixture
async def client(node: NodeProcess, gate_of: Any, asking: Any) -> AsyncIterator[httpx.AsyncClient]:
    async with asking(gate_of(node)) as found:
        yield found


@pytest.fixture
async def one(node: NodeProcess, gate_of: Any, asking: Any) -> AsyncIterator[httpx.AsyncClient]:
    async with asking(gate_of(node, "scores")) as found:
        yield found


async def test_get_loads_a_value_once(client: httpx.AsyncClient, place: Estate) -> None:
    for _ in range(3):
        reply = await client.get("/api?group=scores&key=Tom")
        assert (reply.status_code, reply.content) == (200, b"v-Tom")
        assert reply.headers["content-type"] == "application/octet-stream"
        assert reply.headers["content-length"] == "5"
        assert reply.headers["cache-control"] == "no-store"
        assert int(reply.headers["x-kamacache-version"]) > 0
        assert "x-kamacache-ttl-ms" not in reply.headers
    assert place.loads("Tom") == 1


async def test_head_is_a_get_without_the_value(client: httpx.AsyncClient) -> None:
    reply = await client.head("/api?group=scores&key=Headed")
    assert (reply.status_code, reply.headers["content-length"]) == (200, "8")
    assert (await client.head("/api?group=scores&key=none-h")).status_code == 404


async def test_what_is_put_is_got(client: httpx.AsyncClient) -> None:
    at = "/api?group=plain&key=%ff%00/%C3%A4%26"
    for value in (BINARY, b""):
        put = await client.put(at, content=value)
        assert (put.status_code, put.content) == (204, b"")
        got = await client.get(at)
        assert (got.status_code, got.content) == (200, value)
    assert (await client.get("/api?group=plain&key=%ff%00/%C3%A4%27")).status_code == 404


async def test_a_ttl_is_kept_and_told(client: httpx.AsyncClient) -> None:
    await client.put("/api?group=plain&key=mortal&ttl=60", content=b"v")
    reply = await client.get("/api?group=plain&key=mortal")
    assert 0 < int(reply.headers["x-kamacache-ttl-ms"]) <= 60_000


async def test_delete_says_whether_it_was_there(client: httpx.AsyncClient) -> None:
    await client.put("/api?group=plain&key=gone", content=b"v")
    replies = [await client.delete("/api?group=plain&key=gone") for _ in range(2)]
    assert [(r.status_code, r.json()) for r in replies] == [
        (200, {"deleted": True}),
        (200, {"deleted": False}),
    ]
    assert (await client.get("/api?group=plain&key=gone")).status_code == 404


async def test_the_group_may_be_left_out_where_there_is_one(
    client: httpx.AsyncClient, one: httpx.AsyncClient
) -> None:
    assert (await one.get("/api?key=Jack")).content == b"v-Jack"
    reply = await client.get("/api?key=Jack")
    assert failure(reply) == (400, "ConfigError")
    assert "scores" in reply.json()["message"]


async def test_not_found_is_404_and_says_of_what(one: httpx.AsyncClient) -> None:
    assert failure(await one.get("/api?key=none-1")) == (404, "KeyNotFoundError")
    unknown = await one.get("/api?group=nothing&key=a")
    assert failure(unknown) == (404, "GroupNotFoundError")
    assert "scores" in unknown.json()["message"]
    assert failure(await one.get("/nothing")) == (404, "PageNotFound")
    assert failure(await one.get("/api/")) == (404, "PageNotFound")


@pytest.mark.parametrize(
    ("query", "kind"),
    [
        ("", "ConfigError"),
        ("key=", "KeyTooLongError"),
        ("key=" + "k" * 1025, "KeyTooLongError"),
        ("key=a&kee=b", "ConfigError"),
        ("key=a&timeout=never", "ConfigError"),
        ("key=a&timeout=0", "ConfigError"),
    ],
)
async def test_a_bad_request_is_400(one: httpx.AsyncClient, query: str, kind: str) -> None:
    assert failure(await one.get(f"/api?{query}")) == (400, kind)


async def test_a_bad_ttl_is_400_and_stores_nothing(client: httpx.AsyncClient) -> None:
    for ttl in ("0", "-1", "soon", "nan"):
        reply = await client.put(f"/api?group=plain&key=badttl&ttl={ttl}", content=b"v")
        assert failure(reply) == (400, "ConfigError")
    assert (await client.get("/api?group=plain&key=badttl")).status_code == 404


async def test_another_method_is_405(one: httpx.AsyncClient) -> None:
    for method in ("POST", "PATCH", "OPTIONS"):
        reply = await one.request(method, "/api?key=a")
        assert failure(reply) == (405, "MethodNotAllowed")
        assert set(reply.headers["allow"].split(", ")) == {"GET", "HEAD", "PUT", "DELETE"}


async def test_a_getter_that_raises_is_502(one: httpx.AsyncClient) -> None:
    reply = await one.get("/api?key=bad-1")
    assert failure(reply) == (502, "LoadError")
    assert "the database says no" in reply.json()["message"]


async def test_a_load_that_is_late_is_504(one: httpx.AsyncClient, place: Estate) -> None:
    reply = await one.get("/api?key=gate-late&timeout=0.05")
    assert failure(reply) == (504, "DeadlineExceededError")
    place.open_gate("gate-late")
    assert (await one.get("/api?key=gate-late")).content == b"v-gate-late"


async def test_a_value_above_the_limit_is_413_however_it_comes(client: httpx.AsyncClient) -> None:
    at = "/api?group=level0&key=big"  # 64 KiB: small segments
    largest = 1 << 20

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(largest // 4096):
            yield b"x" * 4096

    assert failure(await client.put(at, content=b"x" * largest)) == (413, "ValueTooLargeError")
    assert failure(await client.put(at, content=chunks())) == (413, "ValueTooLargeError")


async def test_a_body_is_not_read_where_its_length_is_too_large(
    node: NodeProcess, gate_of: Any
) -> None:
    sent: list[Any] = []

    async def receive() -> Any:
        raise AssertionError("the body was read")

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "PUT",
        "path": "/api",
        "query_string": b"group=plain&key=a",
        "headers": [(b"content-length", b"99999999999")],
    }
    await gate_of(node)(scope, receive, send)
    assert sent[0]["status"] == 413


async def test_chunks_within_the_limit_are_one_value(client: httpx.AsyncClient) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for part in (b"one ", b"", b"two"):
            yield part

    reply = await client.put("/api?group=plain&key=chunked", content=chunks())
    assert reply.status_code == 204
    assert (await client.get("/api?group=plain&key=chunked")).content == b"one two"


async def test_a_length_beside_chunks_is_refused_and_counts_for_nothing(
    client: httpx.AsyncClient,
) -> None:
    # Chunks decide how long the body is: the number would have let any size past the bound on
    # what is held, and is how requests are smuggled past a proxy.
    url = "/api?group=plain&key=both"
    headers = {"transfer-encoding": "chunked", "content-length": "1"}
    reply = await client.put(url, content=b"three", headers=headers)
    assert failure(reply) == (400, "BadRequest")
    assert reply.headers["connection"] == "close"  # what follows is no request of this client
    assert (await client.get(url)).content != b"three"


async def test_no_browser_takes_a_value_for_a_script(client: httpx.AsyncClient) -> None:
    for url in ("/api?group=scores&key=Tom", "/api?group=nopes&key=Tom", "/healthz"):
        reply = await client.get(url)
        assert reply.headers.get_list("x-content-type-options") == ["nosniff"]


async def test_bytes_held_are_bounded(node: NodeProcess, gate_of: Any, asking: Any) -> None:
    async with asking(gate_of(node, "large")) as roomy:
        await roomy.put("/api?key=long", content=b"x" * 400_000)
        assert len((await roomy.get("/api?key=long")).content) == 400_000
    async with asking(gate_of(node, "large", held_bytes_max=300_000)) as narrow:
        reply = await narrow.get("/api?key=long")
        assert failure(reply) == (503, "NodeUnavailableError")
        assert reply.headers["retry-after"] == "1"
        assert (await narrow.put("/api?key=long", content=b"x" * 400_000)).status_code == 503
        for _ in range(3):  # what was taken comes back
            assert (await narrow.put("/api?key=short", content=b"x" * 200_000)).status_code == 204


async def test_requests_at_once_are_bounded_and_probes_are_not(
    node: NodeProcess, gate_of: Any, asking: Any, place: Estate
) -> None:
    gate = gate_of(node, "scores", requests_max=1)
    async with asking(gate) as client:
        first = asyncio.ensure_future(client.get("/api?key=gate-busy"))
        await until(lambda: place.loads("gate-busy"))
        assert failure(await client.get("/api?key=Tom")) == (503, "NodeUnavailableError")
        assert (await client.get("/healthz")).status_code == 200
        assert (await client.get("/readyz")).status_code == 200
        place.open_gate("gate-busy")
        assert (await first).content == b"v-gate-busy"
        assert (await client.get("/api?key=Tom")).status_code == 200


async def test_a_drain_refuses_new_requests_and_finishes_old_ones(
    node: NodeProcess, gate_of: Any, asking: Any, place: Estate
) -> None:
    gate: Gate = gate_of(node, "scores")
    async with asking(gate) as client:
        first = asyncio.ensure_future(client.get("/api?key=gate-drain"))
        await until(lambda: place.loads("gate-drain"))
        gate.drain()
        assert not gate.idle.is_set()
        reply = await client.get("/api?key=Tom")
        assert failure(reply) == (503, "NodeUnavailableError")
        assert (reply.headers["retry-after"], reply.headers["connection"]) == ("1", "close")
        ready = await client.get("/readyz")
        assert (ready.status_code, ready.json()["ready"]) == (503, False)
        assert "draining" in ready.json()["reason"]
        assert (await client.get("/healthz")).status_code == 200
        place.open_gate("gate-drain")
        assert (await first).content == b"v-gate-drain"
        assert gate.idle.is_set()
