"""What all tests share: places to work in, polling with a deadline, and a search for left-overs.

*Invariant*: a test run leaves no process, no socket and no shared-memory file behind; the session
fails when it does. Nodes that tests start put their shared memory under `SHM_ROOT` of this run.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

SHM = Path("/dev/shm")
PROCESSES_MAX = 8  # of one test run


def pytest_xdist_auto_num_workers() -> int:
    """Tests wait more than they compute: one process more than there are CPUs."""
    return min(len(os.sched_getaffinity(0)) + 1, PROCESSES_MAX)


@pytest.fixture(scope="session")
def shm_root() -> Iterator[Path]:
    """A folder on tmpfs for this test run, empty again when it ends."""
    base = SHM if SHM.is_dir() else Path(tempfile.gettempdir())
    root = Path(tempfile.mkdtemp(prefix=f"kamacache-test-{os.getpid()}-", dir=base))
    yield root
    left = sorted(str(path) for path in root.rglob("*") if not path.is_dir())
    shutil.rmtree(root, ignore_errors=True)
    assert not left, f"shared-memory files left behind: {left}"


@pytest.fixture(scope="session", autouse=True)
def environment(shm_root: Path) -> Iterator[None]:
    """Keep the user's settings out, and the nodes' shared memory under ``shm_root``."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("KAMACACHE_")]:
            if name != "KAMACACHE_STRESS":
                patch.delenv(name)
        patch.setenv("KAMACACHE_SHM_DIR", str(shm_root))
        # What a node leaves for its successor would be another test's. Tests of it say otherwise.
        patch.setenv("KAMACACHE_WARM_RESTART_MAX_DOWNTIME", "0")
        yield


@pytest.fixture(scope="session", autouse=True)
def no_process_left(environment: None) -> Iterator[None]:
    """Fail the session when a child of this process outlives it, and end that child."""
    yield
    gone_by = time.monotonic() + 5
    children = psutil.Process().children(recursive=True)
    _, left = psutil.wait_procs(children, timeout=max(0.0, gone_by - time.monotonic()))
    names = []
    for child in left:
        try:
            names.append(f"{child.pid} {' '.join(child.cmdline())}")
            child.kill()
        except psutil.NoSuchProcess:
            continue
    assert not names, f"processes left behind: {names}"


@pytest.fixture
def short_dir() -> Iterator[Path]:
    """A folder with a short path: a Unix socket's may have 107 bytes, and tmp_path's is longer."""
    path = Path(tempfile.mkdtemp(prefix="kc-", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def stress_full() -> bool:
    """Whether stress tests run at full length (`make soak`) or in their short form."""
    return os.environ.get("KAMACACHE_STRESS") == "full"


WaitUntil = Callable[..., None]


@pytest.fixture
def wait_until() -> WaitUntil:
    """Return ``wait_until(condition, deadline_s=10)``, which polls and fails when time is up."""

    def poll(condition: Callable[[], object], deadline_s: float = 10.0, what: str = "") -> None:
        end = time.monotonic() + deadline_s
        while not condition():
            if time.monotonic() > end:
                pytest.fail(f"not within {deadline_s} s: {what or condition}")
            time.sleep(0.005)

    return poll
