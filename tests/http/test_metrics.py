"""`kamacache.http.metrics` and what counts requests: formats, bounds, and what is not there."""

from __future__ import annotations

import sys
from typing import Any

import httpx
import msgspec
import pytest
from starlette.applications import Starlette
from starlette.routing import Route

from kamacache.http import metering
from kamacache.http.measures import MEASURES
from kamacache.http.metrics import accepts_gzip, encoded, metrics_page
from kamacache.limits import SHARD_SERIES_MAX
from kamacache.local.observing import Observer, observe
from kamacache.local.snapshot import NodeSnapshot, ShardInfo
from kamacache.rundir.meters import HTTP, Region
from tests.node_process import NodeProcess


@pytest.fixture(scope="module")
def told(node: NodeProcess) -> NodeSnapshot:
    return observe(node.run_dir)


@pytest.mark.parametrize(
    ("header", "accepted"),
    [
        ("gzip, deflate, br", True),
        ("br;q=1.0, gzip;q=0.8", True),
        ("*", True),
        ("", False),
        ("identity", False),
        ("gzip;q=0, br", False),
        ("GZIP", True),
        ("x-gzip-not", False),
    ],
)
def test_gzip_is_sent_to_who_takes_it(header: str, accepted: bool) -> None:
    assert accepts_gzip(header) is accepted


async def test_without_prometheus_client_the_answer_says_what_to_install(
    node: NodeProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    page = metrics_page(Observer(node.run_dir))
    app = Starlette(routes=[Route(page.path, page.handle)])
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://node") as client:
        reply = await client.get("/metrics")
    assert reply.status_code == 501
    assert "pip install 'kamacache[metrics]'" in reply.json()["message"]


def test_series_of_too_many_shards_are_sums_by_group(told: NodeSnapshot) -> None:
    group = told.groups[0]
    node = msgspec.structs.replace(told.node, workers=SHARD_SERIES_MAX)
    many = NodeSnapshot(node=node, groups=[msgspec.structs.replace(group)])
    shards = [ShardInfo(worker=0, items=1, evictions=2)] * SHARD_SERIES_MAX
    many.groups[0].shards = shards
    apart = encoded(many, open_metrics=False).decode()
    many.groups[0].shards = [*shards, ShardInfo(worker=0, items=1)]
    node.workers += 1
    summed = encoded(many, open_metrics=False).decode()
    many.groups[0].shards = shards[1:]  # one that cannot be read now splits no series
    assert 'shard="0"' not in encoded(many, open_metrics=False).decode()
    assert apart.count("\nkamacache_shard_items{") == SHARD_SERIES_MAX
    items = f'kamacache_shard_items{{group="{group.name}",shard="all"}} {SHARD_SERIES_MAX + 1}.0'
    assert items in summed
    assert summed.count("\nkamacache_shard_items{") == 1


def test_what_is_not_known_has_no_series(told: NodeSnapshot) -> None:
    told.workers[1].answered = False
    told.roles[0].cpu_s = None
    try:
        text = encoded(told, open_metrics=False).decode()
    finally:
        told.workers[1].answered = True
    assert 'kamacache_worker_connections{worker="0"}' in text
    assert 'kamacache_worker_connections{worker="1"}' not in text
    assert 'kamacache_worker_connections_refused_total{worker="1"} 0.0' in text
    assert 'kamacache_process_cpu_seconds_total{index="0",role="supervisor"}' not in text
    assert "# TYPE kamacache_ring_members gauge\n# HELP" in text  # of no cluster


def test_names_are_prometheus_way() -> None:
    names = [measure.name for measure in MEASURES]
    assert len(set(names)) == len(names)
    for measure in MEASURES:
        assert measure.name.startswith("kamacache_")
        assert measure.name.endswith("_total") == (measure.kind == "counter"), measure.name
        assert measure.meaning.endswith(".")
        if measure.kind == "histogram":
            assert measure.unit == "seconds"


async def test_requests_are_counted_by_what_answered_them(
    node: NodeProcess, gate_of: Any, asking: Any
) -> None:
    region = Region(HTTP)
    gate = gate_of(node, "scores")
    gate.meter = metering.HttpMeter(region)
    async with asking(gate) as client:
        await client.get("/api?key=Metered")
        await client.head("/api?key=Metered")
        await client.get("/api")
        await client.post("/api?key=Metered")
        await client.get("/healthz")
        await client.get("/secret/path")
        await client.request("BREW", "/readyz")
    counts = {name: count for name, count in region.counts().items() if count}
    assert counts == {
        "api GET 200": 1,
        "api HEAD 200": 1,
        "api GET 400": 1,
        "api other 405": 1,
        "healthz GET 200": 1,
        "other GET 404": 1,
        "readyz other 405": 1,
    }
    assert sum(region.histogram(0)[1]) == 4
