"""A node of a cluster comes back with its shards, and nobody reads what was replaced meanwhile.

Real nodes of three workers' groups without a database where a stale value could not be told from a
loaded one. Where it is not certain that what was kept is the latest, the log says why it is not.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import psutil
import pytest

from kamacache.limits import WARM_MARGIN_MS
from tests.cluster_nodes import Cluster, ClusterNode, shared_cluster

pytestmark = pytest.mark.integration

WARM = ("--warm-restart-max-downtime", "60")
COLD = "cold start"
KEYS = 400  # of each node


@pytest.fixture(scope="module")
def cluster(shm_root: Path, environment: None) -> Iterator[Cluster]:
    with shared_cluster(shm_root, arguments=WARM) as cluster:
        await_memory()
        yield cluster


def await_memory() -> None:
    """Wait until nodes that run can answer for one that stops now; see `Peers.told`."""
    time.sleep(WARM_MARGIN_MS / 1000 + 0.1)


def lives(node: ClusterNode) -> str:
    """Return the log of the node's present life."""
    assert node.process is not None
    return node.process.log


def held(node: ClusterNode, keys: list[str]) -> int:
    group = node.group("plain")
    return sum([group.in_memory(key) for key in keys])


def fill(cluster: Cluster, prefix: str, value: str = "before") -> dict[str, list[str]]:
    """Set keys of every node, each at its owner; return them by owner."""
    keys = {n.address: [*islice(cluster.keys_of(n, prefix), KEYS)] for n in cluster.nodes}
    for node in cluster.nodes:
        node.group("plain").set_many(dict.fromkeys(keys[node.address], value))
    return keys


def assert_everywhere(cluster: Cluster, keys: list[str], value: str | None) -> None:
    """Every node that runs returns this value of every key, or has lost it."""
    for node in cluster.running:
        found = node.group("plain").get_many(keys)
        assert {found.get(key) for key in keys} <= {value, None}, node


def test_what_was_written_meanwhile_is_dropped_and_the_rest_is_kept(cluster: Cluster) -> None:
    node, *others = cluster.nodes
    keys = fill(cluster, "meanwhile")[node.address]
    kept, changed, gone = keys[:300], keys[300:350], keys[350:]
    mirrored = keys[300:310]
    assert others[1].group("plain").get_many(mirrored) == dict.fromkeys(mirrored, "before")
    node.stop()
    cluster.await_unlinked(node)
    others[0].group("plain").set_many(dict.fromkeys(changed[:25], "after"))
    others[1].group("plain").set_many(dict.fromkeys(changed[25:], "after"))
    others[0].group("plain").delete_many(gone[:25])
    others[1].group("plain").delete_many(gone[25:])
    node.start()
    assert lives(node).count("settled") == node.workers
    assert COLD not in lives(node)
    assert held(node, kept) == len(kept)
    assert held(node, [*changed, *gone]) == 0
    assert_everywhere(cluster, changed, "after")
    assert_everywhere(cluster, gone, None)
    cluster.await_linked()
    assert_everywhere(cluster, changed, "after")
    assert_everywhere(cluster, kept, "before")
    found = others[0].group("plain").get_many(kept)
    assert len(found) == len(kept)


def test_all_nodes_one_after_the_other_keep_what_they_have(cluster: Cluster) -> None:
    keys = fill(cluster, "rolling")
    for node in cluster.nodes:
        before = held(node, keys[node.address])
        node.stop()
        cluster.await_unlinked(node)
        node.start()
        assert COLD not in lives(node), lives(node)
        assert held(node, keys[node.address]) >= 0.999 * before
        cluster.await_linked()


def test_node_that_lost_its_memory_meanwhile_cannot_answer_for_it(cluster: Cluster) -> None:
    node, other, _ = cluster.nodes
    keys = fill(cluster, "lost")[node.address]
    node.stop()
    cluster.await_unlinked(node)
    other.group("plain").set_many(dict.fromkeys(keys[:50], "after"))
    other.kill()  # and with it the list of what the first must drop
    other.start()
    node.start()
    assert lives(node).count(COLD) == node.workers
    assert f"{other.address} does not know all that it wrote meanwhile" in lives(node)
    assert held(node, keys) == 0
    cluster.await_linked()
    assert_everywhere(cluster, keys[:50], "after")


def test_worker_killed_meanwhile_cannot_answer_either(cluster: Cluster) -> None:
    node, other, _ = cluster.nodes
    keys = fill(cluster, "killed")[node.address]
    node.stop()
    cluster.await_unlinked(node)
    other.group("plain").set_many(dict.fromkeys(keys[:50], "after"))
    assert other.process is not None
    worker = other.process.role("worker 0")
    assert worker is not None
    worker.kill()
    psutil.wait_procs([worker], timeout=5)
    node.start()
    assert f"{other.address} does not know all that it wrote meanwhile" in lives(node)
    cluster.await_linked()
    assert_everywhere(cluster, keys[:50], "after")


def test_node_that_is_not_there_to_answer(cluster: Cluster) -> None:
    node, other, third = cluster.nodes
    keys = fill(cluster, "absent")[node.address]
    node.stop()
    cluster.await_unlinked(node)
    other.group("plain").set_many(dict.fromkeys(keys[:50], "after"))
    other.kill()
    node.start()
    assert f"{other.address} is not reached" in lives(node)
    other.start()
    cluster.await_linked()
    assert_everywhere(cluster, keys[:50], "after")
    assert third.alive
