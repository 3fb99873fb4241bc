"""Networks for tests: skipped, with the reason, where this machine does not allow them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster_nodes import make_cluster
from tests.netns.network import Network, NetworkRefusedError

__all__ = ["make_cluster", "network"]


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
