"""A real node and a real notify socket: what systemd is told, and when it hears nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from kamacache.local.attach import Attachment
from kamacache.local.attached import AttachedEngine
from tests.node_process import NodeProcess
from tests.service_manager import Message, ServiceManager

pytestmark = pytest.mark.integration

WaitUntil = Callable[..., None]
WATCHDOG_S = 0.6
PINGS = 3
APP = """
import os, kamacache

@kamacache.group("environment", cache_bytes="1MiB")
def environment(key):
    return os.environ.get(key, "not set").encode()
"""


def pinged(message: Message) -> bool:
    return message == ["WATCHDOG=1"]


def status(wanted: Callable[[str], bool]) -> Callable[[Message], bool]:
    def told(message: Message) -> bool:
        return any(line.startswith("STATUS=") and wanted(line[7:]) for line in message)

    return told


@contextmanager
def stopped(process: psutil.Process) -> Iterator[None]:
    process.suspend()
    try:
        yield
    finally:
        process.resume()


def test_the_manager_follows_a_node_from_its_start_to_its_end(
    short_dir: Path, wait_until: WaitUntil
) -> None:
    run_dir = short_dir / "run"
    (short_dir / "told.py").write_text(APP)
    with (
        ServiceManager(str(short_dir / "notify")) as manager,
        NodeProcess(
            run_dir,
            *("--workers", "2", "--app", "told:environment", "--listen", "127.0.0.1:0"),
            *("--warm-restart-max-downtime", "0"),
            cwd=short_dir,
            environment={
                "NOTIFY_SOCKET": manager.address,
                "WATCHDOG_USEC": str(round(WATCHDOG_S * 1e6)),
            },
        ) as node,
    ):
        manager.await_told(lambda message: message[0].startswith("EXTEND_TIMEOUT_USEC="))
        manager.await_told(status(lambda text: text.startswith("starting: 0 of 3 processes")))
        ready = manager.await_told(lambda message: message[0] == "READY=1")
        listen = node.await_ready()["listen"]
        well = f"2 workers, listening on {listen}"
        assert ready == ["READY=1", f"STATUS={well}", f"MAINPID={node.pid}"]

        # No child could speak for the node.
        attachment = Attachment(run_dir)
        engine = AttachedEngine(attachment, "environment")
        for name in (b"NOTIFY_SOCKET", b"WATCHDOG_USEC"):
            assert engine.get(name, time.monotonic() + 10) == b"not set"
        attachment.close()

        # The watchdog speaks for the supervisor: not for a worker that hangs ...
        worker = node.role("worker 1")
        assert worker is not None
        with stopped(worker):
            for _ in range(PINGS):
                manager.await_told(pinged, deadline_s=10 * WATCHDOG_S)
        # ... and for nothing else.
        supervisor = psutil.Process(node.pid)
        with stopped(supervisor):
            wait_until(lambda: supervisor.status() == psutil.STATUS_STOPPED)
            manager.heard()
            assert manager.silent(2 * WATCHDOG_S)
        manager.await_told(pinged)

        worker.kill()
        manager.await_told(status(lambda text: text == f"{well}; 1 of 2 workers restarting"))
        manager.await_told(status(lambda text: text == well))

        assert node.stop() == 0
        manager.heard()
        stopping = manager.told.index(["STOPPING=1", "STATUS=stopping"])
        assert manager.told[stopping + 1][0].startswith("EXTEND_TIMEOUT_USEC=")


def test_a_node_that_cannot_start_says_why(short_dir: Path) -> None:
    with (
        ServiceManager(f"@{short_dir}/notify") as manager,
        NodeProcess(
            short_dir / "run",
            *("--app", "no_such_module:groups", "--listen", "none"),
            environment={"NOTIFY_SOCKET": manager.address},
        ) as node,
    ):
        manager.await_told(status(lambda text: "no_such_module" in text))
        assert node.await_end() == 4
        assert not any("READY=1" in message for message in manager.told)
