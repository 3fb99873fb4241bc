"""A node of two workers with `tests.attached_app`, shared by a module's tests."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.attached_estate import Estate, detached, estate
from tests.node_process import NodeProcess

__all__ = ["detached", "estate", "shared"]


@pytest.fixture(scope="module")
def shared(environment: None) -> Iterator[tuple[Estate, NodeProcess]]:
    folder = Path(tempfile.mkdtemp(prefix="kc-", dir="/tmp"))
    try:
        place = Estate(folder)
        with place.node() as node:
            node.await_ready()
            yield place, node
            assert node.stop() == 0
    finally:
        shutil.rmtree(folder, ignore_errors=True)
