"""Getters that ask other groups of the same worker: no deadlock, cycles named."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from kamacache.errors import DeadlineExceededError, LoadError
from kamacache.limits import LOAD_DEPTH_MAX
from tests.worker.harness import Gate, Running, in_threads


def chain_of_groups(worker: Running, count: int) -> None:
    """g0 asks g1 asks g2 ..., each with one thread per depth."""

    def getter_of(level: int) -> Any:
        def getter(key: str) -> bytes:
            if level + 1 == count:
                return key.encode()
            value = worker.get(key, group=f"g{level + 1}")
            assert value is not None
            return b"%d" % level + value

        return getter

    for level in range(count):
        worker.group(getter_of(level), name=f"g{level}", load_threads=1)


def test_the_deepest_nesting_works_with_one_thread_per_depth(worker: Running) -> None:
    chain_of_groups(worker, LOAD_DEPTH_MAX + 1)
    assert worker.get("k", group="g0") == b"0123k"


def test_one_level_more_is_a_load_error(worker: Running) -> None:
    chain_of_groups(worker, LOAD_DEPTH_MAX + 2)
    with pytest.raises(LoadError) as caught:
        worker.get("k", group="g0")
    assert caught.value.cause_type == "depth"


def test_many_nested_chains_at_once_come_to_an_end(worker: Running) -> None:
    chain_of_groups(worker, LOAD_DEPTH_MAX + 1)
    results = in_threads(24, lambda i: worker.get(f"k{i % 6}", group=f"g{i % 3}", timeout=15))
    assert [type(result) for result in results] == [bytes] * 24


def test_one_group_that_asks_itself_for_other_keys_works(worker: Running) -> None:
    def getter(key: str) -> bytes:
        level = int(key)
        return b"end" if not level else (worker.get(str(level - 1)) or b"") + b"."

    worker.group(getter, load_threads=1)
    assert worker.get("4") == b"end...."


def test_a_key_in_its_own_chain_fails_at_once(worker: Running) -> None:
    worker.group(lambda key: worker.get(key, group="b"), name="a")
    worker.group(lambda key: worker.get(key, group="a"), name="b")
    began = time.monotonic()
    with pytest.raises(LoadError) as caught:
        worker.get("k", group="a")
    assert caught.value.cause_type == "cycle"
    assert time.monotonic() - began < 2


def test_two_loads_that_wait_for_each_other_end_at_the_deadline(worker: Running) -> None:
    both = threading.Barrier(2)

    def getter(other: str) -> Any:
        def get(key: str) -> bytes | None:
            both.wait(10)
            return worker.get(key, group=other)

        return get

    worker.group(getter("b"), name="a", load_timeout_s=0.5)
    worker.group(getter("a"), name="b", load_timeout_s=0.5)
    results = in_threads(2, lambda i: worker.get("k", group="ab"[i], timeout=10))
    assert {type(result) for result in results} <= {LoadError, DeadlineExceededError}
    assert not worker.groups["a"].flights
    assert not worker.groups["b"].flights


def test_a_queued_load_is_promoted_to_its_nested_joiners_depth(
    worker: Running, wait_until: Any
) -> None:
    gate = Gate()

    def getter(key: str) -> bytes:
        if key == "outer":
            gate(key)
            return worker.get("inner") or b""  # joins a load that is queued at depth 0
        return key.encode()

    group = worker.group(getter, load_threads=1)  # outer holds the one thread of depth 0
    results: dict[str, Any] = {}
    outer = threading.Thread(target=lambda: results.update(outer=worker.get("outer")))
    outer.start()
    gate.wait_entered()
    inner = threading.Thread(target=lambda: results.update(inner=worker.get("inner")))
    inner.start()
    wait_until(lambda: b"inner" in group.flights)
    gate.open.set()
    outer.join(10)
    inner.join(10)
    assert results == {"outer": b"inner", "inner": b"inner"}
    assert worker.counter("loads") == 2


def test_joining_a_running_load_that_needs_our_own_depth_is_relieved(
    worker: Running, wait_until: Any
) -> None:
    # y (depth 0) asks x (depth 1, holds its only thread), which joins a, running at depth 0,
    # which asks b at depth 1: queued behind x, which waits for it.
    gate_a, gate_x = Gate(), Gate()

    def getter(key: str) -> bytes:
        if key == "y":
            return worker.get("x", group="nested") or b""
        gate_a(key)
        return worker.get("b", group="nested") or b""

    def nested(key: str) -> bytes:
        if key == "x":
            gate_x(key)
            return worker.get("a") or b""
        return key.encode()

    worker.group(getter, load_threads=2)
    worker.group(nested, name="nested", load_threads=1)
    results: dict[str, Any] = {}
    first = threading.Thread(target=lambda: results.update(a=worker.get("a", timeout=20)))
    first.start()
    gate_a.wait_entered()
    second = threading.Thread(target=lambda: results.update(y=worker.get("y", timeout=20)))
    second.start()
    gate_x.wait_entered()
    gate_x.open.set()
    wait_until(lambda: len(worker.groups["g"].flights[b"a"].waiters) == 2)
    gate_a.open.set()
    first.join(20)
    second.join(20)
    assert results == {"a": b"b", "y": b"b"}


def test_an_async_getter_must_not_block_its_loop(worker: Running) -> None:
    async def getter(key: str) -> bytes | None:
        return worker.get(key, group="plain")

    worker.group(getter)
    worker.group(lambda key: b"v", name="plain")
    with pytest.raises(LoadError) as caught:
        worker.get("k")
    assert caught.value.cause_type == "blocking"
