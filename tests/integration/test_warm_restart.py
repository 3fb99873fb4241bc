"""A node that drains leaves its shards, and the next one serves what is in them.

Real processes. What is cold says why in the log; what is kept is counted.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kamacache.errors import NodeUnavailableError
from kamacache.local.attach import Attachment
from kamacache.local.attached import AttachedEngine
from kamacache.rundir.description import read_description
from kamacache.rundir.kept import NOTE
from kamacache.rundir.layout import RunDir
from tests.node_process import NodeProcess, files_below

WARM = ("--warm-restart-max-downtime", "60")
QUIET = ("--fronts", "0")
GROUP = "scores:8MiB"
ITEMS = 10_000
CALL_S = 20.0

pytestmark = pytest.mark.integration


class Warm:
    """One run directory and its nodes, one after the other."""

    def __init__(self, folder: Path, shm: Path) -> None:
        self.run_dir, self.shm = folder / "run", shm
        self.node: NodeProcess | None = None

    def start(
        self, *args: str, groups: tuple[str, ...] = (GROUP,), workers: int = 2
    ) -> NodeProcess:
        named = [part for group in groups for part in ("--group", group)]
        self.node = NodeProcess(
            self.run_dir,
            *("--workers", str(workers), "--shm-dir", str(self.shm), *QUIET, *named, *WARM, *args),
        )
        return self.node

    def restart(self, *args: str, **more: object) -> str:
        """Drain the node, start the next one, and return its log."""
        self.stop()
        self.start(*args, **more).await_ready()  # type: ignore[arg-type]
        return self.node.log if self.node else ""

    def stop(self, number: int = signal.SIGTERM) -> str:
        assert self.node is not None
        assert self.node.stop(number) == 0, self.node.log
        log = self.node.log
        self.close()
        return log

    def close(self) -> None:
        if self.node is not None:
            self.node.__exit__()
            self.node = None

    def put(self, items: dict[str, str], ttl_ms: int | None = None, group: str = "scores") -> None:
        data = {key.encode(): value.encode() for key, value in items.items()}
        with_engine(
            self.run_dir, group, lambda e: e.set_many(data, ttl_ms, time.monotonic() + CALL_S)
        )

    def found(self, keys: list[str], group: str = "scores") -> dict[str, str]:
        asked = [key.encode() for key in keys]
        got = with_engine(
            self.run_dir, group, lambda e: e.get_many(asked, time.monotonic() + CALL_S)
        )
        return {key.decode(): value.decode() for key, value in got.items()}

    @property
    def kept_folder(self) -> Path:
        [folder] = RunDir(self.run_dir).shm_base(self.shm).iterdir()
        return folder


def with_engine(run_dir: Path, group: str, use: Callable[[AttachedEngine], Any]) -> Any:
    attachment = Attachment(run_dir)
    try:
        return use(AttachedEngine(attachment, group))
    finally:
        attachment.close()


def engine_reaches(engine: AttachedEngine) -> Callable[[], bool]:
    """Return a condition: the engine has found the node that runs now."""

    def reaches() -> bool:
        try:
            return engine.get(b"key", time.monotonic() + CALL_S) is not None
        except NodeUnavailableError:
            return False

    return reaches


@pytest.fixture
def warm(short_dir: Path, shm_root: Path) -> Iterator[Warm]:
    shm = shm_root / f"warm-{short_dir.name}"
    shm.mkdir()
    found = Warm(short_dir, shm)
    try:
        yield found
    finally:
        found.close()
        shutil.rmtree(shm, ignore_errors=True)


def numbered(count: int, prefix: str = "key") -> dict[str, str]:
    return {f"{prefix}-{number}": f"value {number}" for number in range(count)}


def test_all_unexpired_items_are_there_after_a_restart_and_no_others(
    warm: Warm, wait_until: Callable[..., None]
) -> None:
    items, brief = numbered(ITEMS), numbered(500, "brief")
    warm.start().await_ready()
    warm.put(items)
    warm.put(brief, ttl_ms=300)
    expired_by_s = time.monotonic() + 0.4
    warm.put({"key-0": "a later value"})
    with_engine(warm.run_dir, "scores", lambda e: e.delete(b"key-1", time.monotonic() + CALL_S))

    log = warm.restart()
    assert "warm start" in log
    assert "cold" not in log
    items["key-0"] = "a later value"
    del items["key-1"]
    found = warm.found([*items, "key-1"])
    assert found == items
    wait_until(lambda: time.monotonic() > expired_by_s)
    assert warm.found([*brief]) == {}

    # What was kept can be written to, grows old and is kept again.
    warm.put({"key-2": "set after the restart"})
    assert "warm start" in warm.restart()
    assert warm.found(["key-2", "key-3"]) == {"key-2": "set after the restart", "key-3": "value 3"}
    warm.stop(signal.SIGINT)
    assert files_below(warm.run_dir, warm.shm) == []


def test_process_that_stays_attached_finds_the_next_node_and_never_reads_the_last_one(
    warm: Warm, wait_until: Callable[..., None]
) -> None:
    warm.start().await_ready()
    attachment = Attachment(warm.run_dir)
    engine = AttachedEngine(attachment, "scores")
    try:
        engine.set(b"key", b"before", None, time.monotonic() + CALL_S)
        assert engine.lookup(b"key") == b"before"
        warm.stop()
        wait_until(lambda: engine.lookup(b"key") is None, 1)
        warm.start().await_ready()
        wait_until(engine_reaches(engine), 5)
        assert engine.lookup(b"key") == b"before"
        engine.set(b"key", b"after", None, time.monotonic() + CALL_S)
        assert engine.lookup(b"key") == b"after"
    finally:
        attachment.close()


def test_group_that_changed_starts_cold_alone(warm: Warm) -> None:
    groups = ("scores:4MiB", "sized:4MiB", "timed:4MiB", "gone:4MiB")
    warm.start(groups=groups).await_ready()
    for group in ("scores", "sized", "timed", "gone"):
        warm.put(numbered(100), group=group)
    log = warm.restart(groups=("scores:4MiB", "sized:6MiB", "timed:4MiB,ttl=9", "new:1MiB"))
    cold = [line for line in log.splitlines() if "starts cold" in line]
    assert len(cold) == 2
    assert re.search("cache_bytes.*group=sized", cold[0])
    assert re.search("ttl_ms.*group=timed", cold[1])
    counts = {g: len(warm.found([*numbered(100)], g)) for g in ("scores", "sized", "timed", "new")}
    assert counts == {"scores": 100, "sized": 0, "timed": 0, "new": 0}
    assert not list(warm.kept_folder.glob("gone-*"))  # takes no memory any more


def link(note: Path) -> None:
    note.rename(note.with_name("x"))
    note.symlink_to("x")


def other_boot(note: Path) -> None:
    note.write_text(json.dumps(json.loads(note.read_text()) | {"boot_id": "another"}))


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "other boot": (other_boot, "the machine was started anew"),
    # As after a SIGKILL between the removal of the note and the end of the take-over.
    "no note": (Path.unlink, "cleaned up after a node that crashed"),
    "link": (link, "cleaned up after a node that crashed"),
}


def test_what_cannot_be_trusted_is_thrown_away_and_the_log_says_why(warm: Warm) -> None:
    warm.start().await_ready()
    for name, (spoil, why) in SPOILT.items():
        warm.put({"key": "value"})
        warm.stop()
        spoil(warm.kept_folder / NOTE)
        warm.start().await_ready()
        assert warm.node is not None
        assert why in warm.node.log, name
        assert warm.found(["key"]) == {}, name
        assert len(list(RunDir(warm.run_dir).shm_base(warm.shm).iterdir())) == 1, name


def test_other_count_of_workers_starts_cold_and_says_so(warm: Warm) -> None:
    warm.start(workers=2).await_ready()
    warm.put({"key": "value"})
    assert "it had 2 workers, this node has 1" in warm.restart(workers=1)
    assert warm.found(["key"]) == {}
    assert "warm restart is off" in warm.restart("--warm-restart-max-downtime", "0")
    warm.stop()
    assert files_below(warm.run_dir, warm.shm) == []  # a node that is not to, leaves nothing


def test_other_shm_folder_frees_what_was_kept_so_that_it_never_comes_back(warm: Warm) -> None:
    warm.start().await_ready()
    warm.put({"key": "before"})
    first, other = warm.shm, warm.shm.with_name(f"{warm.shm.name}-other")
    other.mkdir()
    try:
        warm.stop()
        warm.shm = other
        warm.start().await_ready()
        assert not list(first.glob("*/*"))
        assert warm.found(["key"]) == {}
        warm.put({"key": "after"})
        warm.stop()
        warm.shm = first
        warm.start().await_ready()
        assert warm.found(["key"]) == {}  # and not what the second node replaced
        assert not list(other.glob("*/*"))
        warm.stop(signal.SIGINT)
        assert files_below(warm.run_dir, first, other) == []
    finally:
        shutil.rmtree(other, ignore_errors=True)


def test_node_that_did_not_end_in_order_leaves_nothing(warm: Warm) -> None:
    node = warm.start()
    node.await_ready()
    worker = node.role("worker 0")
    assert worker is not None
    worker.suspend()  # does not drain, and is killed
    node.process.terminate()
    deadline_s = time.monotonic() + 5
    while "node stops" not in node.log:
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    time.sleep(0.3)  # two signals at once are one
    log = warm.stop()
    assert "worker 0 did not end in order" in log
    assert files_below(warm.run_dir, warm.shm) == []


@pytest.mark.soak
def test_strange_files_in_a_kept_folder_are_not_taken_over(warm: Warm) -> None:
    warm.start(groups=(GROUP, "other:1MiB")).await_ready()
    warm.put({"key": "value"})
    warm.stop()
    folder = warm.kept_folder
    elsewhere = warm.shm / "elsewhere"
    elsewhere.write_bytes((folder / "other-0.data").read_bytes())
    before = elsewhere.read_bytes()
    (folder / "other-0.data").unlink()
    (folder / "other-0.data").symlink_to(elsewhere)
    (folder / "folder").mkdir()
    (folder / "control").write_bytes(b"x" * 4096)
    warm.start(groups=(GROUP, "other:1MiB")).await_ready()
    assert warm.found(["key"]) == {"key": "value"}
    warm.put(numbered(100), group="other")
    assert elsewhere.read_bytes() == before
    folder = Path(read_description(warm.run_dir).shm_dir)
    assert not (folder / "folder").exists()
    elsewhere.unlink()


@pytest.mark.soak
def test_embedded_node_keeps_its_shards_where_it_is_told_to(
    short_dir: Path, shm_root: Path
) -> None:
    program = """
import sys, kamacache
scores = kamacache.Group("scores", cache_bytes="1MiB", codec=sys.argv[3])
node = kamacache.Node(run_dir=sys.argv[1], shm_dir=sys.argv[2], workers=1, groups=[scores],
                      warm_restart_max_downtime=30, log_level="info")
with node:
    print(scores.get("key", default=None))
    scores.set("key", "value")
"""
    shm = shm_root / "embedded"
    shm.mkdir()

    def told(codec: str) -> str:
        command = [sys.executable, "-c", program, str(short_dir / "r"), str(shm), codec]
        ended = subprocess.run(command, check=True, capture_output=True, text=True, timeout=30)
        return ended.stdout.strip() + (" cold" if "starts cold" in ended.stderr else "")

    try:
        assert told("str") == "None"
        assert told("str") == "value"
        assert told("json") == "None cold"  # its values would be read otherwise than written
    finally:
        shutil.rmtree(shm, ignore_errors=True)


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_kill_at_any_moment_leaves_all_or_nothing(warm: Warm, stress_full: bool) -> None:
    """SIGKILL to the supervisor while it keeps, takes over, or starts; then a start as usual."""
    draw = random.Random(3)
    items = numbered(2_000)
    outcomes = {"warm": 0, "cold": 0}
    warm.start().await_ready()
    for round_ in range(60 if stress_full else 10):
        warm.put(items)
        assert warm.node is not None
        node = warm.node
        if round_ % 2:  # while it ends
            node.process.terminate()
            time.sleep(draw.uniform(0, 0.06))
            node.process.kill()
        else:  # while the next one starts
            warm.stop()
            node = warm.start()
            time.sleep(draw.uniform(0.1, 0.5))
            node.process.kill()
        node.await_end()
        warm.close()
        warm.start().await_ready()
        found = warm.found([*items])
        assert found in ({}, items), len(found)
        outcomes["warm" if found else "cold"] += 1
        assert len(list(RunDir(warm.run_dir).shm_base(warm.shm).iterdir())) == 1
    print(outcomes)  # noqa: T201


@pytest.mark.soak
def test_full_memory_is_an_error_that_says_so_and_loses_nothing(warm: Warm) -> None:
    """More groups than there is room for, beside what is kept; then as before."""
    warm.start().await_ready()
    warm.put({"key": "value"})
    warm.stop()
    room = shutil.disk_usage(warm.shm).total
    node = warm.start(groups=(GROUP, f"huge:{room}"))
    assert node.await_end() == 3
    assert "make the groups smaller" in node.log
    warm.close()
    warm.start().await_ready()
    assert warm.found(["key"]) == {"key": "value"}
