"""Which sockets of the service manager's are taken for HTTP, and what is said of the others."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from kamacache.errors import ConfigError
from kamacache.node.address import Address
from kamacache.node.inherited import InheritedSocket, take_inherited
from tests.node_process import ROOT

# What systemd does: the sockets from descriptor 3 on, the pid, and then the program.
ACTIVATE = """
import os, sys
fds = [int(fd) for fd in sys.argv[1].split(",")]
free = [os.dup2(fd, 100 + i) for i, fd in enumerate(fds)]
for i, fd in enumerate(free):
    os.dup2(fd, 3 + i)
    os.close(fd)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(fds)), LISTEN_FDNAMES="a:b")
os.execv(sys.executable, [sys.executable, "-c", sys.argv[2]])
"""
TAKE = """
import os
from kamacache.errors import ConfigError
from kamacache.node.inherited import take_inherited
try:
    taken = take_inherited()
    print(taken.address, os.get_inheritable(taken.fd), [n for n in os.environ if "LISTEN" in n])
    assert take_inherited() is None
except ConfigError as error:
    print(error)
"""


def taken(*passed: socket.socket | int) -> str:
    """Return what a process says that was started with these descriptors."""
    fds = [one if isinstance(one, int) else one.fileno() for one in passed]
    done = subprocess.run(
        [sys.executable, "-c", ACTIVATE, ",".join(map(str, fds)), TAKE],
        pass_fds=fds,
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    return done.stdout.strip()


@pytest.fixture
def bound() -> Iterator[Callable[..., socket.socket]]:
    with ExitStack() as opened:

        def make(
            host: str = "127.0.0.1",
            *,
            family: int = socket.AF_INET,
            kind: int = socket.SOCK_STREAM,
            listens: bool = True,
        ) -> socket.socket:
            made = opened.enter_context(socket.socket(family, kind))
            made.bind(host if family == socket.AF_UNIX else (host, 0))
            if listens:
                made.listen()
            return made

        yield make


Bound = Callable[..., socket.socket]


def test_one_socket_that_listens_is_taken_and_kept_from_programs(bound: Bound) -> None:
    passed = bound()
    assert taken(passed) == f"127.0.0.1:{passed.getsockname()[1]} False []"


def test_ipv6_is_taken(bound: Bound) -> None:
    passed = bound("::1", family=socket.AF_INET6)
    assert taken(passed) == f"[::1]:{passed.getsockname()[1]} False []"


def test_what_cannot_serve_http_is_refused_with_the_remedy(bound: Bound, tmp_path: Path) -> None:
    assert "2 sockets were passed (a:b); the node takes one" in taken(bound(), bound())
    assert "Accept=no" in taken(bound(listens=False))
    assert "datagram" in taken(bound(kind=socket.SOCK_DGRAM, listens=False))
    unix = bound(str(tmp_path / "s"), family=socket.AF_UNIX)
    assert "ListenStream=HOST:PORT" in taken(unix)
    with (tmp_path / "file").open("wb") as file:
        assert "not a socket" in taken(file.fileno())


def test_a_descriptor_that_is_not_there_is_refused() -> None:
    begin = "import os\nos.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='1')"
    done = subprocess.run(
        [sys.executable, "-c", begin + TAKE],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert "descriptor 3 cannot be used: Bad file descriptor" in done.stdout, done.stderr


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"LISTEN_PID": "1", "LISTEN_FDS": "1"},
        {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "0"},
        {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "-1"},
        {"LISTEN_PID": str(os.getpid())},
    ],
)
def test_what_is_not_for_this_process_is_let_alone(variables: dict[str, str]) -> None:
    assert take_inherited(variables) is None
    assert variables == {}


@pytest.mark.parametrize(
    ("passed", "api"),
    [
        (Address("127.0.0.1", 9999), None),
        (Address("127.0.0.1", 9999), "127.0.0.1:9999"),
        (Address("127.0.0.1", 9999), "localhost:9999"),
        (Address("::", 9999), "0.0.0.0:9999"),
    ],
)
def test_api_may_be_left_out_or_agree(passed: Address, api: str | None) -> None:
    assert InheritedSocket(3, passed).agree(api) == str(passed)


@pytest.mark.parametrize("api", ["127.0.0.1:9998", "127.0.0.2:9999", "0.0.0.0:9999", "none", ""])
def test_api_that_says_otherwise_is_refused(api: str) -> None:
    with pytest.raises(ConfigError, match=r"listens on 127\.0\.0\.1:9999; leave --api out"):
        InheritedSocket(3, Address("127.0.0.1", 9999)).agree(api)
