"""Three nodes in network namespaces: links are cut silently and healed, writes on both sides."""

from __future__ import annotations

import time
from itertools import islice

import pytest

from kamacache.errors import KamaCacheError
from kamacache.limits import PEER_RETRY_MAX_S, PEER_SILENCE_S
from tests.cluster_app import SHORT_MIRROR_TTL_S
from tests.cluster_nodes import Cluster
from tests.history import now
from tests.netns.network import Network

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]

BUSY_S = 1.5  # what a machine with other work adds
TIMEOUT_S = 5.0
AGREED_S = PEER_RETRY_MAX_S + SHORT_MIRROR_TTL_S + BUSY_S  # after a link was healed


def test_both_sides_serve_and_agree_after_the_heal(cluster: Cluster, network: Network) -> None:
    """No value older than an acknowledged write once the mirror TTL has passed."""
    alone, *rest = cluster.nodes
    keys = [key for node in cluster.nodes for key in islice(cluster.keys_of(node, "part"), 8)]
    for key in keys:
        cluster.database.write(key, b"1")
        rest[0].group("short").set(key, "1")
        assert alone.group("short").get(key) == "1"
    network.isolate(0)
    cut_s = now()
    cluster.await_links({0: 0, 1: 2, 2: 2}, PEER_SILENCE_S + BUSY_S + 1)
    # One side writes half of the keys, the other one the others.
    newest = {}
    for number, key in enumerate(keys):
        writer = alone if number % 2 else rest[number // 2 % 2]
        newest[key] = f"2 {key}"
        cluster.database.write(key, newest[key].encode())
        began_s = now()
        if number % 3:
            writer.group("short").set(key, newest[key], TIMEOUT_S)
        else:
            writer.group("short").delete(key, TIMEOUT_S)
        assert writer.group("short").get(key, TIMEOUT_S) == newest[key]
        assert now() - began_s < BUSY_S
    # What a side has no link for is served, or loaded, all the same.
    for node in cluster.nodes:
        for key in keys:
            assert node.group("short").get(key, TIMEOUT_S) in ("1", newest[key])
    assert now() - cut_s < 15
    network.rejoin(0)
    healed_s = now()
    cluster.await_links({0: 4, 1: 4, 2: 4}, 10)
    time.sleep(max(0.0, healed_s + AGREED_S - now()))
    for node in cluster.nodes:
        for key in keys:
            assert node.group("short").get(key) == newest[key], f"{node}: {key}"


def test_a_mirror_behind_a_cut_link_is_as_old_as_its_time_at_most(
    cluster: Cluster, network: Network
) -> None:
    owner, writer, reader = cluster.nodes
    keys = list(islice(cluster.keys_of(owner, "behind"), 10))
    for key in keys:
        cluster.database.write(key, b"1")
        writer.group("short").set(key, "1")
    for key in keys:
        assert reader.group("short").get(key) == "1"
    read_s = now()
    network.cut_way(0, 2)  # the owner tells the reader nothing
    for key in keys:
        cluster.database.write(key, b"2")
        writer.group("short").set(key, "2")
    while now() - read_s < SHORT_MIRROR_TTL_S + PEER_SILENCE_S + BUSY_S:
        time.sleep(0.02)
    for key in keys:  # it cannot ask the owner, and may not answer with what it had
        assert reader.group("short").get(key) == "2"
    network.heal(0, 2)
    healed_s = now()
    cluster.await_links({0: 4, 1: 4, 2: 4}, 10)
    time.sleep(max(0.0, healed_s + AGREED_S - now()))
    for key in keys:
        assert reader.group("short").get(key) == "2"


def test_a_node_cut_off_and_written_to_tells_a_late_owner_nothing_old(
    cluster: Cluster, network: Network
) -> None:
    """A write on its way to an owner when the link fails is not applied there after a newer one."""
    owner, writer, other = cluster.nodes
    keys = list(islice(cluster.keys_of(owner, "late"), 6))
    network.cut_way(0, 1)  # the owner gets what the writer sends; its answers are lost
    for key in keys:
        try:
            writer.group("plain").set(key, "from the writer", 3.0)
        except KamaCacheError:
            continue
    for key in keys:
        other.group("plain").set(key, "newer")
    network.heal(0, 1)
    cluster.await_links({0: 4, 1: 4, 2: 4}, 10)
    time.sleep(AGREED_S)
    seen = {node.number: [node.group("plain").get(key) for key in keys] for node in cluster.nodes}
    assert seen == {number: ["newer"] * len(keys) for number in range(3)}


def test_a_node_reads_what_it_wrote_by_way_of_a_third(cluster: Cluster, network: Network) -> None:
    """Its own link to the owner is back before the link of the node that stood in for the owner."""
    writer, owner, third = cluster.nodes
    keys = [
        key
        for key in islice(cluster.keys_of(owner, "third"), 60)
        if list(cluster.ring.owners(key.encode()))[1] == third.address
    ][:10]
    group = writer.group("short")
    for key in keys:
        cluster.database.write(key, b"old")
        owner.group("short").set(key, "old")
    network.isolate(1)
    cluster.await_links({0: 2, 1: 0, 2: 2}, PEER_SILENCE_S + BUSY_S + 1)
    for key in keys:
        cluster.database.write(key, b"new")
        group.set(key, "new")
    network.heal(0, 1)
    cluster.await_links({0: 4, 1: 2, 2: 2}, 10)
    back_s = now()
    while now() - back_s < 2 * SHORT_MIRROR_TTL_S:
        assert [group.get(key) for key in keys] == ["new"] * len(keys)
