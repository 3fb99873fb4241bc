"""`kamacache.http.status_page`: the document and its policy; one round for all who look."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
from collections.abc import AsyncIterator
from typing import Any, cast

import httpx
import msgspec
import pytest
from starlette.applications import Starlette
from starlette.routing import Route

from kamacache.errors import NodeUnavailableError
from kamacache.http.status import document
from kamacache.http.status_page import Sampler, page_document, pages_of_sampler
from kamacache.limits import HISTORY_POINTS_MAX, STATUS_NOTES_MAX, STATUS_PEERS_MAX
from kamacache.local.observing import Observer
from kamacache.local.snapshot import NodeSnapshot
from tests.http.status_documents import Watched, snapshot, watched


class Looks:
    """An observer whose snapshots are those of a test."""

    def __init__(self) -> None:
        self.shot: NodeSnapshot | None = snapshot()

    async def snapshot(self) -> NodeSnapshot:
        if self.shot is None:
            raise NodeUnavailableError("the node is gone")
        return self.shot


@pytest.fixture
def looks() -> Looks:
    return Looks()


@pytest.fixture
async def client(looks: Looks) -> AsyncIterator[httpx.AsyncClient]:
    pages = pages_of_sampler(Sampler(cast(Observer, looks)))
    app = Starlette(routes=[Route(page.path, page.handle) for page in pages])
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://node") as found:
        yield found


async def test_the_policy_names_what_the_page_carries_and_nothing_else(
    client: httpx.AsyncClient,
) -> None:
    reply = await client.get("/")
    policy = reply.headers["content-security-policy"]
    for tag, directive in (("style", "style-src"), ("script", "script-src")):
        found = re.findall(f"<{tag}>(.*?)</{tag}>", reply.text, re.DOTALL)
        assert len(found) == 1
        digest = base64.b64encode(hashlib.sha256(found[0].encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}';" in policy
    assert "unsafe" not in policy
    assert policy.startswith("default-src 'none'")
    assert reply.headers["cache-control"] == "no-store"
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert reply.headers["referrer-policy"] == "no-referrer"


def test_the_page_needs_nothing_from_elsewhere() -> None:
    html, _ = page_document()
    assert not re.findall(r"""(?:src|href)=["'](?!/|#|data:)""", html)
    assert not re.findall(r"""\son[a-z]+=["']""", html)
    assert "{{" not in html
    for parser in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert parser not in html


async def test_status_json_has_only_the_points_asked_for(
    client: httpx.AsyncClient, looks: Looks
) -> None:
    for at_s in (0.0, 2.0):
        looks.shot = snapshot(at_s)
        await client.get("/status.json")
    looks.shot = snapshot(4.0)
    reply = await client.get("/status.json")
    told = reply.json()
    assert told["format"] == 1
    assert reply.headers["cache-control"] == "no-store"
    points = told["history"]["points"]
    assert len(points) == 2  # a point is what came between two looks
    later = (await client.get(f"/status.json?after={points[0][0]}")).json()
    assert later["history"]["points"] == points[1:]
    assert (await client.get("/status.json?after=soon")).status_code == 400


async def test_a_document_is_made_once_for_all_who_look(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[NodeSnapshot] = []

    def noting(shot: NodeSnapshot, *rest: Any) -> dict[str, Any]:
        made.append(shot)
        return document(shot, *rest)

    monkeypatch.setattr("kamacache.http.status_page.document", noting)
    replies = await asyncio.gather(*(client.get("/status.json") for _ in range(100)))
    assert {reply.status_code for reply in replies} == {200}
    assert len(made) == 1


async def test_a_node_that_is_gone_is_told(client: httpx.AsyncClient, looks: Looks) -> None:
    looks.shot = None
    reply = await client.get("/status.json")
    assert (reply.status_code, reply.json()["message"]) == (503, "the node is gone")


def test_the_size_is_bounded() -> None:
    def all_down(shot: NodeSnapshot) -> None:
        for peer in shot.peers:
            peer.usable, peer.down = 0, 4

    shown = watched(all_down, seconds=2, members=300, groups=2)
    assert (len(shown["peers"]), shown["peers_more"]) == (STATUS_PEERS_MAX, 299 - STATUS_PEERS_MAX)
    assert len(shown["ring"]["members"]) == STATUS_PEERS_MAX
    assert shown["ring"]["own"] in {member["address"] for member in shown["ring"]["members"]}
    assert len(shown["notes"]) == STATUS_NOTES_MAX


def test_points_are_those_of_ten_minutes() -> None:
    shown = watched(seconds=900, groups=1, members=0, workers=1)
    points = shown["history"]["points"]
    assert 295 <= len(points) <= HISTORY_POINTS_MAX
    assert shown["unix_ms"] - points[0][0] < 600_000


def test_rates_are_those_of_the_last_minute() -> None:
    node = Watched()
    shown: dict[str, Any] = {}
    for at_s, gets in ((0, 0), (60, 60_000), (120, 60_600)):
        shot = snapshot(float(at_s), groups=1)
        group = shot.groups[0]
        group.gets, group.near_hits, group.memory_hits = gets, gets // 2, gets // 4
        group.negative_hits = group.worker_hits = 0
        group.misses = gets - gets // 2 - gets // 4
        shown = node.take(shot)
    recent = shown["groups"][0]["recent"]
    assert recent["gets_s"] == 10
    assert recent["hit_ratio"] == 0.75
    assert shown["groups"][0]["since_start"]["gets"] == 60_600


def test_what_workers_found_for_peers_is_no_hit_of_this_node() -> None:
    shot = snapshot(0.0, groups=1)
    group = shot.groups[0]
    group.gets, group.near_hits, group.memory_hits, group.negative_hits = 10, 0, 0, 0
    group.misses, group.worker_hits = 10, 10_000
    assert Watched().take(shot)["groups"][0]["since_start"]["hit_ratio"] == 1


def test_a_death_is_told_though_nobody_looked_meanwhile() -> None:
    node = Watched()
    node.take(snapshot(0.0))
    shot = snapshot(10.0)
    worker = next(role for role in shot.roles if role.role == "worker")
    worker.restarts, worker.pid, worker.started_ms = 2, 9999, shot.node.boottime_ms - 3000
    shown = node.take(shot)
    assert [change["text"] for change in shown["changes"]] == [
        "worker 0 runs again as pid 9999",
        "worker 0 died 2 times; it was pid 4101",
    ]
    assert shown["changes"][0]["unix_ms"] == shown["unix_ms"] - 3000


@pytest.mark.parametrize(
    ("state", "serving", "told"),
    [("starting", False, "starting"), ("ready", True, "ready"), ("ready", False, "stalled"),
     ("stopping", True, "draining")],
)  # fmt: skip
def test_the_state_of_the_node(state: str, serving: bool, told: str) -> None:
    shot = snapshot(0.0, state=state)
    shot.node.serving = serving
    shown = Watched().take(shot)
    assert shown["node"]["state"] == told
    assert bool(shown["notes"]) == (told != "ready")


def test_no_number_is_one_that_json_does_not_have() -> None:
    text = msgspec.json.encode(Watched().take(snapshot(0.0, groups=0, members=0)))
    assert b"NaN" not in text
    assert b"Infinity" not in text
