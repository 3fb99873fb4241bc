"""Tests of --check-config: what a node would be, and why it could not start."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kamacache.node.checking import Checked, check
from kamacache.node.settings import from_layers
from kamacache.rundir.context import EXIT_APP, EXIT_CONFIG, EXIT_OK
from kamacache.rundir.layout import RunDir, SupervisorLock

Check = Callable[..., Checked]


@pytest.fixture
def checked(short_dir: Path, shm_root: Path) -> Check:
    """Check flags, and a file's values, of a node at a run directory that is not there yet."""

    def look(file: dict[str, Any] | None = None, /, **flags: Any) -> Checked:
        told = {"run_dir": str(short_dir / "run"), "shm_dir": str(shm_root), "listen": "none"}
        flags = {**told, "group": ("scores:1MiB",), **flags}
        environment = {"KAMACACHE_LOG_LEVEL": "debug"}
        settings = from_layers(flags, environment, file or {})
        return check(settings, flags, environment, file or {})

    return look


def test_each_setting_is_told_with_where_it_comes_from(checked: Check, short_dir: Path) -> None:
    found = checked({"workers": 3, "groups": {"names": {"cache_bytes": "2MiB", "ttl": 5}}})
    rows = {name: (value, source) for name, value, source in found.rows}
    assert (found.code, found.wrong) == (EXIT_OK, [])
    assert rows["workers"] == ("3", "file")
    assert rows["log_level"] == ("debug", "environment")
    assert rows["run_dir"] == (str(short_dir / "run"), "flag")
    assert rows["slow_load_ms"] == ("0", "default")
    assert rows["group scores"] == ("1.0 MiB, lru", "flag")
    assert rows["group names"] == ("2.0 MiB, lru, ttl 5 s", "file")
    assert "a node can start with these settings" in list(found.lines())
    assert not (short_dir / "run").exists(), "a check makes nothing"


def test_passwords_of_a_source_are_not_shown(checked: Check) -> None:
    url = "etcd://127.0.0.1:1/p?username=u&password=topsecret"
    found = checked(listen="127.0.0.1:8001", discover=url)
    assert "topsecret" not in "\n".join(found.lines())


def test_groups_that_need_too_much_memory_cannot_be(checked: Check) -> None:
    for size, why in (("2TiB", "shared memory"), ("32TiB", "use more workers")):
        found = checked(workers=64, group=(f"huge:{size}",))
        assert found.code == EXIT_CONFIG
        assert why in found.wrong[0]


def test_an_app_that_cannot_be_imported_has_its_exit_code(checked: Check) -> None:
    found = checked(app="no_such_module:groups")
    assert found.code == EXIT_APP
    assert "no_such_module" in found.wrong[0]


def test_an_apps_groups_are_told(
    checked: Check, short_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = "import kamacache\ngroups = [kamacache.Group('mine', cache_bytes='1MiB')]\n"
    (short_dir / "checked_app.py").write_text(app)
    monkeypatch.chdir(short_dir)
    found = checked(app="checked_app:groups", group=())
    assert ("group mine", "1.0 MiB, lru", "app") in found.rows


def test_a_port_that_is_taken_is_wrong(checked: Check) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        found = checked(listen=f"127.0.0.1:{taken.getsockname()[1]}")
    assert found.code == EXIT_CONFIG
    assert "cannot listen" in found.wrong[0]


def test_one_port_cannot_be_for_grpc_and_http(checked: Check) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    found = checked(listen=address, api=address)
    assert found.code == EXIT_CONFIG
    assert "another --api" in found.wrong[0]


def test_a_run_directory_that_cannot_be_made_is_wrong(checked: Check, short_dir: Path) -> None:
    (short_dir / "file").write_text("")
    found = checked(run_dir=str(short_dir / "file" / "run"))
    assert found.code == EXIT_CONFIG


def test_a_node_that_runs_there_is_told_and_keeps_its_lock(checked: Check, short_dir: Path) -> None:
    run_dir = RunDir(short_dir / "run")
    run_dir.prepare()
    pid = os.fork()
    if pid == 0:
        try:
            SupervisorLock.take(run_dir)
            os.kill(os.getpid(), 19)  # SIGSTOP: until the test has looked
        finally:
            os._exit(0)
    try:
        os.waitpid(pid, os.WUNTRACED)
        found = checked()
        assert found.code == EXIT_OK
        assert f"pid {pid}" in found.cautions[0]
        assert SupervisorLock.holder(run_dir) == pid
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)


def test_a_peer_whose_name_is_unknown_is_a_caution(checked: Check) -> None:
    peers = ("127.0.0.1:8001,nowhere.invalid:8001",)
    found = checked(listen="127.0.0.1:8001", peers=peers)
    assert any("nowhere.invalid:8001" in text for text in found.cautions)
