"""The end of a node whose loads need each other: who ends when, and who may end it how often."""

from __future__ import annotations

import os
import pty
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import grpc
import pytest

from kamacache.errors import NodeUnavailableError
from kamacache.hashing import shard_hash, worker_of
from kamacache.local.attach import Attachment
from kamacache.local.attached import AttachedEngine
from kamacache.local.link import WorkerLinks
from kamacache.node.stopping import AT_ONCE_GRACE_S
from kamacache.wire.messages import Get
from tests.node_process import NodeProcess, files_below

pytestmark = pytest.mark.integration

WaitUntil = Callable[..., None]

APP = """
import asyncio, os, time
from pathlib import Path
import kamacache

HERE = Path(os.environ["TEST_HERE"])

def passed(gate):
    (HERE / f"{gate}-begun").touch()
    return (HERE / f"{gate}-open").exists()

@kamacache.group("inner", cache_bytes="1MiB")
def inner(key):
    while not passed("inner"):
        time.sleep(0.005)
    return b"inner of " + key.encode()

@kamacache.group("outer", cache_bytes="1MiB")
def outer(key):
    while not passed("outer"):
        time.sleep(0.005)
    return b"outer, " + inner.get(key.partition("/")[2])

@kamacache.group("aouter", cache_bytes="1MiB")
async def aouter(key):
    while not passed("outer"):
        await asyncio.sleep(0.005)
    return b"outer, " + await inner.aget(key.partition("/")[2])

@kamacache.group("fast", cache_bytes="1MiB")
def fast(key):
    return key.encode()

groups = [inner, outer, aouter, fast]
"""


class Draining:
    """A node of two workers that runs the app, and what a test asks of it."""

    def __init__(self, node: NodeProcess, here: Path) -> None:
        self.node = node
        self.here = here
        self.about = node.description()
        self.attachment = Attachment(node.run_dir)
        assert self.attachment.current() is not None  # later there is no node.json
        self.links = [WorkerLinks(self.about.sockets_dir, shard) for shard in range(2)]

    def key(self, outer: int, inner: int) -> bytes:
        """Return a key whose outer load is one worker's and whose inner load is another's."""
        for number in range(10_000):
            key = b"%d" % number
            if self._owner(key) == inner:
                whole = b"%d/%d" % (number % 7, number)
                if self._owner(whole) == outer:
                    return whole
        raise AssertionError("no such key")

    def _owner(self, key: bytes) -> int:
        return worker_of(shard_hash(key, self.about.hash_seed), self.about.workers)

    def get(self, group: str, key: bytes) -> bytes | None:
        return AttachedEngine(self.attachment, group).get(key, time.monotonic() + 20)

    def refuses(self, shard: int) -> bool:
        """Tell whether a worker begins loads no more."""
        request = Get(group="fast", key=b"cold-%d" % time.monotonic_ns())
        try:
            self.links[shard].call(request, time.monotonic() + 5)
        except NodeUnavailableError:
            return True
        return False

    def begun(self, gate: str) -> bool:
        return (self.here / f"{gate}-begun").exists()

    def open(self, gate: str) -> None:
        (self.here / f"{gate}-open").touch()

    def close(self) -> None:
        self.open("inner")
        self.open("outer")
        self.attachment.close()
        for links in self.links:
            links.close()


Start = Callable[..., AbstractContextManager[Draining]]


@pytest.fixture
def draining(short_dir: Path, shm_root: Path) -> Iterator[Start]:
    here = short_dir / "app"
    here.mkdir()
    (here / "drain_app.py").write_text(APP)
    shm = shm_root / short_dir.name
    shm.mkdir()
    environment = {"TEST_HERE": str(here), "PYTHONPATH": f"{Path.cwd()}:{here}"}

    @contextmanager
    def run(
        *args: str, prefix: tuple[str, ...] = (), terminal: int | None = None
    ) -> Iterator[Draining]:
        with NodeProcess(
            short_dir / "run",
            *("--workers", "2", "--app", "drain_app:groups", "--shm-dir", str(shm)),
            *(args or ("--listen", "none")),
            environment=environment,
            prefix=prefix,
            terminal=terminal,
        ) as node:
            node.await_ready()
            draining = Draining(node, here)
            try:
                yield draining
            finally:
                draining.close()
            assert files_below(shm) == []

    yield run
    shutil.rmtree(shm)


@contextmanager
def asking(call: Callable[[], bytes | None]) -> Iterator[Future[bytes | None]]:
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(call)


@pytest.mark.parametrize("group", ["outer", "aouter"])
def test_nested_load_of_another_worker_finishes_during_a_drain(
    draining: Start, wait_until: WaitUntil, group: str
) -> None:
    with draining() as on:
        key = on.key(outer=0, inner=1)
        with asking(lambda: on.get(group, key)) as answer:
            wait_until(lambda: on.begun("outer"))
            on.node.process.send_signal(signal.SIGTERM)
            # Worker 1 has had no load; it must stay all the same.
            wait_until(lambda: on.refuses(0) and on.refuses(1))
            assert len(on.node.children()) == 2
            on.open("outer")
            wait_until(lambda: on.begun("inner"))
            assert len(on.node.children()) == 2
            on.open("inner")
            assert answer.result(10) == b"outer, inner of " + key.partition(b"/")[2]
        assert on.node.await_end(5) == 0
        assert "in time" not in on.node.log


def test_idle_workers_end_as_soon_as_all_are_idle(
    draining: Start,
) -> None:
    with draining() as on:
        began_s = time.monotonic()
        assert on.node.stop() == 0
        assert time.monotonic() - began_s < 1.0
        assert "is back" not in on.node.log  # at their first start they are not


def test_interrupt_in_a_drain_ends_it_at_once(draining: Start, wait_until: WaitUntil) -> None:
    with draining() as on:
        key = on.key(outer=0, inner=1)
        with asking(lambda: on.get("outer", key)) as answer:
            wait_until(lambda: on.begun("outer"))
            on.node.process.send_signal(signal.SIGTERM)
            wait_until(lambda: on.refuses(0) and on.refuses(1))
            began_s = time.monotonic()
            assert on.node.stop(signal.SIGINT) == 0
            assert time.monotonic() - began_s < AT_ONCE_GRACE_S + 1.0
            assert isinstance(answer.exception(10), Exception)


def test_worker_that_dies_in_a_drain_does_not_hold_it_up(
    draining: Start, wait_until: WaitUntil
) -> None:
    with draining() as on:
        key = on.key(outer=0, inner=1)
        with asking(lambda: on.get("outer", key)) as answer:
            wait_until(lambda: on.begun("outer"))
            on.node.process.send_signal(signal.SIGTERM)
            wait_until(lambda: on.refuses(0) and on.refuses(1))
            worker = on.node.role("worker 0")
            assert worker is not None
            worker.kill()
            assert on.node.await_end(5) == 0
            assert isinstance(answer.exception(10), Exception)


def test_workers_begin_loads_until_the_fronts_have_finished(
    draining: Start, wait_until: WaitUntil
) -> None:
    from kamacache.v1 import kamacache_pb2 as pb
    from kamacache.v1.kamacache_pb2_grpc import CacheStub

    with draining("--listen", "127.0.0.1:0", "--fronts", "2") as on:
        key = on.key(outer=0, inner=1)
        with grpc.insecure_channel(str(on.about.listen)) as channel:
            stub = CacheStub(channel)
            call = stub.Get.future(pb.GetRequest(group="outer", key=key), timeout=20)
            wait_until(lambda: on.begun("outer"))
            on.node.process.send_signal(signal.SIGTERM)
            wait_until(lambda: len(on.node.children()) == 3)  # the front without a call is gone
            assert on.get("fast", b"cold") == b"cold"
            on.open("outer")
            on.open("inner")
            assert call.result(10).value == b"outer, inner of " + key.partition(b"/")[2]
        assert on.node.await_end(5) == 0


def test_term_to_one_worker_renews_it(draining: Start, wait_until: WaitUntil) -> None:
    with draining() as on:
        old = on.node.role("worker 1")
        assert old is not None
        old.terminate()

        def renewed() -> bool:
            now = on.node.role("worker 1")
            return now is not None and now.pid != old.pid and not on.refuses(1)

        wait_until(renewed)
        assert on.node.log.count("role is back") == 1
        assert on.node.stop() == 0


WRAPPERS = {
    "a process group": ("env",),
    "timeout": ("timeout", "60"),
    "sh": ("sh", "-c", 'trap "" TERM INT; "$@"', "sh"),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_term_to_the_whole_process_group_is_one_drain(
    draining: Start, wait_until: WaitUntil, wrapper: str
) -> None:
    with draining(prefix=WRAPPERS[wrapper]) as on:
        key = on.key(outer=0, inner=1)
        with asking(lambda: on.get("outer", key)) as answer:
            wait_until(lambda: on.begun("outer"))
            if wrapper == "timeout":  # sends it on to the node, and to the group, the node included
                on.node.process.send_signal(signal.SIGTERM)
            else:
                os.killpg(on.node.process.pid, signal.SIGTERM)
            wait_until(lambda: on.refuses(0) and on.refuses(1))
            on.open("outer")
            wait_until(lambda: on.begun("inner"))
            on.open("inner")
            assert answer.result(10) == b"outer, inner of " + key.partition(b"/")[2]
        on.node.await_end(5)
        for word in ("died", "badly", "killed", "is back"):
            assert word not in on.node.log


OWN_TERMINAL = (
    sys.executable,
    "-c",
    """import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])""",
)


@pytest.mark.parametrize("key", [b"\x03", b"\x1c"], ids=["Ctrl-C", "Ctrl-\\"])
def test_key_at_the_terminal_ends_all_at_once_and_in_order(
    draining: Start, wait_until: WaitUntil, key: bytes
) -> None:
    master, slave = pty.openpty()
    arguments = ("--listen", "127.0.0.1:0", "--fronts", "2")
    try:
        with draining(*arguments, prefix=OWN_TERMINAL, terminal=slave) as on:
            nested = on.key(outer=0, inner=1)
            with asking(lambda: on.get("outer", nested)) as answer:
                wait_until(lambda: on.begun("outer"))
                began_s = time.monotonic()
                os.write(master, key)
                assert on.node.await_end(5) == 0
                assert time.monotonic() - began_s < AT_ONCE_GRACE_S + 1.0
                assert isinstance(answer.exception(10), Exception)
            for word in ("died", "badly", "Traceback", "is back"):
                assert word not in on.node.log
    finally:
        os.close(master)
        os.close(slave)
