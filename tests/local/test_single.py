"""Single-instance mode under threads, asyncio, forks, cancellation and getters that hang."""

from __future__ import annotations

import asyncio
import contextvars
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from kamacache import DeadlineExceededError, Group, LoadError
from kamacache.local import flights
from kamacache.local.loads import FallbackLoader

WaitUntil = Callable[..., None]
WAIT_S = 10.0


class Gate:
    """A getter that says when it has begun and goes on when it is let."""

    def __init__(self, value: bytes = b"loaded") -> None:
        self.value = value
        self.begun = threading.Semaphore(0)
        self.go = threading.Event()
        self.loads = 0
        self.threads: list[int] = []

    def __call__(self, key: str) -> bytes:
        self.loads += 1
        self.threads.append(threading.get_ident())
        self.begun.release()
        assert self.go.wait(WAIT_S), "the test never opened the gate"
        return self.value

    def wait_begun(self) -> None:
        assert self.begun.acquire(timeout=WAIT_S)


@pytest.fixture
def gate() -> Iterator[Gate]:
    made = Gate()
    yield made
    made.go.set()


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(64) as pool:
        yield pool


def joined(group: Group, count: int) -> Callable[[], bool]:
    return lambda: group.stats()["joined"] >= count


# -- one load per key ------------------------------------------------------------------------------


def test_64_threads_that_ask_for_a_cold_key_share_one_load(
    gate: Gate, threads: ThreadPoolExecutor, wait_until: WaitUntil
) -> None:
    group = Group("cold", getter=gate)
    answers = [threads.submit(group.get, "k") for _ in range(64)]
    wait_until(joined(group, 63))
    gate.go.set()
    assert [answer.result(WAIT_S) for answer in answers] == [b"loaded"] * 64
    assert gate.loads == 1


def test_different_keys_load_at_the_same_time(gate: Gate, threads: ThreadPoolExecutor) -> None:
    group = Group("two", getter=gate)
    answers = [threads.submit(group.get, key) for key in ("a", "b")]
    gate.wait_begun()
    gate.wait_begun()
    gate.go.set()
    assert [answer.result(WAIT_S) for answer in answers] == [b"loaded"] * 2


def test_the_getter_runs_in_the_callers_thread_unless_a_time_is_named(gate: Gate) -> None:
    gate.go.set()
    me = threading.get_ident()
    Group("plain", getter=gate).get("k")
    assert gate.threads.pop() == me
    Group("timed", getter=gate).get("k", timeout=5)
    assert gate.threads.pop() != me
    Group("bounded", getter=gate, load_timeout=5).get("k")
    assert gate.threads.pop() != me


def test_a_getter_in_another_thread_sees_the_callers_context() -> None:
    user: contextvars.ContextVar[str] = contextvars.ContextVar("user", default="nobody")
    group = Group("context", getter=lambda key: user.get().encode(), load_timeout=5)
    user.set("Tom")
    assert group.get("k") == b"Tom"


def test_waiters_share_the_error_each_with_a_copy_of_its_own(
    threads: ThreadPoolExecutor, wait_until: WaitUntil
) -> None:
    go = threading.Event()

    def load(key: str) -> bytes:
        assert go.wait(WAIT_S)
        raise ValueError("down")

    group = Group("down", getter=load)
    answers = [threads.submit(group.get, "k") for _ in range(8)]
    wait_until(joined(group, 7))
    go.set()
    errors = [answer.exception(WAIT_S) for answer in answers]
    assert len({id(error) for error in errors}) == 8
    for error in errors:
        assert isinstance(error, LoadError)
        assert isinstance(error.__cause__, ValueError)
    assert group.stats()["loads"] == 1


def test_threads_and_tasks_share_one_load(
    gate: Gate, threads: ThreadPoolExecutor, wait_until: WaitUntil
) -> None:
    group = Group("mixed", getter=gate)

    async def ask() -> list[Any]:
        return await asyncio.gather(*(group.aget("k") for _ in range(8)))

    from_threads = [threads.submit(group.get, "k") for _ in range(8)]
    from_loops = [threads.submit(asyncio.run, ask()) for _ in range(2)]
    wait_until(joined(group, 23))
    gate.go.set()
    assert [answer.result(WAIT_S) for answer in from_threads] == [b"loaded"] * 8
    assert [answer.result(WAIT_S) for answer in from_loops] == [[b"loaded"] * 8] * 2
    assert gate.loads == 1


def test_an_async_getter_serves_synchronous_callers_on_a_loop_of_its_own() -> None:
    loops = []

    async def load(key: str) -> bytes:
        loops.append(asyncio.get_running_loop())
        await asyncio.sleep(0)
        return key.encode()

    group = Group("async", getter=load)
    assert group.get("a") == b"a"
    assert group.get_many(["a", "b", "c"]) == {"a": b"a", "b": b"b", "c": b"c"}
    assert len(set(map(id, loops))) == 1
    assert len(loops) == 3


async def test_an_async_getter_runs_on_the_loop_that_asks() -> None:
    loops = []

    async def load(key: str) -> bytes:
        loops.append(asyncio.get_running_loop())
        return b"x"

    assert await Group("here", getter=load).aget("k") == b"x"
    assert loops == [asyncio.get_running_loop()]


async def test_a_sync_getter_never_runs_on_the_loop(gate: Gate) -> None:
    gate.go.set()
    assert await Group("off", getter=gate).aget("k") == b"loaded"
    assert gate.threads != [threading.get_ident()]


async def test_an_async_hit_needs_no_other_thread_and_no_step_of_the_loop() -> None:
    group = Group("hit")
    group.set("k", b"v")
    group.get("k")
    coroutine = group.aget("k")
    with pytest.raises(StopIteration) as stopped:
        coroutine.send(None)
    assert stopped.value.value == b"v"


async def test_get_on_the_loop_that_loads_the_key_fails_at_once() -> None:
    go = asyncio.Event()

    async def load(key: str) -> bytes:
        await go.wait()
        return b"x"

    group = Group("blocked", getter=load)
    asking = asyncio.create_task(group.aget("k"))
    await asyncio.sleep(0)
    with pytest.raises(LoadError, match="event loop") as caught:
        group.get("k")
    assert caught.value.cause_type == "blocked_loop"
    go.set()
    assert await asking == b"x"


def test_two_callers_with_the_same_keys_in_other_orders_do_not_wait_for_each_other(
    threads: ThreadPoolExecutor,
) -> None:
    barrier = threading.Barrier(2, timeout=WAIT_S)
    loads: list[str] = []

    def load(key: str) -> bytes:
        if not loads or len(loads) == 1:
            loads.append(key)
            barrier.wait()
        else:
            loads.append(key)
        return key.encode()

    group = Group("orders", getter=load)
    keys = ["a", "b", "c", "d"]
    answers = [threads.submit(group.get_many, order) for order in (keys, keys[::-1])]
    for answer in answers:
        assert answer.result(WAIT_S) == {key: key.encode() for key in keys}
    assert sorted(loads) == keys


def test_one_load_per_key_under_many_threads(threads: ThreadPoolExecutor) -> None:
    loads: dict[str, int] = {}
    barrier = threading.Barrier(16, timeout=WAIT_S)

    def load(key: str) -> bytes:
        loads[key] = loads.get(key, 0) + 1
        return key.encode() * 10

    group = Group("many", getter=load, cache_bytes="4MiB")
    keys = [f"key-{number}" for number in range(500)]

    def ask() -> None:
        barrier.wait()
        for key in keys:
            assert group.get(key) == key.encode() * 10

    for answer in [threads.submit(ask) for _ in range(16)]:
        answer.result(WAIT_S)
    assert loads == dict.fromkeys(keys, 1)


# -- cancellation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("cancelled", [0, 1])
async def test_a_cancelled_leader_or_waiter_harms_nobody(cancelled: int, gate: Gate) -> None:
    group = Group("cancelled", getter=gate)
    asking = [asyncio.create_task(group.aget("k")) for _ in range(3)]
    await asyncio.to_thread(gate.wait_begun)
    asking[cancelled].cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking[cancelled]
    gate.go.set()
    others = [task for task in asking if task is not asking[cancelled]]
    assert await asyncio.gather(*others) == [b"loaded"] * 2
    assert gate.loads == 1


async def test_a_cancelled_leader_of_an_async_getter_harms_nobody() -> None:
    go = asyncio.Event()
    loads = 0

    async def load(key: str) -> bytes:
        nonlocal loads
        loads += 1
        await go.wait()
        return b"x"

    group = Group("acancelled", getter=load)
    leader = asyncio.create_task(group.aget("k"))
    waiter = asyncio.create_task(group.aget("k"))
    await asyncio.sleep(0)
    leader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leader
    go.set()
    assert await waiter == b"x"
    assert loads == 1


async def test_when_all_askers_are_cancelled_the_load_still_fills_the_cache() -> None:
    go = asyncio.Event()

    async def load(key: str) -> bytes:
        await go.wait()
        return b"x"

    group = Group("nobody", getter=load)
    asking = asyncio.create_task(group.aget("k"))
    await asyncio.sleep(0)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    loading = next(iter(asyncio.all_tasks() - {asyncio.current_task()}))
    go.set()
    await asyncio.wait_for(loading, WAIT_S)
    assert "k" in group


def test_a_load_lost_with_its_loop_is_begun_again_by_those_who_wait(
    threads: ThreadPoolExecutor, wait_until: WaitUntil
) -> None:
    loads: list[asyncio.AbstractEventLoop] = []
    begun = threading.Event()

    async def load(key: str) -> bytes:
        loads.append(asyncio.get_running_loop())
        begun.set()
        if len(loads) == 1:
            await asyncio.Event().wait()
        return b"second"

    group = Group("lost", getter=load)
    end = threading.Event()

    async def leader() -> None:
        asking = asyncio.create_task(group.aget("k"))
        await asyncio.to_thread(end.wait, WAIT_S)
        del asking  # left to asyncio.run, which cancels every task when it ends

    leading = threads.submit(asyncio.run, leader())
    assert begun.wait(WAIT_S)
    waiter = threads.submit(group.get, "k")
    wait_until(joined(group, 1))
    end.set()
    leading.result(WAIT_S)
    assert waiter.result(WAIT_S) == b"second"
    assert len(loads) == 2


async def test_a_getter_that_cancels_itself_is_a_load_error() -> None:
    async def load(key: str) -> bytes:
        raise asyncio.CancelledError

    with pytest.raises(LoadError, match="CancelledError"):
        await Group("self", getter=load).aget("k")


# -- getters that raise what ends programs, or hang ------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_what_ends_the_program_reaches_the_leader_and_waiters_get_load_error(
    error: type[BaseException], threads: ThreadPoolExecutor, wait_until: WaitUntil
) -> None:
    go = threading.Event()

    def load(key: str) -> bytes:
        assert go.wait(WAIT_S)
        raise error

    group = Group("ends", getter=load)
    leader: Future[type[BaseException]] = Future()

    def lead() -> None:
        try:
            group.get("k")
        except BaseException as raised:
            leader.set_result(type(raised))

    thread = threading.Thread(target=lead)
    thread.start()
    wait_until(lambda: group.stats()["loads"] == 1)
    waiter = threads.submit(group.get, "k")
    wait_until(joined(group, 1))
    go.set()
    assert leader.result(WAIT_S) is error
    thread.join(WAIT_S)
    raised = waiter.exception(WAIT_S)
    assert isinstance(raised, LoadError)
    assert raised.cause_type == error.__name__
    assert group.stats()["loading"] == 0


def test_system_exit_in_a_pool_thread_is_a_load_error_and_the_thread_lives() -> None:
    def load(key: str) -> bytes:
        if key == "exit":
            raise SystemExit(1)
        return b"x"

    group = Group("exits", getter=load, load_timeout=5, load_threads=1)
    for _ in range(2):
        with pytest.raises(LoadError, match="SystemExit"):
            group.get("exit")
    assert group.get("k") == b"x"


def test_a_hanging_getter_leaves_no_key_stuck(gate: Gate, wait_until: WaitUntil) -> None:
    def load(key: str) -> bytes:
        return gate(key) if gate.loads == 0 else b"second"

    group = Group("hangs", getter=load, load_timeout=0.1)
    with pytest.raises(DeadlineExceededError, match="load_timeout"):
        group.get("k")
    assert group.get("k") == b"second"
    gate.go.set()  # the first answer comes late, and is not kept
    wait_until(lambda: group.stats()["detached"] == 1)
    assert group.get("k") == b"second"


def test_a_hanging_leader_in_a_callers_thread_is_overtaken(
    gate: Gate, threads: ThreadPoolExecutor
) -> None:
    group = Group("overtaken", getter=lambda key: gate(key) if gate.loads == 0 else b"second")
    # As without load_timeout=, where the getter runs in the leader's thread, but not 30 s long.
    group._started()._loads.table._load_timeout_s = 0.1  # type: ignore[attr-defined]
    leader = threads.submit(group.get, "k")
    gate.wait_begun()
    with pytest.raises(DeadlineExceededError):
        group.get("k")
    assert group.get("k") == b"second"
    gate.go.set()
    assert leader.result(WAIT_S) == b"loaded"
    assert group.get("k") == b"second"


async def test_a_hanging_async_getter_is_cancelled_and_leaves_no_key_stuck() -> None:
    ended: list[str] = []

    async def load(key: str) -> bytes:
        if ended:
            return b"second"
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(key)
        raise AssertionError

    group = Group("ahangs", getter=load, load_timeout=0.05)
    with pytest.raises(DeadlineExceededError):
        await group.aget("k")
    assert await group.aget("k") == b"second"
    assert ended == ["k"]


def test_hung_threads_are_replaced_so_that_other_keys_load(gate: Gate) -> None:
    group = Group(
        "replaced",
        getter=lambda key: gate(key) if key.startswith("hang") else b"x",
        load_timeout=0.3,
        load_threads=2,
    )
    for key in ("hang1", "hang2"):
        with pytest.raises(DeadlineExceededError):
            group.get(key, timeout=0.01)
    # Both threads hang now; this one is queued until their time is over.
    assert group.get("k", timeout=WAIT_S) == b"x"


def test_a_waiters_deadline_is_its_own(gate: Gate, threads: ThreadPoolExecutor) -> None:
    group = Group("own", getter=gate)
    leader = threads.submit(group.get, "k")
    gate.wait_begun()
    with pytest.raises(DeadlineExceededError):
        group.get("k", timeout=0.02)
    gate.go.set()
    assert leader.result(WAIT_S) == b"loaded"


async def test_an_async_deadline_is_kept_while_the_load_goes_on(gate: Gate) -> None:
    group = Group("adeadline", getter=gate)
    with pytest.raises(DeadlineExceededError):
        await group.aget("k", timeout=0.02)
    waiter = asyncio.create_task(group.aget("k"))
    await asyncio.sleep(0)
    gate.go.set()
    assert await waiter == b"loaded"
    assert gate.loads == 1


# -- sets and deletes against loads ----------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda group: group.set("k", b"set"),
        lambda group: group.set_many({"k": b"set"}),
    ],
)
def test_a_load_begun_before_a_set_never_overwrites_it(
    change: Callable[[Group], None], gate: Gate, threads: ThreadPoolExecutor
) -> None:
    group = Group("set", getter=gate)
    leader = threads.submit(group.get, "k")
    gate.wait_begun()
    change(group)
    assert group.get("k") == b"set"
    gate.go.set()
    assert leader.result(WAIT_S) == b"loaded"
    assert group.get("k") == b"set"


@pytest.mark.parametrize(
    "change", [lambda group: group.delete("k"), lambda group: group.delete_many(["k"])]
)
def test_a_load_begun_before_a_delete_is_not_kept_and_later_gets_load_anew(
    change: Callable[[Group], None], gate: Gate, threads: ThreadPoolExecutor
) -> None:
    group = Group("delete", getter=lambda key: gate(key) if gate.loads == 0 else b"anew")
    leader = threads.submit(group.get, "k")
    gate.wait_begun()
    change(group)
    assert group.get("k") == b"anew"
    gate.go.set()
    assert leader.result(WAIT_S) == b"loaded"
    assert group.get("k") == b"anew"


@pytest.mark.stress
def test_under_random_sets_and_loads_no_acknowledged_set_is_lost(
    threads: ThreadPoolExecutor,
) -> None:
    database = {"k": 0}
    group = Group("race", getter=lambda key: b"%d" % database[key], cache_bytes="64KiB")
    end = time.monotonic() + 1.0
    problems: list[str] = []

    def write() -> None:
        number = 0
        while time.monotonic() < end:
            number += 1
            database["k"] = number
            if number % 2:
                group.set("k", b"%d" % number)
            else:
                group.delete("k")
            got = int(group.get("k"))
            if got != number:
                problems.append(f"{got} after {number}")

    def read() -> None:
        while time.monotonic() < end:
            group.get("k")

    running = [threads.submit(write), *(threads.submit(read) for _ in range(3))]
    for task in running:
        task.result(WAIT_S)
    assert problems == []


# -- nested getters --------------------------------------------------------------------------------


@pytest.mark.parametrize("load_timeout", [None, 5])
def test_getters_may_ask_other_groups(load_timeout: float | None) -> None:
    inner = Group("inner", getter=lambda key: key.encode(), load_timeout=load_timeout)
    outer = Group(
        "outer", getter=lambda key: inner.get(key) + b"!", load_timeout=load_timeout, load_threads=1
    )
    assert outer.get("k") == b"k!"


@pytest.mark.parametrize("load_timeout", [None, 5])
def test_a_key_that_needs_itself_is_a_load_error_at_once(load_timeout: float | None) -> None:
    groups: dict[str, Group] = {}
    groups["a"] = Group("a", getter=lambda key: groups["b"].get(key), load_timeout=load_timeout)
    groups["b"] = Group("b", getter=lambda key: groups["a"].get(key), load_timeout=load_timeout)
    began = time.monotonic()
    with pytest.raises(LoadError) as caught:
        groups["a"].get("k")
    assert caught.value.cause_type == "cycle"
    assert time.monotonic() - began < 4


async def test_async_getters_that_need_themselves_are_a_load_error_at_once() -> None:
    groups: dict[str, Group] = {}

    async def load(key: str) -> bytes:
        value = await groups["a"].aget(key)
        assert isinstance(value, bytes)
        return value

    groups["a"] = Group("a", getter=load)
    with pytest.raises(LoadError) as caught:
        await groups["a"].aget("k")
    assert caught.value.cause_type == "cycle"


def test_a_cycle_that_lost_its_context_is_found_in_its_own_thread() -> None:
    groups: dict[str, Group] = {}

    def load(key: str) -> Any:
        return contextvars.Context().run(groups["a"].get, key)

    groups["a"] = Group("a", getter=load)
    with pytest.raises(LoadError) as caught:
        groups["a"].get("k")
    assert caught.value.cause_type == "cycle"


def test_a_cycle_across_threads_ends_at_the_deadline(threads: ThreadPoolExecutor) -> None:
    barrier = threading.Barrier(2, timeout=WAIT_S)
    group: Group

    def load(key: str) -> Any:
        barrier.wait()
        return group.get({"a": "b", "b": "a"}[key])

    group = Group("cross", getter=load, load_timeout=0.2)
    answers = [threads.submit(group.get, key) for key in "ab"]
    for answer in answers:
        assert isinstance(answer.exception(WAIT_S), DeadlineExceededError | LoadError)
    assert group.stats()["loading"] == 0


def test_nesting_deeper_than_allowed_is_a_load_error() -> None:
    group: Group

    def load(key: str) -> Any:
        return group.get(key + "x")

    group = Group("deep", getter=load)
    with pytest.raises(LoadError) as caught:
        group.get("x")
    assert caught.value.cause_type == "depth"


def test_a_queued_load_is_promoted_so_that_nested_askers_do_not_starve(
    gate: Gate, threads: ThreadPoolExecutor, wait_until: WaitUntil
) -> None:
    group: Group

    def load(key: str) -> Any:
        if key == "outer":
            gate(key)  # holds the only thread of depth 0 while "inner" is queued behind it
            return group.get("inner")
        return b"inner"

    group = Group("promoted", getter=load, load_timeout=WAIT_S, load_threads=1)
    outer = threads.submit(group.get, "outer")
    gate.wait_begun()
    inner = threads.submit(group.get, "inner")
    wait_until(lambda: group.stats()["loads"] == 2)
    gate.go.set()
    assert outer.result(WAIT_S / 2) == b"inner"
    assert inner.result(WAIT_S / 2) == b"inner"
    assert group.stats()["loads"] == 2


def test_a_nested_unknown_key_is_an_unknown_key() -> None:
    inner = Group("inner", getter={}.__getitem__)
    outer = Group("outer", getter=lambda key: inner.get(key))
    assert outer.get("k", default=None) is None


# -- many keys -------------------------------------------------------------------------------------


def test_get_many_joins_loads_under_way_and_loads_the_rest_at_once(
    threads: ThreadPoolExecutor, wait_until: WaitUntil
) -> None:
    go = threading.Event()
    begun = threading.Event()
    calls: list[list[str]] = []

    def load_many(keys: list[str]) -> dict[str, bytes]:
        calls.append(keys)
        if keys == ["a"]:
            begun.set()
            assert go.wait(WAIT_S)
        return {key: key.encode() for key in keys}

    group = Group("batch", getter_many=load_many)
    first = threads.submit(group.get, "a")
    assert begun.wait(WAIT_S)
    both = threads.submit(group.get_many, ["a", "b", "c"])
    wait_until(lambda: "c" in group)
    assert not both.done()
    go.set()
    assert first.result(WAIT_S) == b"a"
    assert both.result(WAIT_S) == {"a": b"a", "b": b"b", "c": b"c"}
    assert calls == [["a"], ["b", "c"]]


async def test_aget_many_runs_async_loads_together_up_to_load_threads() -> None:
    running = most = 0

    async def load(key: str) -> bytes:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1
        return key.encode()

    group = Group("together", getter=load, load_threads=4)
    keys = [str(number) for number in range(50)]
    assert await group.aget_many(keys) == {key: key.encode() for key in keys}
    assert 1 < most <= 5


async def test_aget_many_with_an_async_getter_many() -> None:
    async def load_many(keys: list[str]) -> dict[str, bytes]:
        return {key: key.encode() for key in keys if key != "none"}

    group = Group("amany", getter_many=load_many)
    assert await group.aget_many(["a", "none", "b"]) == {"a": b"a", "b": b"b"}
    assert await group.aget("c") == b"c"


def test_many_bounded_loads_are_windowed_and_all_arrive() -> None:
    group = Group("window", getter=lambda key: key.encode(), load_threads=2)
    keys = [str(number) for number in range(5000)]
    assert group.get_many(keys, timeout=30) == {key: key.encode() for key in keys}


# -- hooks -----------------------------------------------------------------------------------------


def test_the_start_hook_runs_once_before_the_first_load(threads: ThreadPoolExecutor) -> None:
    begun: list[str] = []

    def load(key: str) -> bytes:
        assert begun == ["start"]
        return b"x"

    group = Group("hooks", getter=load, on_worker_start=lambda: begun.append("start"))
    group.set("kept", b"x")
    group.get("kept")
    assert begun == []
    for answer in [threads.submit(group.get, str(number)) for number in range(16)]:
        assert answer.result(WAIT_S) == b"x"
    assert begun == ["start"]


def test_a_start_hook_that_fails_fails_the_load_and_is_tried_again() -> None:
    answers: list[Any] = [OSError("no database"), None]

    def start() -> None:
        answer = answers.pop(0)
        if answer is not None:
            raise answer

    group = Group("tried", getter=lambda key: b"x", on_worker_start=start)
    with pytest.raises(LoadError, match="on_worker_start raised OSError: no database"):
        group.get("k")
    assert group.get("k") == b"x"
    assert answers == []


async def test_async_hooks_are_awaited_on_the_loop_of_the_load() -> None:
    loops = []

    async def start() -> None:
        await asyncio.sleep(0)
        loops.append(asyncio.get_running_loop())

    async def load(key: str) -> bytes:
        return b"x"

    group = Group("ahooks", getter=load, on_worker_start=start)
    assert await asyncio.gather(*(group.aget(str(n)) for n in range(4))) == [b"x"] * 4
    assert loops == [asyncio.get_running_loop()]


# -- time ------------------------------------------------------------------------------------------


def test_values_expire_by_the_groups_ttl_and_by_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    group = Group("ttl", getter=lambda key: b"loaded", ttl=0.05, near_cache_items=8)
    group.set("short", b"set")
    group.set("long", b"set", ttl=60)
    assert (group.get("short"), group.get("long")) == (b"set", b"set")
    end = time.monotonic() + WAIT_S
    while group.get("short") == b"set":
        assert time.monotonic() < end
    assert group.get("long") == b"set"


# -- fork ------------------------------------------------------------------------------------------


def in_child(function: Callable[[], None]) -> None:
    """Run a function in a forked child; fail where it raises or hangs."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            signal.alarm(10)
            function()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    assert status == 0, f"child ended with status {status}"


def test_a_forked_child_has_a_copy_and_statistics_of_its_own() -> None:
    group = Group("forked", getter=lambda key: b"loaded")
    group.set("k", b"parent")
    group.get("k")

    def child() -> None:
        assert group.get("k") == b"parent"
        stats = group.stats()
        assert (stats["gets"], stats["sets"], stats["loads"]) == (1, 0, 0)
        assert stats["items"] == 1
        group.set("k", b"child")
        group.delete("other")
        assert group.get("k") == b"child"
        assert group.get("new") == b"loaded"

    in_child(child)
    assert group.get("k") == b"parent"
    assert "new" not in group


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_fork_amid_loads_leaves_the_child_free_to_load_the_same_key(
    gate: Gate, threads: ThreadPoolExecutor
) -> None:
    group = Group("amid", getter=lambda key: gate(key) if os.getpid() == parent else b"child")
    timed = Group("timed", getter=lambda key: b"x", load_timeout=5)
    parent = os.getpid()
    leader = threads.submit(group.get, "k")
    gate.wait_begun()
    timed.get("k")

    def child() -> None:
        assert group.get("k") == b"child"
        assert timed.get("another") == b"x"
        assert group.stats()["loads"] == 1

    in_child(child)
    gate.go.set()
    assert leader.result(WAIT_S) == b"loaded"
    assert group.get("k") == b"loaded"


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_forks_amid_traffic_never_deadlock(threads: ThreadPoolExecutor) -> None:
    groups = [Group(f"traffic{number}", getter=lambda key: b"x") for number in range(3)]
    end = threading.Event()

    def traffic(seed: int) -> None:
        number = seed
        while not end.is_set():
            number += 8
            for group in groups:
                group.get(str(number))
                group.set(str(number), b"y")

    running = [threads.submit(traffic, seed) for seed in range(4)]

    def child() -> None:
        for group in groups:
            assert group.get("child") == b"x"
            group.set("child", b"y")
            assert group.get("child") == b"y"

    try:
        for _ in range(20):
            in_child(child)
    finally:
        end.set()
    for task in running:
        task.result(WAIT_S)


def test_a_getter_may_fork_and_go_on_in_the_child() -> None:
    pids: list[int] = []

    def load(key: str) -> bytes:
        pids.append(os.fork())
        return b"child" if pids[-1] == 0 else b"parent"

    group = Group("forks", getter=load)
    value = group.get("k")
    if pids[-1] == 0:
        os._exit(0 if value == b"child" else 1)
    assert os.waitpid(pids[-1], 0)[1] == 0
    assert value == b"parent"


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_an_async_getter_works_in_a_child_whose_parent_used_it() -> None:
    async def load(key: str) -> bytes:
        return key.encode()

    group = Group("aforked", getter=load)
    assert group.get("a") == b"a"

    def child() -> None:
        assert group.get("b") == b"b"

    in_child(child)
    assert group.get("c") == b"c"


def test_a_group_made_before_a_multiprocessing_fork_works_in_the_pool() -> None:
    group = Group("pool", getter=lambda key: key.encode())
    group.set("shared", b"before")
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)

    def work() -> None:
        send.send((group.get("shared"), group.get("k")))

    process = context.Process(target=work)
    process.start()
    assert receive.poll(WAIT_S)
    assert receive.recv() == (b"before", b"k")
    process.join(WAIT_S)
    assert process.exitcode == 0


# -- the fallback of an attached group -------------------------------------------------------------


def test_the_fallback_loads_once_at_a_time_and_keeps_nothing(
    gate: Gate, threads: ThreadPoolExecutor, wait_until: WaitUntil
) -> None:
    loader = FallbackLoader(Group("fallback", getter=gate))
    answers = [threads.submit(loader.get, b"k", None) for _ in range(8)]
    wait_until(lambda: loader.table.counts["joined"] == 7)
    gate.go.set()
    assert [answer.result(WAIT_S) for answer in answers] == [b"loaded"] * 8
    assert gate.loads == 1
    assert loader.get(b"k", None) == b"loaded"
    assert gate.loads == 2
    assert loader.get_many([b"a", b"b"], None) == {b"a": b"loaded", b"b": b"loaded"}
    assert len(loader.table) == 0


def test_a_value_that_cannot_be_kept_still_reaches_its_asker(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        def find(self, key: bytes) -> None:
            return None

        def keep(self, key: bytes, loaded: bytes | None) -> None:
            raise OSError("broken store")

    from kamacache.local.loads import Loads

    loads = Loads(Group("broken", getter=lambda key: b"x"), Broken())
    assert loads.get(b"k", None) == b"x"
    assert "loaded value not kept" in caplog.text


def test_more_loads_than_may_wait_are_refused(
    gate: Gate, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch, wait_until: WaitUntil
) -> None:
    monkeypatch.setattr("kamacache.local.threads.LOADS_QUEUED_MAX", 2)
    group = Group("overload", getter=gate, load_timeout=WAIT_S, load_threads=1)
    asked = [threads.submit(group.get, "first")]
    gate.wait_begun()
    asked += [threads.submit(group.get, str(number)) for number in range(2)]
    wait_until(lambda: group.stats()["loading"] == 3)
    with pytest.raises(LoadError) as caught:
        group.get("one more")
    assert caught.value.cause_type == "overloaded"
    gate.go.set()
    assert [answer.result(WAIT_S) for answer in asked] == [b"loaded"] * 3


def test_the_counts_are_the_names_the_stats_show() -> None:
    assert set(flights.COUNTS) <= set(Group("counts").stats())
