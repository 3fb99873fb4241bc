"""Processes and folders of the stress tests, gone at their end whatever happened."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


class Child:
    """A process in a session of its own, whose last line of output is JSON."""

    def __init__(self, command: list[str]) -> None:
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def wait_ready(self) -> None:
        """Wait for the line "ready"; the test's own time limit is the deadline."""
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n", self.end()

    def result(self, deadline_s: float) -> Any:
        """Wait for its end and return what it found."""
        out, err = self.process.communicate(timeout=deadline_s)
        assert self.process.returncode == 0, err
        return json.loads(out.splitlines()[-1])

    def end(self) -> str:
        """Kill the whole session that this child leads; return its errors."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return ""
        return self.process.communicate()[1]


Start = Callable[[list[str]], Child]


@pytest.fixture
def start() -> Iterator[Start]:
    """Return a function that starts a `Child`."""
    children: list[Child] = []

    def begin(command: list[str]) -> Child:
        children.append(Child(command))
        return children[-1]

    yield begin
    for child in children:
        if child.process.poll() is None:
            child.end()
        for pipe in (child.process.stdout, child.process.stderr):
            if pipe is not None:
                pipe.close()


@pytest.fixture
def shm_dir(shm_root: Path) -> Iterator[Path]:
    """A folder for one test's shards."""
    path = Path(tempfile.mkdtemp(prefix="stress-", dir=shm_root))
    yield path
    shutil.rmtree(path)
