"""The image's start command behind the walls of a container: process 1, signals, health."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests import container
from tests.container import Container
from tests.deploy_files import HEALTHCHECK, entrypoint, image_environment

pytestmark = pytest.mark.integration

WaitUntil = Callable[..., None]
READY = "kamacache-node ready: 2 workers, listening on 0.0.0.0:8001"
# What docker-compose.yml says, of one node.
ENVIRONMENT = {
    **image_environment(),
    "KAMACACHE_WORKERS": "2",
    "KAMACACHE_GROUP": "scores:4MiB",
    "KAMACACHE_LISTEN": "0.0.0.0:8001",
    "KAMACACHE_ADVERTISE": "node-1:8001",
    "KAMACACHE_API": "0.0.0.0:9999",
    "KAMACACHE_INSECURE": "true",
    "KAMACACHE_LOG_FORMAT": "json",
    "PYTHONDONTWRITEBYTECODE": "1",
}
ASK = "import sys, urllib.request as u; print(u.urlopen(sys.argv[1], timeout=5).status)"
# A process whose parent ends before it: process 1 inherits it.
ORPHAN = "import os; os.fork() or os.setsid() or os.fork() or os._exit(0)"
ROLES = {"worker 0", "worker 1", "front 0", "http 0"}


def title(process: psutil.Process) -> str:
    """Return what a process calls itself; a zombie, or one that is gone, nothing."""
    try:
        return " ".join(process.cmdline()).strip().removeprefix("kamacache-node: ")
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


@pytest.fixture(autouse=True)
def possible() -> None:
    if (reason := container.why_not()) is not None:
        pytest.skip(f"no container can run here: {reason}")


def start_command() -> list[str]:
    """Return the image's, with this checkout in the place of its virtual environment."""
    assert entrypoint() == ["kamacache-node"]
    return [sys.executable, "-m", "kamacache.cli.node"]


def test_a_node_is_a_proper_process_1(short_dir: Path, wait_until: WaitUntil) -> None:
    with Container(
        short_dir, start_command(), environment=ENVIRONMENT, tmpfs=("/run/kamacache", "/tmp")
    ) as node:
        assert node.line().startswith(READY)
        first = node.first()
        assert '"pid": 1,' in node.log
        assert first.uids().real == container.USER

        # Nothing but its own folders can be written to, and it has no capability.
        assert "Read-only file system" in node.run("touch", "/opt").stderr
        caps = node.run("sed", "-n", "s/^Cap...:\t//p", "/proc/1/status").stdout.split()
        assert {int(word, 16) for word in caps} == {0}

        # The health command of the image, and the probes of the pod.
        health = node.run(sys.executable, str(HEALTHCHECK))
        assert (health.returncode, health.stdout, health.stderr) == (0, "", "")
        for path in ("/healthz", "/readyz"):
            asked = node.run(sys.executable, "-c", ASK, f"http://127.0.0.1:9999{path}")
            assert asked.stdout == "200\n", asked.stderr

        # Orphans of others are reaped; a role that dies is forked again.
        assert node.run(sys.executable, "-c", ORPHAN).returncode == 0
        wait_until(lambda: set(map(title, first.children())) == ROLES)
        [worker] = [child for child in first.children() if title(child) == "worker 1"]
        worker.kill()
        wait_until(lambda: '"role is back"' in node.log)

        # A supervisor that does nothing is not healthy.
        first.suspend()
        wait_until(lambda: node.run(sys.executable, str(HEALTHCHECK)).returncode == 1)
        first.resume()

        first.send_signal(signal.SIGTERM)
        assert node.end() == 0
        said = [json.loads(line) for line in node.log.splitlines()]
        assert any(line["event"] == "node stops" and line["how"] == "drain" for line in said)


def test_a_container_with_too_little_shared_memory_says_so(short_dir: Path) -> None:
    with Container(
        short_dir,
        start_command(),
        environment={**ENVIRONMENT, "KAMACACHE_GROUP": "scores:64MiB"},
        tmpfs=("/run/kamacache",),
        shm="16m",
    ) as node:
        assert node.line() == ""
        assert node.end() == 3
        assert "/dev/shm" in node.log


def test_what_is_mounted_read_only_may_be_the_configuration(short_dir: Path) -> None:
    config = short_dir / "config"
    config.mkdir()
    (config / "node.toml").write_text('listen = "none"\n[groups.scores]\ncache_bytes = "1MiB"\n')
    config.chmod(0o755)
    (config / "node.toml").chmod(0o644)
    with Container(
        short_dir,
        [*start_command(), "--config", "/etc-kamacache/node.toml", "--workers", "1"],
        environment=image_environment(),
        tmpfs=("/run/kamacache",),
        volumes={"/etc-kamacache": config},
    ) as node:
        assert "1 worker, not listening" in node.line()
        node.first().send_signal(signal.SIGQUIT)
        assert node.end() == 0
