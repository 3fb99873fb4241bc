"""The place of a node that runs `tests.attached_app`: its run directory, trace and gates.

The fixtures are those of every folder whose conftest names them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import kamacache
from kamacache.local import engine as engines
from tests import attached_app
from tests.node_process import NodeProcess


class Estate:
    """A node, its place, and the trace of its loads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run_dir = folder / "run"
        self.trace = folder / "trace"
        self.gates = folder / "gates"
        self.gates.mkdir()
        self.trace.touch()

    def node(self, *args: str, workers: int = 2) -> NodeProcess:
        """Start a node here; not ready yet."""
        return NodeProcess(
            self.run_dir,
            *("--workers", str(workers), "--listen", "none", "--group", "plain:8MiB"),
            *("--app", "tests.attached_app:groups", *args),
            environment={
                attached_app.TRACE: str(self.trace),
                attached_app.GATES: str(self.gates),
            },
        )

    def loads(self, key: str) -> int:
        """Return how often a key's load began."""
        return sum(line.split()[0] == key for line in self.trace.read_text().splitlines())

    def loaders(self, key: str) -> list[int]:
        """Return the pids of the processes that began to load a key."""
        lines = [line.split() for line in self.trace.read_text().splitlines()]
        return [int(pid) for name, pid in lines if name == key]

    def open_gate(self, key: str) -> None:
        """Let a ``gate-`` load end."""
        (self.gates / key).touch()


@pytest.fixture
def estate(short_dir: Path, environment: None) -> Estate:
    """A place for this test's own nodes."""
    return Estate(short_dir)


@pytest.fixture
def detached(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Leave no attachment behind in this process."""
    monkeypatch.setattr(engines, "_chosen", engines._chosen)
    yield
    kamacache.detach()
