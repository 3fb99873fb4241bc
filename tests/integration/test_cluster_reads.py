"""Reads in a cluster of three nodes: one load per key, final answers, mirrors."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import pytest

from kamacache.errors import LoadError
from tests.cluster_app import SHORT_MIRROR_TTL_S
from tests.cluster_nodes import Cluster, shared_cluster
from tests.history import now

pytestmark = pytest.mark.integration

WaitUntil = Callable[..., None]
TTL_S = 3.0


@pytest.fixture(scope="module")
def cluster(shm_root: Path, environment: None) -> Iterator[Cluster]:
    with shared_cluster(shm_root) as cluster:
        yield cluster


def test_one_load_for_all_threads_of_all_processes_of_all_nodes(cluster: Cluster) -> None:
    cluster.database.delay(0.3)
    try:
        with cluster.drivers(4) as drivers:
            for owner in cluster.nodes:
                key = cluster.key_of(owner, "flight")
                at_s = now() + 0.3
                for driver in drivers:
                    driver.ask_call("scores", "get", key, threads=16, at_s=at_s)
                answers = [answer for driver in drivers for answer in driver.answers()]
                assert [answer.good() for answer in answers] == [f"v-{key}"] * 192
                loads = cluster.database.loads(key)
                assert [load.node for load in loads] == [owner.address]
                # That they did ask at one time, all of them before the load was over.
                assert min(answer.ended_s for answer in answers) > loads[0].began_s + 0.3
                asked_before = [a for a in answers if a.began_s < loads[0].began_s + 0.3]
                assert len(asked_before) > 100
    finally:
        cluster.database.delay(0)


def test_one_load_for_tasks_and_async_getters(cluster: Cluster) -> None:
    cluster.database.delay(0.3)
    try:
        with cluster.drivers(1) as drivers:
            for owner in cluster.nodes:
                key = cluster.key_of(owner, "aflight")
                at_s = now() + 0.2
                for driver in drivers:
                    driver.ask_call("ascores", "aget", key, tasks=32, at_s=at_s)
                answers = [answer for driver in drivers for answer in driver.answers()]
                assert [answer.good() for answer in answers] == [f"v-{key}"] * 96
                assert [load.node for load in cluster.database.loads(key)] == [owner.address]
    finally:
        cluster.database.delay(0)


def test_one_load_where_batches_of_all_nodes_overlap(cluster: Cluster) -> None:
    keys = [f"batch-{number}" for number in range(60)]
    cluster.database.delay(0.2)
    try:
        with ThreadPoolExecutor(6) as threads:
            asked = [
                threads.submit(node.group(name).get_many, keys)
                for node in cluster.nodes
                for name in ("scores", "batch")
            ]
            for answer in asked:
                assert answer.result(20) == {key: f"v-{key}" for key in keys}
    finally:
        cluster.database.delay(0)
    for name in ("scores", "batch"):
        loads = cluster.database.loads(group=name)
        found = {load.key: load.node for load in loads if load.key in keys}
        assert found == {key: cluster.owner(key).address for key in keys}
        assert sum(load.key in keys for load in loads) == len(keys)


def test_not_found_at_the_owner_is_final(cluster: Cluster) -> None:
    for owner in cluster.nodes:
        key = cluster.key_of(owner, "none")
        for node in cluster.others(owner):
            assert node.group().get(key) is None
        assert owner.group().get(key) is None
        assert cluster.load_count(key) == 1


def test_error_of_a_remote_getter_arrives_with_its_message_and_is_loaded_once(
    cluster: Cluster,
) -> None:
    for owner in cluster.nodes:
        key = cluster.key_of(owner, "bad")
        for turn, node in enumerate(cluster.others(owner), 1):
            with pytest.raises(LoadError) as caught:
                node.group().get(key)
            assert f"the database says no to {key}" in str(caught.value)
            assert caught.value.cause_type == "RuntimeError"
            assert caught.value.key == key.encode()
            assert cluster.load_count(key) == turn  # an error is not kept, nor loaded a second time
            assert {load.node for load in cluster.database.loads(key)} == {owner.address}


def test_batches_join_values_misses_and_errors_of_all_owners(cluster: Cluster) -> None:
    asker = cluster.nodes[0]
    good = [key for node in cluster.nodes for key in islice(cluster.keys_of(node, "join"), 5)]
    none = [cluster.key_of(node, "none-join") for node in cluster.nodes]
    assert asker.group().get_many([*good, *none]) == {key: f"v-{key}" for key in good}
    bad = cluster.key_of(cluster.nodes[2], "bad-join")
    more = [key for node in cluster.nodes for key in islice(cluster.keys_of(node, "more"), 5)]
    with pytest.raises(LoadError) as caught:
        asker.group().get_many([*more, bad])
    assert f"the database says no to {bad}" in str(caught.value)
    assert asker.group().get_many(more) == {key: f"v-{key}" for key in more}
    for key in (*good, *none, *more, bad):
        assert cluster.load_count(key) == 1, key


def test_batches_larger_than_a_message_come_whole(cluster: Cluster) -> None:
    owner, asker = cluster.nodes[1], cluster.nodes[2]
    keys = list(islice(cluster.keys_of(owner, "large"), 150))
    items = {key: f"{key} " + "x" * 10_000 for key in keys}
    cluster.nodes[0].group("plain").set_many(items)
    assert asker.group("plain").get_many(keys) == items


def test_mirror_answers_from_memory_until_its_time_is_over(
    cluster: Cluster, wait_until: WaitUntil
) -> None:
    owner, asker = cluster.nodes[0], cluster.nodes[1]
    key = cluster.key_of(owner, "mirrored")
    group = asker.group("short")
    assert group.get(key) == f"v-{key}"
    kept_s = now()
    assert group.in_memory(key)
    while now() - kept_s < SHORT_MIRROR_TTL_S / 2:
        assert group.get(key) == f"v-{key}"
    wait_until(lambda: not group.in_memory(key), SHORT_MIRROR_TTL_S + 1)
    assert now() - kept_s > SHORT_MIRROR_TTL_S / 2
    assert group.get(key) == f"v-{key}"
    assert cluster.load_count(key) == 1


def test_ttl_of_a_key_travels_to_its_mirrors(cluster: Cluster, wait_until: WaitUntil) -> None:
    owner, writer, reader = cluster.nodes
    key = cluster.key_of(owner, "timed")
    writer.group("plain").set(key, "short-lived", ttl_s=TTL_S)
    set_s = now()
    while now() - set_s < 0.5:
        for node in cluster.nodes:
            assert node.group("plain").get(key) == "short-lived"
        time.sleep(0.02)
    wait_until(lambda: now() - set_s > TTL_S)
    for node in (owner, reader, writer):
        assert node.group("plain").get(key) is None
