"""The gRPC front of a real node: several fronts, hits without workers, batches, drain, restart."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kamacache.v1 import kamacache_pb2 as pb
from kamacache.v1.kamacache_pb2_grpc import CacheStub
from tests.node_process import NodeProcess, is_alive

pytestmark = pytest.mark.integration

WaitUntil = Callable[..., None]

APP = """\
import pathlib, time
import kamacache

def load(key):
    with open("loads", "a") as file:
        file.write(key + "\\n")
    if key.startswith("slow"):
        gate = pathlib.Path("gate")
        end = time.monotonic() + 20
        while not gate.exists() and time.monotonic() < end:
            time.sleep(0.01)
    if key.startswith("no"):
        raise KeyError(key)
    return key.encode() * 2

group = kamacache.Group("scores", cache_bytes="1MiB", getter=load, negative_ttl=60)
"""


@pytest.fixture
def folder(short_dir: Path) -> Path:
    (short_dir / "front_app.py").write_text(APP)
    return short_dir


@pytest.fixture
def node(folder: Path) -> Iterator[NodeProcess]:
    args = ("--workers=2", "--fronts=2", "--app=front_app:group", "--listen=127.0.0.1:0")
    with NodeProcess(folder / "run", *args, cwd=folder) as found:
        found.await_ready()
        try:
            yield found
        finally:
            if found.process.poll() is None:  # stopped, not killed, so that it removes its files
                found.stop()


def connect(node: NodeProcess, number: int = 0) -> grpc.Channel:
    """Return a channel with a connection of its own, so that either front may get it."""
    options = [("grpc.use_local_subchannel_pool", 1), ("test.number", number)]
    return grpc.insecure_channel(str(node.description().listen), options=options)


def test_loads_once_through_all_fronts_and_hits_do_not_ask_a_worker(
    node: NodeProcess, folder: Path, wait_until: WaitUntil
) -> None:
    channels = [connect(node, number) for number in range(8)]
    try:
        stubs = [CacheStub(channel) for channel in channels]
        request = pb.GetRequest(group="scores", key=b"slow-cold")
        with ThreadPoolExecutor(32) as pool:
            calls = [pool.submit(stubs[i % 8].Get, request, timeout=30) for i in range(32)]
            wait_until((folder / "loads").exists)
            (folder / "gate").touch()
            assert {call.result().value for call in calls} == {b"slow-cold" * 2}
        assert (folder / "loads").read_text() == "slow-cold\n"
        workers = [role for i in range(2) if (role := node.role(f"worker {i}"))]
        assert len(workers) == 2
        try:
            for worker in workers:
                worker.suspend()
            for stub in stubs:
                assert stub.Get(request, timeout=5).found
                many = stub.BatchGet(
                    pb.BatchGetRequest(group="scores", keys=[b"slow-cold"] * 3), timeout=5
                )
                assert not many.missing
            with pytest.raises(grpc.RpcError) as caught:
                stubs[0].Get(pb.GetRequest(group="scores", key=b"miss"), timeout=0.3)
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        finally:
            for worker in workers:
                worker.resume()
    finally:
        for channel in channels:
            channel.close()


def test_not_found_is_remembered_and_a_set_replaces_it(node: NodeProcess, folder: Path) -> None:
    with connect(node) as channel:
        stub = CacheStub(channel)
        request = pb.GetRequest(group="scores", key=b"nobody")
        for _ in range(3):
            assert not stub.Get(request, timeout=5).found
        assert (folder / "loads").read_text() == "nobody\n"
        stub.Set(pb.SetRequest(group="scores", key=b"nobody", value=b""), timeout=5)
        reply = stub.Get(request, timeout=5)
        assert (reply.found, reply.value) == (True, b"")
        assert stub.Delete(pb.DeleteRequest(group="scores", key=b"nobody"), timeout=5).found


def test_a_write_is_seen_through_every_front_once_acknowledged(node: NodeProcess) -> None:
    channels = [connect(node, number) for number in range(8)]
    try:
        stubs = [CacheStub(channel) for channel in channels]
        for turn in range(200):
            value = b"%d" % turn
            request = pb.SetRequest(group="scores", key=b"k", value=value)
            stubs[turn % 8].Set(request, timeout=5)
            for stub in (stubs[(turn + 1) % 8], stubs[(turn + 5) % 8]):
                assert stub.Get(pb.GetRequest(group="scores", key=b"k"), timeout=5).value == value
    finally:
        for channel in channels:
            channel.close()


def test_a_batch_of_all_kinds(node: NodeProcess) -> None:
    with connect(node) as channel:
        stub = CacheStub(channel)
        keys = [b"key-%d" % i for i in range(1_000)]
        half = keys[::2]
        stub.BatchSet(pb.BatchSetRequest(group="scores", keys=half, values=half), timeout=10)
        reply = stub.BatchGet(pb.BatchGetRequest(group="scores", keys=[*keys, b"no-1"]), timeout=30)
        expected = [key if i % 2 == 0 else key * 2 for i, key in enumerate(keys)]
        assert list(reply.values) == [*expected, b""]
        assert list(reply.missing) == [1_000]
        gone = stub.BatchDelete(pb.BatchDeleteRequest(group="scores", keys=keys), timeout=10)
        assert gone.deleted == 1_000


def test_a_stop_finishes_calls_in_flight_and_says_so(
    node: NodeProcess, folder: Path, wait_until: WaitUntil
) -> None:
    with connect(node) as channel, ThreadPoolExecutor(1) as pool:
        request = pb.GetRequest(group="scores", key=b"slow-drain")
        call = pool.submit(CacheStub(channel).Get, request, timeout=30)
        wait_until((folder / "loads").exists)
        statuses: list[int] = []
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        watching = threading.Thread(target=lambda: statuses.extend(r.status for r in watch))
        watching.start()
        wait_until(lambda: statuses)
        node.process.send_signal(signal.SIGTERM)
        wait_until(lambda: len(statuses) == 2)
        (folder / "gate").touch()
        assert call.result().value == b"slow-drain" * 2
        assert node.await_end() == 0
        watching.join(5)
        serving = health_pb2.HealthCheckResponse
        assert statuses == [serving.SERVING, serving.NOT_SERVING]


def test_a_front_that_dies_is_replaced(node: NodeProcess, wait_until: WaitUntil) -> None:
    front = node.role("front 0")
    assert front is not None
    front.kill()
    wait_until(lambda: not is_alive(front))
    wait_until(lambda: node.role("front 0") is not None)

    def answered() -> bool:
        with connect(node, time.monotonic_ns() % 1_000_000) as channel:
            reply = CacheStub(channel).Get(pb.GetRequest(group="scores", key=b"a"), timeout=5)
            return bool(reply.value == b"aa")

    for _ in range(8):
        assert answered()
