"""The model of many cores: what saturates first follows from the CPU by role."""

from __future__ import annotations

import json

import cores_model
import pytest
from cores_model import Workload

ROLES = {
    "hit": {"client": 2.0, "worker": 0.0, "front": 0.0},
    "set": {"client": 20.0, "worker": 20.0, "front": 0.0},
    "front": {"client": 100.0, "worker": 0.0, "front": 50.0},
}


def test_hits_are_limited_by_cores_alone() -> None:
    (row,) = cores_model.table(ROLES, [16], [Workload("hits", {"hit": 1.0})])
    assert row.first == "cores"
    assert row.requests_per_s == pytest.approx(16e6 / 2)
    assert (row.workers_needed, row.fronts_needed) == (1, 1)


def test_fast_hits_are_limited_by_memory() -> None:
    roles = {"hit": {"client": 0.01}}
    (row,) = cores_model.table(roles, [64], [Workload("hits", {"hit": 1.0})])
    assert row.first == "memory"
    expected = cores_model.MEMORY_BYTES_PER_S_MAX / cores_model.HIT_BYTES
    assert row.requests_per_s == pytest.approx(expected)


def test_sets_are_limited_by_the_busiest_worker_on_many_cores() -> None:
    workload = Workload("sets", {"set": 1.0})
    small, large = cores_model.table(ROLES, [2, 64], [workload])
    assert small.first == "cores"
    assert large.first == "the busiest worker"
    assert large.requests_per_s == pytest.approx(1e6 / 20 / cores_model.busiest_share(8))
    assert large.workers_needed is None, "the hottest key's worker is busy however many there are"


def test_workers_needed_are_enough_and_one_less_is_not() -> None:
    used = cores_model.mixed(ROLES, Workload("sets", {"set": 1.0}))
    _, workers = cores_model.needed(used, 16)
    assert workers is not None
    for count, enough in ((workers, True), (workers - 1, False)):
        limits = cores_model.limits_of(used, 16, count, 1)
        assert (limits["the busiest worker"] >= limits["cores"]) is enough


def test_clients_elsewhere_cost_this_machine_nothing() -> None:
    workload = Workload("front", {"front": 1.0}, clients_elsewhere=True)
    (row,) = cores_model.table(ROLES, [8], [workload])
    assert row.first == "fronts"
    assert row.limits["cores"] == pytest.approx(8e6 / 50)
    assert row.requests_per_s == pytest.approx(4e6 / 50)
    assert row.fronts_needed == 8


def test_mix_is_weighted_and_unmeasured_kinds_are_left_out() -> None:
    mix = Workload("mix", {"hit": 0.9, "set": 0.1})
    used = cores_model.mixed(ROLES, mix)
    assert used["client"] == pytest.approx(0.9 * 2 + 0.1 * 20)
    rows = cores_model.table(ROLES, [8], [mix, Workload("other", {"unmeasured": 1.0})])
    assert [row.workload for row in rows] == ["mix"]
    json.dumps([row.as_dict() for row in rows], allow_nan=False)
    assert "mix" in cores_model.as_text(rows)
