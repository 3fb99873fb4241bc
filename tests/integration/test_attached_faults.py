"""What attached processes see when the node's processes stop, hang or are killed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import kamacache
from kamacache.errors import LoadError, NodeUnavailableError
from kamacache.hashing import shard_hash, worker_of
from tests.attached_estate import Estate
from tests.attached_process import AttachedProcess, in_threads
from tests.node_process import NodeProcess

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("detached")]

WaitUntil = Callable[..., None]
NOTICE_S = 2.0


def own(key: str) -> bytes:
    return b"own-" + key.encode()


@contextlib.contextmanager
def serving(estate: Estate, **settings: Any) -> Iterator[tuple[NodeProcess, kamacache.Group]]:
    """Run a node, with a group attached to it."""
    with contextlib.ExitStack() as last, estate.node() as node:
        node.await_ready()
        last.callback(shutil.rmtree, Path(node.description().shm_dir).parent, ignore_errors=True)
        kamacache.attach(estate.run_dir)
        yield node, kamacache.Group("scores", **{"getter": own, **settings})


def all_of(node: NodeProcess) -> list[int]:
    return [node.pid, *(child.pid for child in node.children())]


def worker_for(node: NodeProcess, key: str) -> int:
    """Return the pid of the worker that owns a key."""
    about = node.description()
    shard = worker_of(shard_hash(key.encode(), about.hash_seed), about.workers)
    role = node.role(f"worker {shard}")
    assert role is not None
    return role.pid


def kill_node(node: NodeProcess) -> None:
    """Kill all processes of a node at once, so that none can clean up."""
    pids = all_of(node)
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in pids:
            os.kill(pid, number)
    node.process.wait()


def stop_all(node: NodeProcess) -> None:
    for pid in all_of(node):
        os.kill(pid, signal.SIGSTOP)


def kill_supervisor(node: NodeProcess) -> None:
    node.process.kill()
    node.process.wait()


def terminate(node: NodeProcess) -> None:
    assert node.stop() == 0


@pytest.mark.parametrize(
    ("end", "near"),
    [
        (terminate, 1000),
        (kill_supervisor, 1000),
        (kill_node, 1000),
        (stop_all, 1000),
        (kill_node, 0),
    ],
)
def test_readers_notice_within_two_seconds_and_fall_back(
    estate: Estate, end: Callable[[NodeProcess], None], near: int
) -> None:
    with serving(estate, near_cache_items=near) as (node, scores):
        assert scores.get("k") == scores.get("k") == b"v-k"
        stop = threading.Event()
        last_seen_s = [0.0] * 4

        def read(number: int) -> None:
            while not stop.is_set():
                if scores.get("k") == b"v-k":
                    last_seen_s[number] = time.monotonic()
                elif not ended:
                    raise AssertionError("fell back beside a living node")
                time.sleep(0.0005)

        ended = False
        threads = [threading.Thread(target=read, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        try:
            ended = True
            end(node)
            ended_s = time.monotonic()
            while scores.get("k") != b"own-k":
                assert time.monotonic() - ended_s < NOTICE_S + 0.2
                time.sleep(0.005)
            began_s = time.monotonic()
            for number in range(100):
                assert scores.get(f"k{number}") == own(f"k{number}")
            assert asyncio.run(scores.aget("k")) == b"own-k"
            assert time.monotonic() - began_s < 0.5
            with pytest.raises(NodeUnavailableError):
                scores.set("k", b"1")
            assert time.monotonic() - began_s < 0.7
        finally:
            stop.set()
            for thread in threads:
                thread.join(10)
        assert max(last_seen_s) - ended_s < NOTICE_S + 0.1


def test_node_that_stood_still_is_used_again_when_it_goes_on(
    estate: Estate, wait_until: WaitUntil
) -> None:
    with serving(estate) as (node, scores):
        assert scores.get("k") == b"v-k"
        pids = all_of(node)
        stop_all(node)
        wait_until(lambda: scores.get("k") == b"own-k", NOTICE_S + 0.2)
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        wait_until(lambda: scores.get("k") == b"v-k", 3.0)
        scores.set("k", b"1")
        assert scores.get("k") == b"1"
        assert node.stop() == 0


def test_gets_under_way_come_back_when_the_node_stands_still(
    estate: Estate, wait_until: WaitUntil
) -> None:
    keys = [f"gate-{number}" for number in range(6)]
    with serving(estate) as (node, scores):
        pids = all_of(node)
        asks: list[Callable[[], object]] = [
            lambda: {keys[0]: scores.get(keys[0])},
            lambda: {keys[1]: asyncio.run(scores.aget(keys[1]))},
            lambda: scores.get_many(keys[2:4]),
            lambda: asyncio.run(scores.aget_many(keys[4:])),
        ]
        with ThreadPoolExecutor(len(asks)) as threads:
            under_way = [threads.submit(ask) for ask in asks]
            try:
                wait_until(lambda: all(estate.loads(key) == 1 for key in keys))
                time.sleep(1.2)  # longer than the time between two looks at a living node
                assert not any(future.done() for future in under_way)
                stop_all(node)
                stopped_s = time.monotonic()
                found = [future.result(8) for future in under_way]
                took_s = time.monotonic() - stopped_s
            finally:
                for key in keys:
                    estate.open_gate(key)
                for pid in pids:
                    os.kill(pid, signal.SIGCONT)
        parts = (keys[:1], keys[1:2], keys[2:4], keys[4:])
        assert found == [{key: own(key) for key in part} for part in parts]
        assert took_s < NOTICE_S + 2
        wait_until(lambda: scores.get("k") == b"v-k", 3.0)
        assert node.stop() == 0


def written(scores: kamacache.Group, key: str) -> bool:
    """Store a key's own value; False where its worker is not back in the time a call waits."""
    try:
        scores.set(key, b"v-" + key.encode())
    except NodeUnavailableError:
        return False
    return True


def test_reads_go_on_while_workers_are_killed(estate: Estate, wait_until: WaitUntil) -> None:
    def never(key: str) -> bytes:
        raise AssertionError("fell back while the node lives")

    with serving(estate, getter=never) as (node, scores):
        keys = [f"k{number}" for number in range(50)]
        for key in keys:
            scores.get(key)
        stop = threading.Event()
        slowest_s = 0.0
        waited_s: list[float] = []
        failures: list[BaseException] = []

        def read() -> None:
            nonlocal slowest_s
            try:
                while not stop.is_set():
                    for key in keys:
                        began_s = time.monotonic()
                        assert scores.get(key) == b"v-" + key.encode()
                        slowest_s = max(slowest_s, time.monotonic() - began_s)
                    time.sleep(0.0005)
            except BaseException as error:
                failures.append(error)

        reader = threading.Thread(target=read)
        reader.start()
        try:
            for turn in range(6):
                pid = worker_for(node, keys[turn])
                os.kill(pid, signal.SIGKILL)
                began_s = time.monotonic()
                wait_until(lambda key=keys[turn]: written(scores, key), 5.0)
                waited_s.append(time.monotonic() - began_s)
                scores.set(f"written-{turn}", b"%d" % turn)
                assert scores.get(f"written-{turn}") == b"%d" % turn
                wait_until(lambda pid=pid, key=keys[turn]: worker_for(node, key) != pid)
        finally:
            stop.set()
            reader.join(10)
        assert failures == []
        assert slowest_s < 0.5  # hits never waited for a worker
        assert sorted(waited_s)[len(waited_s) // 2] < 1.0, waited_s
        assert node.stop() == 0


def test_load_whose_worker_dies_is_tried_once_more_and_never_by_the_fallback(
    estate: Estate,
) -> None:
    def never(key: str) -> bytes:
        raise AssertionError("a poison key reached the application's own getter")

    with serving(estate, getter=never) as (node, scores):
        asks: list[Callable[[], object]] = [
            lambda: scores.get("die-0"),
            lambda: scores.get_many(["die-1"]),
            lambda: asyncio.run(scores.aget("die-2")),
            lambda: asyncio.run(scores.aget_many(["die-3"])),
        ]
        for turn, ask in enumerate(asks):
            with pytest.raises(LoadError) as caught:
                ask()
            assert caught.value.cause_type == "worker died"
            assert estate.loads(f"die-{turn}") == 2
        assert scores.get("healthy") == b"v-healthy"
        assert node.stop() == 0, node.log


def test_load_outlives_its_worker(estate: Estate, wait_until: WaitUntil) -> None:
    with serving(estate) as (node, scores), AttachedProcess(estate.run_dir) as other:
        asked = threading.Thread(target=lambda: answers.append(scores.get("gate-k")))
        answers: list[bytes] = []
        asked.start()
        other.ask("scores", "get", "gate-k", threads=8)
        wait_until(lambda: estate.loads("gate-k") == 1)
        os.kill(worker_for(node, "gate-k"), signal.SIGKILL)
        wait_until(lambda: estate.loads("gate-k") == 2)
        estate.open_gate("gate-k")
        asked.join(10)
        assert answers == [b"v-gate-k"]
        assert other.answer() == ["v-gate-k"] * 8
        assert estate.loads("gate-k") == 2  # once more, by one worker, for all nine
        assert len(set(estate.loaders("gate-k"))) == 2
        assert node.stop() == 0


def died(answer: object) -> bool:
    return isinstance(answer, LoadError) and answer.cause_type == "worker died"


def test_gets_that_wait_at_a_node_that_dies_fall_back(
    estate: Estate, wait_until: WaitUntil
) -> None:
    for end in (kill_node, kill_supervisor):
        with serving(estate) as (node, scores):
            answers: list[Any] = []
            key = f"gate-{end.__name__}"

            def ask(key: str = key, answers: list[Any] = answers) -> None:
                answers.extend(in_threads(8, lambda _: scores.get(key)))

            asking = threading.Thread(target=ask)
            asking.start()
            wait_until(lambda key=key: estate.loads(key) == 1)
            end(node)
            ended_s = time.monotonic()
            asking.join(10)
            assert len(answers) == 8
            # One that asked anew while the worker's process was ending has asked it twice.
            assert all(answer == own(key) or died(answer) for answer in answers), answers
            assert time.monotonic() - ended_s < NOTICE_S + 1.0


def test_gets_that_wait_at_a_node_that_drains_have_their_answer(
    estate: Estate, wait_until: WaitUntil
) -> None:
    with serving(estate) as (node, scores):
        answers: list[Any] = []
        asking = threading.Thread(
            target=lambda: answers.extend(in_threads(8, lambda _: scores.get("gate-drain")))
        )
        asking.start()
        wait_until(lambda: estate.loads("gate-drain") == 1)
        node.process.send_signal(signal.SIGTERM)
        wait_until(lambda: not node.run_dir.joinpath("node.json").exists())
        assert scores.get("cold") in (b"v-cold", b"own-cold")
        estate.open_gate("gate-drain")
        asking.join(10)
        assert set(answers) <= {b"v-gate-drain", b"own-gate-drain"}
        assert len(answers) == 8
        assert node.await_end() == 0
