"""Networks for tests: skipped, with the reason, where this machine does not allow them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster_nodes import Cluster, MakeCluster, make_cluster
from tests.netns.network import Network, NetworkRefusedError

__all__ = ["cluster", "make_cluster", "network"]


@pytest.fixture
def network() -> Iterator[Network]:
    """Three namespaces on one bridge."""
    made = Network(3)
    try:
        made.__enter__()
    except NetworkRefusedError as error:
        pytest.skip(f"network namespaces are not allowed here: {error}")
    try:
        yield made
    finally:
        made.__exit__()


@pytest.fixture
def cluster(make_cluster: MakeCluster, network: Network) -> Cluster:
    """Three linked nodes, each in a namespace of its own."""
    made = make_cluster(3, hosts=network.hosts, arguments=["--insecure"])
    for node in made.nodes:
        node.prefix = network.prefix(node.number)
    made.start()
    return made
