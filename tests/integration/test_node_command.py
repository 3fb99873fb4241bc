"""``kamacache-node`` as a command: exit codes and what it says on the way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import kamacache
from tests.node_process import ROOT, NodeProcess

pytestmark = pytest.mark.integration


def run(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kamacache.cli.node", *args],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )


def test_help_names_every_setting_and_exit_code() -> None:
    done = run("--help")
    assert done.returncode == 0
    for word in ("--workers", "--group", "--run-dir", "--insecure", "KAMACACHE_RUN_DIR", "78",
                 "--peers", "--discover", "--advertise", "--api"):  # fmt: skip
        assert word in done.stdout


def test_version_is_the_packages() -> None:
    assert kamacache.__version__ in run("--version").stdout


@pytest.mark.parametrize("args", [("--no-such-flag",), ("--workers", "many"), ("stray",)])
def test_wrong_usage_exits_2(args: tuple[str, ...]) -> None:
    assert run(*args).returncode == 2


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ((), "--group"),
        (("--group", "scores"), "NAME:SIZE"),
        (("--group", "a:1MiB", "--listen", "0.0.0.0:8001"), "--insecure"),
        (("--group", "a:1MiB", "--peers", "10.0.0.1:8001"), "add it to --peers"),
        (("--group", "a:1MiB", "--peers", "127.0.0.1:8001,a"), "'a' does not name a node"),
        (("--group", "a:1MiB", "--advertise", "0.0.0.0:1"), "names no node"),
        (("--group", "a:1MiB", "--peers", "localhost:8001,b:8001"), "127.0.0.1:8001"),
        (("--group", "a:1MiB", "--peers", "a:1,b:1", "--advertise", "c:1"), "c:1"),
        (
            ("--group", "a:1MiB", "--listen", "0.0.0.0:1", "--insecure", "--peers", "a:1,b:1"),
            "--advertise",
        ),
        (("--group", "a:1MiB", "--discover", "static:a:1", "--fronts", "0"), "does not listen"),
        (("--group", "a:1MiB", "--api", "0.0.0.0:9999"), "--insecure"),
        (("--group", "a:1MiB", "--config", "/no/such/file"), "cannot be read"),
    ],
)
def test_setting_that_cannot_work_exits_78(
    short_dir: Path, args: tuple[str, ...], says: str
) -> None:
    done = run("--run-dir", str(short_dir / "run"), *args)
    assert done.returncode == 78
    assert says in done.stderr
    assert done.stdout == ""


def test_wrong_variable_exits_78() -> None:
    done = run("--group", "a:1MiB", KAMACACHE_FRONTS="none")
    assert done.returncode == 78
    assert "KAMACACHE_FRONTS" in done.stderr


@pytest.mark.parametrize(
    "text", ["listen = 'nowhere'", "[groups.a]\ncache_bytes = ['1MiB']", "log_level = 7"]
)
def test_what_is_wrong_in_the_file_is_told_with_the_files_name(short_dir: Path, text: str) -> None:
    config = short_dir / "node.toml"
    config.write_text(text)
    with NodeProcess(short_dir / "run", "--config", str(config)) as node:
        assert node.await_end() == 78
        assert f"(config file {config})" in node.log


def test_file_and_environment_make_a_node(short_dir: Path) -> None:
    config = short_dir / "node.toml"
    config.write_text(
        "workers = 2\nlisten = 'none'\nlog-format = 'json'\n"
        "[groups.scores]\ncache_bytes = '2MiB'\nttl = 60\n"
    )
    environment = {"KAMACACHE_CONFIG": str(config), "KAMACACHE_WORKERS": "1"}
    with NodeProcess(short_dir / "run", environment=environment) as node:
        assert node.await_ready()["workers"] == "1"
        spec = node.description().groups[0]
        assert (spec.name, spec.cache_bytes, spec.ttl_ms) == ("scores", 2 << 20, 60_000)
        assert node.stop() == 0
        events = [json.loads(line) for line in node.log.splitlines()]
    assert {"group", "node is ready", "node stops"} <= {event["event"] for event in events}
    assert all({"level", "timestamp", "role"} <= set(event) for event in events)
