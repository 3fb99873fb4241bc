"""The tools of the cluster tests on a single node, where what is right is known."""

from __future__ import annotations

import time

import pytest

from tests.cluster_driver import Work
from tests.cluster_nodes import MakeCluster
from tests.history import Journal, Rules, assert_legal, now

pytestmark = pytest.mark.integration


def test_one_node_gives_a_legal_history(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(1)
    cluster.start()
    cluster.database.delay(0.005)
    journal = Journal()
    keys = [f"r{number}" for number in range(12)]
    with cluster.drivers(3) as drivers:
        for driver in drivers:
            driver.begin(Work("register", keys, threads=2, tasks=2, timeout_s=5))
        time.sleep(2.5)  # the time in which they work
        found = [driver.finish(journal) for driver in drivers]
    assert [one.errors for one in found] == [[], [], []]
    assert len(journal.reads) > 300
    assert len(journal.writes) > 60
    assert len({read.by for read in journal.reads}) == 12
    assert_legal(journal.writes, journal.reads, Rules())


def test_loads_are_counted_and_drivers_tell_how_calls_ended(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(1)
    cluster.start()
    with cluster.drivers(2) as drivers:
        at_s = now() + 0.3
        for driver, forms in zip(drivers, ({"threads": 8}, {"tasks": 8}), strict=True):
            method = "aget" if "tasks" in forms else "get"
            driver.ask_call("scores", method, "cold", at_s=at_s, **forms)
        answers = [answer for driver in drivers for answer in driver.answers()]
        assert [answer.good() for answer in answers] == ["v-cold"] * 16
        assert all(at_s <= answer.began_s < at_s + 1 for answer in answers)
        assert cluster.load_count("cold") == 1
        assert cluster.database.loads("cold")[0].node == cluster.nodes[0].address
        driver = drivers[0]
        assert driver.call("scores", "get", "none-x").error == "KeyNotFoundError"
        failed = driver.call("scores", "get", "bad-x")
        assert failed.error == "LoadError"
        assert "the database says no to bad-x" in failed.message
        assert driver.call("scores", "set", "k", "1").good() is None
        assert driver.call("scores", "get_many", ["k", "l", "none-x"]).good() == {
            "k": "1",
            "l": "v-l",
        }
        assert driver.call("scores", "delete", "k").good() is True
        assert driver.call("scores", "delete", "k").good() is False


def test_a_node_is_killed_hangs_and_comes_back_as_a_whole(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(1)
    cluster.start()
    (node,) = cluster.nodes
    group = node.group()
    group.set("k", "1")
    pids = node.pids()
    assert len(pids) == 4
    node.hang()
    node.go_on()
    assert group.get("k") == "1"
    node.kill()
    assert not node.alive
    node.start()
    assert not set(node.pids()) & set(pids)
    assert group.get("k") == "v-k"
    group.set("k", "2")
    assert group.get("k") == "2"
    node.stop()
    node.start()
    assert node.log.count("node stops") == 1
