"""The remote client and real nodes: a cluster, kills, hosts that hang, event loops, forks."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import uvloop

import kamacache
from kamacache.limits import CLIENT_PATIENCE_S, CLIENT_PROBE_S
from tests.cluster_nodes import Cluster, MakeCluster

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]
A_DEAD_NODE_S = CLIENT_PATIENCE_S + CLIENT_PROBE_S + 0.7

WaitUntil = Callable[..., None]


@pytest.fixture
def cluster(make_cluster: MakeCluster) -> Cluster:
    made = make_cluster(3, workers=1)
    made.start()
    return made


@pytest.fixture
def client(cluster: Cluster) -> Iterator[kamacache.Client]:
    with kamacache.Client([node.address for node in cluster.nodes]) as made:
        yield made


def test_a_cluster_loads_each_key_once_whoever_asks(
    cluster: Cluster, client: kamacache.Client
) -> None:
    keys = [f"key-{i}" for i in range(200)]
    expected = {key: f"v-{key}".encode() for key in keys}
    assert client.get_many("scores", keys) == expected
    with kamacache.Client([cluster.nodes[2].address]) as other:
        assert other.get_many("scores", keys) == expected
        assert other.addresses == cluster.ring.addresses
        assert other.group("scores", codec="str").get("key-0") == "v-key-0"
    loads = cluster.database.loads(group="scores")
    assert Counter(load.key for load in loads) == dict.fromkeys(keys, 1)
    assert all(load.node == cluster.ring.owner(load.key.encode()) for load in loads)


def test_values_and_errors_are_those_of_a_local_group(
    cluster: Cluster, client: kamacache.Client
) -> None:
    client.set("plain", b"\xff\x00", b"")
    assert client.get("plain", b"\xff\x00") == b""
    client.set("plain", "Tom", b"630", ttl=0.05)
    gone_by_s = time.monotonic() + 10
    while client.get("plain", "Tom", None) is not None:
        assert time.monotonic() < gone_by_s
    with pytest.raises(kamacache.KeyNotFoundError):
        client.get("scores", "none-1")
    with pytest.raises(kamacache.LoadError, match="says no") as load_error:
        client.get("scores", "bad-1")
    assert load_error.value.cause_type == "RuntimeError"
    with pytest.raises(kamacache.GroupNotFoundError) as group_error:
        client.get("nothing", "Tom")
    assert "scores" in (group_error.value.known or [])
    with pytest.raises(kamacache.ValueTooLargeError) as size_error:
        client.set("plain", "large", bytes(4 << 20))
    assert size_error.value.value_bytes == 4 << 20
    keys = [f"k{i}" for i in range(100)]
    client.set_many("plain", dict.fromkeys(keys, b"v"))
    found = client.stats("plain")
    assert (found["nodes"], found["nodes_answered"]) == (3, 3)
    assert found["sets"] >= 100
    assert client.delete_many("plain", keys) == 100
    assert client.get_many("plain", keys) == {}


def test_a_killed_node_fails_no_call_and_is_taken_back(
    cluster: Cluster, client: kamacache.Client, wait_until: WaitUntil
) -> None:
    victim = cluster.nodes[0]
    own = cluster.keys_of(victim)
    keys = [next(own) for _ in range(2_000)]
    keys_left = iter(keys)
    assert client.get("scores", next(keys_left)) is not None
    over = threading.Event()

    def work() -> list[float]:
        took_s = []
        while not over.is_set():
            key = next(keys_left)
            start_s = time.monotonic()
            assert client.get("scores", key) == f"v-{key}".encode()
            client.set("plain", key, b"1")
            took_s.append(time.monotonic() - start_s)
        return took_s

    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(work) for _ in range(2)]
        try:
            wait_until(lambda: len(cluster.database.loads()) > 10)
            victim.kill()
            after = len(cluster.database.loads())
            wait_until(lambda: len(cluster.database.loads()) > after + 20, 20)
        finally:
            over.set()
        for call in calls:
            # Theirs may wait for the node's own breaker, too: it asks the dead owner first.
            assert max(call.result(20)) < 5
    victim.start()
    cluster.await_linked()

    def loads_again() -> bool:
        key = next(keys_left)
        client.get("scores", key)
        return cluster.database.loads(key)[0].node == victim.address

    wait_until(loads_again)


def test_a_host_that_hangs_costs_one_wait(cluster: Cluster, client: kamacache.Client) -> None:
    victim = cluster.nodes[1]
    keys = cluster.keys_of(victim)
    for _ in range(3):
        client.set("plain", next(keys), b"1")
    victim.hang()
    took_s = []
    for _ in range(10):
        key = next(keys)
        start_s = time.monotonic()
        client.set("plain", key, b"1")
        assert client.get("plain", key) == b"1"
        took_s.append(time.monotonic() - start_s)
    # Those who are asked instead need their own breaker's time to pass over the hung node.
    assert took_s[0] < A_DEAD_NODE_S + 3
    assert max(took_s[1:]) < 2 * CLIENT_PATIENCE_S  # of a set and a get
    victim.go_on()


def test_a_long_load_is_waited_for(cluster: Cluster, client: kamacache.Client) -> None:
    key = cluster.key_of(cluster.nodes[0], "gate")
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(client.get, "scores", key)
        with pytest.raises(TimeoutError):
            call.result(A_DEAD_NODE_S)
        cluster.database.open_gate(key)
        assert call.result(10) == f"v-{key}".encode()
    assert cluster.load_count(key) == 1


def test_where_all_are_dead_calls_fail_at_once(cluster: Cluster, client: kamacache.Client) -> None:
    assert client.get("scores", "key-0") == b"v-key-0"
    for node in cluster.nodes:
        node.kill()
    for i in range(5):
        start_s = time.monotonic()
        with pytest.raises(kamacache.NodeUnavailableError):
            client.get("scores", f"key-{i}")
        assert time.monotonic() - start_s < CLIENT_PATIENCE_S


def test_one_client_serves_threads_and_two_loops_at_once(
    cluster: Cluster, client: kamacache.Client
) -> None:
    def in_a_loop(name: str) -> int:
        async def work() -> int:
            async def one(i: int) -> None:
                await client.aset("plain", f"{name}-{i}", b"1")
                assert await client.aget("plain", f"{name}-{i}") == b"1"

            await asyncio.gather(*(one(i) for i in range(50)))
            keys = [f"{name}-{i}" for i in range(50)]
            return len(await client.aget_many("plain", keys))

        return uvloop.run(work()) if name.endswith("1") else asyncio.run(work())

    def in_a_thread(name: str) -> int:
        for i in range(50):
            client.set("plain", f"{name}-{i}", b"1")
        return len(client.get_many("plain", [f"{name}-{i}" for i in range(50)]))

    with ThreadPoolExecutor(4) as pool:
        calls = [
            pool.submit(work, f"{work.__name__}{number}")
            for number in range(2)
            for work in (in_a_loop, in_a_thread)
        ]
        assert [call.result(30) for call in calls] == [50] * 4
    # Loops one after the other: the client keeps nothing of those that are closed.
    for number in range(3):
        assert in_a_loop(f"again{number}") == 50
    assert len(client._loops) == 1


def test_a_cancelled_call_ends_and_the_client_goes_on(
    cluster: Cluster, client: kamacache.Client
) -> None:
    key = cluster.key_of(cluster.nodes[0], "gate")

    async def work() -> None:
        call = asyncio.create_task(client.aget("scores", key))
        while not cluster.load_count(key):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(client.aget("scores", key), 0.1)
        cluster.database.open_gate(key)
        assert await client.aget("scores", key) == f"v-{key}".encode()
        await client.aclose()

    asyncio.run(work())


FORKS = """
import asyncio, os, sys, threading, time
import kamacache
from kamacache.client import transport

seeds, mode = sys.argv[1].split(","), sys.argv[2]
client = kamacache.Client(seeds)

def check(who):
    for i in range(5):
        client.set("plain", f"{who}-{i}", who.encode(), timeout=5)
        assert client.get("plain", f"{who}-{i}", timeout=5) == who.encode()

async def in_a_loop(user, key):
    assert await user.aget("plain", key, timeout=5)

async def in_a_loop_and_closed():
    async with kamacache.Client(seeds) as user:
        await in_a_loop(user, "before-0")

over = threading.Event()
threads = []
if mode != "unused":
    check("before")
if mode == "closed":
    asyncio.run(in_a_loop_and_closed())
if mode == "open":
    asyncio.run(in_a_loop(client, "before-0"))
if mode == "slow":
    threads = [threading.Thread(target=lambda: client.get("scores", "gate-fork", timeout=20))]
if mode == "busy":
    def work():
        while not over.is_set():
            client.get("plain", "before-0", timeout=5)
    threads = [threading.Thread(target=work) for _ in range(2)]
for thread in threads:
    thread.start()
if mode == "slow":
    while not transport.gate._inside:
        time.sleep(0.01)
pids = []
for number in range(3):
    pid = os.fork()
    if not pid:
        try:
            check(f"child{number}")
            asyncio.run(in_a_loop(client, f"child{number}-0"))
            os._exit(0)
        except BaseException as error:
            print(type(error), error, flush=True)
            os._exit(1)
    pids.append(pid)
check("parent")
codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
if mode == "slow":
    print(codes, flush=True)
    os._exit(0)  # the load goes on
over.set()
for thread in threads:
    thread.join()
check("after")
print(codes)
client.close()
"""


def forks(cluster: Cluster, mode: str, **environment: str) -> list[str]:
    """Return what a program says that uses a client before and after it forks."""
    seeds = ",".join(node.address for node in cluster.nodes)
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORKS, seeds, mode],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("mode", ["unused", "used", "busy", "closed"])
def test_a_forked_child_has_connections_of_its_own(cluster: Cluster, mode: str) -> None:
    assert forks(cluster, mode) == ["[0, 0, 0]"]


def test_where_grpc_does_not_survive_a_fork_the_child_is_told(cluster: Cluster) -> None:
    *errors, codes = forks(cluster, "open")
    assert codes == "[1, 1, 1]"
    assert all("aclose() before the fork" in error for error in errors)
    *errors, codes = forks(cluster, "used", GRPC_ENABLE_FORK_SUPPORT="0")
    assert codes == "[1, 1, 1]"
    assert all("GRPC_ENABLE_FORK_SUPPORT is off" in error for error in errors)
    try:
        *errors, codes = forks(cluster, "slow")
    finally:
        cluster.database.open_gate("gate-fork")
    assert codes == "[1, 1, 1]"
    assert all("waited for a slow load" in error for error in errors)
