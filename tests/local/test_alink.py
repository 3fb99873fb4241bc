"""The async link: one pipelined connection per loop, and callers that come and go."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kamacache.errors import DeadlineExceededError, LoadError, NodeUnavailableError
from kamacache.local.alink import AsyncWorkerLinks
from kamacache.wire.frames import FrameReader, frame
from kamacache.wire.messages import (
    Answers,
    Done,
    Failure,
    Get,
    Gets,
    Ping,
    Set,
    Value,
    decode_request,
)
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


def asked(links: AsyncWorkerLinks, *keys: bytes, seconds: float = 5) -> list[asyncio.Task[Any]]:
    """Begin gets in one turn of the loop, with one deadline: of some that differ are two frames."""
    until_s = soon(seconds)
    return [asyncio.create_task(links.get("g", key, until_s)) for key in keys]


async def connected(links: AsyncWorkerLinks) -> None:
    """Let the gets that follow find a connection."""
    await links.call(Ping(), soon())


async def closed(links: AsyncWorkerLinks) -> None:
    """Close the connections, for a worker that reads on until they are."""
    links.close()
    await asyncio.sleep(0.01)


async def test_gets_of_one_turn_share_a_frame_and_each_has_its_own_answer(
    worker: Running,
) -> None:
    frames: list[Any] = []
    worker.group(lambda key: key.encode())
    handle = worker.handlers.table[Gets]

    def note(request: Any, asker: Any) -> Any:
        frames.append(request)
        return handle(request, asker)

    worker.handlers.table[Gets] = note
    links = AsyncWorkerLinks(worker.folder, 0)
    await connected(links)
    keys = [b"%d" % number for number in range(300)]
    assert await asyncio.gather(*asked(links, *keys, b"7")) == [*keys, b"7"]
    assert [request.keys for request in frames] == [[*keys, b"7"]]
    links.close()


async def test_a_get_that_fails_and_one_that_is_slow_hold_up_no_other_of_their_turn(
    worker: Running,
) -> None:
    gate = Gate()

    def load(key: str) -> bytes:
        if key == "bad":
            raise ValueError
        if key == "none":
            raise KeyError
        return gate(key) if key == "slow" else key.encode()

    worker.group(load)
    links = AsyncWorkerLinks(worker.folder, 0)
    await connected(links)
    slow, good, bad, none = asked(links, b"slow", b"good", b"bad", b"none")
    assert await asyncio.wait_for(good, 5) == b"good"
    assert await asyncio.wait_for(none, 5) is None
    with pytest.raises(LoadError):
        await asyncio.wait_for(bad, 5)
    assert not slow.done()
    gate.open.set()
    assert await slow == b"v-slow"
    assert not worker.on_loop(lambda: [c for c in worker.server.connections if c.waiters])
    links.close()


async def test_a_get_that_is_cancelled_leaves_the_others_of_its_turn(worker: Running) -> None:
    gate = Gate()
    worker.group(gate)
    links = AsyncWorkerLinks(worker.folder, 0)
    await connected(links)
    first, second, third = asked(links, b"1", b"2", b"3")
    await asyncio.sleep(0)
    first.cancel()  # before it is sent
    await gate.running(2)
    second.cancel()  # under way
    gate.open.set()
    assert await third == b"v-3"
    assert [await asyncio.wait_for(get, 5) for get in asked(links, b"1", b"2")] == [b"v-1", b"v-2"]
    links.close()


async def test_a_get_with_a_short_deadline_is_late_alone(worker: Running) -> None:
    gate = Gate()
    worker.group(gate)
    links = AsyncWorkerLinks(worker.folder, 0)
    await connected(links)
    (patient,) = asked(links, b"1")
    (hasty,) = asked(links, b"2", seconds=0.05)
    began = time.monotonic()
    with pytest.raises(DeadlineExceededError):
        await hasty
    assert time.monotonic() - began < 1
    assert not patient.done()
    gate.open.set()
    assert await patient == b"v-1"
    links.close()


async def test_gets_that_nobody_answers_end_at_their_deadline(short_dir: Path) -> None:
    def silent(request: Any, connection: socket.socket) -> None:
        connection.sendall(frame(Done(request.id, 1)))
        while connection.recv(1 << 16):
            pass

    links = AsyncWorkerLinks(short_dir, 0)
    with scripted(short_dir, silent):
        await connected(links)
        results = await asyncio.gather(
            *asked(links, b"1", b"2", seconds=0.05), return_exceptions=True
        )
        assert [type(result) for result in results] == [DeadlineExceededError] * 2
        assert results[0] is not results[1]
        await closed(links)


async def test_gets_lost_with_their_worker_are_asked_for_again_each_for_itself(
    short_dir: Path,
) -> None:
    def dies_of_several(request: Any, connection: socket.socket) -> None:
        connection.sendall(frame(Done(request.id, 1)))
        connection.recv(1 << 16)

    def answers_one(request: Any, connection: socket.socket) -> None:
        assert isinstance(request, Get)
        connection.sendall(frame(Value(request.id, b"alone")))

    links = AsyncWorkerLinks(short_dir, 0)
    with scripted(short_dir, dies_of_several, answers_one):
        await connected(links)
        gets = asked(links, b"1", b"2", b"3")
        alone, *others = await asyncio.gather(*gets, return_exceptions=True)
        assert alone == b"alone"
        assert [getattr(error, "cause_type", None) for error in others] == ["worker died"] * 2
        links.close()


async def test_while_gets_are_unanswered_later_ones_are_held_for_a_moment_and_go_together(
    short_dir: Path,
) -> None:
    frames: list[Any] = []
    go = threading.Event()

    def slow_at_first(request: Any, connection: socket.socket) -> None:
        reader = FrameReader()
        connection.sendall(frame(Done(request.id, 1)))
        while data := connection.recv(1 << 16):
            reader.feed(data)
            while (body := reader.next()) is not None:
                request = decode_request(body)
                frames.append(request)
                go.wait(10)
                keys: list[Any] = request.keys if isinstance(request, Gets) else [request.key]
                if len(keys) == 1:
                    connection.sendall(frame(Value(request.id, keys[0])))
                else:
                    connection.sendall(frame(Answers(request.id, keys)))

    links = AsyncWorkerLinks(short_dir, 0)
    with scripted(short_dir, slow_at_first):
        await connected(links)
        link = links._by_loop[asyncio.get_running_loop()]
        link._answer_s = 5.0  # as if answers took that long of late
        first = asked(links, b"1")
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        later = []
        until_s = soon()
        for number in range(2, 6):
            later.append(asyncio.create_task(links.get("g", b"%d" % number, until_s)))
            await asyncio.sleep(0.002)
        go.set()
        assert await asyncio.gather(*first, *later) == [b"1", b"2", b"3", b"4", b"5"]
        assert [getattr(request, "keys", None) for request in frames] == [
            None,
            [b"2", b"3", b"4", b"5"],
        ]
        go.clear()
        link._answer_s = 0.001
        gets = asked(links, b"6")
        await asyncio.sleep(0.02)
        gets += asked(links, b"7")  # what is under way takes long: this one does not wait for it
        await asyncio.sleep(0.02)
        go.set()
        assert await asyncio.gather(*gets) == [b"6", b"7"]
        assert len(frames) == 4
        await closed(links)


def leaves_some_unanswered(request: Any, connection: socket.socket) -> None:
    """Stand where a worker does: what begins with "slow" is loaded for ever."""
    reader = FrameReader()
    connection.sendall(frame(Done(request.id, 1)))
    while data := connection.recv(1 << 16):
        reader.feed(data)
        while (body := reader.next()) is not None:
            request = decode_request(body)
            if isinstance(request, Ping):
                connection.sendall(frame(Done(request.id, 1)))
            elif not request.key.startswith(b"slow"):
                connection.sendall(frame(Value(request.id, request.key)))


async def test_gets_are_not_held_for_what_takes_longer_than_a_later_one(short_dir: Path) -> None:
    links = AsyncWorkerLinks(short_dir, 0)
    with scripted(short_dir, leaves_some_unanswered):
        await connected(links)
        link = links._by_loop[asyncio.get_running_loop()]
        slow = asked(links, b"slow")
        await asyncio.sleep(0)
        await asyncio.sleep(0)  # it is sent: gets of one turn of the loop would go together
        link._answer_s = 0.0  # the next one is not held
        for key in (b"1", b"2", b"3"):
            assert await asyncio.wait_for(links.get("g", key, soon()), 2) == key
            link._answer_s = 5.0  # as if answers took that long of late
        slow[0].cancel()
        await closed(links)


async def test_gets_that_are_late_while_they_are_held_make_room(short_dir: Path) -> None:
    links = AsyncWorkerLinks(short_dir, 0, in_flight_max=2)
    with scripted(short_dir, leaves_some_unanswered):
        await connected(links)
        link = links._by_loop[asyncio.get_running_loop()]
        slow = asked(links, b"slow")
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        link._answer_s = 0.05
        held = asked(links, b"held", seconds=0.02)
        await asyncio.sleep(0)
        assert await asyncio.wait_for(links.call(Ping(), soon()), 2) == Done(AnyId(), 1)
        with pytest.raises(DeadlineExceededError):
            await held[0]
        slow[0].cancel()
        await closed(links)


async def test_more_gets_than_may_be_under_way_wait_their_turn(worker: Running) -> None:
    gate = Gate()
    worker.group(gate, load_threads=1)
    links = AsyncWorkerLinks(worker.folder, 0, in_flight_max=2)
    await connected(links)
    gets = asked(links, *(b"%d" % number for number in range(6)))
    await gate.running(1)
    with pytest.raises(DeadlineExceededError):
        await links.get("g", b"x", soon(0.05))
    gate.open.set()
    assert await asyncio.gather(*gets) == [b"v-%d" % number for number in range(6)]
    links.close()


async def test_keys_asked_for_each_are_handed_on_as_they_come(worker: Running) -> None:
    gate = Gate()
    worker.group(lambda key: gate(key) if key == "slow" else key.encode())
    links = AsyncWorkerLinks(worker.folder, 0)
    found: dict[int, Any] = {}

    def take(part: Answers) -> None:
        found.update(zip(part.at or range(len(part.values)), part.values, strict=True))
        part.id, part.at = 10**9, [10**9]  # as who passes it on does

    request = Gets(group="g", keys=[b"a", b"slow", b"c"])
    asking = asyncio.create_task(links.ask_each(request, soon(), take))
    while len(found) < 2:
        assert not asking.done()
        await asyncio.sleep(0.002)
    gate.open.set()
    assert await asking is None
    assert found == {0: b"a", 1: b"v-slow", 2: b"c"}
    reply = await links.ask_each(Gets(group="unknown", keys=[b"a"]), soon(), take)
    assert isinstance(reply, Failure)
    assert reply.kind == "GroupNotFoundError"
    links.close()


async def test_keys_asked_for_each_and_lost_are_asked_for_alone(short_dir: Path) -> None:
    def one_then_die(request: Any, connection: socket.socket) -> None:
        connection.sendall(frame(Answers(request.id, [b"first"], [1])))

    found: dict[int, Any] = {}

    def take(part: Answers) -> None:
        found.update(zip(part.at, part.values, strict=True))

    def alone(request: Any, connection: socket.socket) -> None:
        assert isinstance(request, Get)
        connection.sendall(frame(Value(request.id, b"again", 5, 6)))
        time.sleep(0.2)

    links = AsyncWorkerLinks(short_dir, 0)
    with scripted(short_dir, one_then_die, alone) as seen:
        request = Gets(group="g", flags=1, sent=9, keys=[b"a", b"b"])
        assert await links.ask_each(request, soon(), take) is None
        assert found == {1: b"first", 0: b"again"}
        assert (seen[1].key, seen[1].flags, seen[1].sent) == (b"a", 1, 9)
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
