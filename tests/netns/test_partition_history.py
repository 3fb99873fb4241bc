"""Readers and writers on nodes whose links are cut in all ways and healed: a legal history."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from tests.cluster_app import SHORT_MIRROR_TTL_S
from tests.cluster_driver import Work
from tests.cluster_nodes import Cluster
from tests.history import Cut, Journal, Rules, assert_legal, now
from tests.netns.network import Network

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]

BUSY_S = 1.5  # what a machine with other work adds
TIMEOUT_S = 5.0


def test_history_through_cuts_of_all_kinds_is_legal(cluster: Cluster, network: Network) -> None:
    cluster.database.delay(0.003)
    work = Work(
        "register", [f"r{number}" for number in range(12)], timeout_s=TIMEOUT_S, pause_s=0.004
    )
    journal = Journal()
    cuts = []
    with cluster.drivers(2) as drivers:
        for driver in drivers:
            driver.begin(work)
        time.sleep(1)
        faults: tuple[Callable[[], None], ...] = (
            lambda: network.isolate(1),
            lambda: network.cut(0, 2),
            lambda: network.unplug(2),
        )
        for cut in faults:
            began_s = now()
            cut()
            time.sleep(2.5)  # long enough for all to notice
            for number in range(3):
                network.rejoin(number)
            network.plug(2)
            cluster.await_links({0: 4, 1: 4, 2: 4}, 10)
            # Noticed as late as a silent link is; whole again when links are up and mirrors over.
            cuts.append(Cut(began_s - 0.1, now(), SHORT_MIRROR_TTL_S + BUSY_S))
            time.sleep(SHORT_MIRROR_TTL_S + BUSY_S + 1)  # a time in which all is judged strictly
        found = [driver.finish(journal) for driver in drivers]
    rules = Rules(other_node_s=0.8, unsure_s=TIMEOUT_S, cuts=tuple(cuts))
    assert_legal(journal.writes, journal.reads, rules)
    kinds = {error["kind"] for one in found for error in one.errors}
    assert kinds <= {"NodeUnavailableError", "DeadlineExceededError"}, kinds
    for one in found:
        assert one.operations > 100
        assert one.errors_count <= 4 * len(faults) * work.threads
        assert one.slowest_s < TIMEOUT_S + BUSY_S
        assert [error for error in one.errors if error["took_s"] > TIMEOUT_S + BUSY_S] == []
