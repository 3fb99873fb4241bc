"""Getters in a node's workers: async ones on the loop, many keys at once, hooks around them."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import kamacache
from kamacache.errors import LoadError
from tests.node_process import NodeProcess

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("detached")]

WaitUntil = Callable[..., None]
WORKERS = 2

APP = """
import asyncio, json, os, sys, threading
import kamacache

TRACE = os.environ["TEST_TRACE"]
pool = {}

def note(what, **fields):
    line = json.dumps({"what": what, "pid": os.getpid(), **fields})
    with open(TRACE, "ab", buffering=0) as trace:
        trace.write(line.encode() + b"\\n")

async def astart():
    loop = asyncio.get_running_loop()
    await asyncio.sleep(0.01)
    pool["loop"] = loop
    note("astart", loop=type(loop).__module__, main=threading.current_thread().name)

async def astop():
    await asyncio.sleep(0.01)
    note("astop", same=pool["loop"] is asyncio.get_running_loop())

async def aload(key):
    assert pool["loop"] is asyncio.get_running_loop()
    await asyncio.sleep(0.01)
    note("aload", key=key)
    if key.startswith("none"):
        raise KeyError(key)
    if key.startswith("bad"):
        raise RuntimeError(key)
    return b"a-" + key.encode()

async def aload_many(keys):
    assert pool["loop"] is asyncio.get_running_loop()
    await asyncio.sleep(0.05)
    note("aload_many", keys=sorted(keys))
    return {key: b"m-" + key.encode() for key in keys if not key.startswith("none")}

def start():
    pool["database"] = "open"
    note("start", database=os.getpid())

def stop():
    note("stop", threads=sorted(t.name for t in threading.enumerate() if "busy" in t.name))
    pool.clear()

def load(key):
    note("load", key=key, database=pool["database"])
    return key.encode()

one = kamacache.Group("one", cache_bytes="1MiB", getter=aload, negative_ttl=60,
                      on_worker_start=astart, on_worker_stop=astop)
many = kamacache.Group("many", cache_bytes="1MiB", getter_many=aload_many, negative_ttl=60)
sync = kamacache.Group("sync", cache_bytes="1MiB", getter=load,
                       on_worker_start=start, on_worker_stop=stop)
groups = [one, many, sync]
"""


class Traced:
    """A node of the app, and what its workers wrote down."""

    def __init__(self, node: NodeProcess, path: Path) -> None:
        self.node = node
        self._path = path

    def notes(self, what: str = "") -> list[dict[str, Any]]:
        if not self._path.exists():
            return []
        notes = [json.loads(line) for line in self._path.read_text().splitlines()]
        return [note for note in notes if not what or note["what"] == what]

    def workers(self) -> set[int]:
        return {child.pid for child in self.node.children()}


@pytest.fixture
def traced(short_dir: Path, shm_root: Path) -> Iterator[Traced]:
    (short_dir / "getter_app.py").write_text(APP)
    environment = {
        "TEST_TRACE": str(short_dir / "trace"),
        "PYTHONPATH": f"{Path.cwd()}:{short_dir}",
    }
    arguments = ("--workers", str(WORKERS), "--listen", "none", "--app", "getter_app:groups")
    with NodeProcess(short_dir / "run", *arguments, environment=environment) as node:
        node.await_ready()
        kamacache.attach(short_dir / "run")
        yield Traced(node, short_dir / "trace")
        if node.process.poll() is None:
            assert node.stop() == 0


def group(name: str) -> kamacache.Group:
    return kamacache.Group(name, fallback="error")


def test_async_getter_runs_on_the_workers_loop_once_for_all(traced: Traced) -> None:
    one = group("one")

    async def ask() -> list[Any]:
        return list(await asyncio.gather(*[one.aget("k") for _ in range(16)]))

    answers: list[Any] = []
    threads = [threading.Thread(target=lambda: answers.append(one.get("k"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    answers += asyncio.run(ask())
    for thread in threads:
        thread.join(10)
    assert answers == [b"a-k"] * 24
    assert [note["key"] for note in traced.notes("aload")] == ["k"]


def test_async_getter_says_what_is_not_there_and_what_failed(traced: Traced) -> None:
    one = group("one")
    assert one.get("none-1", default=None) is None
    assert one.get("none-1", default=None) is None  # kept for negative_ttl
    for _ in range(2):
        with pytest.raises(LoadError) as caught:
            one.get("bad-1")
        assert caught.value.cause_type == "RuntimeError"
    assert [note["key"] for note in traced.notes("aload")] == ["none-1", "bad-1", "bad-1"]


def test_async_getter_many_gets_the_missing_keys_in_one_call_a_worker(traced: Traced) -> None:
    many = group("many")
    many.set("held", b"held")
    keys = ["held", "none-1", *(f"k{number}" for number in range(30))]
    expected = {"held": b"held", **{key: b"m-" + key.encode() for key in keys[2:]}}
    assert many.get_many(keys) == expected
    assert asyncio.run(many.aget_many(keys)) == expected
    calls = traced.notes("aload_many")
    assert len(calls) == WORKERS
    assert sorted(key for note in calls for key in note["keys"]) == sorted(keys[1:])
    assert many.get("single") == b"m-single"
    assert traced.notes("aload_many")[-1]["keys"] == ["single"]


def test_hooks_run_once_a_worker_around_everything_else(
    traced: Traced, wait_until: WaitUntil
) -> None:
    workers = traced.workers()
    assert len(workers) == WORKERS
    sync = group("sync")
    assert sync.get_many([str(number) for number in range(20)])
    killed = traced.node.children()[0]
    killed.kill()
    wait_until(lambda: len(traced.notes("start")) == WORKERS + 1)
    wait_until(lambda: traced.node.log.count("role is back") == 1)
    successor = (traced.workers() - workers).pop()
    assert traced.node.stop() == 0
    for pid in workers | {successor}:
        said = [note["what"] for note in traced.notes() if note["pid"] == pid]
        assert said[:2] == ["astart", "start"]  # in the order of the app
        assert set(said[2:-2]) <= {"load"}
        if pid != killed.pid:
            assert said[-2:] == ["astop", "stop"]
            assert (said.count("astop"), said.count("stop")) == (1, 1)
    assert {note["loop"].partition(".")[0] for note in traced.notes("astart")} == {"uvloop"}
    assert {note["same"] for note in traced.notes("astop")} == {True}
    assert {note["database"] for note in traced.notes("load")} == {"open"}
