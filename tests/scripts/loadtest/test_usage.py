"""CPU and memory of processes that work, come and go."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest

from scripts.loadtest.targets.base import ServerProcess
from scripts.loadtest.targets.owners import listeners, node_processes, server_process
from scripts.loadtest.usage import Usage

SPIN = "import sys\nprint('up', flush=True)\nwhile True: pass"


@pytest.fixture
def spinning() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", SPIN], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        yield process
        process.kill()


def found(*processes: psutil.Process) -> list[ServerProcess]:
    return [ServerProcess(f"worker {index}", one) for index, one in enumerate(processes)]


def await_cpu(process: psutil.Process, more_s: float) -> None:
    before = process.cpu_times().user
    end_s = time.monotonic() + 30
    while process.cpu_times().user < before + more_s:
        assert time.monotonic() < end_s
        time.sleep(0.01)


def test_what_a_process_used_is_counted_from_the_beginning(
    spinning: subprocess.Popen[str],
) -> None:
    process = psutil.Process(spinning.pid)
    await_cpu(process, 0.2)
    before_s = process.cpu_times().user + process.cpu_times().system
    usage = Usage(lambda: found(process))
    await_cpu(process, 0.2)
    (use,) = usage.end()
    after_s = process.cpu_times().user + process.cpu_times().system
    assert 0.19 <= use.cpu_s <= after_s - before_s + 0.02
    assert use.rss_bytes > use.private_bytes > 1 << 20
    assert (use.role, use.pid, use.ended) == ("worker 0", spinning.pid, False)


def test_a_process_that_dies_is_counted_as_last_seen(spinning: subprocess.Popen[str]) -> None:
    process = psutil.Process(spinning.pid)
    usage = Usage(lambda: found(process))
    await_cpu(process, 0.2)
    usage.sample()
    spinning.kill()
    spinning.wait(10)
    (use,) = usage.end()
    assert use.ended
    assert use.cpu_s >= 0.19


def test_a_process_that_comes_is_counted_whole(spinning: subprocess.Popen[str]) -> None:
    process = psutil.Process(spinning.pid)
    await_cpu(process, 0.2)
    known: list[ServerProcess] = []
    usage = Usage(lambda: known)
    known += found(process)
    (use,) = usage.end()
    assert use.cpu_s >= 0.19


def test_roles_come_in_their_order() -> None:
    me = psutil.Process(os.getpid())
    parent = me.parent()
    assert parent is not None
    usage = Usage(lambda: [ServerProcess("worker 10", me), ServerProcess("worker 9", parent)])
    assert [use.role for use in usage.end()] == ["worker 9", "worker 10"]


def test_servers_that_are_not_here_have_no_processes() -> None:
    assert node_processes(2**22 + 1) == []
    assert server_process(2**22 + 1, "redis-server", ("redis",)) == []
    assert server_process(0, "redis-server", ("redis",)) == []
    assert server_process(os.getpid(), "redis-server", ("redis",)) == []  # someone else's pid
    assert listeners([("192.0.2.1", 8001), ("no-such-host.invalid", 1)]) == []
