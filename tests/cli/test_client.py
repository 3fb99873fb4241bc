"""`kamacache.cli.client`: the command against a real node, by run directory and by address."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.node_process import ROOT, NodeProcess

pytestmark = pytest.mark.integration

APP = """\
import kamacache

def load(key):
    if key.startswith("no"):
        raise KeyError(key)
    if key.startswith("bad"):
        raise RuntimeError("the database is away")
    return key.encode() * 2

groups = [
    kamacache.Group("scores", cache_bytes="1MiB", getter=load),
    kamacache.Group("other", cache_bytes="1MiB"),
]
"""

Run = Callable[..., subprocess.CompletedProcess[bytes]]


def kamacache(*args: str, stdin: bytes = b"", **variables: str) -> Any:
    return subprocess.run(
        [sys.executable, "-m", "kamacache.cli.client", *args],
        input=stdin,
        capture_output=True,
        timeout=30,
        check=False,
        env={"PYTHONPATH": str(ROOT), "LANG": "C.UTF-8", **variables},
    )


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory, shm_root: Path) -> Iterator[NodeProcess]:
    folder = tmp_path_factory.mktemp("cli")
    (folder / "cli_app.py").write_text(APP)
    args = ("--workers", "2", "--app", "cli_app:groups", "--listen", "127.0.0.1:0")
    with NodeProcess(folder / "run", *args, cwd=folder) as found:
        found.await_ready()
        try:
            yield found
        finally:
            assert found.stop() == 0


@pytest.fixture(params=["run dir", "address"])
def run(request: pytest.FixtureRequest, node: NodeProcess) -> Run:
    if request.param == "run dir":
        where = ("--run-dir", str(node.run_dir))
    else:
        where = ("--address", str(node.description().listen))

    def call(command: str, *args: str, stdin: bytes = b"") -> Any:
        return kamacache(command, *where, *args, stdin=stdin)

    return call


def test_set_get_delete(run: Run) -> None:
    assert run("set", "--group=other", "Tom", "630").returncode == 0
    got = run("get", "--group=other", "Tom")
    assert (got.returncode, got.stdout, got.stderr) == (0, b"630", b"")
    assert run("delete", "--group=other", "Tom").returncode == 0
    again = run("delete", "--group=other", "Tom")
    assert (again.returncode, again.stdout) == (1, b"")
    assert again.stderr == b"kamacache: group 'other': key 'Tom' was not there\n"
    gone = run("get", "--group=other", "Tom")
    assert (gone.returncode, gone.stdout) == (1, b"")
    assert gone.stderr == b"kamacache: group 'other': key 'Tom' is not found\n"


def test_any_bytes_go_in_and_come_out(run: Run) -> None:
    value = bytes(range(256)) * 20
    assert run("set", "--group=other", "--key-hex", "00ff", "-", stdin=value).returncode == 0
    assert run("get", "--group=other", "--key-hex", "00ff").stdout == value
    assert run("set", "--group=other", "empty", "").returncode == 0
    empty = run("get", "--group=other", "empty")
    assert (empty.returncode, empty.stdout) == (0, b"")
    told = json.loads(run("get", "--group=other", "--json", "--key-hex", "00ff").stdout)
    assert told["key_base64"] == "AP8="
    assert "value_base64" in told


def test_json_tells_ttl_and_what_was_not_found(run: Run) -> None:
    run("set", "--group=other", "k", "v", "--ttl", "60")
    told = json.loads(run("get", "--group=other", "k", "--json").stdout)
    assert 0 < told.pop("ttl_ms") <= 60_000
    assert told.pop("version") > 0
    assert told == {"group": "other", "key": "k", "found": True, "value": "v"}
    missing = run("get", "--group=other", "absent", "--json")
    assert missing.returncode == 1
    assert json.loads(missing.stdout) == {"group": "other", "key": "absent", "found": False}


def test_a_miss_is_loaded_and_a_failing_getter_has_its_own_code(run: Run) -> None:
    assert run("get", "--group=scores", "ab").stdout == b"abab"
    assert run("get", "--group=scores", "nobody").returncode == 1
    failed = run("get", "--group=scores", "bad")
    assert failed.returncode == 70
    assert b"the database is away" in failed.stderr
    assert len(failed.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("get", "k"), b"name one with --group"),
        (("get", "--group=nothing", "k"), b"no group 'nothing'"),
        (("get", "--group=other", ""), b"the key has 0 bytes"),
        (("get", "--group=other", "--key-hex", "xy"), b"pairs of hex digits"),
        (("set", "--group=other", "k", "v", "--ttl", "0"), b"--ttl is 0.0 seconds"),
        (("set", "--group=other", "k", "v", "--ttl", "nan"), b"--ttl is nan seconds"),
        (("stats", "--group=nothing"), b"no group 'nothing'"),
    ],
)
def test_wrong_usage_is_two_and_says_what(run: Run, args: tuple[str, ...], said: bytes) -> None:
    done = run(*args)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert b"Traceback" not in done.stderr


def test_a_value_above_the_limit_is_refused(run: Run) -> None:
    done = run("set", "--group=other", "k", "-", stdin=b"v" * 100_000)
    assert done.returncode == 2
    assert b"above the limit" in done.stderr


def test_the_environment_says_where_and_options_beat_it(node: NodeProcess) -> None:
    run_dir, address = str(node.run_dir), str(node.description().listen)
    get = ("get", "--group=scores", "a")
    assert kamacache(*get, KAMACACHE_RUN_DIR=run_dir).stdout == b"aa"
    assert kamacache(*get, KAMACACHE_ADDRESS=address).stdout == b"aa"
    first = kamacache(*get, KAMACACHE_RUN_DIR=run_dir, KAMACACHE_ADDRESS="127.0.0.1:1")
    assert first.stdout == b"aa"
    beaten = kamacache(
        "get", "--group=scores", "a", "--address", address, KAMACACHE_RUN_DIR="/nowhere"
    )
    assert beaten.stdout == b"aa"
    both = kamacache("get", "k", "--run-dir", run_dir, "--address", address)
    assert both.returncode == 2


def test_the_only_group_need_not_be_named(short_dir: Path) -> None:
    args = ("--workers", "1", "--group", "only:1MiB", "--listen", "127.0.0.1:0")
    with NodeProcess(short_dir / "run", *args) as node:
        node.await_ready()
        run_dir, address = str(node.run_dir), str(node.description().listen)
        assert kamacache("set", "k", "v", "--run-dir", run_dir).returncode == 0
        assert kamacache("get", "k", "--address", address).stdout == b"v"
        assert node.stop() == 0
        for where in (("--run-dir", run_dir), ("--address", address)):
            gone = kamacache("get", "k", "--group=only", "--timeout", "5", *where)
            assert gone.returncode == 69, gone.stderr
            assert gone.stderr.startswith(b"kamacache: no node")
            assert len(gone.stderr.splitlines()) == 1


def test_the_help_names_examples_and_exit_codes() -> None:
    shown = kamacache("--help").stdout.decode()
    assert "kamacache set Tom 630" in shown
    assert "69 no node answers" in shown
    for command in ("get", "set", "delete", "stats"):
        assert "--run-dir" in kamacache(command, "--help").stdout.decode()


def test_at_a_run_directory_grpc_is_not_loaded() -> None:
    program = (
        "import sys, kamacache.cli.client as c\n"
        "t = c.target_of('/nowhere', None, 1.0)\n"
        "assert not [m for m in sys.modules if m.split('.')[0] in ('grpc', 'google')]\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=30, check=False)
    assert done.returncode == 0
