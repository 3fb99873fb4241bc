"""Whole nodes that find each other in a real etcd: joining, leaving first, etcd restarting."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from kamacache.cluster.membership import Member
from kamacache.cluster.ring import Ring
from kamacache.local.attach import attach_group
from tests.cluster.discovery.servers import EtcdServer, free_port, program
from tests.node_process import NodeProcess

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(program("etcd") is None, reason="needs etcd (etcd-server in Debian)"),
]

WaitUntil = Callable[..., None]

APP = """\
import os
import kamacache

def load(key):
    return f"{key}@{os.environ['NODE']}".encode()

scores = kamacache.Group("scores", cache_bytes="1MiB", getter=load, mirror_ttl=0)
"""


@pytest.fixture
def etcd(short_dir: Path) -> Iterator[EtcdServer]:
    folder = short_dir / "etcd"
    folder.mkdir()
    server = EtcdServer.begin(folder)
    yield server
    server.stop()


def start(folder: Path, stack: ExitStack, etcd: EtcdServer, address: str, life: int) -> NodeProcess:
    node = NodeProcess(
        folder / f"{address[-5:]}-{life}",
        *("--workers=1", "--app=etcd_app:scores", f"--listen={address}"),
        f"--discover=etcd://{etcd.address}/nodes?ttl=5",
        cwd=folder,
        environment={"NODE": address},
    )
    stack.enter_context(node)
    node.await_ready()
    return node


def up(node: NodeProcess) -> int:
    """How many peers the node can ask."""
    count: int = attach_group(node.run_dir, "scores").stats()["peers_up"]
    return count


def get(node: NodeProcess, key: str) -> bytes | None:
    return attach_group(node.run_dir, "scores").get(key.encode(), None)


def registered(etcd: EtcdServer) -> int:
    """How many keys etcd has."""
    every = {"key": "AA==", "range_end": "AA==", "count_only": True}
    answer = httpx.post(f"http://{etcd.address}/v3/kv/range", json=every, trust_env=False)
    return int(answer.json().get("count", 0))


def test_nodes_join_leave_and_join_again_by_etcd(
    short_dir: Path, etcd: EtcdServer, wait_until: WaitUntil
) -> None:
    (short_dir / "etcd_app.py").write_text(APP)
    first, second = (f"127.0.0.1:{free_port()}" for _ in range(2))
    ring = Ring([Member(first), Member(second)])
    theirs = next(key for key in map(str, range(1_000)) if ring.owner(key.encode()) == second)
    with ExitStack() as stack:
        stayer = start(short_dir, stack, etcd, first, 1)
        assert get(stayer, "alone") == f"alone@{first}".encode()
        leaver = start(short_dir, stack, etcd, second, 1)
        wait_until(lambda: up(stayer) == up(leaver) == 1)
        assert registered(etcd) == 2
        assert get(stayer, theirs) == f"{theirs}@{second}".encode()

        assert leaver.stop() == 0
        assert registered(etcd) == 1  # it left, and did not wait for its lease to end
        wait_until(lambda: up(stayer) == 0)
        assert get(stayer, theirs) in {f"{theirs}@{at}".encode() for at in (first, second)}

        etcd.restart()
        assert get(stayer, theirs) is not None
        comer = start(short_dir, stack, etcd, second, 2)
        wait_until(lambda: up(stayer) == up(comer) == 1, 20.0)
        assert get(stayer, theirs) is not None
        for node in (stayer, comer):
            assert node.stop() == 0
        assert registered(etcd) == 0
