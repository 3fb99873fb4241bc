"""Nodes and a cluster that the tests of the command share, and the command itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster_nodes import Cluster, make_cluster, shared_cluster
from tests.node_process import ROOT

__all__ = ["make_cluster"]

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def kamacache(*args: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    return subprocess.run(
        [sys.executable, "-m", "kamacache.cli.client", *map(str, args)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
        env={
            "PYTHONPATH": str(ROOT),
            "LANG": "C.UTF-8",
            "PATH": os.environ["PATH"],
            **variables,
        },
    )


def told(*args: object, code: int = 0, **variables: str) -> Any:
    """Run the command with --json, and return the object."""
    done = kamacache(*args, "--json", **variables)
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def cluster(shm_root: Path, environment: None) -> Iterator[Cluster]:
    """Three linked nodes, which a test leaves as it found them."""
    with shared_cluster(shm_root, 3) as found:
        yield found
