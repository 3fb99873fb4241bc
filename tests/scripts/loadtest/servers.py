"""The servers that load tests are held against, real ones: a node with HTTP, redis, memcached."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.node_process import NodeProcess

START_S = 20.0


def free_port() -> int:
    """A TCP port of the loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def unix_server(command: list[str], path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server until the end of the block; skips the test where it is not installed."""
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            end_s = time.monotonic() + START_S
            while not accepts(path):
                assert process.poll() is None, f"{command[0]} ended with {process.returncode}"
                assert time.monotonic() < end_s, f"{command[0]} does not listen at {path}"
                time.sleep(0.01)
            yield process
        finally:
            process.kill()


def accepts(path: Path) -> bool:
    """Whether something listens on this Unix socket."""
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


@contextmanager
def redis_server(folder: Path) -> Iterator[tuple[str, int]]:
    """A redis-server; its target and pid."""
    path = folder / "redis.sock"
    command = ["redis-server", "--port", "0", "--unixsocket", str(path), "--dir", str(folder)]
    with unix_server([*command, "--save", "", "--appendonly", "no"], path) as process:
        yield f"redis:{path}", process.pid


@contextmanager
def memcached_server(folder: Path) -> Iterator[tuple[str, int]]:
    """A memcached; its target and pid."""
    path = folder / "memcached.sock"
    command = ["memcached", "-s", str(path), "-m", "32"]
    if os.geteuid() == 0:
        command += ["-u", "root"]
    with unix_server(command, path) as process:
        yield f"memcached:{path}", process.pid


@contextmanager
def loadtest_node(folder: Path, workers: int = 2) -> Iterator[tuple[dict[str, str], NodeProcess]]:
    """A node with the load test's app: its targets by scheme."""
    api = f"127.0.0.1:{free_port()}"
    with NodeProcess(
        folder / "run",
        f"--workers={workers}",
        "--listen=127.0.0.1:0",
        f"--api={api}",
        "--app=scripts.loadtest.app:groups",
        environment={"KAMACACHE_LOADTEST_CACHE_BYTES": "8MiB"},
    ) as node:
        listen = node.await_ready()["listen"]
        yield (
            {
                "local": f"local:{node.run_dir}",
                "grpc": f"grpc:{listen}",
                "http": f"http:{api}",
            },
            node,
        )
        if node.process.poll() is None:
            assert node.stop() == 0
