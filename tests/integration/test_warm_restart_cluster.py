"""A node of a cluster comes back with its shards, and nobody reads what was replaced meanwhile.

Real nodes, and a group without a database, from which a lost value would come back unseen. Where it
is not certain that what was kept is the latest, the log says why.
"""

from __future__ import annotations

import random
import socket
import time
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import psutil
import pytest

from kamacache.limits import INVALIDATIONS_MAX, WARM_MARGIN_MS
from tests.cluster_driver import Work
from tests.cluster_nodes import Cluster, ClusterNode, MakeCluster, shared_cluster
from tests.history import Journal, Rules, assert_legal, now, worst_lag_s

pytestmark = pytest.mark.integration

WARM = ("--warm-restart-max-downtime", "60")
COLD = "cold start"
TIMEOUT_S = 5.0
LAG_S = 0.1 + 0.7  # the promise, and what a machine with other work adds; below the mirror TTL
KEYS = 400  # of each node


@pytest.fixture(scope="module")
def cluster(shm_root: Path, environment: None) -> Iterator[Cluster]:
    with shared_cluster(shm_root, arguments=WARM) as cluster:
        await_memory()
        yield cluster


def free_port() -> int:
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return int(trial.getsockname()[1])


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


def test_restart_under_writes_gives_no_stale_value(cluster: Cluster) -> None:
    node = cluster.nodes[1]
    keys = fill(cluster, "storm-kept")[node.address]

    def restart() -> list[Killed]:
        node.stop()
        time.sleep(0.4)  # away, while the others take its writes
        node.start()
        return []

    under_writes(cluster, restart)
    assert COLD not in lives(node)
    assert held(node, keys) >= 0.999 * len(keys)


@pytest.mark.soak
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


@pytest.mark.soak
def test_all_nodes_at_once_keep_what_they_have_where_all_is_told(cluster: Cluster) -> None:
    cluster.await_linked()
    await_memory()
    keys = fill(cluster, "at-once")
    before = {node.address: held(node, keys[node.address]) for node in cluster.nodes}
    time.sleep(0.5)  # for the last invalidations to be acknowledged
    for node in cluster.nodes:
        node.terminate()
    for node in cluster.nodes:
        node.await_end()
    for node in cluster.nodes:
        node.start(wait=False)
    for node in cluster.nodes:
        node.await_ready()
        assert COLD not in lives(node), lives(node)
        assert held(node, keys[node.address]) >= 0.999 * before[node.address]
    cluster.await_linked()


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_more_writes_than_a_peer_remembers_are_a_flush(cluster: Cluster) -> None:
    cluster.await_linked()
    await_memory()
    node, other, _ = cluster.nodes
    keys = fill(cluster, "many")[node.address]
    node.stop()
    cluster.await_unlinked(node)
    other.group("plain").set_many(dict.fromkeys(keys[:50], "after"))
    numbers = range(5 * INVALIDATIONS_MAX)  # which two nodes of two workers take
    for first in range(0, len(numbers), 4_000):
        batch = numbers[first : first + 4_000]
        other.group("plain").set_many({f"flood-{n}": "x" for n in batch}, timeout_s=60)
    node.start()
    assert COLD not in lives(node)
    assert held(node, keys) == 0  # its group was flushed
    cluster.await_linked()
    assert_everywhere(cluster, keys[:50], "after")


@pytest.mark.soak
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


@pytest.mark.soak
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


@pytest.mark.soak
def test_members_that_a_list_names_are_asked_and_those_that_came_and_went_cannot_be(
    make_cluster: MakeCluster,
) -> None:
    cluster = make_cluster(4, listed=True, arguments=WARM)
    node, other, third, guest = cluster.nodes
    api = f"127.0.0.1:{free_port()}"
    node.arguments = (*node.arguments, "--api", api)
    cluster.list_members(0, 1, 2)
    cluster.start(0, 1, 2)
    await_memory()
    keys = [f"listed-{number}" for number in range(300)]
    node.group("plain").set_many(dict.fromkeys(keys, "before"))
    kept = held(node, keys)
    node.stop()
    cluster.await_unlinked(node)
    node.start()
    assert COLD not in lives(node)
    assert held(node, keys) >= 0.999 * kept
    with urllib.request.urlopen(f"http://{api}/readyz", timeout=5) as answer:
        assert answer.status == 200

    node.stop()
    cluster.list_members(1, 2, 3)
    guest.start()
    cluster.await_links({1: 4, 2: 4})
    guest.group("plain").set_many(dict.fromkeys(keys, "after"))
    guest.kill()
    cluster.list_members(0, 1, 2)
    cluster.await_links({1: 2, 2: 2})
    node.start()
    assert "does not know all that it wrote meanwhile" in lives(node)
    assert held(node, keys) == 0
    assert third.alive
    assert other.alive


# -- under writes ---------------------------------------------------------------------------------


Killed = tuple[str, float]  # which node, and when


def work(prefix: str, seed: int) -> Work:
    keys = [f"{prefix}-{number}" for number in range(24)]
    return Work(
        "plain",
        keys,
        threads=2,
        stored=False,
        set_share=0.2,
        remove_share=0.05,
        timeout_s=TIMEOUT_S,
        pause_s=0.004,
        seed=seed,
    )


def under_writes(
    cluster: Cluster, restarts: Callable[[], list[Killed]], prefix: str = "storm"
) -> None:
    """Restart nodes while processes at all of them read and write; every value read was legal."""
    journal = Journal()
    with cluster.drivers(1) as drivers:
        for seed, driver in enumerate(drivers):
            driver.begin(work(prefix, seed))
        time.sleep(0.7)  # the time in which all work
        killed = restarts()
        time.sleep(1.0)  # and again
        found = [driver.finish(journal) for driver in drivers]
    assert min(one.operations for one in found) > 100
    assert len(journal.writes) > 100
    # Who is attached to a node that was killed may read its memory for 2 s more.
    reads = [
        read
        for read in journal.reads
        if not any(read.node == who and 0 < read.end - at_s < 2.2 for who, at_s in killed)
    ]
    lag_s = worst_lag_s(journal.writes, reads)
    print(f"{len(reads)} reads, {len(journal.writes)} writes, lag {lag_s:.3f} s")  # noqa: T201
    assert_legal(journal.writes, reads, Rules(other_node_s=LAG_S, unsure_s=TIMEOUT_S))


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_restarts_of_all_kinds_under_writes_give_no_stale_value(
    make_cluster: MakeCluster, stress_full: bool
) -> None:
    cluster = make_cluster(3, arguments=WARM)
    cluster.start()
    await_memory()
    draw = random.Random(7)
    log: list[str] = []

    def kill(node: ClusterNode) -> list[Killed]:
        at_s = now()
        node.kill()
        return [(node.address, at_s)]

    def one(node: ClusterNode) -> list[Killed]:
        node.stop()
        time.sleep(draw.uniform(0, 1))
        node.start()
        return []

    def two(node: ClusterNode) -> list[Killed]:
        other = draw.choice(cluster.others(node))
        node.terminate()
        other.terminate()
        node.await_end()
        other.await_end()
        node.start(wait=False)
        time.sleep(draw.uniform(0, 0.5))
        other.start()
        node.await_ready()
        return []

    def one_beside_a_kill(node: ClusterNode) -> list[Killed]:
        other = draw.choice(cluster.others(node))
        node.stop()
        time.sleep(draw.uniform(0, 0.5))
        killed = kill(other)
        node.start(wait=False)
        other.start()
        node.await_ready()
        return killed

    def killed_while_it_settles(node: ClusterNode) -> list[Killed]:
        node.stop()
        node.start(wait=False)
        time.sleep(draw.uniform(0.2, 1.2))
        killed = kill(node)
        node.start()
        return killed

    def worker_killed_meanwhile(node: ClusterNode) -> list[Killed]:
        other = draw.choice(cluster.others(node))
        node.stop()
        assert other.process is not None
        worker = other.process.role("worker 1")
        if worker is not None:
            worker.kill()
        node.start()
        return []

    def rolling(node: ClusterNode) -> list[Killed]:
        return [killed for each in cluster.nodes for killed in one(each)]

    kinds = (one, two, one_beside_a_kill, killed_while_it_settles, worker_killed_meanwhile, rolling)
    for round_ in range(18 if stress_full else 6):
        kind = kinds[round_ % len(kinds)]
        node = draw.choice(cluster.nodes)
        under_writes(cluster, partial(kind, node), f"storm{round_}")
        log.append(f"{kind.__name__}: {lives(node).count('settled')} settled")
        cluster.await_linked()
    print("\n".join(log))  # noqa: T201
