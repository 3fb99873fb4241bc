"""/metrics of nodes of a cluster: what each counts of the other, and how long it is owed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import kamacache
from tests.cluster_nodes import Cluster, ClusterNode, shared_cluster
from tests.scraping import Scrape, fresh

pytestmark = pytest.mark.integration

WaitUntil = Callable[..., None]
KEYS = 30


@pytest.fixture(scope="module")
def cluster(shm_root: Path, environment: None) -> Iterator[Cluster]:
    arguments = ("--warm-restart-max-downtime", "0")
    with shared_cluster(shm_root, 2, arguments=arguments) as cluster:
        yield cluster


def metrics(node: ClusterNode) -> Scrape:
    return fresh(node.run_dir)


def test_calls_to_a_peer_are_counted_by_its_address(
    cluster: Cluster, wait_until: WaitUntil
) -> None:
    one, two = cluster.nodes
    before = metrics(one)
    keys = [key for key, _ in zip(cluster.keys_of(two, "peer"), range(KEYS), strict=False)]
    for key in keys:
        assert one.group().get(key) == f"v-{key}"
    with pytest.raises(kamacache.LoadError):
        one.group().get(cluster.key_of(two, "bad-peer"))
    # What the worker of one keeps of them is published once a second.
    puts = "kamacache_shard_mirror_puts_total"
    wait_until(lambda: metrics(one).of(puts) == before.of(puts) + KEYS, 10)
    after = metrics(one)

    def grew(name: str, **labels: str) -> float:
        return after.of(name, **labels) - before.of(name, **labels)

    assert grew("kamacache_fetches_total", group="scores") == KEYS + 1
    assert grew("kamacache_fetch_errors_total", group="scores") == 1
    assert grew("kamacache_shard_mirror_bytes", group="scores") > KEYS * 20
    assert grew("kamacache_loads_total", group="scores") == 0
    assert grew("kamacache_peer_calls_total", peer=two.address) >= KEYS
    assert grew("kamacache_peer_call_duration_seconds_count", peer=two.address) >= KEYS
    assert grew("kamacache_peer_call_errors_total", peer=two.address) == 1
    assert grew("kamacache_peer_call_errors_total", peer=two.address, reason="failure") == 1
    assert after.of("kamacache_peer_links", peer=two.address, state="usable") == one.workers
    assert not after.has("kamacache_peer_links", peer=one.address)
    assert after["kamacache_ring_members"] == 2
    assert after["kamacache_ring_own_share_ratio"] == pytest.approx(0.5, abs=0.05)
    assert after["kamacache_grpc_peer_streams"] == two.workers
    told = metrics(two)
    assert told.of("kamacache_loads_total", group="scores") >= KEYS
    # What the owner has, it does not load again, and what it is asked for is none of its gets.
    stored = cluster.key_of(two, "stored")
    two.group().set(stored, "there")
    assert one.group().get(stored) == "there"
    hits = "kamacache_peer_hits_total"
    wait_until(lambda: metrics(two)[hits] == told[hits] + 1)
    later = metrics(two)
    for name in ("kamacache_loads_total", "kamacache_gets_total", "kamacache_hits_total"):
        assert later[name] == told[name]


def test_what_one_node_tells_the_other_has_heard(cluster: Cluster, wait_until: WaitUntil) -> None:
    one, two = cluster.nodes
    sent = "kamacache_invalidations_sent_total"
    received = "kamacache_worker_invalidations_received_total"
    before = metrics(one).of(sent, peer=two.address), metrics(two)[received]
    keys = [key for key, _ in zip(cluster.keys_of(one, "told"), range(KEYS), strict=False)]
    for key in keys:
        one.group().set(key, "new")
    wait_until(lambda: metrics(two)[received] == before[1] + KEYS, what="invalidations arrive")
    assert metrics(one).of(sent, peer=two.address) == before[0] + KEYS
    wait_until(lambda: metrics(one).of("kamacache_invalidations_pending", peer=two.address) == 0)
    assert metrics(one).of("kamacache_invalidation_lag_seconds", peer=two.address) == 0


def test_a_peer_that_hangs_is_down_and_what_it_is_owed_grows_old(
    cluster: Cluster, wait_until: WaitUntil
) -> None:
    one, two = cluster.nodes
    two.hang()
    try:
        cluster.await_unlinked(two)
        key = cluster.key_of(one, "owed")
        one.group().set(key, "new")
        told = metrics(one)
        assert told.of("kamacache_peer_links", peer=two.address, state="down") == one.workers
        assert told.of("kamacache_peer_breaker_failures", peer=two.address) >= 1
        assert told.of("kamacache_invalidations_pending", peer=two.address) == 1
        lag_s = told.of("kamacache_invalidation_lag_seconds", peer=two.address)
        assert lag_s > 0
        assert metrics(one).of("kamacache_invalidation_lag_seconds", peer=two.address) > lag_s
    finally:
        two.go_on()
    cluster.await_linked()
    wait_until(lambda: metrics(one).of("kamacache_invalidation_lag_seconds", peer=two.address) == 0)
