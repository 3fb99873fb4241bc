"""HTTP as a role of a real node: its port, its death, its place in a drain."""

from __future__ import annotations

import signal
import socket
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.node_process import NodeProcess, files_below

pytestmark = pytest.mark.integration

WaitUntil = Callable[..., None]

NODE = ("--workers", "1", "--group", "scores:1MiB", "--listen", "none")


@pytest.fixture
def node(short_dir: Path, shm_root: Path) -> Iterator[NodeProcess]:
    run_dir = short_dir / "run"
    with NodeProcess(run_dir, *NODE, "--api", "127.0.0.1:0") as running:
        running.await_ready()
        yield running
    assert files_below(shm_root) == []


def healthy(node: NodeProcess) -> bool:
    try:
        with urllib.request.urlopen(f"http://{node.description().api}/healthz", timeout=5) as got:
            return bool(got.status == 200)
    except OSError:
        return False


def test_ready_node_serves_http_where_it_says(node: NodeProcess) -> None:
    api = node.description().api
    assert api is not None
    assert not api.endswith(":0")
    assert healthy(node)
    assert node.stop() == 0
    assert "badly" not in node.log


def test_killed_http_role_is_renewed_on_the_same_port(
    node: NodeProcess, wait_until: WaitUntil
) -> None:
    api = node.description().api
    for _ in range(2):
        http = node.role("http 0")
        assert http is not None
        http.kill()
        http.wait(10)
        wait_until(lambda: healthy(node))
    assert node.description().api == api
    assert node.stop() == 0


def test_at_once_ends_http_too(node: NodeProcess) -> None:
    assert node.stop(signal.SIGINT, deadline_s=5) == 0
    assert "killed" not in node.log


def test_port_of_http_in_use_is_a_sentence_and_code_3(short_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0), reuse_port=True) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with NodeProcess(short_dir / "run", *NODE, "--api", address) as node:
            assert node.await_end() == 3
            assert f"cannot listen on {address}" in node.log
            assert "another --api" in node.log
