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
from tests.node_process import ROOT


def test_two_run_directories_have_different_shm_folders(short_dir: Path) -> None:
    one, two = RunDir(short_dir / "a"), RunDir(short_dir / "b")
    assert one.shm_base() != two.shm_base()
    (short_dir / "a").mkdir()
    (short_dir / "link").symlink_to(short_dir / "a")
    assert RunDir(short_dir / "link").shm_base() == one.shm_base()


def test_prepared_directory_is_for_its_owner_alone(short_dir: Path) -> None:
    run_dir = RunDir(short_dir / "deep" / "run")
    run_dir.prepare()
    assert stat.S_IMODE(os.stat(run_dir.path).st_mode) == 0o700
    run_dir.prepare(gid=os.getgid())
    assert stat.S_IMODE(os.stat(run_dir.path).st_mode) == 0o750


def test_path_too_long_for_a_socket_is_refused(short_dir: Path) -> None:
    with pytest.raises(ConfigError, match="too long"):
        RunDir(short_dir / ("x" * 90)).prepare()


def test_file_in_the_place_of_the_directory_is_refused(short_dir: Path) -> None:
    (short_dir / "run").write_text("")
    with pytest.raises(ConfigError, match="not a folder"):
        RunDir(short_dir / "run").prepare()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give a folder to another user")
def test_directory_of_another_user_is_refused(short_dir: Path) -> None:
    (short_dir / "run").mkdir()
    os.chown(short_dir / "run", 12345, -1)
    with pytest.raises(ConfigError, match="12345"):
        RunDir(short_dir / "run").prepare()


# Imports first: the other user may not be allowed to read the library's folder.
GIVE = """
import os, sys
from kamacache.errors import ConfigError
from kamacache.rundir.layout import RunDir
os.setgroups([])
os.setgid(12345)
os.setuid(12345)
try:
    RunDir(sys.argv[1]).prepare(gid=54321)
except ConfigError as error:
    print(error)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to be another user")
def test_a_group_that_the_user_is_not_in_is_refused_with_the_remedy(short_dir: Path) -> None:
    short_dir.chmod(0o777)
    done = subprocess.run(
        [sys.executable, "-c", GIVE, str(short_dir / "run")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert "cannot be given to group 54321: Operation not permitted" in done.stdout
    assert "member of --socket-group" in done.stdout


def test_default_run_dir_follows_the_environment(
    short_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short_dir))
    assert default_run_dir() == short_dir / "kamacache"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert default_run_dir().name.startswith("kamacache")


def test_second_taker_learns_the_pid_of_the_holder(short_dir: Path) -> None:
    run_dir = RunDir(short_dir)
    lock = SupervisorLock.take(run_dir)
    assert isinstance(lock, SupervisorLock)
    ask = (
        "import sys; from kamacache.rundir.layout import RunDir, SupervisorLock\n"
        "found = SupervisorLock.take(RunDir(sys.argv[1]))\n"
        "print(found if isinstance(found, int) else 'taken')"
    )

    def other() -> str:
        command = [sys.executable, "-c", ask, str(short_dir)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=30)
        return done.stdout.strip()

    assert other() == str(os.getpid())
    lock.release()
    assert other() == "taken"


def test_the_holder_is_told_without_trying_for_the_lock(short_dir: Path) -> None:
    run_dir = RunDir(short_dir)
    ask = (
        "import sys; from kamacache.rundir.layout import RunDir, SupervisorLock\n"
        "print(SupervisorLock.holder(RunDir(sys.argv[1])))"
    )

    def other() -> str:
        command = [sys.executable, "-c", ask, str(short_dir)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert other() == "None"
    lock = SupervisorLock.take(run_dir)
    assert isinstance(lock, SupervisorLock)
    assert other() == str(os.getpid())
    lock.release()
    assert other() == "None"
    assert not run_dir.lock_path.exists()
