"""Nodes that hang and go on, or are slow: what that costs callers, and what is read afterwards."""

from __future__ import annotations

import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import pytest

from kamacache.errors import KamaCacheError
from tests.cluster_app import SHORT_MIRROR_TTL_S
from tests.cluster_nodes import Cluster, ClusterNode, MakeCluster
from tests.history import now

pytestmark = pytest.mark.integration

BUSY_S = 1.5  # what a machine with other work adds
TIMEOUT_S = 5.0  # of the callers


@pytest.fixture
def cluster(make_cluster: MakeCluster) -> Cluster:
    made = make_cluster()
    made.start()
    return made


def timed(node: ClusterNode, key: str, timeout_s: float = TIMEOUT_S) -> tuple[float, str]:
    began_s = now()
    try:
        answer = node.group().get(key, timeout_s) or ""
    except KamaCacheError as error:
        answer = type(error).__name__
    return now() - began_s, answer


def test_a_hung_node_costs_a_caller_one_deadline_and_others_nothing(cluster: Cluster) -> None:
    hung, *others = cluster.nodes
    asker = others[0]
    timeout_s = 3.0
    theirs = cluster.keys_of(hung, "hung")
    own = [key for node in others for key in islice(cluster.keys_of(node, "fine"), 20)]
    hung.hang()
    try:
        with ThreadPoolExecutor(8) as threads:
            waiting = [threads.submit(timed, asker, next(theirs), timeout_s) for _ in range(8)]
            fine = [timed(asker, key, timeout_s) for key in own]
            answers = [future.result(20) for future in waiting]
        # Those who asked the node that hangs: a value, or a deadline, once.
        assert all(took_s < timeout_s + BUSY_S for took_s, _ in answers), answers
        assert [answer for _, answer in fine] == [f"v-{key}" for key in own]
        assert max(took_s for took_s, _ in fine) < BUSY_S
        assert statistics.median(took_s for took_s, _ in fine) < 0.1
        # Once it is known nobody waits for it, on either node.
        cluster.await_unlinked(hung)
        for node in others:
            for _ in range(10):
                key = next(theirs)
                took_s, answer = timed(node, key, timeout_s)
                assert answer == f"v-{key}"
                assert took_s < BUSY_S
        fresh = next(theirs)
        assert [timed(node, fresh)[1] for node in others] == [f"v-{fresh}"] * 2
        assert cluster.load_count(fresh) == 1
    finally:
        hung.go_on()


def test_a_slow_owner_does_not_slow_the_keys_of_others(cluster: Cluster) -> None:
    slow, *others = cluster.nodes
    asker = others[0]
    cluster.database.delay(2.0, slow.address)
    with ThreadPoolExecutor(24) as threads:
        theirs = list(islice(cluster.keys_of(slow, "slow"), 24))
        waiting = [threads.submit(timed, asker, key) for key in theirs]
        fine = [
            (timed(asker, key), key)
            for node in others
            for key in islice(cluster.keys_of(node, "quick"), 40)
        ]
        assert not all(future.done() for future in waiting)
        answers = [future.result(20) for future in waiting]
    assert [answer for _, answer in answers] == [f"v-{key}" for key in theirs]
    assert min(took_s for took_s, _ in answers) >= 2.0
    assert [answer for (_, answer), _ in fine] == [f"v-{key}" for _, key in fine]
    took_s = [took_s for (took_s, _), _ in fine]
    assert statistics.median(took_s) < 0.1
    assert max(took_s) < BUSY_S
    # Slow is not dead: nobody else loaded its keys, and its links stand.
    assert {load.node for key in theirs for load in cluster.database.loads(key)} == {slow.address}
    assert asker.links() == (4, 4)


def test_an_owner_that_comes_back_has_its_keys_again_and_nothing_older_is_read(
    cluster: Cluster,
) -> None:
    """It hung, so its memory still holds what was written before."""
    owner, writer, reader = cluster.nodes
    keys = list(islice(cluster.keys_of(owner, "back"), 20))
    for key in keys:
        cluster.database.write(key, b"1")
        owner.group("short").set(key, "1")
        assert reader.group("short").get(key) == "1"
    owner.hang()
    cluster.await_unlinked(owner)
    for number, key in enumerate(keys):
        cluster.database.write(key, b"2")
        if number % 2:
            writer.group("short").set(key, "2")
        else:
            writer.group("short").delete(key)
    for key in keys:
        assert writer.group("short").get(key) == "2"
    time.sleep(SHORT_MIRROR_TTL_S)  # what the third node has of before is over
    for key in keys:
        assert reader.group("short").get(key) == "2"
    owner.go_on()
    back_s = now()
    linked = threading.Thread(target=cluster.await_linked)
    linked.start()
    while linked.is_alive() or now() - back_s < SHORT_MIRROR_TTL_S + 0.5:
        for key in keys[::3]:
            assert writer.group("short").get(key) == "2"
            assert reader.group("short").get(key) == "2"
    linked.join()
    for key in keys:
        assert read(owner, key) == "2"
        assert writer.group("short").get(key) == "2"
        assert reader.group("short").get(key) == "2"
    # Its keys are its own again: a new one is loaded there.
    fresh = cluster.key_of(owner, "after")
    assert reader.group("short").get(fresh) == f"v-{fresh}"
    assert [load.node for load in cluster.database.loads(fresh)] == [owner.address]


def test_an_owner_that_comes_back_when_its_stand_in_is_dead_serves_nothing_older(
    cluster: Cluster,
) -> None:
    writer, owner, stand_in = cluster.nodes
    keys = [
        key
        for key in islice(cluster.keys_of(owner, "twice"), 60)
        if list(cluster.ring.owners(key.encode()))[1] == stand_in.address
    ][:10]
    for key in keys:
        cluster.database.write(key, b"old")
        owner.group("short").set(key, "old")
    owner.hang()
    cluster.await_unlinked(owner)
    for key in keys:
        cluster.database.write(key, b"new")
        writer.group("short").set(key, "new")
    stand_in.kill()
    owner.go_on()
    cluster.await_linked()
    time.sleep(SHORT_MIRROR_TTL_S + 0.5)  # the writer's own copies are over
    assert [writer.group("short").get(key) for key in keys] == ["new"] * len(keys)


def read(node: ClusterNode, key: str) -> str | None:
    """Read at a node that a process of another life of it may have to find anew."""
    end_s = now() + 5
    while True:
        try:
            return node.group("short").get(key)
        except KamaCacheError:
            if now() > end_s:
                raise
            time.sleep(0.05)
