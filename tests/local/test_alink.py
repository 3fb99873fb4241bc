"""The async link: one pipelined connection per loop, and callers that come and go."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kamacache.errors import DeadlineExceededError, LoadError, NodeUnavailableError
from kamacache.local.alink import AsyncWorkerLinks
from kamacache.wire.messages import Done, Get, Ping, Set, Value
from tests.local.test_link import AnyId, die, done, scripted, soon
from tests.worker.harness import Gate, Running, in_threads, running


@pytest.fixture
def worker(short_dir: Path) -> Iterator[Running]:
    with running(short_dir) as server:
        yield server


async def test_callers_of_one_loop_share_one_connection(worker: Running) -> None:
    worker.group(lambda key: key.encode())
    links = AsyncWorkerLinks(worker.folder, 0)
    keys = [b"%d" % i for i in range(300)]
    replies = await asyncio.gather(*[links.call(Get(group="g", key=key), soon()) for key in keys])
    assert replies == [Value(AnyId(), key) for key in keys]
    assert len(worker.server.connections) == 1
    links.close()


async def test_requests_in_flight_are_bounded_and_others_wait(worker: Running) -> None:
    gate = Gate()
    worker.group(gate)
    links = AsyncWorkerLinks(worker.folder, 0, in_flight_max=2)
    calls = [
        asyncio.create_task(links.call(Get(group="g", key=b"%d" % i), soon(10))) for i in range(6)
    ]
    await gate.running(2)
    with pytest.raises(DeadlineExceededError):
        await links.call(Ping(), soon(0.05))
    calls[3].cancel()  # one of those that wait their turn
    calls[0].cancel()  # one of those under way
    gate.open.set()
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert [isinstance(result, Value) for result in results] == [
        False,
        True,
        True,
        False,
        True,
        True,
    ]
    links.close()


async def test_a_cancelled_caller_harms_nobody(worker: Running) -> None:
    gate = Gate()
    worker.group(gate)
    links = AsyncWorkerLinks(worker.folder, 0)
    first = asyncio.create_task(links.call(Get(group="g", key=b"k"), soon()))
    second = asyncio.create_task(links.call(Get(group="g", key=b"k"), soon()))
    await gate.running()
    first.cancel()
    gate.open.set()
    assert await second == Value(AnyId(), b"v-k")
    with pytest.raises(asyncio.CancelledError):
        await first
    assert await links.call(Get(group="g", key=b"k"), soon()) == Value(AnyId(), b"v-k")
    assert gate.runs == 1
    links.close()


async def test_a_caller_cancelled_while_connecting_does_not_end_the_connecting(
    short_dir: Path,
) -> None:
    links = AsyncWorkerLinks(short_dir, 0)
    first = asyncio.create_task(links.call(Ping(), soon()))
    second = asyncio.create_task(links.call(Ping(), soon()))
    await asyncio.sleep(0)
    first.cancel()
    with running(short_dir) as worker:
        assert await second == Done(AnyId(), 0)
        assert len(worker.server.connections) == 1
        links.close()


async def test_a_short_deadline_is_late_alone(worker: Running) -> None:
    gate = Gate()
    worker.group(gate)
    links = AsyncWorkerLinks(worker.folder, 0)
    patient = asyncio.create_task(links.call(Get(group="g", key=b"k"), soon()))
    began = time.monotonic()
    with pytest.raises(DeadlineExceededError):
        await links.call(Get(group="g", key=b"k"), soon(0.05))
    assert time.monotonic() - began < 1
    gate.open.set()
    assert await patient == Value(AnyId(), b"v-k")
    links.close()


async def test_lost_requests_are_sent_once_more_and_then_given_up(short_dir: Path) -> None:
    links = AsyncWorkerLinks(short_dir, 0)
    with scripted(short_dir, die, done):
        assert await links.call(Set(group="g", key=b"k", value=b"v"), soon()) == Done(AnyId(), 1)
        links.close()
    links = AsyncWorkerLinks(short_dir, 0)
    with scripted(short_dir, die, die):
        with pytest.raises(LoadError) as caught:
            await links.call(Get(group="g", key=b"k"), soon())
        assert caught.value.cause_type == "worker died"
        links.close()


async def test_without_a_node_there_is_an_error(short_dir: Path) -> None:
    links = AsyncWorkerLinks(short_dir, 0, alive=lambda: False)
    with pytest.raises(NodeUnavailableError):
        await links.call(Ping(), soon())
    with pytest.raises(DeadlineExceededError):
        await AsyncWorkerLinks(short_dir, 1).call(Ping(), soon(0.05))


def test_loops_in_several_threads_and_one_after_the_other(worker: Running, wait_until: Any) -> None:
    worker.group(lambda key: key.encode())
    links = AsyncWorkerLinks(worker.folder, 0)

    async def ask(thread: int) -> int:
        for turn in range(50):
            key = b"%d-%d" % (thread, turn)
            assert await links.call(Get(group="g", key=key), soon()) == Value(AnyId(), key)
        return 1

    for _ in range(3):
        assert in_threads(4, lambda i: asyncio.run(ask(i))) == [1] * 4
    # No loop left a connection behind when it closed.
    wait_until(lambda: not worker.server.connections)
    links.close()


def test_a_forked_child_connects_anew(worker: Running) -> None:
    worker.group(lambda key: key.encode())
    links = AsyncWorkerLinks(worker.folder, 0)

    async def ask(key: bytes) -> bytes | None:
        reply = await links.call(Get(group="g", key=key), soon())
        assert isinstance(reply, Value)
        return reply.value

    with asyncio.Runner() as runner:
        assert runner.run(ask(b"parent")) == b"parent"
        pid = os.fork()
        if not pid:
            code = 1
            try:
                asyncio.set_event_loop(None)
                code = int(asyncio.new_event_loop().run_until_complete(ask(b"child")) != b"child")
            finally:
                os._exit(code)
        assert runner.run(ask(b"again")) == b"again"
        assert os.waitpid(pid, 0)[1] == 0
        assert runner.run(ask(b"after")) == b"after"
    links.close()


async def test_close_from_another_thread_ends_the_callers(worker: Running) -> None:
    gate = Gate()
    worker.group(gate)
    links = AsyncWorkerLinks(worker.folder, 0)
    call = asyncio.create_task(links.call(Get(group="g", key=b"k"), soon()))
    await gate.running()
    closer = threading.Thread(target=links.close)
    closer.start()
    closer.join()
    gate.open.set()
    with pytest.raises((NodeUnavailableError, LoadError)):
        await call
