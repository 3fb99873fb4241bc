"""Writes in a cluster of three nodes: applied at the owner, seen by all, never undone by a load."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import pytest

from kamacache.errors import ValueTooLargeError
from tests.cluster_app import MIRROR_TTL_S, SHORT_MIRROR_TTL_S
from tests.cluster_nodes import Cluster, ClusterNode, shared_cluster
from tests.history import now

pytestmark = pytest.mark.integration

WaitUntil = Callable[..., None]
SEEN_MEDIAN_S = 0.1  # issue: third nodes see a write within 100 ms
SEEN_MAX_S = 2.0  # on a machine with other work; below the mirror TTL of the group asked
WRITES = 200


@pytest.fixture(scope="module")
def cluster(shm_root: Path, environment: None) -> Iterator[Cluster]:
    with shared_cluster(shm_root) as cluster:
        yield cluster


def seen_after_s(reader: ClusterNode, key: str, value: str | None, since_s: float) -> float:
    """Return when a node answered with a value for the first time, in seconds since ``since_s``."""
    group = reader.group("plain")
    while group.get(key) != value:
        assert now() - since_s < MIRROR_TTL_S + 5, f"{reader} never sees the write"
        time.sleep(0.001)
    return now() - since_s


def test_each_node_sees_what_any_node_sets_and_deletes(cluster: Cluster) -> None:
    turns = itertools.product(cluster.nodes, cluster.nodes)
    for turn, (owner, writer) in enumerate(turns):
        key = cluster.key_of(owner, f"set{turn}")
        for value in ("1", "2"):
            writer.group("plain").set(key, value)
            for reader in cluster.nodes:
                assert seen_after_s(reader, key, value, now()) < SEEN_MAX_S
        assert writer.group("plain").delete(key) is True
        for reader in cluster.nodes:
            assert seen_after_s(reader, key, None, now()) < SEEN_MAX_S


def test_delete_tells_whether_the_owner_had_it(cluster: Cluster) -> None:
    turns = itertools.product(cluster.nodes, cluster.nodes)
    for turn, (owner, deleter) in enumerate(turns):
        key = cluster.key_of(owner, f"delete{turn}")
        group = deleter.group("plain")
        assert group.delete(key) is False
        cluster.nodes[turn % 3].group("plain").set(key, "1")
        assert group.delete(key) is True
        assert group.delete(key) is False
        assert group.get(key) is None


def test_batches_of_writes_reach_all_owners_and_are_counted(cluster: Cluster) -> None:
    keys = [key for node in cluster.nodes for key in islice(cluster.keys_of(node, "many"), 50)]
    items = {key: f"1 {key}" for key in keys}
    writer, reader, deleter = cluster.nodes
    writer.group("plain").set_many(items)
    assert writer.group("plain").get_many(keys) == items
    assert reader.group("plain").get_many(keys) == items
    newer = {key: f"2 {key}" for key in keys[::2]}
    deleter.group("plain").set_many(newer)
    assert deleter.group("plain").get_many(keys) == {**items, **newer}
    for key, value in newer.items():
        assert seen_after_s(reader, key, value, now()) < SEEN_MAX_S
    assert deleter.group("plain").delete_many(keys[:40]) == 40
    assert deleter.group("plain").delete_many(keys) == len(keys) - 40
    assert deleter.group("plain").delete_many(keys) == 0
    assert deleter.group("plain").get_many(keys) == {}


def test_processes_of_a_node_read_what_one_of_them_wrote(cluster: Cluster) -> None:
    with cluster.drivers(1) as drivers:
        for driver, node in zip(drivers, cluster.nodes, strict=True):
            group = node.group("plain")
            for turn in range(60):
                owner = cluster.nodes[turn % 3]
                key = cluster.key_of(owner, f"ryw{turn % 6}")
                value = f"{node.number} {turn}"
                if turn % 2:
                    group.set(key, value)
                    assert driver.call("plain", "get", key).good() == value
                else:
                    assert driver.call("plain", "set", key, value).error is None
                    assert group.get(key) == value
                if turn % 5 == 0:
                    assert driver.call("plain", "delete", key).good() is True
                    assert group.get(key) is None


def test_third_nodes_see_a_write_within_100_ms(cluster: Cluster) -> None:
    seen_s = []
    draw = list(itertools.permutations(cluster.nodes))
    for turn in range(WRITES):
        owner, writer, reader = draw[turn % len(draw)]
        if turn % 4 == 3:
            writer = owner
        key = cluster.key_of(owner, f"seen{turn}")
        writer.group("plain").set(key, "old")
        # The invalidation of that may still be under way, and then no copy is kept.
        while not reader.group("plain").in_memory(key):
            assert reader.group("plain").get(key) == "old"
        if turn % 2:
            writer.group("plain").set(key, "new")
            seen_s.append(seen_after_s(reader, key, "new", now()))
        else:
            writer.group("plain").delete(key)
            seen_s.append(seen_after_s(reader, key, None, now()))
    median_s = statistics.median(seen_s)
    print(f"seen after (s): median {median_s:.4f}, max {max(seen_s):.4f}")  # noqa: T201
    assert median_s < SEEN_MEDIAN_S
    assert sorted(seen_s)[len(seen_s) * 9 // 10] < SEEN_MEDIAN_S  # what a busy machine leaves of it
    assert max(seen_s) < SEEN_MAX_S


def test_a_slow_load_never_overwrites_a_newer_write(cluster: Cluster) -> None:
    """The load reads the database before the write; it ends after it, and must leave no trace."""
    turns = itertools.product(cluster.nodes, cluster.nodes, cluster.nodes)
    for turn, (owner, asker, writer) in enumerate(turns):
        key = cluster.key_of(owner, f"gate-{turn}")
        cluster.database.write(key, b"old")
        with ThreadPoolExecutor(1) as threads:
            asked = threads.submit(asker.group().get, key)
            await_loads(cluster, key, 1)
            cluster.database.write(key, b"new")
            writer.group().set(key, "new")
            cluster.database.open_gate(key)
            assert asked.result(10) in ("old", "new")
        assert writer.group().get(key) == "new"
        for node in cluster.nodes:
            end_s = now() + SEEN_MAX_S
            while node.group().get(key) != "new":
                assert now() < end_s, f"{node} keeps what was loaded before the write"
        for node in cluster.nodes:
            assert node.group().get(key) == "new"


def test_a_slow_load_is_not_kept_after_a_delete(cluster: Cluster) -> None:
    turns = itertools.product(cluster.nodes, cluster.nodes, cluster.nodes)
    for turn, (owner, asker, deleter) in enumerate(turns):
        key = cluster.key_of(owner, f"gate-d{turn}")
        cluster.database.write(key, b"old")
        with ThreadPoolExecutor(1) as threads:
            asked = threads.submit(asker.group().get, key)
            await_loads(cluster, key, 1)
            cluster.database.write(key, b"new")
            deleter.group().delete(key)
            cluster.database.open_gate(key)
            assert asked.result(10) in ("old", "new")
        assert deleter.group().get(key) == "new"
        for node in cluster.nodes:
            end_s = now() + SEEN_MAX_S
            while node.group().get(key) != "new":
                assert now() < end_s, f"{node} keeps what was loaded before the delete"
        assert cluster.load_count(key) == 2


def await_loads(cluster: Cluster, key: str, count: int) -> None:
    end_s = now() + 10
    while cluster.load_count(key) < count:
        assert now() < end_s, f"{key} is not loaded"
        time.sleep(0.005)


def test_value_too_large_is_refused_before_it_travels(cluster: Cluster) -> None:
    for node in cluster.nodes:
        with pytest.raises(ValueTooLargeError) as caught:
            node.group("plain").set("large", "x" * 1_000_000)
        assert caught.value.value_bytes == 1_000_000


def test_a_write_that_nobody_tells_of_is_seen_when_the_mirrors_time_is_over(
    cluster: Cluster,
) -> None:
    """The reader's front, which takes invalidations, stands still."""
    owner, writer, reader = cluster.nodes
    assert reader.process is not None
    front = reader.process.role("front 0")
    assert front is not None
    group = reader.group("short")
    key = cluster.key_of(owner, "worst")
    cluster.database.write(key, b"old")
    writer.group("short").set(key, "old")
    front.suspend()
    try:
        assert group.get(key) == "old"
        assert group.in_memory(key)
        cluster.database.write(key, b"new")
        writer.group("short").set(key, "new")
        written_s = now()
        assert group.get(key) == "old"  # else this shows nothing
        while group.get(key) != "new":
            assert now() - written_s < SHORT_MIRROR_TTL_S + SEEN_MAX_S
            time.sleep(0.01)
        assert now() - written_s > SHORT_MIRROR_TTL_S / 4
    finally:
        front.resume()
        cluster.await_linked()
    assert group.get(key) == "new"
