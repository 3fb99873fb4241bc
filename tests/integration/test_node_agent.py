"""The agent in a real node: what it publishes, its death, its leaving, and what ends the node."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import grpc
import psutil
import pytest

from kamacache.cluster.membership import Membership, MembershipReader
from kamacache.limits import DISCOVERY_FIRST_S
from kamacache.v1 import kamacache_pb2 as pb
from kamacache.v1.kamacache_pb2_grpc import CacheStub
from tests.node_process import NodeProcess, files_below

pytestmark = pytest.mark.integration

WaitUntil = Callable[..., None]

LISTEN = ("--listen", "127.0.0.1:0", "--workers", "1", "--group", "scores:1MiB")


class Cluster:
    """One node that follows a file, and what its roles find."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.file = folder / "peers.json"
        self.run_dir = folder / "run"
        self.shm = Path(os.environ["KAMACACHE_SHM_DIR"]) / folder.name
        self.shm.mkdir()
        self._stack = stack
        self._reader: MembershipReader | None = None

    def start(self, *args: str, ready: bool = True) -> NodeProcess:
        self.node = self._stack.enter_context(
            NodeProcess(
                self.run_dir, *LISTEN, "--discover", f"file:{self.file}", *args,
                *("--shm-dir", str(self.shm)),
            )
        )  # fmt: skip
        if ready:
            self.node.await_ready()
            self._reader = MembershipReader(self.node.description())
        return self.node

    def write(self, *addresses: str) -> None:
        new = self.file.with_suffix(".new")
        new.write_text(json.dumps({"members": addresses}))
        new.replace(self.file)

    @property
    def now(self) -> Membership:
        assert self._reader is not None
        return self._reader.current()

    @property
    def agent(self) -> psutil.Process:
        found = self.node.role("agent 0")
        assert found is not None, self.node.log
        return found

    def end(self) -> None:
        if self._reader is not None:
            self._reader.close()
        self._stack.close()
        left = files_below(self.shm)
        shutil.rmtree(self.shm)
        assert left == []


@pytest.fixture
def cluster(short_dir: Path, environment: None) -> Iterator[Cluster]:
    found = Cluster(short_dir, ExitStack())
    found.write("127.0.0.9:8001")
    yield found
    found.end()


def test_ready_node_knows_its_peers_and_follows_the_source(
    cluster: Cluster, wait_until: WaitUntil
) -> None:
    node = cluster.start()
    own = node.description().name
    assert own is not None
    assert own == node.description().listen
    assert cluster.now.own == own
    assert cluster.now.others == ("127.0.0.9:8001",)
    assert cluster.now.number == 2  # 1 was the node alone
    cluster.write("127.0.0.9:8001", "127.0.0.8:8001=2", own)
    wait_until(lambda: cluster.now.number == 3)
    assert [member.weight for member in cluster.now.members] == [1, 2, 1]
    assert node.stop() == 0


def test_agent_alone_may_write_the_words_and_the_supervisor_loads_nothing(
    cluster: Cluster,
) -> None:
    node = cluster.start()

    def maps(pid: int) -> set[str]:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
        return {line.split()[1] for line in lines if line.endswith("/control")}

    assert maps(cluster.agent.pid) == {"rw-s"}
    others = [child.pid for child in node.children() if child.pid != cluster.agent.pid]
    assert len(others) == 2
    assert all(maps(pid) == {"r--s"} for pid in others)
    assert len(os.listdir(f"/proc/{node.pid}/task")) == 1
    assert "cygrpc" not in Path(f"/proc/{node.pid}/maps").read_text()
    assert node.stop() == 0


def test_killed_agent_is_renewed_and_counts_on(cluster: Cluster, wait_until: WaitUntil) -> None:
    node = cluster.start()
    others = {child.pid for child in node.children()} - {cluster.agent.pid}
    for number in range(3, 6):
        cluster.agent.kill()
        cluster.write(f"127.0.0.{number}:8001")
        wait_until(lambda number=number: cluster.now.number == number)
        assert cluster.now.others == (f"127.0.0.{number}:8001",)
    assert {child.pid for child in node.children()} - {cluster.agent.pid} == others
    wait_until(lambda: node.log.count("role is back") == 3)
    cluster.agent.terminate()  # asked to leave, it is renewed as well
    wait_until(lambda: node.log.count("role is back") == 4)
    assert cluster.now.number == 5  # and publishes nothing that stands already
    assert node.stop() == 0


def test_list_that_cannot_be_a_cluster_and_a_missing_file_leave_the_last_one(
    cluster: Cluster, wait_until: WaitUntil
) -> None:
    node = cluster.start()
    cluster.write("127.0.0.9:8001", "nonsense")
    wait_until(lambda: "nonsense" in node.log)
    cluster.file.unlink()
    wait_until(lambda: "No such file" in node.log)
    assert cluster.now.number == 2
    assert cluster.now.others == ("127.0.0.9:8001",)
    cluster.write("127.0.0.7:8001")
    wait_until(lambda: cluster.now.others == ("127.0.0.7:8001",))
    assert node.stop() == 0


def test_node_whose_source_says_nothing_becomes_ready_alone_and_goes_on_looking(
    cluster: Cluster, wait_until: WaitUntil
) -> None:
    cluster.file.unlink()
    began_s = time.monotonic()
    node = cluster.start()
    assert time.monotonic() - began_s >= DISCOVERY_FIRST_S
    assert (cluster.now.number, cluster.now.others) == (1, ())
    cluster.write("127.0.0.7:8001")
    wait_until(lambda: cluster.now.others == ("127.0.0.7:8001",))
    assert node.stop() == 0


def test_peers_that_were_told_stand_until_the_source_speaks(
    cluster: Cluster, wait_until: WaitUntil
) -> None:
    cluster.file.unlink()
    with socket.create_server(("127.0.0.2", 0)) as free:
        listen = f"127.0.0.2:{free.getsockname()[1]}"
    node = cluster.start(
        "--advertise", "127.0.0.5:1", "--listen", listen,
        "--peers", "127.0.0.5:1=3,127.0.0.6:1",
    )  # fmt: skip
    assert cluster.now.own == "127.0.0.5:1"
    assert cluster.now.others == ("127.0.0.6:1",)
    cluster.write("127.0.0.7:1")
    wait_until(lambda: cluster.now.others == ("127.0.0.7:1",))
    assert cluster.now.members[0].weight == 3  # its own, where the source does not say
    assert node.stop() == 0


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("etc://h:1/p", "etcd://HOST:PORT"),
        ("static:", "names nobody"),
        ("static:a:1,b", "'b' does not name a node"),
        ("file:peers.toml", "must begin with /"),
    ],
)
def test_source_that_cannot_work_ends_the_node_with_78_at_once(
    cluster: Cluster, url: str, says: str
) -> None:
    node = cluster.start("--discover", url, ready=False)
    assert node.await_end() == 78
    assert says in node.log.splitlines()[-1]
    assert node.log.count("could not start") in (0, 2)  # told once, and why the node ends


def test_agent_leaves_before_the_fronts_refuse(cluster: Cluster, wait_until: WaitUntil) -> None:
    node = cluster.start()
    front = node.role("front 0")
    assert front is not None
    listen = node.description().listen
    with grpc.insecure_channel(str(listen)) as channel:
        stub = CacheStub(channel)
        cluster.agent.suspend()
        leaving = cluster.agent
        node.process.send_signal(signal.SIGTERM)
        wait_until(lambda: not (cluster.run_dir / "node.json").exists())
        reply = stub.Set(pb.SetRequest(group="scores", key=b"Tom", value=b"630"), timeout=5)
        assert reply is not None
        assert front.is_running()
        leaving.resume()
        assert node.await_end() == 0
    assert "in time" not in node.log


def test_agent_that_hangs_does_not_hold_the_end_up_for_long(cluster: Cluster) -> None:
    node = cluster.start()
    cluster.agent.suspend()
    assert node.stop(deadline_s=10) == 0
    assert "agent did not leave in time" in node.log


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGQUIT])
def test_at_once_ends_the_agent_too(cluster: Cluster, number: signal.Signals) -> None:
    node = cluster.start()
    assert node.stop(number, deadline_s=5) == 0
    assert "killed" not in node.log
