"""The HTTP role of a real node: its port, its death, its drain, and what it does not load."""

from __future__ import annotations

import shutil
import signal
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.attached_estate import Estate
from tests.node_process import NodeProcess, is_alive

pytestmark = pytest.mark.integration

WaitUntil = Callable[..., None]
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def ask(node: NodeProcess, path: str, method: str = "GET", body: bytes | None = None) -> str:
    """Return status and body of an answer as one text."""
    url = f"http://{node.description().api}{path}"
    return fetch(urllib.request.Request(url, body, method=method))


def fetch(request: urllib.request.Request) -> str:
    try:
        with OPENER.open(request, timeout=30) as reply:
            return f"{reply.status} {reply.read().decode()}"
    except urllib.error.HTTPError as error:
        with error:
            return f"{error.code} {error.read().decode()}"


def answers(node: NodeProcess, path: str) -> bool:
    try:
        return ask(node, path).startswith("200 ")
    except OSError:
        return False


@pytest.fixture
def node(estate: Estate) -> Iterator[NodeProcess]:
    with estate.node("--api", "127.0.0.1:0") as found:
        found.await_ready()
        yield found
        if found.process.poll() is None:
            assert found.stop() == 0


def test_a_ready_node_serves_http_at_once(node: NodeProcess, estate: Estate) -> None:
    assert ask(node, "/readyz") == '200 {"ready": true}\n'
    assert ask(node, "/healthz").startswith("200 ")
    for _ in range(2):
        assert ask(node, "/api?group=scores&key=Tom") == "200 v-Tom"
    assert estate.loads("Tom") == 1
    assert ask(node, "/api?group=scores&key=none-1").startswith("404 ")
    assert ask(node, "/api?group=plain&key=%ff", "PUT", b"1").startswith("204 ")
    assert ask(node, "/api?group=plain&key=%ff") == "200 1"
    assert ask(node, "/api?group=plain&key=%ff", "DELETE") == '200 {"deleted": true}\n'
    role = node.role("http 0")
    assert role is not None
    loaded = Path(f"/proc/{role.pid}/maps").read_text()
    assert "uvloop" in loaded
    assert "grpc" not in loaded


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_gets_the_value(node: NodeProcess) -> None:
    url = f"http://{node.description().api}/api?group=scores&key=Tom"
    command = ["curl", "--noproxy", "*", "-sS", "-w", " %{http_code}", url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout == "v-Tom 200"


def test_a_role_that_dies_is_replaced_at_its_port(node: NodeProcess, wait_until: WaitUntil) -> None:
    role = node.role("http 0")
    assert role is not None
    role.kill()
    wait_until(lambda: not is_alive(role))
    wait_until(lambda: answers(node, "/readyz"))
    assert ask(node, "/api?group=scores&key=Tom") == "200 v-Tom"


def test_a_drain_finishes_requests_and_says_503(
    node: NodeProcess, estate: Estate, wait_until: WaitUntil
) -> None:
    at = f"http://{node.description().api}"
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(ask, node, "/api?group=scores&key=gate-drain")
        wait_until(lambda: estate.loads("gate-drain"))
        node.process.send_signal(signal.SIGTERM)
        wait_until(lambda: fetch(urllib.request.Request(at + "/readyz")).startswith("503 "))
        assert fetch(urllib.request.Request(at + "/api?group=scores&key=Tom")).startswith("503 ")
        estate.open_gate("gate-drain")
        assert waiting.result(30) == "200 v-gate-drain"
    assert node.await_end() == 0


def test_a_stop_at_once_does_not_wait(
    node: NodeProcess, estate: Estate, wait_until: WaitUntil
) -> None:
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(ask, node, "/api?group=scores&key=gate-int")
        wait_until(lambda: estate.loads("gate-int"))
        assert node.stop(signal.SIGINT) == 0
        with pytest.raises(OSError, match=r"Remote end closed|reset"):
            waiting.result(30)
    assert "Traceback" not in node.log
