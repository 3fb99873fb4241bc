"""A group over a real node of two workers: every call, its errors, its coherence, its counts."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import kamacache
from kamacache.errors import (
    DeadlineExceededError,
    GroupNotFoundError,
    KeyNotFoundError,
    LoadError,
    NodeUnavailableError,
    ValueTooLargeError,
)
from kamacache.limits import BATCH_KEYS_MAX
from kamacache.rundir.counters import open_counters
from tests.attached_app import DEPTH
from tests.attached_estate import Estate
from tests.attached_process import AttachedProcess, in_threads, several
from tests.node_process import NodeProcess

pytestmark = pytest.mark.integration

WaitUntil = Callable[..., None]
Shared = tuple[Estate, NodeProcess]
NEAR = pytest.mark.parametrize("near", [0, 1000], ids=["memory", "near"])


@pytest.fixture(autouse=True)
def attached(shared: Shared, detached: None) -> Iterator[Estate]:
    kamacache.attach(shared[0].run_dir)
    yield shared[0]
    kamacache.detach()


def own(key: str) -> bytes:
    raise AssertionError("the fallback getter ran beside a living node")


def group(name: str = "scores", **settings: Any) -> kamacache.Group:
    return kamacache.Group(name, **{"getter": own, **settings})


# -- every call --------------------------------------------------------------------------------


@NEAR
def test_sync_calls(near: int, request: pytest.FixtureRequest) -> None:
    scores, key = group(near_cache_items=near), request.node.name
    assert scores.get(key) == b"v-" + key.encode()
    scores.set(key, b"2")
    assert scores.get(key) == scores.get(key.encode()) == b"2"
    scores.set(key, b"")
    assert scores.get(key, default=b"x") == b""
    assert scores.delete(key) is True
    assert scores.delete(key) is False
    assert scores.get(key) == b"v-" + key.encode()
    assert scores.get("none-1", default=None) is None
    with pytest.raises(KeyNotFoundError):
        scores.get("none-1")
    assert key in scores
    assert "none-1" not in scores


@NEAR
async def test_async_calls(near: int, request: pytest.FixtureRequest) -> None:
    scores, key = group("ascores", near_cache_items=near), request.node.name
    assert await scores.aget(key) == b"v-" + key.encode()
    await scores.aset(key, b"2")
    assert await scores.aget(key) == b"2"
    assert await scores.adelete(key) is True
    assert await scores.adelete(key) is False
    assert await scores.aget(key) == b"v-" + key.encode()
    assert await scores.aget("none-1", default=None) is None
    with pytest.raises(KeyNotFoundError):
        await scores.aget("none-1")


@NEAR
def test_sync_calls_of_many(near: int, request: pytest.FixtureRequest) -> None:
    batch, name = group("batch", near_cache_items=near), request.node.name
    keys = [f"{name}-{number}" for number in range(40)]
    asked: list[str | bytes] = [*keys, keys[0].encode(), "none-1"]
    expected: dict[Any, bytes] = {key: b"v-" + key.encode() for key in keys}
    expected[keys[0].encode()] = expected[keys[0]]
    assert batch.get_many(asked) == expected
    assert batch.get_many(asked) == expected
    batch.set_many(dict.fromkeys(keys[:20], b"2"))
    assert batch.get_many(keys[:20]) == dict.fromkeys(keys[:20], b"2")
    assert batch.delete_many([*keys, "none-1", "never-there"]) == 40
    assert batch.delete_many(keys) == 0
    assert not any(key in batch for key in keys)


async def test_async_calls_of_many(request: pytest.FixtureRequest) -> None:
    batch, name = group("batch"), request.node.name
    keys = [f"{name}-{number}" for number in range(40)]
    expected = {key: b"v-" + key.encode() for key in keys}
    assert await batch.aget_many([*keys, "none-1"]) == expected
    assert await batch.aget_many([*keys, "none-1"]) == expected
    await batch.aset_many(dict.fromkeys(keys, b"2"))
    assert await batch.aget_many(keys) == dict.fromkeys(keys, b"2")
    assert await batch.adelete_many(keys) == 40
    assert await batch.adelete_many(keys) == 0


def test_one_getter_many_call_for_each_worker(attached: Estate) -> None:
    before = len(attached.trace.read_text().splitlines())
    group("batch").get_many([f"few-{number}" for number in range(30)])
    assert len(attached.trace.read_text().splitlines()) - before == 2


def test_batches_larger_than_a_frame() -> None:
    plain = group("plain", getter=None, cache_bytes="1MiB")
    count = 2 * BATCH_KEYS_MAX + 500
    items: dict[Any, bytes] = {f"k{number}": b"%d" % number for number in range(count)}
    plain.set_many(items)
    assert plain.get_many(items) == items
    assert plain.delete_many(items) == count


def test_set_many_of_several_megabytes_in_frames_of_eight() -> None:
    plain = group("plain", getter=None)
    value = b"x" * plain.stats()["value_bytes_max"]
    items: dict[Any, bytes] = {f"large{number}": value for number in range(300)}
    assert sum(map(len, items.values())) > 9 << 20
    plain.set_many(items)
    found = plain.get_many(items)
    assert 0 < len(found) < len(items)  # the group holds 8 MiB
    assert set(found.values()) == {value}
    plain.delete_many(items)


def test_value_above_the_limit_is_refused_and_changes_nothing() -> None:
    plain = group("plain", getter=None)
    plain.set("k", b"1")
    limit = plain.stats()["value_bytes_max"]
    for too_large in (b"x" * (limit + 1), b"x" * (40 << 20)):  # the second is above a frame, too
        with pytest.raises(ValueTooLargeError) as caught:
            plain.set("k", too_large)
        assert caught.value.limit_bytes == limit
        with pytest.raises(ValueTooLargeError):
            plain.set_many({f"k{number}": b"2" for number in range(50)} | {"k": too_large})
        with pytest.raises(ValueTooLargeError):
            asyncio.run(plain.aset("k", too_large))
    assert plain.get("k") == b"1"
    assert not plain.get_many([f"k{number}" for number in range(50)])
    plain.set("k", b"x" * limit)


def test_ttl_ends_near_entries_too(wait_until: WaitUntil) -> None:
    plain = group("plain", getter=None)
    plain.set("brief", b"1", ttl=0.2)
    plain.set_many({"brief2": b"1"}, ttl=0.2)
    assert plain.get("brief") == plain.get("brief") == plain.get("brief2") == b"1"
    wait_until(lambda: plain.get("brief", None) is plain.get("brief2", None) is None, 2.0)


# -- the node's rules --------------------------------------------------------------------------


def test_group_that_the_node_has_not_is_an_error_that_names_those_it_has() -> None:
    unheard_of = group("unheard-of")
    for call in (
        lambda: unheard_of.get("k"),
        lambda: unheard_of.set("k", b"1"),
        unheard_of.stats,
    ):
        with pytest.raises(GroupNotFoundError, match="scores"):
            call()


def test_size_policy_and_ttl_are_the_nodes(shared: Shared) -> None:
    fifo = group("fifo", cache_bytes="64MiB", eviction="lru", ttl=None)
    fifo.get("k")
    assert fifo.stats()["capacity_bytes"] == 1 << 20
    engine = fifo._engine
    entry = engine.lookup_entry(b"k")  # type: ignore[union-attr]
    assert 0 < entry.ttl_ms <= 60_000
    node = {spec.name: spec for spec in shared[1].description().groups}
    assert node["fifo"].eviction == "s3fifo"


def test_getter_that_only_this_process_has_is_said_to_be_unused(
    caplog: pytest.LogCaptureFixture,
) -> None:
    plain = group("plain")
    assert plain.get("nobody-loads-it", default=None) is None
    assert "has no getter there" in caplog.text


# -- loads -------------------------------------------------------------------------------------


def test_getters_error_is_a_load_error_and_never_the_fallbacks_matter() -> None:
    scores = group()
    with pytest.raises(LoadError) as caught:
        scores.get("bad-1")
    assert caught.value.cause_type == "RuntimeError"
    with pytest.raises(LoadError, match="1 of 3"):
        scores.get_many(["bad-2", "good-1", "good-2"])
    assert "good-1" in scores
    assert "good-2" in scores


def test_deadline_ends_the_wait_not_the_load(attached: Estate, wait_until: WaitUntil) -> None:
    scores = group()
    began_s = time.monotonic()
    with pytest.raises(DeadlineExceededError):
        scores.get("gate-late", timeout=0.1)
    with pytest.raises(DeadlineExceededError):
        scores.get_many(["gate-late", "gate-late2"], timeout=0.1)
    assert time.monotonic() - began_s < 2.0
    attached.open_gate("gate-late")
    attached.open_gate("gate-late2")
    wait_until(lambda: "gate-late" in scores)
    assert attached.loads("gate-late") == 1


def test_set_while_the_key_is_loaded_stays(attached: Estate, wait_until: WaitUntil) -> None:
    scores = group()
    for key, write, after in (
        ("gate-set", lambda: scores.set("gate-set", b"newer"), b"newer"),
        ("gate-many", lambda: scores.set_many({"gate-many": b"newer"}), b"newer"),
        ("gate-delete", lambda: scores.delete("gate-delete"), None),
    ):
        asked: list[bytes] = []
        waiter = threading.Thread(target=lambda key=key, to=asked: to.append(scores.get(key)))
        waiter.start()
        wait_until(lambda key=key: attached.loads(key) == 1)
        write()
        attached.open_gate(key)
        waiter.join(10)
        assert asked == [b"v-" + key.encode()]
        assert scores._lookup(key) == after


def test_cancelled_aget_harms_nobody(attached: Estate, wait_until: WaitUntil) -> None:
    scores = group()

    async def ask() -> bytes:
        first = asyncio.create_task(scores.aget("gate-cancel"))
        while not attached.loads("gate-cancel"):  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        second = asyncio.create_task(scores.aget("gate-cancel"))
        await asyncio.sleep(0)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        attached.open_gate("gate-cancel")
        return bytes(await second)

    assert asyncio.run(ask()) == b"v-gate-cancel"
    assert attached.loads("gate-cancel") == 1
    assert scores.get("gate-cancel") == b"v-gate-cancel"


def test_nested_getters_reach_the_depth_that_is_allowed() -> None:
    expected = "".join(map(str, range(DEPTH + 1))).encode() + b"."
    assert group("level0").get("deep") == expected
    assert asyncio.run(group("alevel0").aget("deep")) == expected
    # All levels of many keys at once: no level may take the threads that the next one needs.
    level = group("level0")
    found = in_threads(32, lambda number: level.get(f"deep{number}"))
    assert found == [expected] * 32


def test_cycle_of_getters_is_an_error_at_once() -> None:
    began_s = time.monotonic()
    for name in ("cycle_a", "cycle_b"):
        for key in ("k", "many-k"):
            with pytest.raises(LoadError) as caught:
                group(name).get(key)
            assert caught.value.cause_type == "cycle"
    assert time.monotonic() - began_s < 3.0


def test_getter_may_write_the_key_that_it_loads() -> None:
    assert group("writer").get("k") == b"3"
    assert asyncio.run(group("awriter").aget("k")) == b"3"


def test_async_getter_that_blocks_its_loop_by_a_write_is_told_so() -> None:
    began_s = time.monotonic()
    with pytest.raises(LoadError, match="await"):
        asyncio.run(group("awriter").aget("blocking"))
    assert time.monotonic() - began_s < 3.0


# -- threads and loops -------------------------------------------------------------------------


def test_cold_key_asked_by_threads_and_loops_is_loaded_once(attached: Estate) -> None:
    scores = group()

    async def twice() -> list[bytes]:
        return list(await asyncio.gather(*(scores.aget("cold") for _ in range(4))))

    def ask(number: int) -> Any:
        return asyncio.run(twice()) if number % 2 else [scores.get("cold")] * 4

    assert in_threads(32, ask) == [[b"v-cold"] * 4] * 32
    assert attached.loads("cold") == 1


def test_threads_get_their_own_values() -> None:
    plain, rounds = group("plain", getter=None), 50

    def work(number: int) -> int:
        for turn in range(rounds):
            key, value = f"t{number}", b"%d-%d" % (number, turn)
            plain.set(key, value)
            assert plain.get(key) == value
            assert plain.get_many([key, f"{key}-none"]) == {key: value}
        return number

    assert in_threads(32, work) == list(range(32))


def test_loops_that_come_and_go_leave_nothing_open() -> None:
    scores = group("ascores")
    asyncio.run(scores.aget("k0"))
    before = len(os.listdir("/proc/self/fd"))
    for number in range(20):
        asyncio.run(scores.aget(f"loop-{number}"))
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before + 2


# -- several processes -------------------------------------------------------------------------


def test_acknowledged_write_is_seen_by_every_process_at_its_next_read(attached: Estate) -> None:
    scores = group("plain", getter=None)
    with several(2, attached.run_dir) as (one, two):
        for turn in range(50):
            value = f"turn-{turn}"
            writers = (one, two)
            if turn % 3 == 0:
                writers[turn % 2].call("plain", "set", "shared", value)
            else:
                scores.set("shared", value.encode())
            for _ in range(2):  # the second time from the near cache
                assert scores.get("shared") == value.encode()
                assert one.call("plain", "get", "shared") == value
                assert two.call("plain", "get", "shared") == value
            if turn % 5 == 4:
                assert one.call("plain", "delete", "shared") is True
                assert scores.get("shared", default=None) is None
                assert two.call("plain", "get", "shared") == {"error": "KeyNotFoundError"}


def test_cold_key_asked_by_processes_of_threads_is_loaded_once(attached: Estate) -> None:
    with several(8, attached.run_dir) as processes:
        for key in ("gate-herd", "gate-herd2"):
            for process in processes:
                process.ask("scores", "get", key, threads=8)
            attached.open_gate(key)
            for process in processes:
                assert process.answer() == [f"v-{key}"] * 8
            assert attached.loads(key) == 1


def test_load_goes_on_when_the_asking_process_is_killed(
    attached: Estate, wait_until: WaitUntil
) -> None:
    with AttachedProcess(attached.run_dir) as first:
        first.ask("scores", "get", "gate-orphan", threads=2)
        wait_until(lambda: attached.loads("gate-orphan") == 1)
        with AttachedProcess(attached.run_dir) as second:
            second.ask("scores", "get", "gate-orphan")
            first.process.kill()
            attached.open_gate("gate-orphan")
            assert second.answer() == ["v-gate-orphan"]
    assert attached.loads("gate-orphan") == 1


# -- counts ------------------------------------------------------------------------------------


def hits(stats: dict[str, Any]) -> dict[str, int]:
    return {name: stats[name] for name in ("gets", "hits", "near_hits", "memory_hits", "misses")}


def gained(now: dict[str, Any], before: dict[str, Any]) -> dict[str, int]:
    return {name: now[name] - before[name] for name in hits(before)}


def test_hits_by_layer_are_summed_over_processes_living_and_dead(
    attached: Estate, wait_until: WaitUntil
) -> None:
    fifo = group("fifo")
    before = fifo.stats()
    with several(2, attached.run_dir) as (one, two):
        for process in (one, two):
            process.call("fifo", "get", "counted")  # one load, then hits only
        assert fifo.get("counted") == b"v-counted"
        for _ in range(10):
            for process in (one, two):
                process.call("fifo", "get", "counted")
        assert one.end() == 0
        two.call("fifo", "stats")  # publishes what it counted; then it is killed
        two.process.kill()
        two.process.wait()
        now = fifo.stats()
        # The second process's first get is a memory hit, too, and so is ours.
        assert gained(now, before) == {
            "gets": 23, "hits": 22, "near_hits": 19, "memory_hits": 3, "misses": 1,
        }  # fmt: skip
        assert now["loads"] - before["loads"] == 1
        # The supervisor folds the dead one's slot; the sums stay.
        end_s = time.monotonic() + 1.5
        while time.monotonic() < end_s:
            assert hits(fifo.stats()) == hits(now)
            time.sleep(0.1)


def test_forked_child_works_and_counts_nothing_twice() -> None:
    fork = multiprocessing.get_context("fork")
    scores = group()
    for _ in range(3):
        scores.get("forked")
    before = scores.stats()
    own_before = before["own"]

    def child() -> None:
        for _ in range(10):
            assert scores.get("forked") == b"v-forked"
        scores.set("from-child", b"1")
        assert asyncio.run(scores.aget("from-child")) == b"1"
        assert scores.stats()["near_items"] == 2

    children = [fork.Process(target=child) for _ in range(3)]
    for process in children:
        process.start()
    for process in children:
        process.join(20)
    assert [process.exitcode for process in children] == [0, 0, 0]
    assert scores.get("from-child") == b"1"
    now = scores.stats()
    assert gained(now, before)["hits"] == 3 * 11 + 1
    assert now["sets"] - before["sets"] == 3
    assert now["own"]["memory_hits"] - own_before["memory_hits"] == 1


def test_pool_of_forked_workers_uses_the_parents_attachment() -> None:
    scores = group()
    scores.get("pooled")
    before, ask = scores.stats(), _Ask(scores)
    with multiprocessing.get_context("fork").Pool(4) as pool:
        found = pool.map(ask, ["pooled"] * 200)
        pool.close()
        pool.join()
    assert found == [b"v-pooled"] * 200
    assert gained(scores.stats(), before)["hits"] == 200


class _Ask:
    """A callable that a forked pool inherits; only its key travels."""

    groups: dict[str, kamacache.Group] = {}  # noqa: RUF012 -- one for all, on purpose

    def __init__(self, scores: kamacache.Group) -> None:
        self.groups["scores"] = scores

    def __call__(self, key: str) -> bytes:
        return bytes(self.groups["scores"].get(key))


def test_fork_while_threads_read_and_write_leaves_a_child_that_works() -> None:
    plain = group("plain", getter=None)
    stop = threading.Event()
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            while not stop.is_set():
                plain.set(f"busy{number}", b"%d" % number)
                assert plain.get(f"busy{number}") == b"%d" % number
                plain.stats()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()

    def child() -> None:
        for number in range(20):
            plain.set(f"child{number}", b"1")
            assert plain.get(f"child{number}") == b"1"
        plain.stats()

    children = []
    try:
        for _ in range(10):
            process = multiprocessing.get_context("fork").Process(target=child)
            process.start()
            children.append(process)
            process.join(10)
    finally:
        stop.set()
        for thread in threads:
            thread.join(10)
        for process in children:
            if process.is_alive():
                process.kill()
            process.join()
    assert ([process.exitcode for process in children], failures) == ([0] * 10, [])


def test_groups_made_again_and_again_share_one_counter_slot(shared: Shared) -> None:
    for number in range(50):
        assert group().get("slot") == b"v-slot", number
    counters = open_counters(shared[1].description().counters_path)
    assert len(counters._claimed) <= len(shared[1].description().groups)


def test_stats_have_the_same_names_with_a_node_and_without(attached: Estate) -> None:
    beside = group()
    beside.get("named")
    found = beside.stats()
    assert asyncio.run(beside.astats()).keys() == found.keys()
    kamacache.detach()
    alone = kamacache.Group("scores", getter=lambda key: b"1")
    alone.get("named")
    assert set(alone.stats()) - set(found) == set()
    for stats in (found, alone.stats()):
        assert stats["gets"] == stats["hits"] + stats["negative_hits"] + stats["misses"]


def test_detach_goes_back_to_this_process_and_attach_to_the_node(attached: Estate) -> None:
    scores = group(getter=lambda key: b"own")
    scores.set("moved", b"node's")
    before = scores.stats()
    scores.get("moved")
    kamacache.detach()
    assert scores.get("moved") == b"own"
    assert scores.stats()["mode"] == "single"
    kamacache.attach(attached.run_dir)
    assert scores.get("moved") == b"node's"
    assert gained(scores.stats(), before)["hits"] == 2  # what was counted before it left, too


def test_writes_and_stats_need_a_node(attached: Estate) -> None:
    kamacache.attach(attached.folder / "nowhere")
    scores = group(getter=lambda key: b"own")
    assert scores.get("k") == b"own"
    for call in (
        lambda: scores.set("k", b"1"),
        lambda: scores.delete("k"),
        lambda: scores.set_many({"k": b"1"}),
        lambda: scores.delete_many(["k"]),
        lambda: asyncio.run(scores.aset("k", b"1")),
        lambda: asyncio.run(scores.adelete("k")),
        scores.stats,
    ):
        with pytest.raises(NodeUnavailableError, match="nowhere"):
            call()
