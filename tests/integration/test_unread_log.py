"""A node whose stderr nobody reads, or that has none, serves all the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kamacache.local.attach import Attachment
from kamacache.local.attached import AttachedEngine
from kamacache.node.readable import wait_readable
from kamacache.rundir.context import EXIT_APP
from tests.node_process import ROOT

pytestmark = pytest.mark.integration

APP = """
import logging
import kamacache

@kamacache.group("scores", cache_bytes="1MiB")
def scores(key: str) -> bytes:
    logging.getLogger("app").warning("x" * 3000)
    return key.encode()
"""


@pytest.mark.parametrize("how", ["unread", "closed"])
def test_a_log_that_has_no_reader_stops_nobody(short_dir: Path, shm_root: Path, how: str) -> None:
    (short_dir / "noisy_app.py").write_text(APP)
    read, write = os.pipe()
    node = subprocess.Popen(
        [
            *("sh", "-c", 'exec "$@"' + " 2>&-" * (how == "closed"), "sh"),
            *(sys.executable, "-m", "kamacache.cli.node", "--run-dir", str(short_dir / "run")),
            *("--app", "noisy_app:scores", "--workers", "1", "--listen", "none"),
            *("--shm-dir", str(shm_root), "--warm-restart-max-downtime", "0"),
        ],
        stdout=subprocess.PIPE,
        stderr=write,
        cwd=short_dir,
        env={**os.environ, "PYTHONPATH": f"{short_dir}:{ROOT}"},
    )
    os.close(write)
    attachment = None
    try:
        assert node.stdout is not None
        assert wait_readable((node.stdout.fileno(),), 20)
        attachment = Attachment(short_dir / "run")
        engine = AttachedEngine(attachment, "scores")
        for number in range(60):  # far more than a pipe has room for
            key = b"%d" % number
            assert engine.get(key, time.monotonic() + 10) == key
        node.terminate()
        assert node.wait(20) == 0
    finally:
        if attachment is not None:
            attachment.close()
        if node.poll() is None:
            node.kill()
            node.wait()
        if node.stdout is not None:
            node.stdout.close()
        os.close(read)


def test_why_a_node_ends_has_the_form_of_the_log(short_dir: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "kamacache.cli.node", "--run-dir", str(short_dir / "run")),
            *("--app", "no_such_app:x", "--listen", "none", "--log-format", "json"),
        ],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        cwd=short_dir,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == EXIT_APP
    *_, last = (json.loads(line) for line in done.stderr.splitlines())
    assert (last["event"], last["code"], last["role"]) == (
        "the node cannot run",
        EXIT_APP,
        "supervisor",
    )
    assert "no_such_app" in last["reason"]
