"""`kamacache.Node` in programs of their own: started, used, refused, killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

import kamacache
from tests.node_process import ROOT, end_all, files_below, is_alive

pytestmark = pytest.mark.integration

WaitUntil = Callable[..., None]

HEAD = """
import json, os, signal, sys, threading, time
import kamacache

def say(**found):
    print(json.dumps(found), flush=True)

def load(key):
    return f"{key} by {os.getpid()}".encode()

scores = kamacache.Group("scores", cache_bytes="1MiB", getter=load)
"""


class Program:
    """A Python program that says JSON lines; ended, with all its processes, at the end."""

    def __init__(self, source: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HEAD + source],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        self._seen: set[psutil.Process] = set()

    def heard(self) -> dict[str, Any]:
        """Return the next line that the program says."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        self._seen.update(self.family())
        if not line:
            assert self.process.stderr is not None
            pytest.fail(self.process.stderr.read().decode())
        found: dict[str, Any] = json.loads(line)
        return found

    def family(self) -> list[psutil.Process]:
        """Return all living processes that the program brought up."""
        try:
            found = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        return [child for child in found if is_alive(child)]

    def seen(self) -> set[psutil.Process]:
        """Return all processes seen so far."""
        return self._seen

    def ends(self, deadline_s: float = 20.0) -> int:
        """Return the program's exit code."""
        return self.process.wait(deadline_s)

    def __enter__(self) -> Program:  # noqa: PYI034
        return self

    def __exit__(self, *error: object) -> None:
        self._seen.update(self.family())
        self.process.kill()
        self.process.communicate()
        end_all(self._seen)


def test_workers_run_the_programs_getters_closures_too() -> None:
    with Program("""
prefix = str(time.time_ns())
def closure(key):
    return f"{prefix} {key} {os.getpid()}".encode()
inner = kamacache.Group("inner", cache_bytes="1MiB", getter=closure)
node = kamacache.Node("127.0.0.1:0", workers=2)
node.register_group(scores)
node.register_group(inner)
with node:
    first, second = inner.get("Tom").decode(), inner.get("Tom").decode()
    say(first=first, second=second, prefix=prefix, pid=os.getpid(), run_dir=str(node.run_dir),
        listening=node.listening, grpc="grpc" in sys.modules)
say(run_dir=str(node.run_dir))
""") as program:
        found = program.heard()
        prefix, key, pid = found["first"].split()
        assert (prefix, key) == (found["prefix"], "Tom")
        assert int(pid) != found["pid"]
        assert found["second"] == found["first"]
        assert not found["grpc"]
        assert not found["listening"].endswith(":0")
        assert program.heard() == {"run_dir": "None"}
        assert program.ends() == 0
        assert not any(map(is_alive, program.seen()))
        assert not Path(found["run_dir"]).exists()


def test_killed_program_takes_its_node_along(wait_until: WaitUntil) -> None:
    with Program("""
node = kamacache.Node("127.0.0.1:0", workers=2, groups=[scores]).start()
from kamacache.rundir.description import read_description
say(run_dir=str(node.run_dir), shm=read_description(node.run_dir).shm_dir)
signal.pause()
""") as program:
        found = program.heard()
        assert len(program.seen()) == 4
        program.process.kill()
        wait_until(lambda: not any(map(is_alive, program.seen())), 3.0)
        assert not Path(found["run_dir"]).exists()
        assert not Path(found["shm"]).exists()


def test_killed_supervisor_leaves_nothing_and_the_program_goes_on(wait_until: WaitUntil) -> None:
    with Program("""
node = kamacache.Node(workers=2, groups=[scores]).start()
scores.get("Tom")
say(run_dir=str(node.run_dir), pid=node.pid)
sys.stdin.close()
while node.pid and os.path.exists(node.run_dir): time.sleep(0.01)
say(value=scores.get("Jack").decode(), pid=os.getpid())
node.stop()
""") as program:
        found = program.heard()
        os.kill(found["pid"], signal.SIGKILL)
        after = program.heard()
        assert after["value"] == f"Jack by {after['pid']}"
        assert program.ends() == 0
        wait_until(lambda: not any(map(is_alive, program.seen())), 2.0)


def test_program_that_forgets_to_stop_leaves_nothing(short_dir: Path) -> None:
    with Program(f"""
node = kamacache.Node(workers=1, groups=[scores], run_dir={str(short_dir / "run")!r}).start()
if os.fork() == 0:
    sys.exit(0)     # its atexit must not stop the node
os.wait()
say(value=scores.get("Tom").decode(), alive=os.path.exists(f"/proc/{{node.pid}}"))
""") as program:
        assert program.heard()["alive"]
        assert program.ends() == 0
        assert not any(map(is_alive, program.seen()))
        assert files_below(short_dir / "run") == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_run_blocks_until_a_signal(
    short_dir: Path, number: signal.Signals, wait_until: WaitUntil
) -> None:
    with Program(f"""
node = kamacache.Node(workers=1, groups=[scores], run_dir={str(short_dir / "run")!r})
node.start()
say(up=True)
say(code=node.run())
""") as program:
        assert program.heard() == {"up": True}

        def waits_for_signals() -> int:
            status = Path(f"/proc/{program.process.pid}/status").read_text()
            caught = next(line for line in status.splitlines() if line.startswith("SigCgt"))
            return int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1

        wait_until(waits_for_signals)
        program.process.send_signal(number)
        assert program.heard() == {"code": 0}
        assert program.ends() == 0
        assert files_below(short_dir / "run") == []


def test_node_can_be_started_again_after_a_stop() -> None:
    with Program("""
node = kamacache.Node(workers=1, groups=[scores])
for round in range(2):
    with node:
        say(value=scores.get("Tom").decode(), me=os.getpid())
    node.stop()
say(alone=scores.get("Tom").decode(), me=os.getpid())
""") as program:
        one, two, alone = program.heard(), program.heard(), program.heard()
        assert one["value"] != two["value"]
        assert not one["value"].endswith(str(one["me"]))
        assert alone["alone"] == f"Tom by {alone['me']}"
        assert program.ends() == 0


@pytest.mark.parametrize(
    ("before", "says"),
    [
        (
            "threading.Thread(target=time.sleep, args=(9,), daemon=True, name='busy').start()",
            "busy",
        ),
        ("import grpc", "grpc"),
    ],
)
def test_program_that_cannot_be_forked_is_told_why(before: str, says: str) -> None:
    with Program(f"""
{before}
try:
    kamacache.Node(workers=1, groups=[scores]).start()
except kamacache.ConfigError as error:
    say(error=str(error))
""") as program:
        error = program.heard()["error"]
        assert says in error
        assert "kamacache-node" in error
        assert program.ends() == 0


def test_running_event_loop_is_refused() -> None:
    with Program("""
import asyncio
async def main():
    try:
        kamacache.Node(workers=1, groups=[scores]).start()
    except kamacache.ConfigError as error:
        say(error=str(error))
asyncio.run(main())
""") as program:
        assert "asyncio.run" in program.heard()["error"]


def test_node_that_does_not_come_up_raises_its_reason() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with Program(f"""
node = kamacache.Node({address!r}, workers=1, groups=[scores])
try:
    node.start()
except kamacache.NodeUnavailableError as error:
    say(error=str(error), pid=node.pid, run_dir=str(node.run_dir))
say(value=scores.get("Tom").decode(), me=os.getpid())
""") as program:
            found = program.heard()
            assert address in found["error"]
            assert (found["pid"], found["run_dir"]) == (None, "None")
            alone = program.heard()
            assert alone["value"] == f"Tom by {alone['me']}"
            assert program.ends() == 0


def test_arguments_are_checked_before_anything_starts() -> None:
    scores = kamacache.Group("scores", cache_bytes=2048)
    kamacache.Node("127.0.0.1:8001", peers=["127.0.0.1:8001"])
    kamacache.Node("127.0.0.1:8001", peers=iter(["127.0.0.1:8001", "127.0.0.1:8002"]))
    kamacache.Node("0.0.0.0:8001", peers="a:1,b:1", advertise="a:1", insecure=True)
    with pytest.raises(kamacache.ConfigError, match="localhost is not"):
        kamacache.Node("127.0.0.1:8001", peers=["localhost:8001", "localhost:8002"])
    with pytest.raises(kamacache.ConfigError, match="does not listen"):
        kamacache.Node(discover="static:a:1")
    with pytest.raises(kamacache.ConfigError, match="insecure"):
        kamacache.Node("127.0.0.1:8001", api="0.0.0.0:9999")
    with pytest.raises(kamacache.ConfigError, match="no such group"):
        kamacache.Node("127.0.0.1:8001", socket_group="no-such-group-here")
    with pytest.raises(kamacache.ConfigError, match="other hosts"):
        kamacache.Node("0.0.0.0:8001")
    with pytest.raises(kamacache.ConfigError, match="workers"):
        kamacache.Node(workers=0)
    with pytest.raises(kamacache.ConfigError, match="no group"):
        kamacache.Node().start()
    with pytest.raises(kamacache.ConfigError, match="already"):
        kamacache.Node(groups=[scores, kamacache.Group("scores", cache_bytes=2048)])
    with pytest.raises(kamacache.ConfigError, match="is not a kamacache"):
        kamacache.Node(groups=["scores"])  # type: ignore[list-item]


def test_node_with_peers_knows_its_cluster_from_the_start() -> None:
    with Program("""
from kamacache.cluster.membership import MembershipReader
from kamacache.rundir.description import read_description
def tell(**args):
    with kamacache.Node("127.0.0.1:0", workers=1, groups=[scores], **args) as node:
        about = read_description(node.run_dir)
        found = MembershipReader(about).current()
        say(number=found.number, own=found.own, members=[m.address for m in found.members],
            name=about.name, clustered=about.clustered, listening=node.listening)
tell()
import socket
with socket.create_server(("127.0.0.2", 0)) as held:
    address = "127.0.0.2:%d" % held.getsockname()[1]
node = kamacache.Node(address, workers=1, groups=[scores], peers=["127.0.0.3:1=2", address])
with node:
    about = read_description(node.run_dir)
    found = MembershipReader(about).current()
    say(number=found.number, own=found.own, others=found.others, clustered=about.clustered,
        weights=[m.weight for m in found.members], is_name=about.name == address)
""") as program:
        alone = program.heard()
        address = alone["listening"]
        assert alone == {"number": 0, "own": address, "members": [address], "name": address,
                         "clustered": False, "listening": address}  # fmt: skip
        found = program.heard()
        assert found.pop("own").startswith("127.0.0.2:")
        assert found == {"number": 1, "others": ["127.0.0.3:1"], "clustered": True,
                         "weights": [1, 2], "is_name": True}  # fmt: skip
        assert program.ends() == 0


def test_worker_whose_loop_is_blocked_for_good_is_replaced() -> None:
    with Program("""
import kamacache.node.pulse, kamacache.node.supervisor
kamacache.node.pulse.HUNG_WORKER_S = 0.5
kamacache.node.supervisor.PULSE_EVERY_S = 0.1
async def blocks(key):
    if key == "stuck": time.sleep(600)
    return str(os.getpid()).encode()
blocking = kamacache.Group("blocking", cache_bytes="1MiB", getter=blocks)
with kamacache.Node(workers=1, groups=[blocking]):
    before = blocking.get("one")
    try:
        blocking.get("stuck", timeout=0.2)
    except kamacache.KamaCacheError as error:
        pass
    say(before=before.decode(), after=blocking.get("two", timeout=20).decode())
""") as program:
        found = program.heard()
        assert found["before"] != found["after"]
        assert program.ends() == 0
