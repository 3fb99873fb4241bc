"""Attaching: to a node that is there, is not yet, stops, crashes, and is started anew."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

import kamacache
from kamacache.errors import GroupNotFoundError, NodeUnavailableError
from kamacache.limits import REATTACH_EVERY_S
from kamacache.local.attach import attach_group
from tests.attached_estate import Estate
from tests.attached_process import AttachedProcess, in_threads
from tests.node_process import ROOT, NodeProcess

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("detached")]

WaitUntil = Callable[..., None]


def own(key: str) -> bytes:
    return b"own-" + key.encode()


def group(name: str = "scores", **settings: Any) -> kamacache.Group:
    return kamacache.Group(name, **{"getter": own, **settings})


def test_environment_attaches_at_the_first_use(estate: Estate) -> None:
    with estate.node() as node, AttachedProcess(estate.run_dir) as process:
        node.await_ready()
        assert process.call("scores", "get", "k") == "v-k"
        assert process.call("scores", "stats")["mode"] == "attached"
        assert node.stop() == 0


def test_attached_process_never_loads_grpc(estate: Estate) -> None:
    with estate.node() as node:
        node.await_ready()
        source = (
            "import sys, asyncio, kamacache; scores = kamacache.Group('scores');"
            "scores.get('k'); scores.set('k', b'1'); scores.delete('k'); scores.stats();"
            "asyncio.run(scores.aget_many(['a', 'b']));"
            "print(sorted({name.partition('.')[0] for name in sys.modules}"
            " & {'grpc', 'google', 'structlog', 'click', 'uvloop'}))"
        )
        done = subprocess.run(
            [sys.executable, "-c", source],
            env={**os.environ, "PYTHONPATH": str(ROOT), "KAMACACHE_RUN_DIR": str(estate.run_dir)},
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
        assert (done.stdout, done.stderr) == ("[]\n", "")
        assert node.stop() == 0


def test_group_attached_before_the_node_runs_joins_it_and_reads_its_memory(
    estate: Estate, wait_until: WaitUntil
) -> None:
    kamacache.attach(estate.run_dir)
    scores = group()
    assert scores.get("k") == b"own-k"
    with estate.node() as node:
        node.await_ready()
        wait_until(lambda: scores.get("k") == b"v-k", 2 * REATTACH_EVERY_S)
        before = scores.stats()
        assert [scores.get("k") for _ in range(10)] == [b"v-k"] * 10
        after = scores.stats()
        assert (after["hits"] - before["hits"], after["misses"] - before["misses"]) == (10, 0)
        assert after["fallback_loads"] >= 1
        assert node.stop() == 0


def test_without_a_node_getters_run_here_or_the_call_fails(estate: Estate) -> None:
    kamacache.attach(estate.run_dir)
    calls: list[str] = []

    def counted(key: str) -> bytes:
        calls.append(key)
        return own(key)

    opened = group(getter=counted)
    assert opened.get("k") == opened.get("k") == b"own-k"
    assert opened.get_many(["k", "l"]) == {"k": b"own-k", "l": b"own-l"}
    assert asyncio.run(opened.aget("k")) == b"own-k"
    assert asyncio.run(opened.aget_many(["k"])) == {"k": b"own-k"}
    assert calls == ["k", "k", "k", "l", "k", "k"]  # nothing is kept
    for strict in (group(fallback="error"), group(getter=None)):
        with pytest.raises(NodeUnavailableError, match="--run-dir"):
            strict.get("k")
        with pytest.raises(NodeUnavailableError):
            strict.get_many(["k"])
        with pytest.raises(NodeUnavailableError):
            asyncio.run(strict.aget("k"))


def test_without_a_node_a_key_has_one_load_at_a_time(estate: Estate, wait_until: WaitUntil) -> None:
    kamacache.attach(estate.run_dir)
    calls: list[str] = []
    go = threading.Event()

    def gated(key: str) -> bytes:
        calls.append(key)
        assert go.wait(10)
        return own(key)

    scores = group(getter=gated)
    scores._started()

    def open_when_all_wait() -> None:
        wait_until(lambda: joined(scores) == 31)
        go.set()

    opener = threading.Thread(target=open_when_all_wait, daemon=True)
    opener.start()
    assert in_threads(32, lambda _: scores.get("k")) == [b"own-k"] * 32
    assert calls == ["k"]


def joined(scores: kamacache.Group) -> int:
    """Return how many wait for another's load in this process."""
    fallback = scores._engine._fallback  # type: ignore[union-attr]
    return int(fallback.table.counts["joined"])


def test_many_gets_without_a_node_wait_for_nothing(estate: Estate) -> None:
    kamacache.attach(estate.run_dir)
    scores = group()
    scores.get("k")
    began_s = time.monotonic()
    for number in range(200):
        scores.get(f"k{number}")
    assert time.monotonic() - began_s < 0.5
    began_s = time.monotonic()
    in_threads(32, lambda number: [scores.get(f"t{number}") for _ in range(20)])
    assert time.monotonic() - began_s < 1.5


def test_group_follows_its_node_through_stops_and_starts(
    estate: Estate, wait_until: WaitUntil
) -> None:
    kamacache.attach(estate.run_dir)
    scores = group(near_cache_items=100)
    epochs, opened = set(), []
    for turn in range(3):
        value = b"turn-%d" % turn
        with estate.node() as node:
            node.await_ready()
            epochs.add(node.description().epoch)
            wait_until(lambda: scores.get("k") == b"v-k", 3.0)  # not the last life's
            scores.set("k", value)
            assert [scores.get("k") for _ in range(3)] == [value] * 3
            scores.get_many(["k", "l"])
            asyncio.run(scores.aget("m"))
            assert scores.stats()["items"] == 3
            assert node.stop() == 0
        wait_until(lambda: scores.get("k") == b"own-k", 2.0)
        with pytest.raises(NodeUnavailableError):
            scores.set("k", value)
        gc.collect()
        opened.append(len(os.listdir("/proc/self/fd")))
    assert len(epochs) == 3
    assert opened[2] - opened[0] <= 2 * 2  # of a life that is over its counters stay mapped


def test_node_with_other_groups_after_a_restart_is_an_error_not_the_getter(
    estate: Estate, wait_until: WaitUntil
) -> None:
    kamacache.attach(estate.run_dir)
    scores = group()
    with estate.node() as node:
        node.await_ready()
        wait_until(lambda: scores.get("k") == b"v-k", 2.0)
        assert node.stop() == 0
    args = ("--workers", "1", "--listen", "none", "--group", "others:1MiB")
    with NodeProcess(estate.run_dir, *args) as node:
        node.await_ready()

        def refused() -> bool:
            try:
                scores.get("k")
            except GroupNotFoundError:
                return True
            return False

        wait_until(refused, 3.0)
        assert node.stop() == 0


def test_node_whose_files_cannot_be_read_is_said_once_and_is_as_none(
    estate: Estate, wait_until: WaitUntil, caplog: pytest.LogCaptureFixture
) -> None:
    with estate.node() as node:
        node.await_ready()
        shm = node.description().shm_dir
        os.rename(f"{shm}/scores-0.data", f"{shm}/away")
        kamacache.attach(estate.run_dir)
        scores = group()
        assert [scores.get("k") for _ in range(5)] == [b"own-k"] * 5
        assert caplog.text.count("cannot be used") == 1
        with pytest.raises(NodeUnavailableError) as caught:
            scores.set("k", b"1")
        assert "scores-0.data" in str(caught.value.__cause__)
        os.rename(f"{shm}/away", f"{shm}/scores-0.data")
        wait_until(lambda: scores.get("k") == b"v-k", 2 * REATTACH_EVERY_S)
        assert node.stop() == 0


def test_attach_while_threads_read_turns_every_group_over(estate: Estate) -> None:
    stop = threading.Event()
    failures: list[BaseException] = []
    scores = group()

    def read() -> None:
        while not stop.is_set():
            try:
                assert scores.get("k") in (b"own-k", b"v-k")
            except BaseException as error:
                failures.append(error)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        with estate.node() as node:
            node.await_ready()
            for _ in range(10):
                kamacache.attach(estate.run_dir)
                assert scores.stats()["mode"] == "attached"
                assert scores.get("k") == b"v-k"
                kamacache.detach()
                assert scores.stats()["mode"] == "single"
                assert scores.get("k") == b"own-k"
            kamacache.attach(estate.run_dir)
            assert scores.get("k") == b"v-k"
            kamacache.detach()
            assert node.stop() == 0
    finally:
        stop.set()
        for thread in threads:
            thread.join(10)
    assert failures == []


def test_attach_group_is_for_commands(estate: Estate) -> None:
    with pytest.raises(NodeUnavailableError):
        attach_group(estate.run_dir, "scores")
    with estate.node() as node:
        node.await_ready()
        engine = attach_group(estate.run_dir, "scores")
        assert engine.lookup(b"k") is None
        assert engine.get(b"k", None) == b"v-k"
        assert engine.lookup(b"k") == b"v-k"
        with pytest.raises(GroupNotFoundError, match="scores"):
            attach_group(estate.run_dir, "nope")
        assert node.stop() == 0
    with pytest.raises(NodeUnavailableError):
        engine.set(b"k", b"1", None, None)


def test_child_forked_while_a_thread_attaches_finds_the_node_itself(estate: Estate) -> None:
    with estate.node() as node:
        node.await_ready()
        for _ in range(20):
            kamacache.attach(estate.run_dir)
            scores = group(fallback="error")
            first = threading.Thread(target=scores.get, args=("k",))
            first.start()
            pid = os.fork()
            if not pid:
                try:
                    os._exit(scores.get("k") != b"v-k")
                finally:
                    os._exit(99)
            first.join(10)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert node.stop() == 0
