"""The units under a real systemd: the sandbox, restarts, reloads, the watchdog."""

from __future__ import annotations

import shutil
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import systemd_boot
from tests.node_process import ROOT
from tests.systemd_boot import Systemd

pytestmark = [pytest.mark.integration, pytest.mark.soak, pytest.mark.timeout(300)]

WaitUntil = Callable[..., None]
NODE = "kamacache-node.service"
SOCKET = "kamacache-node.socket"
PREFIX = "/opt/kamacache"
ITEMS = 20_000
WELL = "2 workers, listening on 127.0.0.1:8001, HTTP on 127.0.0.1:9999"
WATCHDOG_S = 2
# Another user of the group, in a sandbox of its own: in through shared memory and Unix sockets.
APP = f"""
[Service]
Type=oneshot
ExecStart={PREFIX}/bin/python3 {PREFIX}/attached.py WHAT
StandardOutput=truncate:/run/kctest.out
User=kctest
SupplementaryGroups=kamacache
NoNewPrivileges=yes
PrivateTmp=yes
PrivateDevices=yes
PrivateIPC=yes
ProtectSystem=strict
"""
ATTACHED = f"""
import sys, kamacache
kamacache.attach("/run/kamacache")
group = kamacache.Group("default", fallback="error")
keys = [f"k{{i}}" for i in range({ITEMS})]
if sys.argv[1] == "set":
    group.set_many(dict.fromkeys(keys, b"x" * 100))
print(len(group.get_many(keys)))
"""


@pytest.fixture(scope="module")
def systemd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Systemd]:
    if (reason := systemd_boot.why_not()) is not None:
        pytest.skip(f"systemd cannot be booted here: {reason}")
    packages = Path(sysconfig.get_path("platlib"))
    with Systemd(tmp_path_factory.mktemp("boot"), packages) as booted:
        booted.await_booted()
        booted.install(PREFIX, ROOT)
        source = booted.root / "src"
        source.mkdir()
        for name in ("kamacache-node.service", "kamacache-node.socket", "kamacache.sysusers",
                     "node.toml", "install_service.py"):  # fmt: skip
            shutil.copy(ROOT / "scripts" / name, source)
        done = booted.run("/usr/bin/python3", "/src/install_service.py")
        assert done.returncode == 0, done.stdout + done.stderr
        assert booted.run("useradd", "-r", "kctest").returncode == 0
        config = booted.root / "etc/kamacache/node.toml"
        config.write_text("workers = 2\n" + config.read_text())
        yield booted


@pytest.fixture
def node(systemd: Systemd) -> Iterator[Systemd]:
    started = systemd.run("systemctl", "start", SOCKET, NODE)
    journal = systemd.run("journalctl", "-u", NODE, "--no-pager", "-n", "30").stdout
    assert started.returncode == 0, started.stderr + journal
    yield systemd
    systemd.run("systemctl", "stop", SOCKET, NODE)


def attached(systemd: Systemd, what: str) -> int:
    (systemd.root / f"{PREFIX}/attached.py".lstrip("/")).write_text(ATTACHED)
    unit = systemd.root / "run/systemd/system/kctest.service"
    unit.parent.mkdir(parents=True, exist_ok=True)
    unit.write_text(APP.replace("WHAT", what))
    systemd.run("systemctl", "daemon-reload")
    done = systemd.run("systemctl", "start", unit.name)
    journal = systemd.run("journalctl", "-u", unit.name, "--no-pager").stdout
    assert done.returncode == 0, journal
    return int((systemd.root / "run/kctest.out").read_text())


def role(systemd: Systemd, title: str) -> str:
    return systemd.run("pgrep", "-f", f"^kamacache-node: {title}").stdout.strip()


def test_a_restart_keeps_what_another_user_put_there(node: Systemd) -> None:
    assert node.show(NODE, "StatusText") == WELL
    assert attached(node, "set") == ITEMS
    before = node.show(NODE, "MainPID")
    assert node.run("systemctl", "restart", NODE).returncode == 0
    assert node.show(NODE, "MainPID") != before
    assert attached(node, "get") >= 0.999 * ITEMS


def test_int_ends_a_node_and_frees_its_shards(node: Systemd, wait_until: WaitUntil) -> None:
    shm = node.root / "dev/shm"
    assert any(shm.iterdir())
    node.run("systemctl", "stop", SOCKET)
    node.run("systemctl", "kill", "-s", "INT", "--kill-who=main", NODE)
    wait_until(lambda: node.show(NODE, "ActiveState") == "inactive")
    assert (node.show(NODE, "Result"), node.show(NODE, "NRestarts")) == ("success", "0")
    assert [path for path in shm.rglob("*") if path.is_file()] == []


def test_a_reload_that_cannot_work_fails_and_changes_nothing(node: Systemd) -> None:
    config = node.root / "etc/kamacache/node.toml"
    good = config.read_text()
    pid = node.show(NODE, "MainPID")
    try:
        config.write_text(good.replace("workers = 2", "workers = 0"))
        assert node.run("systemctl", "reload", NODE).returncode != 0
    finally:
        config.write_text(good)
    assert node.run("systemctl", "reload", NODE).returncode == 0
    assert (node.show(NODE, "MainPID"), node.show(NODE, "StatusText")) == (pid, WELL)


def test_a_start_that_cannot_work_is_not_repeated(systemd: Systemd) -> None:
    config = systemd.root / "etc/kamacache/node.toml"
    good = config.read_text()
    try:
        config.write_text(good.replace("workers = 2", "workers = 0"))
        assert systemd.run("systemctl", "start", NODE).returncode != 0
        assert systemd.show(NODE, "ExecMainStatus") == "78"
        assert systemd.show(NODE, "ActiveState") == "failed"
        assert systemd.show(NODE, "NRestarts") == "0"
    finally:
        config.write_text(good)
        systemd.run("systemctl", "reset-failed", NODE)


def test_the_watchdog_restarts_a_hung_node_and_not_a_hung_worker(
    systemd: Systemd, wait_until: WaitUntil
) -> None:
    override = systemd.root / f"run/systemd/system/{NODE}.d/test.conf"
    override.parent.mkdir(parents=True, exist_ok=True)
    override.write_text(f"[Service]\nWatchdogSec={WATCHDOG_S}s\nTimeoutAbortSec=1s\n")
    assert systemd.run("systemctl", "daemon-reload").returncode == 0
    assert systemd.run("systemctl", "start", NODE).returncode == 0
    pid, worker = systemd.show(NODE, "MainPID"), role(systemd, "worker 1")
    systemd.run("kill", "-STOP", worker)
    time.sleep(2 * WATCHDOG_S)  # nothing is to happen
    systemd.run("kill", "-CONT", worker)
    assert systemd.show(NODE, "MainPID") == pid
    assert systemd.run("kill", "-STOP", pid).returncode == 0
    wait_until(lambda: systemd.show(NODE, "NRestarts") == "1", deadline_s=30)
    wait_until(lambda: systemd.show(NODE, "ActiveState") == "active", deadline_s=30)
    assert systemd.show(NODE, "StatusText") == WELL
    assert systemd.run("systemctl", "stop", NODE).returncode == 0
