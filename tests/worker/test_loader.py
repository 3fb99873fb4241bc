"""One load per key, and what becomes of those who wait, through a real socket."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from typing import Any

import pytest

from kamacache.errors import DeadlineExceededError, LoadError
from kamacache.limits import HUNG_THREADS_MAX
from kamacache.wire.frames import frame
from kamacache.wire.messages import Delete, Done, Get, Set, SetMany, Stats, StatsReply
from tests.worker.harness import Gate, Running, in_threads


def waiting(worker: Running, key: bytes = b"k") -> int:
    flight = worker.groups["g"].flights.get(key)
    return len(flight.waiters) if flight else 0


def test_many_connections_asking_one_cold_key_are_one_load(
    worker: Running, wait_until: Any
) -> None:
    gate = Gate()
    worker.group(gate)
    opener = gate.open_when(lambda: waiting(worker) == 32)
    assert in_threads(32, lambda _: worker.get("k")) == [b"v-k"] * 32
    opener.join()
    assert gate.runs == 1
    assert worker.get("k") == b"v-k"
    assert gate.runs == 1
    assert worker.counter("loads") == 1
    assert worker.counter("loads_joined") == 31


def test_waiters_share_the_error_and_nothing_stays_stuck(worker: Running, wait_until: Any) -> None:
    gate = Gate()
    runs: list[str] = []

    def getter(key: str) -> bytes:
        runs.append(key)
        if len(runs) == 1:
            gate(key)
            raise ValueError("no such table")
        return b"late"

    worker.group(getter)
    opener = gate.open_when(lambda: waiting(worker) == 4)
    results = in_threads(4, lambda _: worker.get("k"))
    opener.join()
    assert [type(result) for result in results] == [LoadError] * 4
    assert all("no such table" in str(result) for result in results)
    assert all(result.cause_type == "ValueError" for result in results)
    assert len(runs) == 1
    assert worker.get("k") == b"late"


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, StopIteration, GeneratorExit])
def test_what_a_getter_raises_beyond_exceptions_is_a_load_error(
    worker: Running, error: type[BaseException]
) -> None:
    def getter(key: str) -> bytes:
        if key == "bad":
            raise error
        return b"good"

    worker.group(getter, load_threads=1)
    for _ in range(3):
        with pytest.raises(LoadError) as caught:
            worker.get("bad")
        assert error.__name__ in str(caught.value)
    assert worker.get("fine") == b"good"


@pytest.mark.parametrize(
    "error", [SystemExit, KeyboardInterrupt, StopIteration, asyncio.CancelledError]
)
def test_the_same_of_an_async_getter(worker: Running, error: type[BaseException]) -> None:
    async def getter(key: str) -> bytes:
        await asyncio.sleep(0)
        if key == "bad":
            raise error
        return b"good"

    worker.group(getter)
    for _ in range(3):
        with pytest.raises(LoadError):
            worker.get("bad")
    assert worker.get("fine") == b"good"


def test_a_waiter_with_a_short_deadline_is_late_alone(worker: Running, wait_until: Any) -> None:
    gate = Gate()
    worker.group(gate)
    results: list[Any] = []
    patient = threading.Thread(target=lambda: results.append(worker.get("k")))
    patient.start()
    gate.wait_entered()
    began = time.monotonic()
    with pytest.raises(DeadlineExceededError):
        worker.get("k", timeout=0.05)
    assert time.monotonic() - began < 2
    assert waiting(worker) == 1, "the late waiter is out of the books"
    gate.open.set()
    patient.join(10)
    assert results == [b"v-k"]
    assert gate.runs == 1


def test_the_result_of_a_load_that_nobody_waits_for_is_kept(
    worker: Running, wait_until: Any
) -> None:
    gate = Gate()
    group = worker.group(gate)
    with pytest.raises(DeadlineExceededError):
        worker.get("k", timeout=0.05)
    gate.open.set()
    wait_until(lambda: worker.on_loop(lambda: group.shard.get(b"k")) == b"v-k")
    assert worker.get("k") == b"v-k"
    assert gate.runs == 1


def test_an_asker_that_disconnects_harms_nobody(worker: Running, wait_until: Any) -> None:
    gate = Gate()
    worker.group(gate)
    with socket.socket(socket.AF_UNIX) as leader:
        leader.connect(worker.path)
        leader.sendall(frame(Get(id=1, group="g", key=b"k", budget_ms=10_000)))
        gate.wait_entered()
        results: list[Any] = []
        other = threading.Thread(target=lambda: results.append(worker.get("k")))
        other.start()
        wait_until(lambda: waiting(worker) == 2)
    wait_until(lambda: waiting(worker) == 1)
    gate.open.set()
    other.join(10)
    assert results == [b"v-k"]
    assert gate.runs == 1


@pytest.mark.parametrize("write", ["set", "set_many", "delete"])
def test_a_load_that_began_before_a_write_does_not_overwrite_it(
    worker: Running, wait_until: Any, write: str
) -> None:
    gate = Gate()
    group = worker.group(gate)
    results: list[Any] = []
    asker = threading.Thread(target=lambda: results.append(worker.get("k")))
    asker.start()
    gate.wait_entered()
    if write == "set":
        worker.call(Set(group="g", key=b"k", value=b"new"))
    elif write == "set_many":
        worker.call(SetMany(group="g", items=[(b"k", b"new")]))
    else:
        assert worker.call(Delete(group="g", key=b"k")) == Done(worker_id(), 0)
    again: list[Any] = []
    second = threading.Thread(target=lambda: again.append(worker.get("k")))
    if write == "delete":
        second.start()
        gate.wait_entered()  # the get after the delete began a load of its own
    else:
        assert worker.get("k") == b"new"
    gate.values = {"k": b"second"}
    gate.open.set()
    asker.join(10)
    assert len(results) == 1, "who waited before the write gets the load's answer"
    if write == "delete":
        second.join(10)
        assert again == [b"second"]
        assert gate.runs == 2
    else:
        assert worker.get("k") == b"new"
        assert worker.on_loop(lambda: group.shard.get(b"k")) == b"new"
        assert gate.runs == 1
    assert worker.counter("loads_detached") == 1


class worker_id(int):
    """Equal to any id."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, int)

    __hash__ = int.__hash__


def test_a_getter_that_hangs_frees_its_key_and_its_thread_is_replaced(worker: Running) -> None:
    release = threading.Event()
    runs: list[str] = []

    def getter(key: str) -> bytes:
        runs.append(key)
        if len(runs) == 1:
            release.wait(20)
            return b"stale"
        return b"fresh"

    worker.group(getter, load_timeout_s=0.1, load_threads=1)
    try:
        with pytest.raises(DeadlineExceededError, match="load_timeout"):
            worker.get("k")
        assert worker.threads.hung == 1
        assert worker.get("k") == b"fresh"
        assert worker.get("other") == b"fresh"
        assert worker.counter("load_timeouts") == 1
    finally:
        release.set()


def test_a_late_result_of_a_hung_getter_is_dropped_and_its_thread_counted_back(
    worker: Running, wait_until: Any
) -> None:
    release = threading.Event()
    group = worker.group(
        lambda key: (release.wait(20), b"stale")[1], load_timeout_s=0.05, load_threads=1
    )
    with pytest.raises(DeadlineExceededError):
        worker.get("k")
    release.set()
    wait_until(lambda: worker.threads.hung == 0)
    assert worker.on_loop(lambda: group.shard.get(b"k")) is None
    assert not worker.recycled.is_set()


def test_too_many_hung_getters_recycle_the_worker(worker: Running, wait_until: Any) -> None:
    release = threading.Event()
    worker.group(lambda key: (release.wait(30), b"")[1], load_timeout_s=0.2, load_threads=64)
    try:
        results = in_threads(HUNG_THREADS_MAX + 1, lambda i: worker.get(f"key{i}"))
        assert {type(result) for result in results} == {DeadlineExceededError}
        wait_until(worker.recycled.is_set)
    finally:
        release.set()


def test_an_async_getter_is_cancelled_at_load_timeout(worker: Running, wait_until: Any) -> None:
    cancelled = threading.Event()

    async def getter(key: str) -> bytes:
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return b""

    worker.group(getter, load_timeout_s=0.1)
    with pytest.raises(DeadlineExceededError):
        worker.get("k")
    wait_until(cancelled.is_set)
    assert not worker.groups["g"].flights


def test_an_async_getter_that_ignores_its_cancellation_frees_its_key(
    worker: Running, wait_until: Any
) -> None:
    runs: list[str] = []
    release = threading.Event()

    async def getter(key: str) -> bytes:
        runs.append(key)
        while len(runs) == 1 and not release.is_set():
            try:
                await asyncio.sleep(0.01)
            except asyncio.CancelledError:
                continue
        return b"fresh"

    group = worker.group(getter, load_timeout_s=0.1)
    with pytest.raises(DeadlineExceededError):
        worker.get("k")
    assert worker.get("k") == b"fresh" if len(runs) > 1 else True
    runs.append("so that the second does not hang")
    assert worker.get("k") == b"fresh"
    worker.on_loop(group.loader.tick)
    assert worker.threads.hung == 1
    release.set()
    wait_until(lambda: worker.threads.hung == 0)


def test_not_found_is_an_answer_and_kept_when_asked_for(worker: Running) -> None:
    runs: list[str] = []

    def getter(key: str) -> bytes:
        runs.append(key)
        raise KeyError(key)

    worker.group(getter, name="g", negative_ttl_ms=60_000)
    worker.group(getter, name="forgets")
    assert worker.get("k") is None
    assert worker.get("k") is None
    assert runs == ["k"]
    assert worker.get("k", group="forgets") is None
    assert worker.get("k", group="forgets") is None
    assert runs == ["k"] * 3


def test_a_group_without_getter_finds_nothing_until_set(worker: Running) -> None:
    worker.group()
    assert worker.get("k") is None
    worker.call(Set(group="g", key=b"k", value=b""))
    assert worker.get("k") == b"", "empty is not absent"


def test_a_loaded_value_too_large_to_keep_is_returned(worker: Running) -> None:
    gate = Gate({"k": bytes(200_000)})
    gate.open.set()
    worker.group(gate, cache_bytes=1 << 20)
    assert worker.get("k") == bytes(200_000)
    assert worker.get("k") == bytes(200_000)
    assert gate.runs == 2
    assert worker.counter("loads_not_kept") == 2


def test_getter_many_loads_the_missing_in_one_call_and_single_gets_join_it(
    worker: Running, wait_until: Any
) -> None:
    calls: list[list[str]] = []
    entered, release = threading.Event(), threading.Event()

    def getter_many(keys: list[str]) -> dict[str, bytes]:
        calls.append(keys)
        if len(calls) == 1:
            entered.set()
            assert release.wait(20)
        return {key: b"v-" + key.encode() for key in keys if key != "none"}

    worker.group(getter_many=getter_many)
    worker.call(Set(group="g", key=b"hit", value=b"hit"))
    many: list[Any] = []
    asker = threading.Thread(target=lambda: many.append(worker.get_many("hit", "a", "none", "a")))
    asker.start()
    assert entered.wait(10)
    one: list[Any] = []
    joiner = threading.Thread(target=lambda: one.append(worker.get("a")))
    joiner.start()
    wait_until(lambda: waiting(worker, b"a") == 2)
    release.set()
    asker.join(10)
    joiner.join(10)
    assert many[0].values == [b"hit", b"v-a", None, b"v-a"]
    assert many[0].errors == []
    assert one == [b"v-a"]
    assert calls == [["a", "none"]]


def test_get_many_keeps_what_loads_and_names_what_fails(worker: Running) -> None:
    def getter(key: str) -> bytes:
        if key.startswith("bad"):
            raise ValueError(key)
        return key.encode()

    worker.group(getter)
    reply = worker.get_many("a", "bad1", "b", "bad2")
    assert reply.values == [b"a", None, b"b", None]
    assert [(failed.index, failed.kind) for failed in reply.errors] == [
        (1, "LoadError"),
        (3, "LoadError"),
    ]
    assert worker.counter("loads") == 4
    assert worker.get("a") == b"a"
    assert worker.counter("loads") == 4


def test_a_write_detaches_one_key_of_many(worker: Running) -> None:
    entered, release = threading.Event(), threading.Event()

    def getter_many(keys: list[str]) -> dict[str, bytes]:
        entered.set()
        assert release.wait(20)
        return dict.fromkeys(keys, b"old")

    worker.group(getter_many=getter_many)
    many: list[Any] = []
    asker = threading.Thread(target=lambda: many.append(worker.get_many("a", "b")))
    asker.start()
    assert entered.wait(10)
    worker.call(Set(group="g", key=b"a", value=b"new"))
    release.set()
    asker.join(10)
    assert many[0].values == [b"old", b"old"]
    assert worker.get("a") == b"new"
    assert worker.get("b") == b"old"


def test_hits_are_answered_while_getters_compute(worker: Running) -> None:
    stop = threading.Event()

    def getter(key: str) -> bytes:
        while not stop.is_set():
            sum(range(1000))
        return b""

    worker.group(getter, load_threads=2)
    worker.call(Set(group="g", key=b"hit", value=b"here"))
    askers = [threading.Thread(target=lambda i=i: worker.get(f"slow{i}")) for i in range(2)]
    for asker in askers:
        asker.start()
    try:
        for _ in range(20):
            assert worker.get("hit", timeout=2) == b"here"
    finally:
        stop.set()
        for asker in askers:
            asker.join(10)


def test_stats_hold_the_shards_and_the_loaders_numbers(worker: Running) -> None:
    worker.group(lambda key: b"v")
    worker.get("k")
    reply = worker.call(Stats(group="g"))
    assert isinstance(reply, StatsReply)
    assert reply.stats["loads"] == 1
    assert reply.stats["items"] == 1
    assert reply.stats["loads_in_flight"] == 0


def test_a_load_is_timed_without_the_queue_and_the_queue_apart(
    worker: Running, wait_until: Any
) -> None:
    gate = Gate()
    group = worker.group(gate, load_threads=1)
    region = group.loader.meters

    def first_runs_second_waits() -> bool:
        return gate.runs == 1 and group.loader.running == 2

    opener = gate.open_when(first_runs_second_waits)
    began_s = time.monotonic()
    assert in_threads(2, lambda number: worker.get(f"k{number}")) == [b"v-k0", b"v-k1"]
    took_s = time.monotonic() - began_s
    opener.join()
    wait_until(lambda: sum(region.histogram()[1]) == 2)
    sum_s, _ = region.histogram()
    queued_s = region.counts()["load_queue_us"] / 1e6
    assert 0 < sum_s < took_s
    assert 0 < queued_s < 2 * took_s
    assert sum_s + queued_s <= 2 * took_s


def test_a_worker_tells_what_is_under_way_in_each_group(worker: Running, wait_until: Any) -> None:
    gate = Gate()
    worker.group(gate, load_threads=1)
    worker.group(name="idle")

    def now() -> StatsReply:
        reply = worker.call(Stats())
        assert isinstance(reply, StatsReply)
        return reply

    asked = threading.Thread(target=in_threads, args=(3, lambda number: worker.get(f"k{number}")))
    asked.start()
    try:
        wait_until(lambda: now().groups == [[3, 2, 0], [0, 0, 0]])
        assert now().stats["loads_running"] == 1
    finally:
        gate.open.set()
        asked.join(10)
    wait_until(lambda: now().groups == [[0, 0, 0], [0, 0, 0]])
    assert worker.counter("loads") == 3
