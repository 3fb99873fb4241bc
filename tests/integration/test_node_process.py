"""A node as a process: ready, restarts, stops, crashes, and nothing left behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kamacache.limits import DRAIN_TIMEOUT_S, SERVE_UNTIL_AHEAD_MS
from kamacache.local.attach import Attachment
from kamacache.local.attached import AttachedEngine
from kamacache.node.signals import SAME_SIGNAL_S
from kamacache.rundir.control import ControlReader
from kamacache.rundir.description import read_description
from kamacache.rundir.roster import read_roster
from tests.node_process import COLD, ROOT, NodeProcess, files_below, is_alive

pytestmark = pytest.mark.integration

WaitUntil = Callable[..., None]
GROUP = ("--group", "scores:1MiB")
QUIET = ("--listen", "none")


@pytest.fixture
def run_dir(short_dir: Path) -> Path:
    return short_dir / "run"


@pytest.fixture
def shm(short_dir: Path, shm_root: Path) -> Iterator[Path]:
    """This test's own folder on tmpfs, with nothing in it at the end."""
    folder = shm_root / short_dir.name
    folder.mkdir()
    yield folder
    assert files_below(folder) == []


def test_ready_line_says_where_and_how(run_dir: Path, shm: Path) -> None:
    with NodeProcess(
        run_dir, "--workers", "8", *GROUP, "--listen", "127.0.0.1:0", "--shm-dir", str(shm)
    ) as node:
        ready = node.await_ready()
        assert ready["workers"] == "8"
        assert ready["run_dir"] == str(run_dir)
        host, _, port = ready["listen"].rpartition(":")
        assert host == "127.0.0.1"
        with socket.create_connection((host, int(port)), timeout=5):
            pass
        about = node.description()
        assert (about.workers, about.listen, about.pid) == (8, ready["listen"], node.pid)
        assert all(Path(about.socket_path(shard)).is_socket() for shard in range(8))
        titles = {child.cmdline()[0] for child in node.children()}
        assert titles == {f"kamacache-node: worker {i}" for i in range(8)} | {
            "kamacache-node: front 0"
        }
        assert (
            Path(f"/proc/{node.pid}/cmdline")
            .read_bytes()
            .startswith(f"kamacache-node: supervisor [{run_dir}]".encode())
        )
        assert node.stop() == 0
    assert files_below(run_dir, shm) == []


def test_files_and_sockets_are_the_owners_alone(run_dir: Path, shm: Path) -> None:
    with NodeProcess(run_dir, "--workers", "1", *GROUP, *QUIET, "--shm-dir", str(shm)) as node:
        node.await_ready()
        for path in [run_dir, *files_below(run_dir, shm), *shm.rglob("*")]:
            assert path.stat().st_mode & 0o077 == 0, path
        assert node.stop() == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give files to another group")
def test_socket_group_may_attach_and_not_write_data(run_dir: Path, shm: Path) -> None:
    with NodeProcess(
        run_dir, "--workers", "1", *GROUP, *QUIET, "--shm-dir", str(shm), "--socket-group", "12345"
    ) as node:
        node.await_ready()
        about = node.description()
        modes = {
            path.name: oct(path.stat().st_mode & 0o777)
            for path in (Path(about.shm_dir), *Path(about.shm_dir).iterdir(), run_dir)
        }
        assert modes["scores-0.data"] == modes["control"] == "0o640"
        assert modes["scores-0.access"] == modes["counters"] == "0o660"
        assert modes["run"] == "0o750"
        assert Path(about.socket_path(0)).stat().st_mode & 0o777 == 0o660
        assert Path(about.socket_path(0)).stat().st_gid == 12345
        assert node.stop() == 0


def test_second_node_on_a_run_directory_is_refused(run_dir: Path, shm: Path) -> None:
    args = ("--workers", "1", *GROUP, *QUIET, "--shm-dir", str(shm))
    with NodeProcess(run_dir, *args) as first:
        first.await_ready()
        with NodeProcess(run_dir, *args) as second:
            assert second.await_end() == 3
            assert f"pid {first.pid} " in second.log
        assert first.description().pid == first.pid
        assert first.stop() == 0


def test_killed_worker_is_back_within_a_second(
    run_dir: Path, shm: Path, wait_until: WaitUntil
) -> None:
    with NodeProcess(run_dir, "--workers", "2", *GROUP, *QUIET, "--shm-dir", str(shm)) as node:
        node.await_ready()
        about = node.description()
        for _ in range(5):
            old = node.role("worker 1")
            assert old is not None
            os.kill(old.pid, signal.SIGKILL)
            killed_s = time.monotonic()

            def back(old_pid: int = old.pid) -> bool:
                now = node.role("worker 1")
                if now is None or now.pid == old_pid:
                    return False
                with socket.socket(socket.AF_UNIX) as link:
                    return link.connect_ex(about.socket_path(1)) == 0

            wait_until(back, 5.0)
            assert time.monotonic() - killed_s < 1.0
        assert node.role("worker 0") is not None
        assert node.stop() == 0


def test_killed_supervisor_leaves_no_process_and_no_file(
    run_dir: Path, shm: Path, wait_until: WaitUntil
) -> None:
    args = ("--workers", "4", *GROUP, "--listen", "127.0.0.1:0", "--shm-dir", str(shm))
    with NodeProcess(run_dir, *args) as node:
        node.await_ready()
        roles = node.children()
        assert len(roles) == 5
        node.process.kill()
        wait_until(lambda: not any(map(is_alive, roles)), 2.0, "roles outlive the supervisor")
        assert files_below(run_dir, shm) == []
    with NodeProcess(run_dir, *args) as successor:
        successor.await_ready()
        assert successor.stop() == 0


def test_start_after_all_were_killed_at_once_cleans_up(run_dir: Path, shm: Path) -> None:
    args = ("--workers", "2", *GROUP, *QUIET, "--shm-dir", str(shm))
    with NodeProcess(run_dir, *args) as node:
        node.await_ready()
        reader = ControlReader(node.description().control_path)
        assert reader.serving
        roles = node.children()
        node.process.send_signal(signal.SIGSTOP)  # or it would fork the roles again
        for child in roles:
            child.kill()
        node.process.kill()
        node.process.wait()
    assert files_below(run_dir, shm) != []
    with NodeProcess(run_dir, *args) as successor:
        successor.await_ready()
        assert not reader.serving  # at once, not when its 2 s are over
        reader.close()
        epochs = [path for path in shm.glob("*/*") if path.is_dir()]
        assert [path.name for path in epochs] == [successor.description().epoch]
        assert successor.stop() == 0


def test_readers_are_told_when_the_node_stops(run_dir: Path, shm: Path) -> None:
    with NodeProcess(run_dir, "--workers", "1", *GROUP, *QUIET, "--shm-dir", str(shm)) as node:
        node.await_ready()
        reader = ControlReader(node.description().control_path)
        assert reader.serving
        assert node.stop() == 0
        assert not reader.serving
        reader.close()


def test_serve_until_goes_on_while_the_node_lives(
    run_dir: Path, shm: Path, wait_until: WaitUntil
) -> None:
    with NodeProcess(run_dir, "--workers", "1", *GROUP, *QUIET, "--shm-dir", str(shm)) as node:
        node.await_ready()
        reader = ControlReader(node.description().control_path)
        first = reader.words[2]
        wait_until(lambda: reader.words[2] > first + SERVE_UNTIL_AHEAD_MS // 4, 5.0)
        os.kill(node.pid, signal.SIGSTOP)
        wait_until(lambda: not reader.serving, 2.5, "a stopped supervisor goes on serving")
        os.kill(node.pid, signal.SIGCONT)
        wait_until(lambda: reader.serving, 2.0)
        reader.close()
        assert node.stop() == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGQUIT])
def test_interrupt_ends_at_once_and_leaves_nothing(
    run_dir: Path, shm: Path, number: signal.Signals
) -> None:
    with NodeProcess(
        run_dir, "--workers", "2", *GROUP, "--listen", "127.0.0.1:0", "--shm-dir", str(shm)
    ) as node:
        node.await_ready()
        began_s = time.monotonic()
        assert node.stop(number) == 0
        assert time.monotonic() - began_s < 2.5
    assert files_below(run_dir, shm) == []


def test_hangup_reloads_and_the_node_goes_on(
    run_dir: Path, shm: Path, wait_until: WaitUntil
) -> None:
    with NodeProcess(run_dir, "--workers", "1", *GROUP, *QUIET, "--shm-dir", str(shm)) as node:
        node.await_ready()
        node.process.send_signal(signal.SIGHUP)
        wait_until(lambda: read_roster(node.description().sockets_dir).reloads == 1)
        assert len(node.children()) == 1
        assert node.stop() == 0


def test_worker_that_ignores_the_drain_is_killed_by_a_second_term(
    run_dir: Path, shm: Path, wait_until: WaitUntil
) -> None:
    with NodeProcess(run_dir, "--workers", "2", *GROUP, *QUIET, "--shm-dir", str(shm)) as node:
        node.await_ready()
        stuck = node.role("worker 0")
        assert stuck is not None
        stuck.suspend()
        told_s = time.monotonic()
        node.process.send_signal(signal.SIGTERM)
        wait_until(lambda: not (run_dir / "node.json").exists())
        node.process.send_signal(signal.SIGTERM)  # at once: taken for the first once more
        wait_until(lambda: time.monotonic() - told_s > 2 * SAME_SIGNAL_S)
        assert {child.cmdline()[0] for child in node.children()} == {
            "kamacache-node: worker 0",
            "kamacache-node: worker 1",
        }
        assert node.stop(signal.SIGTERM, deadline_s=3.0) == 0
        assert time.monotonic() - told_s < DRAIN_TIMEOUT_S / 2
    assert files_below(run_dir, shm) == []


def test_port_in_use_is_a_sentence_and_code_3(run_dir: Path, shm: Path) -> None:
    with socket.create_server(("127.0.0.1", 0), reuse_port=True) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with NodeProcess(run_dir, *GROUP, "--listen", address, "--shm-dir", str(shm)) as node:
            assert node.await_end() == 3
            assert address in node.log
    assert files_below(run_dir, shm) == []


def test_port_of_http_in_use_names_its_own_setting(run_dir: Path, shm: Path) -> None:
    with socket.create_server(("127.0.0.1", 0), reuse_port=True) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        args = (*GROUP, *QUIET, "--shm-dir", str(shm), "--api", address)
        with NodeProcess(run_dir, *args) as node:
            assert node.await_end() == 3
            assert f"cannot listen on {address}" in node.log
            assert "another --api" in node.log
    assert files_below(run_dir, shm) == []


def test_missing_shm_folder_is_refused_by_name(run_dir: Path, short_dir: Path) -> None:
    missing = short_dir / "no-such-folder"
    with NodeProcess(run_dir, *GROUP, *QUIET, "--shm-dir", str(missing)) as node:
        assert node.await_end() == 78
        assert str(missing) in node.log


def test_folder_on_a_disk_is_a_warning(run_dir: Path, short_dir: Path) -> None:
    from kamacache.store.arena import is_tmpfs

    disk = short_dir / "disk"
    disk.mkdir()
    if is_tmpfs(disk):
        pytest.skip("/tmp is a tmpfs here")
    with NodeProcess(run_dir, "--workers", "1", *GROUP, *QUIET, "--shm-dir", str(disk)) as node:
        node.await_ready()
        assert "not on tmpfs" in node.log
        assert node.stop() == 0


@pytest.fixture
def small_tmpfs(short_dir: Path) -> Iterator[Path]:
    """A tmpfs of 8 MiB, mounted for one test."""
    if os.geteuid() != 0:
        pytest.skip("needs root to mount a tmpfs")
    folder = short_dir / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False, timeout=10)
    if done.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True, timeout=10)


def test_shared_memory_too_small_is_a_sentence_and_no_sigbus(
    run_dir: Path, small_tmpfs: Path
) -> None:
    args = ("--workers", "2", *QUIET, "--shm-dir", str(small_tmpfs))
    with NodeProcess(run_dir, "--group", "scores:64MiB", *args) as node:
        assert node.await_end() == 3
        for part in ("64.", "8.0 MiB", "--shm-size", "--shm-dir"):
            assert part in node.log
    assert files_below(run_dir, small_tmpfs) == []
    with NodeProcess(run_dir, "--group", "scores:4MiB", *args) as node:
        node.await_ready()
        assert node.stop() == 0


def test_node_runs_without_loading_grpc_or_threads_in_the_supervisor(
    run_dir: Path, shm: Path
) -> None:
    with NodeProcess(
        run_dir, "--workers", "1", *GROUP, "--listen", "127.0.0.1:0", "--shm-dir", str(shm)
    ) as node:
        node.await_ready()
        assert len(os.listdir(f"/proc/{node.pid}/task")) == 1
        assert "cygrpc" not in Path(f"/proc/{node.pid}/maps").read_text()
        front = node.role("front 0")
        assert front is not None
        assert "cygrpc" in Path(f"/proc/{front.pid}/maps").read_text()
        assert node.stop() == 0


def test_roles_share_only_the_standard_streams_with_the_supervisor(
    run_dir: Path, shm: Path
) -> None:
    def opened(pid: int) -> set[str]:
        links = [os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()]
        return {link for link in links if link.startswith(("pipe:", "socket:", "/"))}

    with NodeProcess(run_dir, "--workers", "3", *GROUP, *QUIET, "--shm-dir", str(shm)) as node:
        node.await_ready()
        streams = {os.readlink(f"/proc/{node.pid}/fd/{fd}") for fd in (0, 1, 2)}
        held = opened(node.pid)
        assert str(run_dir / "supervisor.lock") in held
        shared = str(shm)  # what a role maps there, it has mapped itself
        for child in node.children():
            both = {link for link in opened(child.pid) & held if not link.startswith(shared)}
            assert both <= streams
            maps = Path(f"/proc/{child.pid}/maps").read_text().splitlines()
            assert {line.split()[1] for line in maps if line.endswith("/control")} <= {"r--s"}
        assert node.stop() == 0


def test_node_runs_with_its_standard_streams_closed(
    run_dir: Path, shm: Path, wait_until: WaitUntil
) -> None:
    command = [sys.executable, "-m", "kamacache.cli.node", "--run-dir", str(run_dir), *GROUP]
    command += [*QUIET, "--workers", "1", "--shm-dir", str(shm)]
    node = subprocess.Popen(
        ["/bin/sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command],
        env={**os.environ, "PYTHONPATH": str(ROOT), **COLD},
    )
    try:
        wait_until((run_dir / "node.json").exists)
        about = read_description(run_dir)
        wait_until(Path(about.socket_path(0)).is_socket)
        node.terminate()
        assert node.wait(10) == 0
    finally:
        node.kill()
        node.wait()
    assert files_below(run_dir, shm) == []


def test_drain_lets_a_load_in_flight_finish(
    short_dir: Path, run_dir: Path, shm: Path, wait_until: WaitUntil
) -> None:
    begun = short_dir / "begun"
    (short_dir / "slowapp.py").write_text(
        "import kamacache, time, pathlib\n"
        "def load(key):\n"
        f"    pathlib.Path({str(begun)!r}).touch()\n"
        "    time.sleep(0.7)\n"
        "    return b'late'\n"
        "slow = kamacache.Group('slow', cache_bytes='1MiB', getter=load)\n"
    )
    with NodeProcess(
        run_dir,
        *("--app", "slowapp:slow", "--workers", "2", *QUIET, "--shm-dir", str(shm)),
        cwd=short_dir,
    ) as node:
        node.await_ready()
        attachment = Attachment(run_dir)
        engine = AttachedEngine(attachment, "slow")
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(engine.get, b"Tom", time.monotonic() + 10)
            wait_until(begun.exists)
            assert node.stop() == 0
            assert answer.result(5) == b"late"
        attachment.close()
    assert files_below(run_dir, shm) == []
