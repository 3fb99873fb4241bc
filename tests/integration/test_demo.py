"""`scripts/quickstart.py` and `scripts/demo.py` as a user runs them, on ports that are free."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.node_process import ROOT, end_all

pytestmark = pytest.mark.integration

WaitUntil = Callable[..., None]
DEADLINE_S = 50.0
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@pytest.fixture
def ports() -> list[int]:
    """Four free ports, all different."""
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(socket.socket()) for _ in range(4)]
        for one in held:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in held]


@contextlib.contextmanager
def script(name: str, *args: str, out: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a script of the project, its output in a file; leave nothing of it behind."""
    with out.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "scripts" / name), *args],
            stdout=output,
            stderr=output,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
    try:
        yield process
    finally:
        if process.poll() is None:  # the test failed; the nodes clean up, but for a defect
            parent = psutil.Process(process.pid)
            left = [parent, *parent.children(recursive=True)]
            process.terminate()
            psutil.wait_procs(left, timeout=10)
            end_all(left)
            process.wait()


def demo(ports: list[int], out: Path) -> contextlib.AbstractContextManager[subprocess.Popen[bytes]]:
    chosen = ",".join(map(str, ports[:3]))
    return script("demo.py", f"--ports={chosen}", f"--api-port={ports[3]}", out=out)


def catches(pid: int, number: int) -> bool:
    """Tell whether a process has a handler for a signal."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = int(re.findall(r"SigCgt:\s*(\w+)", status)[0], 16)
    return bool(caught >> (number - 1) & 1)


def answer(url: str) -> tuple[int, str]:
    """Return status and body; 0 while nobody listens."""
    try:
        with OPENER.open(url, timeout=20) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()
    except OSError:
        return 0, ""


def test_the_demo_shows_who_loads_what_and_ends(ports: list[int], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with demo(ports, out) as process:
        code = process.wait(DEADLINE_S)
    said = out.read_text()
    assert code == 0, said
    owners = "|".join(map(str, ports[:3]))
    for key, score in {"Tom": "630", "Jack": "589", "Sam": "567", "Peter": "999"}.items():
        line = rf"{key} +({owners}) +{score}, searched at \1 +{score}, nobody searched"
        assert re.search(line, said), said
        assert len(re.findall(rf"\[SlowDB\] Searching for key: {key}\n", said)) == 1
    assert re.search(rf"Nobody +({owners}) +404, searched at \1 +404, ", said), said


def test_the_demo_says_which_port_is_taken(ports: list[int], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", ports[1]))
        taken.listen()
        with demo(ports, out) as process:
            assert process.wait(DEADLINE_S) == 1
    assert f"port {ports[1]} of 127.0.0.1 is not free" in out.read_text()
    assert "--ports" in out.read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_demo_that_is_told_to_end_leaves_nothing(
    ports: list[int], tmp_path: Path, wait_until: WaitUntil, number: int
) -> None:
    with demo(ports, tmp_path / "out") as process:
        parent = psutil.Process(process.pid)
        wait_until(lambda: len(parent.children(recursive=True)) > 6)  # nodes with their roles
        nodes = parent.children(recursive=True)
        process.send_signal(number)
        assert process.wait(DEADLINE_S) == 128 + number
        assert not [node for node in nodes if node.is_running()]


def test_one_node_of_the_quick_start_serves_while_the_others_are_missing(
    ports: list[int], tmp_path: Path, wait_until: WaitUntil
) -> None:
    out = tmp_path / "out"
    peers = ",".join(f"127.0.0.1:{port}" for port in ports[:3])
    api = f"127.0.0.1:{ports[3]}"
    args = (f"--port={ports[0]}", f"--peers={peers}", f"--api={api}")
    with script("quickstart.py", *args, out=out) as process:
        wait_until(lambda: answer(f"http://{api}/readyz")[0] == 200, deadline_s=DEADLINE_S)
        for _ in range(2):
            assert answer(f"http://{api}/api?key=Tom") == (200, "630")
        assert answer(f"http://{api}/api?key=Nobody")[0] == 404
        wait_until(lambda: catches(process.pid, signal.SIGTERM))  # it is in Node.run() now
        began_s = time.monotonic()
        process.terminate()
        assert process.wait(DEADLINE_S) == 0
        assert time.monotonic() - began_s < 20
    lines = out.read_text().splitlines()
    assert lines.count("[SlowDB] Searching for key: Tom") == 1
    assert lines.count("[SlowDB] Searching for key: Nobody") == 1
