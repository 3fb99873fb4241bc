"""What a node took for one that was away is told to it, though the worker that took it has died."""

from __future__ import annotations

import time
from itertools import islice

import pytest

from tests.cluster_nodes import Cluster, ClusterNode, MakeCluster

pytestmark = pytest.mark.integration

REPLACED_S = 10.0


@pytest.fixture
def cluster(make_cluster: MakeCluster) -> Cluster:
    made = make_cluster()
    made.start()
    return made


def kill_workers(node: ClusterNode) -> None:
    """Kill the node's workers; return when others have taken their places."""
    assert node.process is not None
    dead = [node.process.role(f"worker {index}") for index in range(node.workers)]
    for worker in dead:
        assert worker is not None
        worker.kill()

    end_s = time.monotonic() + REPLACED_S
    while True:
        found = [node.process.role(f"worker {index}") for index in range(node.workers)]
        if None not in found and not set(found) & set(dead) and node.links() is not None:
            return
        assert time.monotonic() < end_s, f"{node}: {found}"
        time.sleep(0.02)


@pytest.mark.parametrize("write", ["set", "delete"])
def test_a_write_taken_for_a_hung_owner_survives_the_death_of_its_taker(
    cluster: Cluster, write: str
) -> None:
    owner, taker, writer = cluster.nodes
    mine = (
        key
        for key in cluster.keys_of(owner, write)
        if [*cluster.ring.owners(key.encode())][1] == taker.address
    )
    keys = list(islice(mine, 20))
    for key in keys:
        owner.group().set(key, "before")
        cluster.database.write(key, b"after")
    owner.hang()
    try:
        cluster.await_unlinked(owner)
        for number, key in enumerate(keys):
            by = (taker, writer)[number % 2]
            if write == "set":
                by.group().set(key, "after")
            else:
                by.group().delete(key)
        kill_workers(taker)
        kill_workers(writer)
    finally:
        owner.go_on()
    cluster.await_linked()
    for node in cluster.nodes:
        assert node.group().get_many(keys) == dict.fromkeys(keys, "after"), node
