"""`kamacache drain`: ends the node that is meant, and no other process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import kamacache, told
from tests.node_process import NodeProcess

pytestmark = pytest.mark.integration

APP = """\
import kamacache, pathlib, time

def load(key):
    gate = pathlib.Path(__file__).with_name("gate")
    gate.with_name("loading").touch()
    while not gate.exists():
        time.sleep(0.005)
    return b"loaded"

group = kamacache.Group("slow", cache_bytes="1MiB", getter=load)
"""


@pytest.fixture
def node(short_dir: Path, shm_root: Path) -> Iterator[NodeProcess]:
    (short_dir / "slow_app.py").write_text(APP)
    args = ("--workers", "1", "--app", "slow_app:group", "--listen", "127.0.0.1:0")
    keep = ("--warm-restart-max-downtime", "0")
    with NodeProcess(short_dir / "run", *args, *keep, cwd=short_dir) as found:
        found.await_ready()
        yield found


def test_it_waits_for_loads_and_tells_when_the_node_still_drains(
    node: NodeProcess, short_dir: Path, wait_until: object
) -> None:
    command = [sys.executable, "-m", "kamacache.cli.client", "get", "key"]
    with subprocess.Popen(
        [*command, "--run-dir", str(node.run_dir)], stdout=subprocess.PIPE
    ) as getting:
        assert callable(wait_until)
        wait_until((short_dir / "loading").exists)
        late = told("drain", "--run-dir", node.run_dir, "--timeout", 0.5, code=75)
        assert late["drained"] is False
        assert late["pid"] == node.pid
        (short_dir / "gate").touch()
        done = kamacache("drain", "--run-dir", node.run_dir)
        # It may have ended before it was asked a second time.
        assert done.returncode in (0, 69), done.stderr
        assert getting.communicate(timeout=10)[0] == b"loaded"
    assert node.await_end() == 0


def test_its_end_is_told(node: NodeProcess) -> None:
    done = kamacache("drain", "--run-dir", node.run_dir)
    assert done.returncode == 0, done.stderr
    assert f"(pid {node.pid}) has ended, after " in done.stdout
    assert node.await_end() == 0
    again = kamacache("drain", "--run-dir", node.run_dir)
    assert again.returncode == 69
    assert again.stderr.startswith("kamacache: no node runs at ")


def test_a_pid_that_is_another_process_now_gets_no_signal(
    node: NodeProcess, short_dir: Path
) -> None:
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        path = node.run_dir / "node.json"
        text = path.read_text()
        path.write_text(json.dumps(json.loads(text) | {"pid": other.pid}))
        refused = kamacache("drain", "--run-dir", node.run_dir)
        assert refused.returncode == 69
        assert "killed" in refused.stderr
        path.write_text(json.dumps(json.loads(text) | {"pid": 4_000_000}))
        assert kamacache("drain", "--run-dir", node.run_dir).returncode == 69
        path.write_text(text)
        assert other.poll() is None
        assert node.process.poll() is None
    finally:
        other.kill()
        other.wait()
    assert node.stop(signal.SIGINT) == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to be another user")
def test_another_users_node_is_not_permitted(node: NodeProcess) -> None:
    script = (
        "import os, kamacache.cli.client as c, kamacache.cli.admin.drain\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"  # the library is root's alone
        "c.main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "drain", "--run-dir", str(node.run_dir)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 77, done.stderr
    assert "systemctl stop" in done.stderr
    assert node.stop(signal.SIGINT) == 0
