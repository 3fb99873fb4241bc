"""gunicorn's forked workers beside a node: one load per key over all of them.

What is documented: the node runs beside gunicorn (`kamacache-node`, or systemd), and the app
attaches by KAMACACHE_RUN_DIR, whether it is loaded before gunicorn forks or after.
"""

from __future__ import annotations

import http.client
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.attached_estate import Estate
from tests.attached_process import in_threads
from tests.node_process import ROOT, end_all

pytestmark = pytest.mark.integration

REQUESTS = 64
WORKERS = 4
APP = """
import os
import kamacache

def own(key):
    raise RuntimeError("the application's own getter ran beside a living node")

scores = kamacache.Group("scores", getter=own)
if os.environ.get("TOUCH_AT_IMPORT"):
    scores.get("warm")  # with preload: attaches before the fork

def app(environ, start_response):
    if environ["PATH_INFO"] == "/stats":
        body = repr(scores.stats()).encode()
    else:
        body = scores.get(environ["PATH_INFO"][1:]) + b" " + str(os.getpid()).encode()
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]
"""


@contextmanager
def gunicorn(folder: Path, run_dir: Path, *args: str) -> Iterator[tuple[str, int]]:
    """Run gunicorn with `APP`; yield where it listens."""
    (folder / "webapp.py").write_text(APP)
    log_path = folder / "gunicorn.log"
    with socket.socket() as listener, log_path.open("wb") as log:
        listener.bind(("127.0.0.1", 0))
        listener.listen(256)
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "gunicorn", "webapp:app", "--workers", str(WORKERS)),
                *("--bind", f"fd://{listener.fileno()}", "--graceful-timeout", "5", *args),
                *("--no-control-socket",),
            ],
            cwd=folder,
            stdout=log,
            stderr=log,
            pass_fds=[listener.fileno()],
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "KAMACACHE_RUN_DIR": str(run_dir),
                "TOUCH_AT_IMPORT": "1" if "--preload" in args else "",
            },
        )
        seen: set[psutil.Process] = set()
        try:
            address = listener.getsockname()
            end_s = time.monotonic() + 20
            while len(workers := psutil.Process(process.pid).children()) < WORKERS:
                assert process.poll() is None, log_path.read_text()
                assert time.monotonic() < end_s, log_path.read_text()
                time.sleep(0.02)
            seen.update(workers)
            yield address
            process.terminate()
            assert process.wait(15) == 0, log_path.read_text()
        finally:
            process.kill()
            process.wait()
            end_all(seen)


def fetch(address: tuple[str, int], path: str) -> bytes:
    connection = http.client.HTTPConnection(*address, timeout=30)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        body = response.read()
        assert response.status == 200, body
        return body
    finally:
        connection.close()


@pytest.mark.parametrize(
    "args",
    [
        ("--worker-class", "gthread", "--threads", "16"),
        ("--worker-class", "gthread", "--threads", "16", "--preload"),
        ("--worker-class", "sync"),
        ("--worker-class", "sync", "--preload"),
    ],
    ids=lambda args: "-".join(arg.strip("-") for arg in args if not arg.isdigit()),
)
def test_cold_key_hit_by_64_requests_is_loaded_once(
    estate: Estate, short_dir: Path, args: tuple[str, ...]
) -> None:
    with estate.node() as node:
        node.await_ready()
        with gunicorn(short_dir, estate.run_dir, *args) as address:
            concurrent = 64 if "gthread" in args else WORKERS
            key = "gate-cold"

            def ask(number: int) -> bytes:
                if number == 0:
                    end_s = time.monotonic() + 10
                    while not estate.loads(key) and time.monotonic() < end_s:
                        time.sleep(0.005)
                    # The rest joins that load, or reads what it left.
                    estate.open_gate(key)
                return fetch(address, f"/{key}")

            answers = in_threads(REQUESTS, ask)
            assert {answer.rpartition(b" ")[0] for answer in answers} == {b"v-gate-cold"}
            assert estate.loads(key) == 1
            answers += in_threads(concurrent, lambda _: fetch(address, f"/{key}"))
            assert len({answer.rpartition(b" ")[2] for answer in answers}) > 1
            assert b"'mode': 'attached'" in fetch(address, "/stats")
        assert estate.loads("warm") == int("--preload" in args)
        assert node.stop() == 0
