"""Many processes get, set and delete the same keys on all nodes; every value read was legal."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster_driver import Work
from tests.cluster_nodes import Cluster, shared_cluster
from tests.history import Journal, Rules, assert_legal, worst_lag_s

pytestmark = pytest.mark.integration

LAG_S = 0.1 + 0.7  # the promise, and what a machine with other work adds; below the mirror TTL
WORK_S = 4.0


@pytest.fixture(scope="module")
def cluster(shm_root: Path, environment: None) -> Iterator[Cluster]:
    with shared_cluster(shm_root) as cluster:
        yield cluster


def run(cluster: Cluster, work: Work, each: int) -> Journal:
    """Let so many processes a node work; return what they did."""
    journal = Journal()
    with cluster.drivers(each) as drivers:
        for driver in drivers:
            driver.begin(work)
        time.sleep(WORK_S)  # the time in which they work
        found = [driver.finish(journal) for driver in drivers]
    assert [one.errors for one in found] == [[] for _ in drivers]
    lag_s = worst_lag_s(journal.writes, journal.reads)
    print(  # noqa: T201
        f"{len(journal.reads)} reads, {len(journal.writes)} writes, lag {lag_s:.4f} s"
    )
    assert len(journal.reads) > 500
    assert len(journal.writes) > 100
    assert len({read.node for read in journal.reads}) == 3
    return journal


def test_with_a_database(cluster: Cluster) -> None:
    cluster.database.delay(0.004)  # a load is as old as that when it ends
    work = Work("register", [f"r{number}" for number in range(15)], threads=2, tasks=2)
    journal = run(cluster, work, each=2)
    assert_legal(journal.writes, journal.reads, Rules(other_node_s=LAG_S))


def test_without_a_database_nothing_set_is_lost(cluster: Cluster) -> None:
    keys = [f"p{number}" for number in range(15)]
    work = Work("plain", keys, threads=2, tasks=2, stored=False, set_share=0.2)
    journal = run(cluster, work, each=2)
    assert_legal(journal.writes, journal.reads, Rules(other_node_s=LAG_S, cold_is_legal=False))


def test_few_keys_and_many_writers(cluster: Cluster) -> None:
    cluster.database.delay(0.0)
    work = Work(
        "register",
        [f"hot{number}" for number in range(3)],
        threads=4,
        set_share=0.3,
        drop_share=0.1,
        replace_share=0.1,
        remove_share=0.1,
        pause_s=0.002,
    )
    journal = run(cluster, work, each=1)
    assert_legal(journal.writes, journal.reads, Rules(other_node_s=LAG_S))
