"""Workers and fronts of linked nodes die one by one, while all nodes read and write."""

from __future__ import annotations

import random
import time

import pytest

from kamacache.limits import PEER_SILENCE_S
from tests.cluster_app import SHORT_MIRROR_TTL_S
from tests.cluster_driver import Work
from tests.cluster_nodes import MakeCluster
from tests.history import Cut, Journal, Rules, assert_legal, now, worst_lag_s

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]

BUSY_S = 1.5  # what a machine with other work adds
TIMEOUT_S = 5.0
WORKERS = ("worker 0", "worker 1")


@pytest.mark.parametrize(
    "roles",
    [
        pytest.param(WORKERS, marks=pytest.mark.soak, id="workers"),
        pytest.param(("front 0",), marks=pytest.mark.soak, id="front"),
        pytest.param((*WORKERS, "front 0"), id="workers and front"),
    ],
)
def test_kill_of_roles_gives_no_wrong_value(
    make_cluster: MakeCluster, roles: tuple[str, ...]
) -> None:
    cluster = make_cluster()
    cluster.start()
    cluster.database.delay(0.003)
    seed = random.randrange(1 << 32)
    print("seed", seed)  # noqa: T201
    draw = random.Random(seed)
    journal = Journal()
    keys = [f"r{number}" for number in range(15)]
    work = Work("register", keys, threads=2, tasks=1, timeout_s=TIMEOUT_S, pause_s=0.004)
    with cluster.drivers(1) as drivers:
        for driver in drivers:
            driver.begin(work)
        time.sleep(1)
        victims = [(node, role) for node in cluster.nodes for role in roles]
        began_s = now()
        draw.shuffle(victims)
        for node, role in victims:
            assert node.process is not None
            process = node.process.role(role)
            if process is not None:
                process.kill()
            time.sleep(draw.choice((0.1, 0.2, 0.5)))  # no synchronisation: what varies
        cluster.await_linked()
        ended_s = now()
        time.sleep(SHORT_MIRROR_TTL_S + BUSY_S + 1)  # so that there is a time that is judged
        found = [driver.finish(journal) for driver in drivers]
    lag_s = worst_lag_s(journal.writes, journal.reads)
    errors = [error for one in found for error in one.errors]
    print(  # noqa: T201
        f"{len(journal.reads)} reads, {len(journal.writes)} writes, {len(errors)} errors, "
        f"lag {lag_s:.3f} s: {sorted({error['kind'] for error in errors})}"
    )
    # A front's death is a cut link, and another node stands in for its node meanwhile. A worker may
    # die with what it had to tell: other nodes' mirrors then live out their time.
    cuts = (Cut(began_s, ended_s, SHORT_MIRROR_TTL_S + BUSY_S),)
    lag_max_s = SHORT_MIRROR_TTL_S + PEER_SILENCE_S + BUSY_S
    rules = Rules(other_node_s=lag_max_s, unsure_s=TIMEOUT_S, cuts=cuts)
    assert_legal(journal.writes, journal.reads, rules)
    assert all(one.operations > 100 for one in found)
    assert all(error["took_s"] < TIMEOUT_S + BUSY_S for error in errors)
    # A caller has an error where the worker that it had asked died, and not for long after.
    assert len(errors) <= 2 * len(victims) * work.threads, errors
