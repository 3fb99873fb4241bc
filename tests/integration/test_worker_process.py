"""Real worker processes behind real links: death, drain, restart, one load for all."""

from __future__ import annotations

import signal
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kamacache.errors import DeadlineExceededError, KamaCacheError, LoadError, NodeUnavailableError
from kamacache.limits import HUNG_THREADS_MAX
from kamacache.local.link import WorkerLinks
from kamacache.wire.messages import Delete, Done, Get, Ping, Set, Stats, StatsReply, Value
from tests.node_process import NodeProcess
from tests.worker.harness import in_threads

pytestmark = pytest.mark.integration

APP = """
import os, signal, time
from pathlib import Path
import kamacache

HERE = Path(os.environ["TEST_HERE"])

@kamacache.group("g", cache_bytes="1MiB", load_timeout=20)
def g(key):
    with open(HERE / "calls", "a") as calls:
        calls.write(key + "\\n")
    if key == "poison":
        os.kill(os.getpid(), signal.SIGKILL)
    if key.startswith("wait"):
        while not (HERE / "go").exists():
            time.sleep(0.005)
    return key.encode()

@kamacache.group("hangs", cache_bytes="1MiB", load_timeout=0.2, load_threads=64)
def hangs(key):
    while not (HERE / "go").exists():
        time.sleep(0.05)

groups = [g, hangs]
"""


class Node:
    """A node with one worker and links to it."""

    def __init__(self, process: NodeProcess, here: Path) -> None:
        self.process = process
        self.here = here
        self.links = WorkerLinks(process.description().sockets_dir, 0)

    def get(self, key: str, timeout: float = 10) -> bytes | None:
        request = Get(group="g", key=key.encode())
        reply = self.links.call(request, time.monotonic() + timeout)
        assert isinstance(reply, Value)
        return reply.value

    def call(self, request: Any) -> Any:
        return self.links.call(request, time.monotonic() + 10)

    @property
    def calls(self) -> list[str]:
        path = self.here / "calls"
        return path.read_text().split() if path.exists() else []

    def kill_worker(self) -> None:
        worker = self.process.role("worker 0")
        assert worker is not None
        worker.kill()


@pytest.fixture
def node(short_dir: Path, shm_root: Path) -> Iterator[Node]:
    here = short_dir / "app"
    here.mkdir()
    (here / "wire_app.py").write_text(APP)
    environment = {"TEST_HERE": str(here), "PYTHONPATH": f"{Path.cwd()}:{here}"}
    arguments = ("--workers", "1", "--fronts", "0", "--app", "wire_app:groups")
    with NodeProcess(short_dir / "run", *arguments, environment=environment) as process:
        process.await_ready()
        node = Node(process, here)
        try:
            yield node
        finally:
            node.links.close()
            (here / "go").touch()
            if process.process.poll() is None:
                process.stop()


def test_sixty_four_askers_of_a_cold_key_are_one_load(node: Node, wait_until: Any) -> None:
    def loads_joined() -> bool:
        reply = node.call(Stats(group="g"))
        assert isinstance(reply, StatsReply)
        return reply.stats["loads_joined"] == 62

    links = WorkerLinks(node.process.description().sockets_dir, 0)

    def release() -> None:
        wait_until(loads_joined)
        (node.here / "go").touch()

    def ask(index: int) -> Any:
        if index == 63:
            return release()
        return links.call(Get(group="g", key=b"wait"), time.monotonic() + 15)

    results = in_threads(64, ask)
    links.close()
    assert [type(result) for result in results[:63]] == [Value] * 63
    assert {result.value for result in results[:63]} == {b"wait"}
    assert node.calls == ["wait"]


def test_a_killed_worker_is_waited_for(node: Node) -> None:
    assert node.call(Set(group="g", key=b"k", value=b"set")).count == 1
    node.kill_worker()
    began = time.monotonic()
    assert node.get("k") == b"set"
    assert time.monotonic() - began < 2
    node.kill_worker()
    assert isinstance(node.call(Delete(group="g", key=b"k")), Done)
    assert node.get("k") == b"k"


def test_a_load_whose_worker_died_is_tried_once_more(node: Node) -> None:
    with pytest.raises(LoadError) as caught:
        node.get("poison", timeout=15)
    assert caught.value.cause_type == "worker died"
    assert node.calls == ["poison"] * 2
    assert node.get("fine") == b"fine"


def test_a_load_outlives_its_asker(node: Node, wait_until: Any) -> None:
    with pytest.raises(DeadlineExceededError):
        node.get("wait", timeout=0.3)  # its connection ends with it
    wait_until(lambda: node.calls == ["wait"])
    (node.here / "go").touch()
    assert node.get("wait") == b"wait"
    assert node.calls == ["wait"]


def test_too_many_hung_getters_bring_a_fresh_worker(node: Node, wait_until: Any) -> None:
    def worker_pid() -> int:
        worker = node.process.role("worker 0")
        return worker.pid if worker else 0

    def ask(index: int) -> Any:
        request = Get(group="hangs", key=b"%d" % index)
        return node.links.call(request, time.monotonic() + 10)

    before = worker_pid()
    results = in_threads(HUNG_THREADS_MAX + 1, ask)
    assert all(isinstance(result, KamaCacheError) for result in results)
    wait_until(lambda: worker_pid() not in {0, before})
    assert node.get("fine") == b"fine"
    assert "too many getters hang" in node.process.log


def test_a_drain_finishes_loads_and_refuses_new_ones(node: Node, wait_until: Any) -> None:
    node.call(Ping())  # leaves an idle connection, on which the refused load comes
    other = WorkerLinks(node.process.description().sockets_dir, 0)
    results: list[Any] = []

    def refused() -> bool:
        try:
            node.get("another")
        except NodeUnavailableError:
            return True
        return False

    def ask() -> None:
        results.append(other.call(Get(group="g", key=b"wait"), time.monotonic() + 10))

    asker = threading.Thread(target=ask)
    asker.start()
    wait_until(lambda: node.calls == ["wait"])
    node.call(Set(group="g", key=b"held", value=b"set"))
    node.process.process.send_signal(signal.SIGTERM)
    wait_until(lambda: node.call(Delete(group="g", key=b"another")) and refused())
    began = node.calls.count("another")
    assert node.get("held") == b"set"
    assert node.call(Set(group="g", key=b"held", value=b"new")).count == 1
    assert node.get("held") == b"new"
    (node.here / "go").touch()
    asker.join(10)
    other.close()
    assert [result.value for result in results] == [b"wait"]
    assert node.calls.count("wait") == 1
    assert node.calls.count("another") == began
    assert node.process.await_end() == 0


def test_the_sockets_are_the_owners_alone(node: Node) -> None:
    path = Path(node.process.description().socket_path(0))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) & 0o077 == 0
