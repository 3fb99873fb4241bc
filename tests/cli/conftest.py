"""Nodes and a cluster that the tests of the command share, and the command itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from click.testing import CliRunner

from kamacache.cli.client import command
from tests.cluster_nodes import Cluster, make_cluster, shared_cluster

__all__ = ["make_cluster"]


class Ended(NamedTuple):
    """What the command printed, and its exit code."""

    returncode: int
    stdout: str
    stderr: str


def kamacache(*args: object, **variables: str) -> Ended:
    """Run the command to its end, in this process: starting Python takes longer than most of it."""
    runner = CliRunner(env={"NO_COLOR": None, "KAMACACHE_RUN_DIR": None, **variables})
    result = runner.invoke(command, [str(arg) for arg in args], prog_name="kamacache")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Ended(result.exit_code, result.stdout, result.stderr)


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
