"""The systemd units: what `make install-service` installs, and what systemd thinks of it."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kamacache.cli.node import command
from kamacache.limits import DRAIN_TIMEOUT_S
from kamacache.node.settings import from_layers, read_file
from kamacache.node.stopping import AT_ONCE_GRACE_S, DRAIN_MARGIN_S, LEAVE_TIMEOUT_S
from kamacache.rundir.context import EXIT_APP, EXIT_CONFIG, EXIT_ROLE
from tests.node_process import ROOT

SCRIPTS = ROOT / "scripts"
SERVICE = SCRIPTS / "kamacache-node.service"
INSTALL = SCRIPTS / "install_service.py"
EXIT_USAGE = 2
EXPOSURE_MAX = 30  # in tenths: 3.0

needs_analyze = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed"
)


def settings_of(unit: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in unit.read_text().splitlines():
        name, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.setdefault(name, []).append(value)
    return found


def seconds(text: str) -> float:
    number = re.fullmatch(r"([0-9]+)s", text)
    assert number, text
    return float(number[1])


def install(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(INSTALL), *arguments],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is installed below a root, with a program at the place of the node's."""
    root = tmp_path_factory.mktemp("root")
    program = root / "venv/bin/kamacache-node"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    install("--destdir", str(root), "--prefix", str(root / "venv"))
    return root


def test_what_the_unit_runs_is_what_the_command_understands() -> None:
    unit = settings_of(SERVICE)
    for line in unit["ExecStart"] + unit["ExecReload"][:-1]:
        program, *arguments = shlex.split(line)
        assert Path(program).name == "kamacache-node"
        told = dict(command.make_context(program, arguments).params)
        assert told.pop("config") == "/etc/kamacache/node.toml"
        assert told["run_dir"] == "${RUNTIME_DIRECTORY}"
    assert "--check-config" in unit["ExecReload"][0]
    assert unit["ExecReload"][-1] == "/bin/kill -HUP $MAINPID"


def test_the_example_of_settings_is_a_node(tmp_path: Path) -> None:
    given = SCRIPTS / "node.toml"
    # The group is made by the installation.
    settings = from_layers({"run_dir": "/run/kamacache", "socket_group": "0"}, {}, read_file(given))
    assert str(settings.listen) == "127.0.0.1:8001"
    listens = settings_of(SCRIPTS / "kamacache-node.socket")["ListenStream"]
    assert listens == [str(settings.api)]
    # What stands there in comments is understood, too.
    spelled = re.sub(r"^# ([a-z_]+ = )", r"\1", given.read_text(), flags=re.MULTILINE)
    lines = {line.partition(" = ")[0]: line for line in spelled.splitlines()}
    full = tmp_path / "node.toml"
    full.write_text("\n".join(lines.values()))
    assert "peer_secret" in read_file(full)


def test_the_unit_waits_longer_than_a_drain_takes() -> None:
    unit = settings_of(SERVICE)
    drain_s = max(LEAVE_TIMEOUT_S, DRAIN_TIMEOUT_S) + DRAIN_MARGIN_S + AT_ONCE_GRACE_S
    assert seconds(unit["TimeoutStopSec"][0]) > drain_s


def test_only_what_waiting_may_mend_is_started_again() -> None:
    unit = settings_of(SERVICE)
    assert unit["Restart"] == ["on-failure"]
    prevented = {int(code) for code in unit["RestartPreventExitStatus"][0].split()}
    assert prevented == {EXIT_USAGE, EXIT_APP, EXIT_CONFIG}
    assert EXIT_ROLE not in prevented


def test_what_keeps_the_shards_over_a_restart_is_there() -> None:
    unit = settings_of(SERVICE)
    assert unit["RuntimeDirectoryPreserve"] == ["yes"]
    assert unit["RemoveIPC"] == ["no"]  # yes would remove /dev/shm files of the user
    assert "DynamicUser" not in unit  # implies RemoveIPC=yes
    user = unit["User"][0]
    assert (SCRIPTS / "kamacache.sysusers").read_text().splitlines()[-1].startswith(f"u {user} -")


def test_an_installation_has_its_own_program_and_can_be_repeated(installed: Path) -> None:
    units = installed / "etc/systemd/system"
    start = settings_of(units / "kamacache-node.service")["ExecStart"][0]
    assert start.startswith(f"{installed}/venv/bin/kamacache-node ")
    config = installed / "etc/kamacache/node.toml"
    assert config.stat().st_mode & 0o777 == 0o640
    assert config.parent.stat().st_mode & 0o777 == 0o750
    assert (units / "kamacache-node.service").stat().st_mode & 0o777 == 0o644
    config.write_text("workers = 3\n")
    (units / "kamacache-node.service").write_text("old")
    said = install("--destdir", str(installed), "--prefix", str(installed / "venv"))
    assert re.search(rf"keep +{config}", said)
    assert config.read_text() == "workers = 3\n"
    assert settings_of(units / "kamacache-node.service")["ExecStart"] == [start]
    left = {str(path.relative_to(installed)) for path in installed.rglob("*") if path.is_file()}
    assert left == {
        "venv/bin/kamacache-node",
        "etc/kamacache/node.toml",
        "etc/sysusers.d/kamacache.conf",
        "etc/systemd/system/kamacache-node.service",
        "etc/systemd/system/kamacache-node.socket",
    }


def test_a_dry_run_changes_nothing(tmp_path: Path) -> None:
    said = install("--destdir", str(tmp_path), "--dry-run")
    assert said.startswith("Would install:")
    assert str(tmp_path / "etc/systemd/system/kamacache-node.socket") in said
    assert list(tmp_path.iterdir()) == []


@needs_analyze
def test_systemd_finds_nothing_wrong_with_the_units(installed: Path) -> None:
    units = installed / "etc/systemd/system"
    done = subprocess.run(
        ["systemd-analyze", "verify", *map(str, sorted(units.iterdir()))],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "LC_ALL": "C", "SYSTEMD_LOG_LEVEL": "warning"},
    )
    ours = [line for line in done.stderr.splitlines() if "kamacache" in line]
    assert (done.returncode, ours) == (0, [])


@needs_analyze
def test_the_sandbox_leaves_an_exposure_below_three() -> None:
    done = subprocess.run(
        [
            *("systemd-analyze", "security", "--offline=true", "--no-pager"),
            *(f"--threshold={EXPOSURE_MAX}", str(SERVICE)),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "LC_ALL": "C"},
    )
    level = re.search(r"Overall exposure level for kamacache-node.service: ([0-9.]+)", done.stdout)
    assert level, done.stdout + done.stderr
    assert float(level[1]) < EXPOSURE_MAX / 10
    assert done.returncode == 0
