"""A running worker server for each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.worker.harness import Running, running


@pytest.fixture
def worker(short_dir: Path) -> Iterator[Running]:
    with running(short_dir) as server:
        yield server
