"""A node of two workers with `tests.attached_app`, shared by a module's tests."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import kamacache
from kamacache.local import engine as engines
from tests.attached_estate import Estate
from tests.node_process import NodeProcess


@pytest.fixture
def estate(short_dir: Path, environment: None) -> Estate:
    """A place for this test's own nodes."""
    return Estate(short_dir)


@pytest.fixture(scope="module")
def shared(environment: None) -> Iterator[tuple[Estate, NodeProcess]]:
    folder = Path(tempfile.mkdtemp(prefix="kc-", dir="/tmp"))
    try:
        estate = Estate(folder)
        with estate.node() as node:
            node.await_ready()
            yield estate, node
            assert node.stop() == 0
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def detached(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Leave no attachment behind in this process."""
    monkeypatch.setattr(engines, "_chosen", engines._chosen)
    yield
    kamacache.detach()
