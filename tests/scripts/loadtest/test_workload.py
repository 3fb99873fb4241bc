"""Requests: kinds in their proportion, keys in their order, the same for the same seed."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from scripts.loadtest.limits import BLOCK_OPERATIONS_MAX, BLOCK_OPERATIONS_MIN
from scripts.loadtest.operations import DELETE, READ, WRITE, Mix
from scripts.loadtest.popularity import Uniform
from scripts.loadtest.workload import Drawn, KeyNames, Traced, Workload

READS = Mix(1, 0, 0)


def workload(mix: Mix = READS, batch: int = 1, keys: int = 1000, seed: int = 1) -> Workload:
    source = Drawn(Uniform(keys, np.random.default_rng(seed)), KeyNames(b"k:"))
    return Workload(source, mix, batch, random=np.random.default_rng(seed))


def traced(keys: list[bytes], *, again: bool = False, batch: int = 1) -> Workload:
    return Workload(
        Traced(keys, b"", again=again), Mix(1, 0, 0), batch, random=np.random.default_rng(1)
    )


def test_names_are_prefix_and_ten_digits() -> None:
    names = KeyNames(b"user:").names(np.array([0, 7, 99_999, 100_000, 9_999_999_999]))
    assert names == [
        b"user:0000000000",
        b"user:0000000007",
        b"user:0000099999",
        b"user:0000100000",
        b"user:9999999999",
    ]
    assert KeyNames(b"").names(np.array([3])) == [b"0000000003"]
    with pytest.raises(ValueError, match="limit is 1014"):
        KeyNames(b"x" * 1015)


def test_kinds_come_in_their_proportion() -> None:
    work = workload(Mix(70, 20, 10))
    kinds = [kind for step in range(20) for kind, _ in work.block(step * 0.001)]
    assert kinds.count(READ) / len(kinds) == pytest.approx(0.7, abs=0.02)
    assert kinds.count(WRITE) / len(kinds) == pytest.approx(0.2, abs=0.02)
    assert kinds.count(DELETE) / len(kinds) == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize("mix", [Mix(1, 0, 0), Mix(0, 1, 0), Mix(0, 0, 5)])
def test_a_single_kind_comes_alone(mix: Mix) -> None:
    expected = next(kind for kind, weight in enumerate(mix) if weight)
    assert {kind for kind, _ in workload(mix).block(0.0)} == {expected}


def test_same_seed_same_requests() -> None:
    first, second = (workload(Mix(5, 5, 1), 3), workload(Mix(5, 5, 1), 3))
    assert first.block(0.0) == second.block(0.0)
    assert workload(seed=2).block(0.0) != workload(seed=3).block(0.0)


def test_keys_of_a_batch_are_distinct() -> None:
    for _, keys in workload(batch=8, keys=5).block(0.0):
        assert isinstance(keys, list)
        assert 1 <= len(keys) == len(set(keys)) <= 5


def test_blocks_grow_with_the_pace_and_shrink_with_it() -> None:
    work = workload()
    assert len(work.block(0.0)) == BLOCK_OPERATIONS_MIN
    quick = [len(work.block(step * 0.001)) for step in range(1, 20)]
    assert quick[-1] == BLOCK_OPERATIONS_MAX
    slow = [len(work.block(float(step))) for step in range(1, 20)]
    assert slow[-1] == BLOCK_OPERATIONS_MIN


def test_trace_comes_once_in_its_order() -> None:
    given = [b"%d" % number for number in range(100)]
    work = traced(given)
    taken = []
    while block := work.block(0.0):
        taken += [keys for _, keys in block]
    assert taken == given
    assert work.block(0.0) == []


def test_trace_begins_anew_where_it_is_to() -> None:
    taken = traced([b"a", b"b", b"c"], again=True)
    keys = [keys for _ in range(3) for _, keys in taken.block(0.0)]
    assert keys[:6] == [b"a", b"b", b"c", b"a", b"b", b"c"]


def test_trace_is_cut_into_batches() -> None:
    work = traced([b"a", b"b", b"b", b"c", b"d"], batch=2)
    assert [keys for _, keys in work.block(0.0)] == [[b"a", b"b"], [b"b", b"c"], [b"d"]]


def test_threads_share_requests_without_loss() -> None:
    given = [b"%d" % number for number in range(20_000)]
    operations = traced(given).operations(lambda: 0.0)
    taken: list[list[bytes]] = [[] for _ in range(4)]

    def take(mine: list[bytes]) -> None:
        for _, keys in operations:
            assert isinstance(keys, bytes)
            mine.append(keys)

    threads = [threading.Thread(target=take, args=(mine,)) for mine in taken]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(key for mine in taken for key in mine) == sorted(given)
