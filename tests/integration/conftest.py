"""What the tests on real processes share."""

from tests.attached_estate import detached, estate
from tests.cluster_nodes import make_cluster

__all__ = ["detached", "estate", "make_cluster"]
