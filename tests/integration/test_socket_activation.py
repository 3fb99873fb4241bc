"""HTTP on a socket that the service manager holds: nobody who connects is turned away."""

from __future__ import annotations

import os
import signal
import socket
import ssl
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path

import psutil
import pytest
import trustme

from tests.node_process import NodeProcess

pytestmark = pytest.mark.integration

WaitUntil = Callable[..., None]
GROUP = ("--workers", "1", "--group", "scores:1MiB", "--listen", "none")
COLD = ("--warm-restart-max-downtime", "0")
CALLERS = 4
# As systemd starts a service: the socket is descriptor 3, and LISTEN_PID names the program.
ACTIVATE = """
import os, sys
fd = int(sys.argv[1])
if fd != 3:
    os.dup2(fd, 3)
    os.close(fd)
os.set_inheritable(3, True)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1", LISTEN_FDNAMES="http")
os.execv(sys.argv[2], sys.argv[2:])
"""


@pytest.fixture
def passed() -> Iterator[socket.socket]:
    """What a socket unit holds."""
    with socket.create_server(("127.0.0.1", 0)) as made:
        yield made


class Activated(NodeProcess):
    """A node that was given the socket."""

    def __init__(self, run_dir: Path, passed: socket.socket, *args: str) -> None:
        fd = passed.fileno()
        super().__init__(
            run_dir,
            *(*GROUP, *COLD, *args),
            prefix=(sys.executable, "-c", ACTIVATE, str(fd)),
            pass_fds=(fd,),
        )


def ask(port: int, path: str) -> tuple[int, bytes]:
    connection = HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def connections(port: int) -> int:
    """Return how many clients are connected to the port, accepted or not."""
    return sum(
        one.status == psutil.CONN_ESTABLISHED and one.raddr == ("127.0.0.1", port)
        for one in psutil.Process().net_connections("tcp4")
    )


def test_requests_wait_while_the_role_and_the_node_come_back(
    short_dir: Path, passed: socket.socket, wait_until: WaitUntil
) -> None:
    port = passed.getsockname()[1]
    with ThreadPoolExecutor(CALLERS) as pool:
        early = [pool.submit(ask, port, "/healthz") for _ in range(CALLERS)]
        with Activated(short_dir / "run", passed) as node:
            node.await_ready()
            assert node.description().api == f"127.0.0.1:{port}"
            # 1. They came before there was a node.
            assert {answer.result(20)[0] for answer in early} == {200}

            # 2. They come while the role does nothing, and it dies: the next one answers.
            role = node.role("http 0")
            assert role is not None
            role.suspend()
            wait_until(lambda: role.status() == psutil.STATUS_STOPPED)
            late = [pool.submit(ask, port, "/healthz") for _ in range(CALLERS)]
            wait_until(lambda: connections(port) == CALLERS)
            role.kill()
            assert {answer.result(20)[0] for answer in late} == {200}
            again = node.role("http 0")
            assert again is not None
            assert again.pid != role.pid

            # 3. The other roles do not hold the socket; the supervisor keeps it for the next one.
            def holds(pid: int) -> bool:
                inode = os.fstat(passed.fileno()).st_ino
                links = Path(f"/proc/{pid}/fd").iterdir()
                return f"socket:[{inode}]" in {os.readlink(link) for link in links}

            worker = node.role("worker 0")
            assert worker is not None
            assert (holds(node.pid), holds(again.pid), holds(worker.pid)) == (True, True, False)

            # 4. The node stops: who connects now is the next node's.
            node.process.send_signal(signal.SIGTERM)
            node.await_end()
        between = [pool.submit(ask, port, "/readyz") for _ in range(CALLERS)]
        with Activated(short_dir / "run", passed, "--api", f"localhost:{port}") as node:
            assert {answer.result(20)[0] for answer in between} == {200}
            assert node.stop() == 0


def test_the_socket_serves_tls_where_the_node_has_a_certificate(
    short_dir: Path, passed: socket.socket
) -> None:
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    certificate, key = short_dir / "cert.pem", short_dir / "key.pem"
    issued.cert_chain_pems[0].write_to_path(certificate)
    issued.private_key_pem.write_to_path(key)
    key.chmod(0o600)
    trust = ssl.create_default_context()
    authority.configure_trust(trust)
    port = passed.getsockname()[1]
    files = ("--tls-cert", str(certificate), "--tls-key", str(key))
    with Activated(short_dir / "run", passed, *files) as node:
        node.await_ready()
        client = HTTPSConnection("127.0.0.1", port, timeout=20, context=trust)
        try:
            client.request("GET", "/healthz")
            assert client.getresponse().status == 200
        finally:
            client.close()
        with pytest.raises((OSError, HTTPException)):
            ask(port, "/healthz")
        assert node.stop() == 0


def test_api_elsewhere_and_a_socket_for_others_are_refused(
    short_dir: Path, passed: socket.socket
) -> None:
    with Activated(short_dir / "run", passed, "--api", "127.0.0.1:1") as node:
        assert node.await_end() == 78
        assert "leave --api out" in node.log
    with (
        socket.create_server(("0.0.0.0", 0)) as everywhere,
        Activated(short_dir / "run", everywhere) as node,
    ):
        assert node.await_end() == 78
        assert "--insecure" in node.log
