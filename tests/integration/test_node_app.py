"""``--app``: what a node does with apps that load, fail, hang or misbehave."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from kamacache.config import GroupSpec
from tests.node_process import NodeProcess, files_below

pytestmark = pytest.mark.integration

WaitUntil = Callable[..., None]
QUIET = ("--listen", "none", "--workers", "2")


@pytest.fixture
def app_dir(short_dir: Path) -> Path:
    folder = short_dir / "app"
    folder.mkdir()
    return folder


def started(
    short_dir: Path, app_dir: Path, source: str, *args: str, attribute: str = "app"
) -> NodeProcess:
    (app_dir / "cacheapp.py").write_text("import kamacache\n" + source)
    app = ("--app", f"cacheapp:{attribute}")
    return NodeProcess(short_dir / "run", *app, *QUIET, *args, cwd=app_dir)


GROUPS = """
def load(key): return key.encode()
one = kamacache.Group("one", cache_bytes="1MiB", getter=load, ttl=60)
two = kamacache.Group("two", cache_bytes="2MiB", eviction="s3fifo")
both = [one, two]
def factory(): return both
node = kamacache.Node(groups=both)
"""


@pytest.mark.parametrize(
    ("attribute", "names"),
    [
        ("one", ["one"]),
        ("both", ["one", "two"]),
        ("factory", ["one", "two"]),
        ("node", ["one", "two"]),
    ],
)
def test_groups_of_an_app_become_the_nodes(
    short_dir: Path, app_dir: Path, attribute: str, names: list[str]
) -> None:
    with started(short_dir, app_dir, GROUPS, attribute=attribute) as node:
        node.await_ready()
        found = node.description().groups
        assert [spec.name for spec in found] == names
        assert found[0].ttl_ms == 60_000
        assert found[0].has_getter
        assert node.stop() == 0


def test_flag_overrides_what_it_names_and_adds_groups(short_dir: Path, app_dir: Path) -> None:
    flags = ("--group", "one:4MiB,eviction=s3fifo", "--group", "three:1MiB")
    with started(short_dir, app_dir, GROUPS, *flags, attribute="both") as node:
        node.await_ready()
        found: dict[str, GroupSpec] = {spec.name: spec for spec in node.description().groups}
        assert list(found) == ["one", "two", "three"]
        assert (found["one"].cache_bytes, found["one"].eviction) == (4 << 20, "s3fifo")
        assert found["one"].ttl_ms == 60_000  # not named by the flag: the app's
        assert not found["three"].has_getter
        assert node.stop() == 0


@pytest.mark.parametrize(
    ("source", "attribute", "says"),
    [
        ("raise RuntimeError('database is on fire')", "app", "database is on fire"),
        ("import no_such_module_anywhere", "app", "no_such_module_anywhere"),
        ("def app(:", "app", "SyntaxError"),
        ("", "missing", "missing"),
        ("app = 42", "app", "int"),
        ("app = []", "app", "no group"),
        ("raise SystemExit(7)", "app", "exits with 7"),
        ("import os; os._exit(9)", "app", "exited with 9"),
        ("import os; os.kill(os.getpid(), 11)", "app", "signal 11"),
        (GROUPS + "app = [one, kamacache.Group('one', cache_bytes=9)]", "app", "two groups"),
        ("node = kamacache.Node(groups=[kamacache.Group('a', cache_bytes=9)]).start()", "node",
         "cannot start another"),
    ],
)  # fmt: skip
def test_app_that_cannot_be_loaded_ends_the_node(
    short_dir: Path, app_dir: Path, source: str, attribute: str, says: str
) -> None:
    with started(short_dir, app_dir, source, attribute=attribute) as node:
        assert node.await_end() == (78 if source == "app = []" else 4)
        assert says in node.log
    assert files_below(short_dir / "run") == []


def test_app_that_fails_only_in_the_workers_ends_the_node(short_dir: Path, app_dir: Path) -> None:
    source = GROUPS + (
        "from kamacache.rundir import context\n"
        "if context.node_role == 'worker': raise RuntimeError('not in a worker')\n"
    )
    with started(short_dir, app_dir, source, attribute="one") as node:
        assert node.await_end() == 4
        assert "not in a worker" in node.log
        assert "3 times" in node.log
    assert files_below(short_dir / "run") == []


def test_worker_that_dies_at_boot_ends_the_node_with_code_3(short_dir: Path, app_dir: Path) -> None:
    source = GROUPS + (
        "import os, signal\nfrom kamacache.rundir import context\n"
        "if context.node_role == 'worker': os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    with started(short_dir, app_dir, source, attribute="one") as node:
        assert node.await_end() == 3
        assert "signal 9" in node.log
    assert files_below(short_dir / "run") == []


def test_node_can_be_stopped_while_the_app_hangs(
    short_dir: Path, app_dir: Path, wait_until: WaitUntil
) -> None:
    here = app_dir / "hangs"
    source = f"open({str(here)!r}, 'w').close()\nimport time; time.sleep(600)\n"
    with started(short_dir, app_dir, source) as node:
        wait_until(here.exists)
        assert node.stop(deadline_s=5.0) == 0
        assert node.children() == []


def test_what_the_app_prints_stays_off_the_ready_line(short_dir: Path, app_dir: Path) -> None:
    with started(short_dir, app_dir, "print('hello')" + GROUPS, attribute="one") as node:
        node.await_ready()
        assert "hello" in node.log
        assert node.stop() == 0


def test_first_restart_is_at_once_for_a_worker_whose_app_loads(
    short_dir: Path, app_dir: Path, wait_until: WaitUntil
) -> None:
    with started(short_dir, app_dir, GROUPS, attribute="one") as node:
        node.await_ready()
        for _ in range(4):  # more often than a worker may fail to start
            worker = node.role("worker 0")
            assert worker is not None
            worker.kill()
            count = node.log.count("role is back")
            wait_until(lambda count=count: node.log.count("role is back") > count)
        assert node.stop() == 0
