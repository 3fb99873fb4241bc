"""What a client may do to a worker: nothing that others notice."""

from __future__ import annotations

import logging
import os
import random
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kamacache.errors import GroupNotFoundError, KamaCacheError, KeyTooLongError, ValueTooLargeError
from kamacache.limits import (
    BATCH_KEYS_MAX,
    FRAME_BYTES_MAX,
    FRAME_STALL_S,
    REQUESTS_PER_CONNECTION_MAX,
    UNREAD_STALL_S,
)
from kamacache.wire.frames import FrameReader, frame
from kamacache.wire.messages import (
    Delete,
    DeleteMany,
    Done,
    Failure,
    Get,
    GetMany,
    Ping,
    Set,
    SetMany,
    Value,
    decode_reply,
)
from kamacache.worker import protocol
from kamacache.worker.main import listen
from tests.worker.harness import Gate, Running, running


@pytest.fixture(autouse=True)
def fresh_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rate limits of one test must not hide the line of the next."""
    monkeypatch.setattr(protocol.log, "_last_s", {})


@contextmanager
def connected(worker: Running) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(10)
        client.connect(worker.path)
        yield client


def replies(client: socket.socket, count: int) -> list[Any]:
    reader = FrameReader()
    found: list[Any] = []
    while len(found) < count:
        while (body := reader.next()) is not None:
            found.append(decode_reply(body))
            del body
        if len(found) < count:
            data = client.recv(1 << 16)
            assert data, f"closed after {len(found)} of {count} replies"
            reader.feed(data)
    return found


def is_closed(client: socket.socket) -> bool:
    try:
        return client.recv(1 << 16) == b""
    except ConnectionResetError:
        return True


def test_pipelined_requests_are_answered_in_one_go(worker: Running) -> None:
    worker.group()
    requests = [
        Set(id=1, group="g", key=b"a", value=b"1"),
        SetMany(id=2, group="g", items=[(b"b", b"2"), (b"c", b"")]),
        Get(id=3, group="g", key=b"b"),
        Delete(id=4, group="g", key=b"a"),
        Delete(id=5, group="g", key=b"a"),
        DeleteMany(id=6, group="g", keys=[b"b", b"c", b"d"]),
        Get(id=7, group="g", key=b"b"),
        Ping(id=8),
    ]
    with connected(worker) as client:
        client.sendall(b"".join(frame(request) for request in requests))
        assert replies(client, 8) == [
            Done(1, 1),
            Done(2, 2),
            Value(3, b"2"),
            Done(4, 1),
            Done(5, 0),
            Done(6, 2),
            Value(7, None),
            Done(8, 0),
        ]


def test_a_frame_that_comes_byte_by_byte_is_understood(worker: Running) -> None:
    worker.group()
    with connected(worker) as client:
        for byte in frame(Set(id=1, group="g", key=b"k", value=b"v")) + frame(Ping(id=2)):
            client.send(bytes((byte,)))
        assert replies(client, 2) == [Done(1, 1), Done(2, 0)]


def test_a_large_value_comes_whole(worker: Running) -> None:
    value = random.Random(1).randbytes(900_000)
    worker.group(cache_bytes=128 << 20)
    worker.call(Set(group="g", key=b"k", value=value))
    assert worker.get("k") == value


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (Get(group="nope", key=b"k"), GroupNotFoundError),
        (Get(group="g", key=b""), KeyTooLongError),
        (Get(group="g", key=bytes(1025)), KeyTooLongError),
        (GetMany(group="g", keys=[b"k", b""]), KeyTooLongError),
        (GetMany(group="g", keys=[b"k"] * (BATCH_KEYS_MAX + 1)), KamaCacheError),
        (Set(group="g", key=bytes(1025), value=b""), KeyTooLongError),
        (Set(group="g", key=b"k", value=b"", ttl_ms=0), KamaCacheError),
        (Set(group="g", key=b"k", value=b"", ttl_ms=-1), KamaCacheError),
        (Set(group="g", key=b"k", value=bytes(1 << 20)), ValueTooLargeError),
        (SetMany(group="g", items=[(b"", b"")]), KeyTooLongError),
        (Delete(group="g", key=b""), KeyTooLongError),
    ],
)
def test_a_request_that_cannot_be_met_is_a_clear_error(
    worker: Running, request_: Any, error: type[Exception]
) -> None:
    worker.group(lambda key: b"v")
    with pytest.raises(error) as caught:
        worker.call(request_)
    assert str(caught.value)
    assert worker.get("k") == b"v"


def test_ttl_of_the_group_and_of_the_call(worker: Running) -> None:
    group = worker.group(ttl_ms=60_000)
    worker.call(Set(group="g", key=b"default", value=b""))
    worker.call(Set(group="g", key=b"own", value=b"", ttl_ms=5_000))
    now_ms = time.clock_gettime(time.CLOCK_BOOTTIME) * 1000
    writer: Any = group.shard
    assert 55_000 < writer.expiry_of(b"default") - now_ms <= 60_000
    assert 1_000 < writer.expiry_of(b"own") - now_ms <= 5_000


def test_a_message_of_another_version_is_a_failure_and_the_connection_goes_on(
    worker: Running, caplog: pytest.LogCaptureFixture
) -> None:
    def framed(parts: object) -> bytes:
        body = msgspec.msgpack.encode(parts)
        return len(body).to_bytes(4, "little") + body

    with connected(worker) as client:
        client.sendall(framed([99, 7, "g"]) + framed([1, 8, "g", "not a number"]))
        client.sendall(frame(Ping(id=9)))
        first, second, third = replies(client, 3)
    assert isinstance(first, Failure)
    assert (first.id, second.id) == (7, 8)
    assert "version" in first.message
    assert third == Done(9, 0)
    assert len(caplog.records) == 1


def test_fields_that_a_later_version_adds_are_ignored(worker: Running) -> None:
    parts = [*msgspec.msgpack.decode(frame(Ping(id=3))[4:]), "later", {"more": 1}]
    body = msgspec.msgpack.encode(parts)
    with connected(worker) as client:
        client.sendall(len(body).to_bytes(4, "little") + body)
        assert replies(client, 1) == [Done(3, 0)]


@pytest.mark.parametrize(
    "data",
    [
        bytes(8),
        b"\xff" * 64,
        (FRAME_BYTES_MAX + 1).to_bytes(4, "little"),
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        (5).to_bytes(4, "little") + b"\xc1" * 5,
        (3).to_bytes(4, "little") + b"abc",
    ],
    ids=["zeros", "ones", "too long", "http", "no msgpack", "no message"],
)
def test_garbage_closes_the_connection_with_one_log_line(
    worker: Running, caplog: pytest.LogCaptureFixture, data: bytes
) -> None:
    worker.group()
    caplog.set_level(logging.WARNING)
    for _ in range(5):
        with connected(worker) as client:
            client.sendall(data)
            assert is_closed(client)
    assert len(caplog.records) == 1
    worker.call(Ping())


def test_random_bytes_never_hurt_the_worker(worker: Running) -> None:
    worker.group(lambda key: b"v")
    source = random.Random(7)
    good = frame(Get(id=1, group="g", key=b"key", budget_ms=1000))
    for _ in range(300):
        data = bytearray(good * source.randint(1, 3))
        for _ in range(source.randint(1, 6)):
            data[source.randrange(len(data))] = source.randrange(256)
        with connected(worker) as client:
            client.sendall(data[: source.randint(1, len(data))])
    assert worker.get("k") == b"v"


def test_a_truncated_frame_leaves_nothing_behind(worker: Running, wait_until: Any) -> None:
    with connected(worker) as client:
        client.sendall(frame(Set(id=1, group="g", key=b"k", value=bytes(100_000)))[:50_000])
        wait_until(lambda: worker.server.partial_bytes == 50_000)
    wait_until(lambda: worker.server.partial_bytes == 0)
    wait_until(lambda: not worker.server.connections)


def test_a_half_frame_that_stalls_is_cut_off(worker: Running, wait_until: Any) -> None:
    with connected(worker) as slow, connected(worker) as idle:
        slow.sendall(frame(Ping(id=1)) + frame(Ping(id=2))[:6])
        assert replies(slow, 1) == [Done(1, 0)]
        wait_until(lambda: worker.server.partial_bytes == 6)
        now = time.monotonic()
        check_all(worker, now + FRAME_STALL_S - 1)
        slow.sendall(frame(Ping(id=2))[6:9])  # a byte now and then is no excuse
        wait_until(lambda: worker.server.partial_bytes == 9)
        check_all(worker, now + FRAME_STALL_S + 1)
        assert is_closed(slow)
        idle.sendall(frame(Ping(id=3)))
        assert replies(idle, 1) == [Done(3, 0)]


def check_all(worker: Running, now_s: float) -> None:
    def check() -> None:
        for connection in [*worker.server.connections]:
            connection.check(now_s)

    worker.on_loop(check)


def test_half_frames_of_all_clients_are_bounded(
    worker: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "PARTIAL_BYTES_MAX", 300_000)
    half = frame(Set(id=1, group="g", key=b"k", value=bytes(200_000)))[:-1]
    with connected(worker) as first, connected(worker) as second:
        first.sendall(half)
        second.sendall(half)
        first.settimeout(0.05)
        closed = 0
        for client in (first, second):
            client.settimeout(2)
            try:
                closed += is_closed(client)
            except TimeoutError:
                continue
        assert closed == 1


def test_a_client_that_does_not_read_is_paused_then_cut_off(
    worker: Running, wait_until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    value = bytes(500_000)
    worker.group(cache_bytes=64 << 20)
    worker.call(Set(group="g", key=b"k", value=value))
    with connected(worker) as client:
        client.setblocking(False)
        data = frame(Get(id=1, group="g", key=b"k")) * 400_000  # 200 GB of replies
        sent = 0
        end = time.monotonic() + 20
        while time.monotonic() < end:
            try:
                sent += client.send(data[sent : sent + 65536])
            except BlockingIOError:
                if [each for each in worker.server.connections if each._paused_since_s]:
                    break
        (paused,) = [each for each in worker.server.connections if each._paused_since_s]
        assert paused._transport is not None
        assert paused._transport.get_write_buffer_size() < 32 << 20
        assert sent < len(data)
        worker.call(Ping())
        check_all(worker, time.monotonic() + UNREAD_STALL_S + 1)
        wait_until(lambda: paused not in worker.server.connections)


def test_a_client_that_reads_late_gets_every_reply(worker: Running, wait_until: Any) -> None:
    worker.group(cache_bytes=64 << 20)
    worker.call(Set(group="g", key=b"k", value=bytes(500_000)))
    with connected(worker) as client:
        client.sendall(b"".join(frame(Get(id=i, group="g", key=b"k")) for i in range(100)))
        wait_until(lambda: any(each._paused_since_s for each in worker.server.connections))
        assert [reply.id for reply in replies(client, 100)] == list(range(100))
        client.sendall(frame(Ping(id=1)))
        assert replies(client, 1) == [Done(1, 0)]


def test_loads_in_flight_on_one_connection_are_bounded(worker: Running, wait_until: Any) -> None:
    gate = Gate()
    worker.group(gate)
    count = REQUESTS_PER_CONNECTION_MAX + 100
    with connected(worker) as client:
        client.sendall(
            b"".join(frame(Get(id=i, group="g", key=b"k", budget_ms=20_000)) for i in range(count))
        )
        wait_until(lambda: waiting(worker) == REQUESTS_PER_CONNECTION_MAX)
        worker.call(Ping())
        assert waiting(worker) == REQUESTS_PER_CONNECTION_MAX
        gate.open.set()
        assert {reply.id for reply in replies(client, count)} == set(range(count))
    assert gate.runs == 1


def waiting(worker: Running) -> int:
    flight = worker.groups["g"].flights.get(b"k")
    return len(flight.waiters) if flight else 0


def test_connections_above_the_limit_are_refused(short_dir: Path) -> None:
    with running(short_dir, connections_max=2) as worker:
        with connected(worker) as first, connected(worker) as second:
            for client in (first, second):
                client.sendall(frame(Ping(id=1)))
                assert replies(client, 1)
            with connected(worker) as third:
                assert is_closed(third)
        assert worker.server.refused == 1


def test_an_answer_too_large_for_one_frame_comes_in_parts(
    worker: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kamacache.worker import replies

    monkeypatch.setattr(replies, "VALUE_FRAME_BYTES_MAX", 10_000)

    def getter(key: str) -> bytes:
        if key == "huge":
            return bytes(20_000)
        if key == "k5":
            raise ValueError
        return key.encode() * 1000

    worker.group(getter)
    keys = [f"k{i}" for i in range(20)]
    reply = worker.get_many(*keys)
    assert reply.values == [None if key == "k5" else key.encode() * 1000 for key in keys]
    assert [failed.index for failed in reply.errors] == [5]
    with pytest.raises(ValueTooLargeError):
        worker.get("huge")


@pytest.mark.parametrize(("gid", "mode"), [(None, 0o600), (os.getgid(), 0o660)])
def test_the_socket_is_for_its_owner_or_a_group(
    short_dir: Path, gid: int | None, mode: int
) -> None:
    path = str(short_dir / "worker-0.sock")
    Path(path).touch()  # what a dead worker left
    with listen(path, gid):
        assert stat.S_IMODE(os.stat(path).st_mode) == mode
        assert [entry.name for entry in short_dir.iterdir()] == ["worker-0.sock"]
