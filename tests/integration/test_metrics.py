"""/metrics of a real node: exact counts that no death takes back, and a worker that hangs."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

import kamacache
from kamacache.http.measures import MEASURES
from kamacache.limits import SNAPSHOT_EVERY_S, WORKER_ASKED_S
from tests.attached_estate import Estate
from tests.attached_process import AttachedProcess
from tests.node_process import NodeProcess
from tests.scraping import OPEN_METRICS, OPENER, Scrape, fresh, scrape

pytestmark = pytest.mark.integration

WaitUntil = Callable[..., None]
ANSWER_S = WORKER_ASKED_S + 0.7  # 0.9 on an idle machine


@pytest.fixture(scope="module")
def place(environment: None) -> Iterator[Estate]:
    folder = Path(tempfile.mkdtemp(prefix="kc-", dir="/tmp"))
    yield Estate(folder)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def node(place: Estate) -> Iterator[NodeProcess]:
    ports = ("--listen", "127.0.0.1:0", "--api", "127.0.0.1:0")
    with place.node(*ports, "--warm-restart-max-downtime", "0") as found:
        found.await_ready()
        yield found
        assert found.stop() == 0


@pytest.fixture
def metrics(node: NodeProcess) -> Callable[[], Scrape]:
    return lambda: fresh(node.run_dir)


def api_of(node: NodeProcess) -> str:
    api = node.description().api
    assert api is not None
    return api


def kill(node: NodeProcess, title: str, wait_until: WaitUntil) -> None:
    """Kill a process of a node; return when another has its place and is ready."""
    found = node.role(title)
    assert found is not None
    found.kill()
    role, _, index = title.partition(" ")

    def back() -> bool:
        successor = node.role(title)
        if successor is None or successor.pid == found.pid:
            return False
        told = fresh(node.run_dir)
        return told.of("kamacache_process_ready", role=role, index=index) == 1

    wait_until(back, 20)


def test_every_entry_of_a_shard_is_accounted_for(
    node: NodeProcess, metrics: Callable[[], Scrape], wait_until: WaitUntil
) -> None:
    listen = node.description().listen
    assert listen is not None
    # "plain" has 8 MiB. The first of its tests: what a test before wrote would be told in this one.
    before = metrics()
    with kamacache.Client([listen]) as client:
        plain = client.group("plain")
        plain.set_many({f"brief-{number}": b"x" * 4000 for number in range(300)}, ttl=1)
        wait_until(lambda: not plain.get_many(["brief-0", "brief-299"]))
        for part in range(10):
            plain.set_many({f"{part}-{number}": b"x" * 4000 for number in range(300)})
        assert plain.delete("9-299")

    after = before

    def grew(name: str) -> float:
        return after.of(name, group="plain") - before.of(name, group="plain")

    def told() -> bool:  # each second
        nonlocal after
        after = metrics()
        return grew("kamacache_shard_puts_total") == grew("kamacache_sets_total") == 3300 and (
            grew("kamacache_shard_deletes_total") == grew("kamacache_deletes_total") == 1
        )

    wait_until(told, 10)
    expired = grew("kamacache_shard_expired_total")
    evicted = grew("kamacache_shard_evictions_total")
    assert 200 <= expired <= 300
    assert evicted > 500
    assert grew("kamacache_shard_items") == 3300 - expired - evicted - 1
    live, items = (after.of(f"kamacache_shard_{n}", group="plain") for n in ("live_bytes", "items"))
    assert 4000 * (items - 10) < live < 4200 * items
    capacity = after.of("kamacache_shard_capacity_bytes", group="plain")
    assert live < capacity == pytest.approx(8 << 20, rel=0.1)
    assert after.of("kamacache_shard_mirror_bytes", group="plain") == 0


def test_loads_are_counted_exactly_also_when_their_worker_is_killed(
    node: NodeProcess, metrics: Callable[[], Scrape], wait_until: WaitUntil
) -> None:
    before = metrics()
    with AttachedProcess(node.run_dir) as app:
        for number in range(40):
            assert app.call("scores", "get", f"exact-{number}") == f"v-exact-{number}"
        assert app.call("scores", "get", "bad-exact")["error"] == "LoadError"
        kill(node, "worker 0", wait_until)
        for number in range(40):  # memory has them still
            assert app.call("scores", "get", f"exact-{number}") == f"v-exact-{number}"
        for number in range(40, 60):
            assert app.call("scores", "get", f"exact-{number}") == f"v-exact-{number}"
        assert app.end() == 0
    after = metrics()

    def grew(name: str, **labels: str) -> float:
        return after.of(name, group="scores", **labels) - before.of(name, group="scores", **labels)

    assert grew("kamacache_loads_total") == 61
    assert grew("kamacache_load_errors_total") == 1
    assert grew("kamacache_load_duration_seconds_count") == 61
    assert grew("kamacache_load_duration_seconds_bucket", le="+Inf") == 61
    assert grew("kamacache_gets_total") == 101
    assert grew("kamacache_hits_total") == 40
    assert grew("kamacache_misses_total") == 61
    restarts = "kamacache_process_restarts_total"
    assert after.of(restarts, role="worker", index="0") == 1
    assert after.of(restarts, role="worker", index="1") == 0


def test_no_counter_goes_down_whichever_process_dies(
    node: NodeProcess, metrics: Callable[[], Scrape], wait_until: WaitUntil
) -> None:
    listen = node.description().listen
    assert listen is not None
    with kamacache.Client([listen]) as client:
        client.group("plain").set("down", b"1")
        client.group("plain").get("down")
    scrape(api_of(node))
    seen = metrics()
    assert seen.of("kamacache_grpc_requests_total", method="Get", code="OK") >= 1
    assert seen.of("kamacache_http_requests_total", handler="metrics", code="200") >= 1
    for title in ("worker 1", "front 0", "http 0"):
        kill(node, title, wait_until)
        now = metrics()
        for key, value in seen.counters.items():
            assert now.samples.get(key, 0.0) >= value, f"{key} after the death of {title}"
        seen = now
    assert seen.of("kamacache_process_restarts_total", role="front") == 1


def test_hits_of_a_forked_application_are_those_of_all_its_processes(
    node: NodeProcess, metrics: Callable[[], Scrape]
) -> None:
    before = metrics()
    script = """
import os, kamacache
group = kamacache.Group("plain", cache_bytes="8MiB")
group.set("forked", b"1")
assert group.get("forked") == b"1"
children = []
for _ in range(3):
    pid = os.fork()
    if not pid:
        for _ in range(100):
            assert group.get("forked") == b"1"
        raise SystemExit(0)
    children.append(pid)
for pid in children:
    assert os.waitpid(pid, 0)[1] == 0
"""
    subprocess.run(
        [sys.executable, "-c", script],
        check=True,
        timeout=30,
        env={**os.environ, "KAMACACHE_RUN_DIR": str(node.run_dir)},
    )
    after = metrics()
    hits = "kamacache_hits_total"
    assert after.of(hits, group="plain") - before.of(hits, group="plain") == 301
    assert (
        after.of("kamacache_sets_total", group="plain")
        - before.of("kamacache_sets_total", group="plain")
        == 1
    )


def test_what_is_under_way_is_told_while_it_is(
    place: Estate, node: NodeProcess, metrics: Callable[[], Scrape], wait_until: WaitUntil
) -> None:
    joined = "kamacache_loads_joined_total"
    before = metrics()
    with AttachedProcess(node.run_dir) as one, AttachedProcess(node.run_dir) as two:
        for app in (one, two):
            app.ask("scores", "get", "gate-under-way")
        wait_until(lambda: metrics()[joined] == before[joined] + 1, 10)
        during = metrics()
        for name in ("loads_in_flight", "worker_loads_running"):
            assert during[f"kamacache_{name}"] == 1
        assert during["kamacache_loads_queued"] == 0
        assert during["kamacache_worker_connections"] >= 2
        assert during["kamacache_loads_total"] == before["kamacache_loads_total"] + 1
        place.open_gate("gate-under-way")
        assert [one.answer(), two.answer()] == [["v-gate-under-way"]] * 2
    wait_until(lambda: metrics()["kamacache_loads_in_flight"] == 0)


def test_reloads_are_counted(
    node: NodeProcess, metrics: Callable[[], Scrape], wait_until: WaitUntil
) -> None:
    def taken() -> float:
        return metrics().of("kamacache_config_reloads_total", result="taken")

    before = taken()
    node.process.send_signal(signal.SIGHUP)
    wait_until(lambda: taken() == before + 1, 10)


def test_a_hung_worker_costs_its_own_numbers_of_now_and_no_more(
    node: NodeProcess, metrics: Callable[[], Scrape], wait_until: WaitUntil
) -> None:
    whole = metrics()
    hung = node.role("worker 1")
    assert hung is not None
    hung.send_signal(signal.SIGSTOP)
    try:
        wait_until(lambda: hung.status() == psutil.STATUS_STOPPED)
        for _ in range(5):  # on a busy machine the other worker, too, may answer late
            time.sleep(SNAPSHOT_EVERY_S)
            began_s = time.monotonic()
            told = scrape(api_of(node))
            took_s = time.monotonic() - began_s
            if took_s < ANSWER_S and told.of("kamacache_worker_answered", worker="0"):
                break
        else:
            pytest.fail("the hung worker holds the others up")
    finally:
        hung.send_signal(signal.SIGCONT)
    assert told.of("kamacache_worker_answered", worker="1") == 0
    assert told["kamacache_node_ready"] == 0
    missing = {key for key in whole.samples if key not in told.samples}
    assert {name for name, _ in missing} == {
        "kamacache_worker_connections",
        "kamacache_worker_loads_running",
        "kamacache_worker_getters_hung",
    }
    assert all(("worker", "1") in labels for _, labels in missing)
    wait_until(lambda: metrics().of("kamacache_worker_answered") == 2)


def test_both_formats_tell_the_same(node: NodeProcess) -> None:
    text, opened = scrape(api_of(node)), scrape(api_of(node), OPEN_METRICS)
    assert text.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert opened.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    assert opened.text.endswith("# EOF\n")
    # Between the two a request was counted, which may be the first of its kind.
    http = ("kamacache_http_requests_total", "kamacache_http_request_duration_seconds")
    missing = opened.samples.keys() ^ text.samples.keys()
    assert [name for name, _ in missing if not name.startswith(http)] == []
    told = re.findall(r"^# TYPE (\w+) (\w+)$", text.text, re.MULTILINE)
    assert told == [(measure.name, measure.kind) for measure in MEASURES]
    assert "content-encoding" not in text.headers


def test_an_answer_is_compressed_for_who_takes_it(node: NodeProcess) -> None:
    import gzip

    url = f"http://{api_of(node)}/metrics"
    request = urllib.request.Request(url, headers={"accept-encoding": "gzip"})
    with OPENER.open(request, timeout=10) as reply:
        assert reply.headers["content-encoding"] == "gzip"
        assert b"kamacache_loads_total" in gzip.decompress(reply.read())


def test_promtool_finds_nothing_to_say(node: NodeProcess) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed; .ci/run unpacks it from Debian's prometheus")
    done = subprocess.run(
        [promtool, "check", "metrics"],
        input=scrape(api_of(node)).text,
        text=True,
        capture_output=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_processes_are_told_with_their_memory_and_time(
    node: NodeProcess, metrics: Callable[[], Scrape], wait_until: WaitUntil
) -> None:
    wait_until(lambda: metrics()["kamacache_node_ready"] == 1)
    told = metrics()
    for role, index in (("supervisor", "0"), ("worker", "0"), ("worker", "1"), ("front", "0")):
        assert told.of("kamacache_process_resident_memory_bytes", role=role, index=index) > 5e6
        assert told.of("kamacache_process_cpu_seconds_total", role=role, index=index) > 0
        assert told.of("kamacache_process_ready", role=role, index=index) == 1
    assert told.of("kamacache_build_info", version=kamacache.__version__) == 1
    assert abs(told["kamacache_node_start_time_seconds"] - time.time()) < 600
    assert told["kamacache_node_serve_until_left_seconds"] <= 2
    assert not told.has("kamacache_tls_certificate_expiry_timestamp_seconds")  # no TLS
