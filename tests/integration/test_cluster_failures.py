"""Nodes that are killed, one and all but one, under readers and writers; and their return."""

from __future__ import annotations

import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import pytest

from kamacache.errors import KamaCacheError
from kamacache.limits import PEER_SILENCE_S
from tests.cluster_app import SHORT_MIRROR_TTL_S
from tests.cluster_driver import Driver, Found, Work
from tests.cluster_nodes import Cluster, ClusterNode, MakeCluster
from tests.history import Cut, Journal, Rules, assert_legal, now, worst_lag_s

pytestmark = pytest.mark.integration

BUSY_S = 1.5  # what a machine with other work adds
TIMEOUT_S = 5.0  # of the callers
LAG_S = SHORT_MIRROR_TTL_S + BUSY_S  # while links fail


@pytest.fixture
def cluster(make_cluster: MakeCluster) -> Cluster:
    made = make_cluster()
    made.start()
    return made


def judge_errors(driver: Driver, found: Found) -> None:
    """Fail where a caller waited longer than its deadline, or had more than one error."""
    callers = {error["caller"] for error in found.errors}
    for caller in callers:
        errors = found.errors_of(caller)
        assert len(errors) <= 1, f"{driver.name}: {errors}"
        assert errors[0]["took_s"] < TIMEOUT_S + BUSY_S
    assert found.slowest_s < TIMEOUT_S + BUSY_S, driver.name


def work(seed: int) -> Work:
    keys = [f"r{number}" for number in range(15)]
    return Work("register", keys, threads=2, tasks=2, timeout_s=TIMEOUT_S, pause_s=0.004, seed=seed)


def test_kill_of_a_node_under_load_gives_no_wrong_value_and_no_pile_of_errors(
    cluster: Cluster,
) -> None:
    victim, *others = cluster.nodes
    cluster.database.delay(0.003)
    steady = [f"steady-{number}" for number in range(90)]
    for node in cluster.nodes:
        node.group().get_many(steady)
    journal = Journal()
    with cluster.drivers(2) as drivers:
        for seed, driver in enumerate(drivers):
            driver.begin(work(seed))
        time.sleep(2)  # the time in which all work
        victim.kill()
        killed_s = now()
        cluster.await_unlinked(victim)
        agreed_s = now()
        for node in others:
            assert len(node.group().get_many(steady)) == len(steady)
        fresh = list(islice(cluster.keys_of(victim, "fresh"), 30))
        for node in others:
            assert len(node.group().get_many(fresh)) == len(fresh)
        time.sleep(2)  # the time in which the others go on
        found = {driver: driver.finish(journal) for driver in drivers}
    assert agreed_s - killed_s < PEER_SILENCE_S + BUSY_S
    for driver, one in found.items():
        assert one.operations > 100
        if not driver.name.startswith(f"node{victim.number}-"):
            judge_errors(driver, one)
    # Who is attached to the dead node may read its memory for 2 s more, as if it were cut off.
    reads = [r for r in journal.reads if r.node != victim.address or r.end < killed_s]
    # What it acknowledged in its last moments it had not told all others: who stands in for it may
    # have a mirror of before, which the writer's own node is given, too.
    cuts = (Cut(killed_s - BUSY_S, agreed_s, SHORT_MIRROR_TTL_S + BUSY_S, own_too=True),)
    assert_legal(journal.writes, reads, Rules(other_node_s=LAG_S, unsure_s=TIMEOUT_S, cuts=cuts))
    lag_s = worst_lag_s(journal.writes, reads)
    errors = sum(
        len(found[d].errors) for d in found if not d.name.startswith(f"node{victim.number}-")
    )
    print(f"agreed after {agreed_s - killed_s:.2f} s, lag {lag_s:.2f} s, {errors} errors")  # noqa: T201
    for key in steady:
        loads = cluster.database.loads(key)
        if cluster.owner(key) is not victim:
            assert len(loads) == 1, key
        else:
            assert len(loads) <= 2, key  # its second owner's, after the death of the first
    assert [key for key in fresh if cluster.load_count(key) != 1] == []


def test_kill_while_all_ask_for_the_dead_nodes_keys_loads_each_a_bounded_number_of_times(
    cluster: Cluster,
) -> None:
    victim, *others = cluster.nodes
    keys = list(islice(cluster.keys_of(victim, "herd"), 60))
    stop = threading.Event()

    def ask(node: ClusterNode, own: list[str]) -> list[str]:
        errors = []
        while not stop.is_set():
            for key in own:
                try:
                    assert node.group().get(key, TIMEOUT_S) == f"v-{key}"
                except KamaCacheError as error:
                    errors.append(f"{type(error).__name__}: {error}")
        return errors

    with ThreadPoolExecutor(8) as threads:
        asking = [
            threads.submit(ask, node, keys[turn::2] + keys[:turn:2])
            for node in others
            for turn in range(2)
        ]
        try:
            time.sleep(0.5)  # the time in which they ask the owner
            victim.kill()
            cluster.await_unlinked(victim)
            time.sleep(1)  # the time in which they ask the next
        finally:
            stop.set()
        for future in asking:
            assert len(future.result(20)) <= 1, future.result()
    for key in keys:
        loads = cluster.database.loads(key)
        assert 1 <= len(loads) <= 1 + len(others), loads
    counts = [cluster.load_count(key) for key in keys]
    print(f"loads a key: mean {statistics.mean(counts):.2f}, max {max(counts)}")  # noqa: T201
    assert statistics.mean(counts) < 3, counts


def test_an_owner_that_starts_anew_asks_who_stood_in_for_it(cluster: Cluster) -> None:
    owner, writer, reader = cluster.nodes
    keys = list(islice(cluster.keys_of(owner, "anew"), 30))
    for key in keys:
        owner.group().set(key, "1")
    owner.kill()
    cluster.await_unlinked(owner)
    for key in keys:
        cluster.database.write(key, b"2")
        writer.group().set(key, "2")
    owner.start()
    for key in keys:
        assert reader.group().get(key) == "2"
        assert owner.group().get(key) == "2"
    cluster.await_linked()
    for key in keys:
        for node in cluster.nodes:
            assert node.group().get(key) == "2"
    loaded = [key for key in keys if cluster.load_count(key)]
    assert len(loaded) <= len(keys) // 20, loaded
    fresh = cluster.key_of(owner, "fresh")
    assert writer.group().get(fresh) == f"v-{fresh}"
    assert [load.node for load in cluster.database.loads(fresh)] == [owner.address]


def test_a_node_whose_peers_are_all_gone_serves_what_it_has_and_loads_the_rest(
    cluster: Cluster,
) -> None:
    left, *others = cluster.nodes
    own = list(islice(cluster.keys_of(left, "own"), 10))
    theirs = [key for node in others for key in islice(cluster.keys_of(node, "theirs"), 10)]
    left.group().get_many(own)
    for node in others:
        node.kill()
    began_s = now()
    for key in (*own, *theirs):
        assert left.group().get(key, TIMEOUT_S) == f"v-{key}"
    assert now() - began_s < TIMEOUT_S + BUSY_S
    cluster.await_linked()
    began_s = now()
    for key in (*own, *theirs):
        assert left.group().get(key) == f"v-{key}"
        assert cluster.load_count(key) == 1
    for key in theirs:
        left.group().set(key, "written")
        assert left.group().get(key) == "written"
        assert left.group().delete(key) is True
        assert left.group().get(key) == f"v-{key}"
    assert now() - began_s < BUSY_S + 1
    for node in others:
        node.start(wait=False)
    for node in others:
        node.await_ready()
    cluster.await_linked()
    fresh = cluster.key_of(others[0], "again")
    assert left.group().get(fresh) == f"v-{fresh}"
    assert cluster.database.loads(fresh)[0].node == others[0].address
