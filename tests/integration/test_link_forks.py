"""Forks of an attached process while its threads are in the middle of calls."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.node_process import ROOT, NodeProcess

pytestmark = pytest.mark.integration

WaitUntil = Callable[..., None]

# A process of its own: threads, forks, and a loop in a thread, as an application may have them.
FORKING = """
import asyncio, os, sys, threading, time, warnings
import kamacache

warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of forks beside threads
THREADS, FORKS, CALLS = 4, int(sys.argv[2]), 20
kamacache.attach(sys.argv[1])
group = kamacache.Group("scores", fallback="error", near_cache_items=0)
stop = threading.Event()
failures = []

def check(name, number):
    key = f"{name}-{number % 50}"
    value = key.encode() * (1 + number % 300)
    group.set(key, value, timeout=10)
    found = group.get(key, timeout=10)
    assert found == value, (key, len(value), found and len(found))
    assert group.get_many([key, "none"], timeout=10) == {key: value}

async def acheck(name, number):
    key = f"{name}-{number % 50}"
    value = key.encode() * (1 + number % 300)
    await group.aset(key, value, timeout=10)
    assert await group.aget(key, timeout=10) == value

def work(name):
    number = 0
    try:
        while not stop.is_set():
            check(name, number)
            number += 1
    except BaseException as error:
        failures.append(repr(error))

def awork(name):
    async def run():
        number = 0
        while not stop.is_set():
            await asyncio.gather(*[acheck(f"{name}{task}", number) for task in range(8)])
            number += 1
    try:
        asyncio.run(run())
    except BaseException as error:
        failures.append(repr(error))

def child(number):
    code = 1
    try:
        for call in range(CALLS):
            check(f"child{number}", call)
        asyncio.run(acheck(f"child{number}", 7))
        code = 0
    except BaseException as error:
        print("child", number, repr(error), file=sys.stderr, flush=True)
    finally:
        os._exit(code)

threads = [threading.Thread(target=work, args=(f"thread{at}",)) for at in range(THREADS)]
threads += [threading.Thread(target=awork, args=("task",))]
group.set("attached", b"1")  # attached before the first fork
for thread in threads:
    thread.start()
pids = []
for number in range(FORKS):
    pid = os.fork()
    if pid == 0:
        child(number)
    pids.append(pid)
    time.sleep(0.001 * (number % 7))
codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
stop.set()
for thread in threads:
    thread.join(20)
assert not any(thread.is_alive() for thread in threads), "a thread hangs"
assert not failures, failures
assert codes == [0] * FORKS, codes
print("fine")
"""


def test_children_forked_in_the_middle_of_calls_have_links_of_their_own(
    short_dir: Path, wait_until: WaitUntil
) -> None:
    arguments = ("--workers", "2", "--listen", "none", "--group", "scores:8MiB")
    with NodeProcess(short_dir / "run", *arguments) as node:
        node.await_ready()
        done = subprocess.run(
            [sys.executable, "-c", FORKING, str(node.run_dir), "25"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=50,
            check=False,
        )
        assert (done.returncode, done.stdout) == (0, "fine\n"), done.stderr
        # Nobody was cut off, and no descriptor of a dead child keeps a connection open.
        assert "frame" not in node.log
        for shard in range(2):
            worker = node.role(f"worker {shard}")
            assert worker is not None
            wait_until(lambda worker=worker: len(worker.net_connections("unix")) < 8)
        assert node.stop() == 0
