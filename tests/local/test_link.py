"""The sync link: deadlines, threads, forks, and workers that go away."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from kamacache.errors import DeadlineExceededError, LoadError, NodeUnavailableError
from kamacache.limits import LINK_RESTART_WAIT_S
from kamacache.local.alink import AsyncWorkerLinks
from kamacache.local.exchange import LOST_MAX
from kamacache.local.link import WorkerLinks, call_all
from kamacache.local.looplink import LoopLink
from kamacache.node.readable import wait_readable
from kamacache.wire.frames import FrameReader, frame
from kamacache.wire.messages import (
    Done,
    Get,
    GetMany,
    Ping,
    Set,
    Value,
    Values,
    decode_request,
)
from tests.worker.harness import Gate, Running, in_threads, running

Answer = Callable[[Any, socket.socket], None]


@pytest.fixture
def worker(short_dir: Path) -> Iterator[Running]:
    with running(short_dir) as server:
        yield server


@contextmanager
def scripted(folder: Path, *answers: Answer, shard: int = 0) -> Iterator[list[Any]]:
    """A worker that handles the first request of its n-th connection by the n-th function."""
    seen: list[Any] = []
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{folder}/worker-{shard}.sock")
    listener.listen()
    listener.settimeout(10)

    def serve() -> None:
        for answer in answers:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                reader = FrameReader()
                while (body := reader.next()) is None:
                    data = connection.recv(1 << 16)
                    if not data:
                        break
                    reader.feed(data)
                if body is not None:
                    seen.append(decode_request(body))
                    with suppress(OSError):  # the caller may be gone
                        answer(seen[-1], connection)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield seen
    finally:
        listener.close()
        Path(f"{folder}/worker-{shard}.sock").unlink(missing_ok=True)
        thread.join(10)


def done(request: Any, connection: socket.socket) -> None:
    connection.sendall(frame(Done(request.id, 1)))


def die(request: Any, connection: socket.socket) -> None:
    """Close the connection without an answer."""


def soon(seconds: float = 5) -> float:
    return time.monotonic() + seconds


def test_connections_are_kept_and_bounded(worker: Running) -> None:
    gate = Gate()
    worker.group(gate)
    links = WorkerLinks(worker.folder, 0, links_max=2)
    try:
        holders = [
            threading.Thread(target=lambda i=i: links.call(Get(group="g", key=b"%d" % i), soon(10)))
            for i in range(2)
        ]
        for holder in holders:
            holder.start()
            gate.wait_entered()
        with pytest.raises(DeadlineExceededError):
            links.call(Ping(), soon(0.05))
        waiter: list[Any] = []
        third = threading.Thread(target=lambda: waiter.append(links.call(Ping(), soon())))
        third.start()
        gate.open.set()
        for thread in (*holders, third):
            thread.join(10)
        assert len(waiter) == 1
        assert len(worker.server.connections) == 2
    finally:
        links.close()


def test_threads_share_the_links_and_get_their_own_answers(worker: Running) -> None:
    worker.group(lambda key: key.encode())

    def ask(thread: int) -> int:
        for turn in range(200):
            key = b"%d-%d" % (thread, turn % 20)
            assert worker.links.call(Get(group="g", key=key), soon()) == Value(AnyId(), key)
        return 1

    assert in_threads(8, ask) == [1] * 8
    assert len(worker.server.connections) <= 8


class AnyId(int):
    def __eq__(self, other: object) -> bool:
        return isinstance(other, int)

    __hash__ = int.__hash__


def test_a_late_reply_is_never_another_calls(short_dir: Path) -> None:
    release = threading.Event()

    def late(request: Any, connection: socket.socket) -> None:
        release.wait(10)
        connection.sendall(frame(Value(request.id, b"late")))

    def answer(request: Any, connection: socket.socket) -> None:
        connection.sendall(frame(Value(request.id, b"right")))

    links = WorkerLinks(short_dir, 0)
    with scripted(short_dir, late, answer):
        began = time.monotonic()
        with pytest.raises(DeadlineExceededError):
            links.call(Get(group="g", key=b"k"), soon(0.1))
        assert time.monotonic() - began < 1
        release.set()
        assert links.call(Get(group="g", key=b"k"), soon()) == Value(AnyId(), b"right")
        links.close()


def test_a_reply_of_another_id_ends_the_connection(short_dir: Path) -> None:
    def wrong(request: Any, connection: socket.socket) -> None:
        connection.sendall(frame(Done(request.id + 1, 1)))

    links = WorkerLinks(short_dir, 0)
    with scripted(short_dir, wrong, done) as seen:
        links.call(Set(group="g", key=b"k", value=b"v"), soon())
        assert len(seen) == 2
        links.close()


def test_a_request_lost_with_its_worker_is_sent_once_more(short_dir: Path) -> None:
    links = WorkerLinks(short_dir, 0)
    with scripted(short_dir, die, done) as seen:
        assert links.call(Set(group="g", key=b"k", value=b"v"), soon()) == Done(AnyId(), 1)
        assert len(seen) == 2
        links.close()


def listening(folder: Path) -> socket.socket:
    """Take the place of the worker that listens."""
    path = f"{folder}/worker-0.sock"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{path}.new")
    listener.listen()
    os.rename(f"{path}.new", path)
    return listener


def answer_one(listener: socket.socket) -> None:
    with listener, listener.accept()[0] as connection:
        reader = FrameReader()
        while (body := reader.next()) is None:
            reader.feed(connection.recv(1 << 16))
        done(decode_request(body), connection)


@contextmanager
def dying(folder: Path, deaths: int) -> Iterator[None]:
    """Workers whose queue takes a connection each and that end without accepting it; then one."""

    def serve(listener: socket.socket) -> None:
        for _ in range(deaths):
            assert wait_readable((listener.fileno(),), 10)
            successor = listening(folder)
            listener.close()
            listener = successor
        answer_one(listener)

    thread = threading.Thread(target=serve, args=(listening(folder),))
    thread.start()
    yield
    thread.join(10)
    assert not thread.is_alive()


def test_what_a_dying_worker_never_read_is_not_lost_by_it(short_dir: Path) -> None:
    links = WorkerLinks(short_dir, 0)
    with dying(short_dir, deaths=LOST_MAX + 2):
        assert isinstance(links.call(Set(group="g", key=b"k", value=b"v"), soon()), Done)
    links.close()
    with dying(short_dir, deaths=LOST_MAX + 2):
        pending = links.start(Set(group="g", key=b"k", value=b"v"), soon())
        assert isinstance(links.finish(pending), Done)
    links.close()


async def test_what_a_dying_worker_never_read_is_not_lost_by_it_on_a_loop(short_dir: Path) -> None:
    links = AsyncWorkerLinks(short_dir, 0)
    with dying(short_dir, deaths=LOST_MAX + 2):
        assert isinstance(await links.call(Set(group="g", key=b"k", value=b"v"), soon()), Done)
    links.close()


async def test_what_could_not_be_sent_is_not_lost_on_a_loop(
    short_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listeners = [listening(short_dir)]
    flush = LoopLink._flush

    def worker_ends_before(link: LoopLink) -> None:
        if len(listeners) <= LOST_MAX + 1:
            listeners.append(listening(short_dir))
            listeners[-2].close()
        flush(link)

    monkeypatch.setattr(LoopLink, "_flush", worker_ends_before)
    links = AsyncWorkerLinks(short_dir, 0)
    asked = asyncio.ensure_future(links.call(Get(group="g", key=b"k"), soon()))
    while len(listeners) <= LOST_MAX + 1 and not asked.done():  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    with listeners[-1]:
        if not asked.done():
            await asyncio.wait_for(asyncio.to_thread(answer_one, listeners[-1]), 10)
        assert isinstance(await asked, Done)
    links.close()


def test_a_load_that_kills_its_worker_twice_is_a_load_error(short_dir: Path) -> None:
    links = WorkerLinks(short_dir, 0)
    with scripted(short_dir, die, die, done) as seen:
        with pytest.raises(LoadError) as caught:
            links.call(Get(group="g", key=b"k"), soon())
        assert caught.value.cause_type == "worker died"
        assert len(seen) == 2
        with socket.socket(socket.AF_UNIX) as last:
            last.connect(f"{short_dir}/worker-0.sock")
        links.close()


def test_garbage_from_a_worker_is_an_error_not_a_value(short_dir: Path) -> None:
    def garbage(request: Any, connection: socket.socket) -> None:
        connection.sendall(b"\xff" * 100)

    links = WorkerLinks(short_dir, 0)
    with scripted(short_dir, garbage, garbage), pytest.raises(NodeUnavailableError):
        links.call(Set(group="g", key=b"k", value=b"v"), soon())
    links.close()


def test_a_call_waits_for_a_worker_that_restarts(short_dir: Path) -> None:
    links = WorkerLinks(short_dir, 0)
    with scripted(short_dir, done):
        links.call(Ping(), soon())
    began = threading.Event()
    results: list[Any] = []

    def ask() -> None:
        began.set()
        results.append(links.call(Ping(), soon()))

    asker = threading.Thread(target=ask)
    asker.start()
    began.wait(5)
    with scripted(short_dir, done):
        asker.join(5)
    assert results == [Done(AnyId(), 1)]
    links.close()


def test_without_a_node_a_call_gives_up_and_the_next_does_not_wait(short_dir: Path) -> None:
    links = WorkerLinks(short_dir, 0)
    began = time.monotonic()
    with pytest.raises(NodeUnavailableError) as caught:
        links.call(Ping(), soon(10))
    waited = time.monotonic() - began
    assert caught.value.shard == 0
    assert LINK_RESTART_WAIT_S * 0.8 < waited < LINK_RESTART_WAIT_S + 1
    began = time.monotonic()
    for _ in range(3):
        with pytest.raises(NodeUnavailableError):
            links.call(Ping(), soon(10))
    assert time.monotonic() - began < 0.4


def test_nobody_waits_for_a_node_that_is_known_to_be_gone(short_dir: Path) -> None:
    links = WorkerLinks(short_dir, 0, alive=lambda: False)
    began = time.monotonic()
    with pytest.raises(NodeUnavailableError):
        links.call(Ping(), soon(10))
    assert time.monotonic() - began < 0.5


def test_a_large_value_crosses_in_both_directions(worker: Running) -> None:
    worker.group(cache_bytes=512 << 20)
    value = os.urandom(1 << 20)
    assert worker.call(Set(group="g", key=b"k", value=value)) == Done(AnyId(), 1)
    assert worker.get("k") == value


def test_a_worker_that_stops_reading_is_given_up_at_the_deadline(short_dir: Path) -> None:
    links = WorkerLinks(short_dir, 0)
    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.bind(f"{short_dir}/worker-0.sock")
        deaf.listen()
        began = time.monotonic()
        with pytest.raises(DeadlineExceededError):
            links.call(Set(group="g", key=b"k", value=bytes(8 << 20)), soon(0.2))
        assert time.monotonic() - began < 2
    links.close()


def test_short_and_long_deadlines_may_alternate(worker: Running) -> None:
    gate = Gate()
    worker.group(gate)
    with pytest.raises(DeadlineExceededError):
        worker.links.call(Get(group="g", key=b"k"), soon(0.03))
    threading.Timer(0.3, gate.open.set).start()
    assert worker.links.call(Get(group="g", key=b"k"), soon(10)) == Value(AnyId(), b"v-k")


def test_a_forked_child_uses_connections_of_its_own(worker: Running) -> None:
    worker.group(lambda key: key.encode())
    assert worker.get("before") == b"before"
    readable, writable = os.pipe()
    pid = os.fork()
    if not pid:
        code = 1
        try:
            for turn in range(200):
                key = b"child-%d" % turn
                reply = worker.links.call(Get(group="g", key=key), soon())
                assert isinstance(reply, Value)
                assert reply.value == key
            code = 0
            os.write(writable, b"done")
        finally:
            os._exit(code)
    os.close(writable)
    for turn in range(200):
        assert worker.get(f"parent-{turn}") == b"parent-%d" % turn
    assert os.waitpid(pid, 0)[1] == 0
    assert os.read(readable, 10) == b"done"
    os.close(readable)
    assert worker.get("after") == b"after"


def test_several_workers_are_asked_at_once(short_dir: Path) -> None:
    barrier = threading.Barrier(3)

    def together(request: Any, connection: socket.socket) -> None:
        barrier.wait(10)  # none is answered until all were asked
        connection.sendall(frame(Values(request.id, list(request.keys))))

    links = [WorkerLinks(short_dir, shard) for shard in range(4)]
    with (
        scripted(short_dir, together, shard=0),
        scripted(short_dir, together, shard=1),
        scripted(short_dir, together, shard=2),
    ):
        outcomes = call_all(
            [(links[shard], GetMany(group="g", keys=[b"%d" % shard])) for shard in (2, 3, 0, 1)],
            soon(5),
        )
    assert [getattr(outcome, "values", None) for outcome in outcomes] == [
        [b"2"],
        None,
        [b"0"],
        [b"1"],
    ]
    assert isinstance(outcomes[1], NodeUnavailableError)
    for each in links:
        each.close()
