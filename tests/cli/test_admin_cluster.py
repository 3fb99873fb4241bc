"""`kamacache ring`, `peers`, `stats` and `flush` at a cluster of three real nodes."""

from __future__ import annotations

import base64
import json
import signal
import subprocess
import sys
import threading
import time

import pytest

from tests.cli.conftest import kamacache, told
from tests.cluster_nodes import Cluster, ClusterNode
from tests.node_process import ROOT

pytestmark = pytest.mark.integration


def await_told(cluster: Cluster, away: ClusterNode, deadline_s: float = 10.0) -> None:
    """Wait until a node that is back has been told all."""
    end_s = time.monotonic() + deadline_s
    while any(node.group().stats()["peer_pending_invalidations"] for node in cluster.running):
        assert time.monotonic() < end_s, f"{away} was not told"
        time.sleep(0.02)


def test_ring_tells_the_owner_its_successors_and_the_worker(cluster: Cluster) -> None:
    node = cluster.nodes[0]
    key = cluster.key_of(cluster.nodes[1], "ring")
    node.group().get(key)
    found = told("ring", key, "--group=scores", "--run-dir", node.run_dir)
    assert set(found) == {
        *("key", "hash", "point", "owner", "goes_to", "why", "own", "membership", "nodes"),
        *("group", "worker", "workers", "shard_hash", "held"),
    }
    order = list(cluster.ring.owners(key.encode()))
    assert [peer["address"] for peer in found["nodes"]] == order
    assert found["owner"] == found["goes_to"] == order[0]
    assert found["own"] == node.address
    assert found["workers"] == 2
    assert found["worker"] in (0, 1)
    assert found["held"] == "value"
    assert all(peer["usable"] for peer in found["nodes"])
    assert sum(peer["share"] for peer in found["nodes"]) == pytest.approx(1, abs=1e-5)
    remote = told("ring", key, "--address", node.address)
    assert remote["owner"] == order[0]
    assert remote["worker"] is None
    assert all(peer["usable"] for peer in remote["nodes"])


def test_ring_takes_keys_as_hex_and_base64(cluster: Cluster) -> None:
    where = ("--run-dir", cluster.nodes[0].run_dir)
    data = b"\x00\xff"
    as_hex = told("ring", "--hex", data.hex(), *where)
    assert as_hex == told("ring", "--base64", base64.b64encode(data).decode(), *where)
    assert as_hex["owner"] == cluster.ring.owner(data)
    for wrong in (("--hex", "xy"), ("--base64", "*"), ("--hex", "--base64", "00")):
        done = kamacache("ring", *wrong, *where)
        assert done.returncode == 2, done.stderr


def test_ring_for_people_says_why(cluster: Cluster) -> None:
    node = cluster.nodes[0]
    shown = kamacache("ring", cluster.key_of(node), "--run-dir", node.run_dir).stdout
    assert "(this node): it owns the key" in shown
    assert "worker    " in shown
    assert "\x1b" not in shown


@pytest.mark.parametrize("by", ["run dir", "address"])
def test_peers_tells_every_node_and_its_version(cluster: Cluster, by: str) -> None:
    node = cluster.nodes[1]
    where = ("--run-dir", node.run_dir) if by == "run dir" else ("--address", node.address)
    found = told("peers", *where)
    assert found["own"] == node.address
    assert [peer["address"] for peer in found["peers"]] == sorted(cluster.ring.addresses)
    assert {peer["version"] for peer in found["peers"]} == {"0.1.0"}
    for peer in found["peers"]:
        assert set(peer) == {
            *("address", "own", "weight", "share", "state", "version", "links", "calls"),
            *("failed", "p50_ms", "p99_ms", "invalidations_sent", "invalidations_pending"),
            *("invalidation_lag_s", "error"),
        }
        if by == "run dir" and not peer["own"]:
            assert peer["state"] == "usable"
            assert [link["worker"] for link in peer["links"]] == [0, 1]
    shown = kamacache("peers", *where).stdout
    assert all(address in shown for address in cluster.ring.addresses)


def test_a_flush_reaches_every_node_and_every_kind_of_copy(cluster: Cluster) -> None:
    keys = [cluster.key_of(node, f"flush{number}") for node in cluster.nodes for number in (1, 2)]
    for node in cluster.nodes:
        node.group().get_many(keys)
    for key in keys:
        cluster.database.write(key, b"new")
    found = told("flush", "scores", "--yes", "--run-dir", cluster.nodes[0].run_dir)
    assert found["group"] == "scores"
    assert found["dropped"] >= len(keys)
    assert [(n["address"], n["reached"]) for n in found["nodes"]] == [
        (node.address, True) for node in cluster.nodes[1:]
    ]
    for node in cluster.nodes:
        assert set(node.group().get_many(keys).values()) == {"new"}


def test_a_flush_ends_what_attached_processes_keep_near(cluster: Cluster) -> None:
    keys = [cluster.key_of(node, "near") for node in cluster.nodes]
    with cluster.drivers(1) as drivers:
        for driver in drivers:
            for key in keys * 3:
                assert driver.call("scores", "get", key).good() == f"v-{key}"
        for key in keys:
            cluster.database.write(key, b"new")
        told("flush", "scores", "--yes", "--run-dir", cluster.nodes[2].run_dir)
        for driver in drivers:
            assert [driver.call("scores", "get", key).good() for key in keys] == ["new"] * 3


def test_a_local_flush_leaves_the_other_nodes_alone(cluster: Cluster) -> None:
    node, other = cluster.nodes[:2]
    key = cluster.key_of(other, "local")
    assert node.group().get(key) == other.group().get(key)
    found = told("flush", "scores", "--yes", "--local", "--run-dir", node.run_dir)
    assert found["nodes"] == []
    assert not node.group().in_memory(key)
    assert other.group().in_memory(key)


def test_a_flush_of_every_group(cluster: Cluster) -> None:
    for name in ("scores", "plain"):
        cluster.nodes[0].group(name).set(f"all-{name}", "value")
    done = kamacache("flush", "--all", "--yes", "--run-dir", cluster.nodes[1].run_dir)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("every group: ")
    assert done.stdout.endswith(", and all on 2 other nodes\n")
    assert not cluster.nodes[0].group("plain").get("all-plain")


def test_a_flush_is_not_done_unasked(cluster: Cluster) -> None:
    where = ("--run-dir", cluster.nodes[0].run_dir)
    refused = kamacache("flush", "scores", *where)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "--yes" in refused.stderr
    assert kamacache("flush", "--yes", *where).returncode == 2
    unknown = kamacache("flush", "nothing", "--yes", *where)
    assert unknown.returncode == 2
    assert "no group 'nothing'" in unknown.stderr
    remote = kamacache("flush", "scores", "--yes", "--address", cluster.nodes[0].address)
    assert remote.returncode == 2
    assert "run directory" in remote.stderr


def test_after_a_flush_under_load_no_node_returns_what_was_before(cluster: Cluster) -> None:
    """Loads, fetches, sets and near caches go on while the flushes run; a value is its time."""
    ended = threading.Event()
    old: list[str] = []
    flushed = {"round": 0}
    keys = [cluster.key_of(node, f"race{number}") for node in cluster.nodes for number in range(4)]

    def write(number: int) -> None:
        for key in keys:
            cluster.database.write(key, b"%d" % number)

    def read(node: ClusterNode) -> None:
        group = node.group()
        while not ended.is_set():
            for key in keys:
                least = flushed["round"]  # before the get: what must be seen by now
                value = int(group.get(key) or 0)
                if value < least:
                    old.append(f"{node.address} {key}: {value} after flush {least}")

    write(0)
    cluster.database.delay(0.01)
    readers = [threading.Thread(target=read, args=(node,)) for node in cluster.nodes]
    for reader in readers:
        reader.start()
    try:
        for number in range(1, 6):
            write(number)
            done = told("flush", "scores", "--yes", "--run-dir", cluster.nodes[number % 3].run_dir)
            assert all(node["reached"] for node in done["nodes"])
            flushed["round"] = number
    finally:
        ended.set()
        for reader in readers:
            reader.join(10)
        cluster.database.delay(0)
    assert not old, old[:5]


def test_a_node_that_is_away_is_named_and_flushes_when_it_is_back(cluster: Cluster) -> None:
    node, _, away = cluster.nodes
    key = cluster.key_of(away, "away")
    assert away.group().get(key) == f"v-{key}"
    away.hang()
    try:
        cluster.await_unlinked(away)
        cluster.database.write(key, b"new")
        done = kamacache("flush", "scores", "--yes", "--run-dir", node.run_dir)
        assert done.returncode == 0
        assert done.stderr.count(f"{away.address} was not reached (the link is down)") == 1
        assert node.group().get(key) == "new"  # of who stands in
        stands_in = told("ring", key, "--run-dir", node.run_dir)
        assert stands_in["owner"] == away.address
        assert stands_in["goes_to"] != away.address
        assert stands_in["why"].startswith("it stands in")
        down = told("peers", "--run-dir", node.run_dir)["peers"]
        assert {p["state"] for p in down if p["address"] == away.address} == {"down"}
    finally:
        away.go_on()
    cluster.await_linked()
    await_told(cluster, away)
    assert away.group().get(key) == "new"


def test_watch_goes_on_through_a_restart_and_ends_with_control_c(cluster: Cluster) -> None:
    node = cluster.nodes[2]
    command = [sys.executable, "-m", "kamacache.cli.client", "stats", "scores", "--watch=1"]
    with subprocess.Popen(
        [*command, "--json", "--run-dir", str(node.run_dir)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={"PYTHONPATH": str(ROOT)},
    ) as watching:
        assert watching.stdout is not None
        assert watching.stderr is not None
        try:
            epoch = json.loads(watching.stdout.readline())["node"]["epoch"]
            node.stop()
            assert "waiting for it" in watching.stderr.readline()
            node.start()
            assert "the node is back" in watching.stderr.readline()
            while (found := json.loads(watching.stdout.readline()))["node"]["epoch"] == epoch:
                pass  # looks of before, which the node's end outlasted
            assert "per_s" not in found["groups"]["scores"]
            assert "per_s" in json.loads(watching.stdout.readline())["groups"]["scores"]
            watching.send_signal(signal.SIGINT)
            assert watching.wait(10) == 0
            assert watching.stderr.read() == ""
        finally:
            watching.kill()
    cluster.await_linked()
