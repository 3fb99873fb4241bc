"""``--socket-group``: who may attach to a node, by the kernel's word: processes of other users."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.node_process import ROOT, NodeProcess, files_below

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root to be another user"),
]

WaitUntil = Callable[..., None]
NOBODY = 65534
GID = 54321
OTHER_GID = 54322

# Imports first: the other user may not be allowed to read the library's folder.
ATTACHED = """
import codecs, json, os, sys
import kamacache, kamacache.local.attach, kamacache.local.attached, kamacache.codecs
codecs.lookup("ascii")
uid, gid, run_dir = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
os.setgroups([])
os.setgid(gid)
os.setuid(uid)
kamacache.attach(run_dir)
group = kamacache.Group("scores", fallback="error")
try:
    group.set("theirs", b"1")
    found = [group.get("theirs"), group.get("theirs"), group.get_many(["cold"]).get("cold")]
    print(json.dumps([str(value) for value in found] + [group.stats()["hits"]]))
except kamacache.KamaCacheError as error:
    print(json.dumps(type(error).__name__))
for name in sys.argv[4:]:
    try:
        os.close(os.open(name, os.O_RDWR))
        print(json.dumps(name))
    except OSError:
        pass
"""


def attached_as(gid: int, run_dir: Path, *names: Path) -> list[Any]:
    """Use the node as nobody, of this group; return what came of it, and which files opened."""
    done = subprocess.run(
        [sys.executable, "-c", ATTACHED, str(NOBODY), str(gid), str(run_dir), *map(str, names)],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def start(short_dir: Path, shm_root: Path) -> Iterator[Callable[..., Any]]:
    shm = shm_root / short_dir.name
    shm.mkdir()
    before = shm_root.stat().st_mode
    for folder in (short_dir, shm_root, shm):
        folder.chmod(0o711)  # the way to the node's own folders is open, they are not
    arguments = ("--workers", "2", "--listen", "none", "--group", "scores:1MiB")

    @contextmanager
    def run(*args: str) -> Iterator[NodeProcess]:
        with NodeProcess(short_dir / "run", *arguments, *args, "--shm-dir", str(shm)) as node:
            node.await_ready()
            yield node
            assert node.stop() == 0

    yield run
    assert files_below(shm) == []
    shm_root.chmod(before & 0o777)


def test_process_of_the_group_attaches_and_others_do_not(start: Callable[..., Any]) -> None:
    with start("--socket-group", str(GID)) as node:
        shm = Path(node.description().shm_dir)
        data = [path for path in shm.iterdir() if path.suffix != ".access"]
        found, *opened = attached_as(GID, node.run_dir, *data)
        assert found[:2] == ["b'1'", "b'1'"]
        assert opened == [str(shm / "counters")]  # and no shard, no control word, no lock
        assert attached_as(OTHER_GID, node.run_dir, *shm.iterdir()) == ["NodeUnavailableError"]


def test_nobody_else_attaches_by_default(start: Callable[..., Any]) -> None:
    with start() as node:
        shm = Path(node.description().shm_dir)
        for gid in (GID, OTHER_GID):
            assert attached_as(gid, node.run_dir, *shm.iterdir()) == ["NodeUnavailableError"]


def test_files_that_a_worker_makes_anew_are_the_groups_too(
    start: Callable[..., Any], wait_until: WaitUntil
) -> None:
    with start("--socket-group", str(GID)) as node:
        shm = Path(node.description().shm_dir)
        for shard in range(2):
            (shm / f"scores-{shard}.data").unlink()
            worker = node.role(f"worker {shard}")
            assert worker is not None
            worker.kill()
        wait_until(lambda: node.log.count("role is back") == 2)
        assert attached_as(GID, node.run_dir)[0][:2] == ["b'1'", "b'1'"]
        modes = {path.name: path.stat().st_mode & 0o777 for path in shm.iterdir()}
        assert {modes.pop(f"scores-{shard}.lock") for shard in range(2)} == {0o600}
        assert modes == {
            "control": 0o640,
            "counters": 0o660,
            "meters": 0o640,
            **{f"scores-{shard}.data": 0o640 for shard in range(2)},
            **{f"scores-{shard}.access": 0o660 for shard in range(2)},
        }
        assert {path.stat().st_gid for path in shm.iterdir() if path.suffix != ".lock"} == {GID}
