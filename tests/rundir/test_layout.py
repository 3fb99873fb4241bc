"""Paths, permissions and the lock of a run directory."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from kamacache.errors import ConfigError
from kamacache.rundir.layout import RunDir, SupervisorLock, default_run_dir


def test_two_run_directories_have_different_shm_folders(tmp_path: Path) -> None:
    one, two = RunDir(tmp_path / "a"), RunDir(tmp_path / "b")
    assert one.shm_base() != two.shm_base()
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert RunDir(tmp_path / "link").shm_base() == one.shm_base()


def test_prepared_directory_is_for_its_owner_alone(short_dir: Path) -> None:
    run_dir = RunDir(short_dir / "deep" / "run")
    run_dir.prepare()
    assert stat.S_IMODE(os.stat(run_dir.path).st_mode) == 0o700
    run_dir.prepare(gid=os.getgid())
    assert stat.S_IMODE(os.stat(run_dir.path).st_mode) == 0o750


def test_path_too_long_for_a_socket_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="too long"):
        RunDir(tmp_path / ("x" * 90)).prepare()


def test_file_in_the_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(ConfigError, match="not a folder"):
        RunDir(tmp_path / "run").prepare()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give a folder to another user")
def test_directory_of_another_user_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    os.chown(tmp_path / "run", 12345, -1)
    with pytest.raises(ConfigError, match="12345"):
        RunDir(tmp_path / "run").prepare()


def test_default_run_dir_follows_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert default_run_dir() == tmp_path / "kamacache"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert default_run_dir().name.startswith("kamacache")


def test_second_taker_learns_the_pid_of_the_holder(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    lock = SupervisorLock.take(run_dir)
    assert isinstance(lock, SupervisorLock)
    ask = (
        "import sys; from kamacache.rundir.layout import RunDir, SupervisorLock\n"
        "found = SupervisorLock.take(RunDir(sys.argv[1]))\n"
        "print(found if isinstance(found, int) else 'taken')"
    )

    def other() -> str:
        command = [sys.executable, "-c", ask, str(tmp_path)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=30)
        return done.stdout.strip()

    assert other() == str(os.getpid())
    lock.release()
    assert other() == "taken"
