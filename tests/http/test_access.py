"""Tokens over HTTP: by scope for /api, `stats` for the pages, nothing for the probes."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import Response

from kamacache.http.api import Gate
from kamacache.http.readiness import Readiness
from kamacache.http.routes import Page
from kamacache.http.settings import HttpSettings
from kamacache.local.attach import role_engines
from kamacache.rundir.live import LiveSettings, SecurityFiles
from kamacache.security.access import Access
from tests.node_process import NodeProcess

READ, WRITE, OPS = (f"{name}-secret-0123456789" for name in ("read", "write", "ops"))
TOKENS = f"""
[[token]]
name = "reader"
secret = "{READ}"
read = ["scores"]

[[token]]
name = "writer"
secret = "{WRITE}"
write = ["scores"]

[[token]]
name = "ops"
secret = "{OPS}"
stats = true
"""
PAGES = ("/metrics", "/", "/status.json")


async def shown(request: Request) -> Response:
    return Response("shown")


class Guarded:
    """The role's app over some groups of a node, which wants tokens."""

    def __init__(self, node: NodeProcess, path: Path, *groups: str) -> None:
        about = node.description()
        engines = role_engines(node.run_dir, about)
        self.path, self.access = path, Access()
        self.gate = Gate(
            {name: engines[name] for name in groups},
            Readiness(about),
            HttpSettings(listen="127.0.0.1:0"),
            pages=[Page(path=page, handle=shown, name="page") for page in PAGES],
            access=self.access,
        )
        self.write(TOKENS)

    def write(self, text: str) -> None:
        self.path.touch(mode=0o600)
        self.path.write_text(text)
        self.access.apply(LiveSettings(security=SecurityFiles(tokens=str(self.path))))


@asynccontextmanager
async def client_of(guarded: Guarded) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=guarded.gate)
    async with httpx.AsyncClient(transport=transport, base_url="http://node") as client:
        yield client


@pytest.fixture
def guarded(node: NodeProcess, tmp_path: Path) -> Guarded:
    return Guarded(node, tmp_path / "tokens.toml", "scores", "plain")


@pytest.fixture
async def client(guarded: Guarded) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(guarded) as found:
        yield found


def bearer(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


def failure(reply: httpx.Response) -> tuple[int, str]:
    return reply.status_code, reply.json()["error"]


async def test_the_api_wants_the_scope_of_what_is_done(client: httpx.AsyncClient) -> None:
    wanted = {
        READ: {"GET": 200, "HEAD": 200, "PUT": 403, "DELETE": 403},
        WRITE: {"GET": 403, "HEAD": 403, "PUT": 204, "DELETE": 200},
        OPS: {"GET": 403, "HEAD": 403, "PUT": 403, "DELETE": 403},
    }
    for secret, statuses in wanted.items():
        for method, status in statuses.items():
            url = "/api?group=scores&key=Tom"
            reply = await client.request(method, url, headers=bearer(secret))
            assert reply.status_code == status, (secret, method)


async def test_without_a_known_token_only_the_probes_answer(client: httpx.AsyncClient) -> None:
    for path in ("/healthz", "/readyz"):
        assert (await client.get(path)).status_code == 200
    paths = ("/api?group=scores&key=Tom", "/api", "/none", *PAGES)
    for headers in ({}, bearer("guess-0123456789-0123"), {"authorization": "Basic Og=="}):
        replies = await asyncio.gather(*(client.get(path, headers=headers) for path in paths))
        for reply in replies:
            assert failure(reply) == (401, "AccessDeniedError")
            assert "Bearer" in reply.headers["www-authenticate"]
            assert "Basic" in reply.headers["www-authenticate"]
            assert "scores" not in reply.text


async def test_the_pages_want_a_token_for_stats_and_take_it_as_a_password(
    client: httpx.AsyncClient,
) -> None:
    for page in PAGES:
        assert (await client.get(page, headers=bearer(OPS))).text == "shown"
        assert (await client.get(page, auth=("anyone", OPS))).text == "shown"
        assert failure(await client.get(page, headers=bearer(READ))) == (403, "AccessDeniedError")


async def test_a_path_that_is_almost_a_pages_is_no_page(client: httpx.AsyncClient) -> None:
    # A route's "$" would take a line's end for the end of the path.
    for page in PAGES:
        for path in (f"{page}%0A", f"{page}%0a?after_ms=0", f"{page}%00"):
            for secret in (READ, OPS):
                reply = await client.get(path, headers=bearer(secret))
                assert failure(reply) == (404, "PageNotFound"), path


async def test_two_tokens_in_one_request_are_none(client: httpx.AsyncClient) -> None:
    url = "/api?group=scores&key=Tom"
    for secrets in ((READ, OPS), (OPS, READ), (READ, READ)):
        headers = [("authorization", f"Bearer {secret}") for secret in secrets]
        assert failure(await client.get(url, headers=headers)) == (401, "AccessDeniedError")


async def test_what_presents_a_token_oddly_is_known_or_is_refused(
    client: httpx.AsyncClient,
) -> None:
    def basic(text: bytes) -> bytes:
        return b"Basic " + base64.b64encode(text)

    odd: dict[bytes, int] = {
        b"BEARER  " + READ.encode() + b"  ": 200,
        b"bAsIc " + base64.b64encode(b":" + READ.encode()): 200,
        basic("\u00fcser:".encode() + READ.encode()): 200,
        basic(b"\xff\x00:" + READ.encode()): 200,
        basic(READ.encode()): 401,
        basic(READ.encode() + b":"): 401,
        b"Basic \xc3\xbc==": 401,
        b"Basic " + b"=" * 9: 401,
        b"Bearer": 401,
        b"Bearer \xff\xfe": 401,
        b"Bearer " + READ.upper().encode(): 401,
        b"Token " + READ.encode(): 401,
        READ.encode(): 401,
        b"": 401,
    }

    async def status(header: bytes) -> int:
        url = "/api?group=scores&key=Tom"
        return (await client.get(url, headers=[(b"authorization", header)])).status_code

    found = await asyncio.gather(*map(status, odd))
    assert dict(zip(odd, found, strict=True)) == odd


async def test_a_group_beyond_the_scope_is_refused_like_one_that_is_not_there(
    client: httpx.AsyncClient,
) -> None:
    replies = [
        await client.get(f"/api?group={group}&key=Tom", headers=bearer(READ))
        for group in ("plain", "nopes")
    ]
    assert [failure(reply) for reply in replies] == [(403, "AccessDeniedError")] * 2
    assert replies[0].text.replace("plain", "") == replies[1].text.replace("nopes", "")
    assert "scores" not in replies[0].text


async def test_a_token_hears_of_the_groups_it_may_know_and_no_others(
    guarded: Guarded, client: httpx.AsyncClient
) -> None:
    reply = await client.get("/api?key=Tom", headers=bearer(READ))
    assert failure(reply) == (400, "ConfigError")
    assert "scores" in reply.text
    assert "plain" not in reply.text
    guarded.write(TOKENS.replace('read = ["scores"]', 'read = ["scores", "nopes"]'))
    reply = await client.get("/api?group=nopes&key=Tom", headers=bearer(READ))
    assert failure(reply) == (404, "GroupNotFoundError")
    assert "plain" not in reply.text


async def test_the_only_group_need_not_be_named_by_who_may_use_it(
    node: NodeProcess, tmp_path: Path
) -> None:
    guarded = Guarded(node, tmp_path / "tokens.toml", "scores")
    async with client_of(guarded) as client:
        assert (await client.get("/api?key=Tom", headers=bearer(READ))).content == b"v-Tom"
        guarded.write(TOKENS.replace('["scores"]', '["other"]'))
        reply = await client.get("/api?key=Tom", headers=bearer(READ))
        assert failure(reply) == (400, "ConfigError")
        assert "scores" not in reply.text


async def test_a_token_that_a_reload_removed_ends_with_the_next_request(
    guarded: Guarded, client: httpx.AsyncClient
) -> None:
    url = "/api?group=scores&key=Tom"
    assert (await client.get(url, headers=bearer(READ))).status_code == 200
    guarded.write(TOKENS.replace(READ, "new-secret-0123456789"))
    assert (await client.get(url, headers=bearer(READ))).status_code == 401
    assert (await client.get(url, headers=bearer("new-secret-0123456789"))).status_code == 200


async def test_a_body_of_who_may_not_is_not_read(guarded: Guarded) -> None:
    received: list[Any] = []
    sent: list[Any] = []

    async def receive() -> Any:
        received.append(None)
        return {"type": "http.request", "body": b"x", "more_body": True}

    async def send(message: Any) -> None:
        sent.append(message)

    for headers in ([], [(b"authorization", f"Bearer {READ}".encode())]):
        scope = {
            "type": "http",
            "method": "PUT",
            "path": "/api",
            "query_string": b"group=scores&key=Tom",
            "headers": headers,
            "client": ("10.0.0.9", 4711),
        }
        await guarded.gate(scope, receive, send)
    assert [message["status"] for message in sent if "status" in message] == [401, 403]
    assert not received


async def test_without_tokens_all_is_as_it_was(guarded: Guarded, client: httpx.AsyncClient) -> None:
    guarded.access.apply(LiveSettings())
    for path in ("/api?group=scores&key=Tom", *PAGES):
        assert (await client.get(path)).status_code == 200
