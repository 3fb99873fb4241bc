"""A real node for tests: started as a command, awaited, watched, and ended whatever happened."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import psutil

from kamacache.node.readable import wait_readable
from kamacache.rundir.description import NodeDescription, read_description

READY_LINE = re.compile(
    r"kamacache-node ready: (?P<workers>\d+) workers?, "
    r"(?:listening on (?P<listen>\S+)|not listening), attach with KAMACACHE_RUN_DIR=(?P<run_dir>.+)"
)
ROOT = Path(__file__).resolve().parent.parent
# What a node leaves for its successor would be another test's. A flag overrides it.
COLD = {"KAMACACHE_WARM_RESTART_MAX_DOWNTIME": "0"}


class NodeProcess:
    """``kamacache-node`` with these arguments; a context manager that leaves no process behind.

    ``prefix`` is a command that runs it, such as ``timeout 60``; it then has a session of its own,
    and ``process`` is that command's.
    """

    def __init__(
        self,
        run_dir: Path,
        *args: str,
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
        terminal: int | None = None,
        pass_fds: Sequence[int] = (),
    ) -> None:
        self.run_dir = run_dir
        self._log_path = run_dir.with_name(run_dir.name + f".log{time.monotonic_ns()}")
        with self._log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    *(*prefix, sys.executable, "-m", "kamacache.cli.node"),
                    *("--run-dir", str(run_dir), *args),
                ],
                stdin=terminal,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=cwd or ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT), **COLD, **(environment or {})},
                start_new_session=bool(prefix),
                pass_fds=pass_fds,
            )
        self._wrapped = bool(prefix)
        self.pid = self.process.pid
        self._seen: set[psutil.Process] = set()

    @property
    def log(self) -> str:
        """What the node wrote to stderr so far."""
        return self._log_path.read_text()

    def await_ready(self, deadline_s: float = 20.0) -> re.Match[str]:
        """Return the match of the ready line; fails with the log when it does not come."""
        assert self.process.stdout is not None
        readable = wait_readable((self.process.stdout.fileno(),), deadline_s)
        assert readable, f"no ready line within {deadline_s} s\n{self.log}"
        line = self.process.stdout.readline().decode().rstrip("\n")
        match = READY_LINE.fullmatch(line)
        assert match, f"not a ready line: {line!r}\n{self.log}"
        if self._wrapped:
            self.pid = self.description().pid
            self._seen.add(psutil.Process(self.pid))
        self._seen.update(self.children())
        return match

    def await_end(self, deadline_s: float = 20.0) -> int:
        """Return the exit code."""
        try:
            return self.process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"the node did not end within {deadline_s} s\n{self.log}"
            ) from None

    def stop(self, number: int = signal.SIGTERM, deadline_s: float = 20.0) -> int:
        """Send a signal and return the exit code."""
        self.process.send_signal(number)
        return self.await_end(deadline_s)

    def description(self) -> NodeDescription:
        """Return what the node published."""
        return read_description(self.run_dir)

    def children(self) -> list[psutil.Process]:
        """Return the living roles."""
        try:
            found = psutil.Process(self.pid).children()
        except psutil.NoSuchProcess:
            return []
        alive = [child for child in found if is_alive(child)]
        self._seen.update(alive)
        return alive

    def role(self, title: str) -> psutil.Process | None:
        """Return the process that calls itself ``kamacache-node: <title>``, or None."""
        for child in self.children():
            try:
                if child.cmdline()[:1] == [f"kamacache-node: {title}"]:
                    return child
            except psutil.NoSuchProcess:
                continue
        return None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.children()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        end_all(self._seen)
        self._log_path.unlink(missing_ok=True)


def is_alive(process: psutil.Process) -> bool:
    """Tell whether a process runs; a zombie does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def end_all(processes: Sequence[psutil.Process] | set[psutil.Process]) -> None:
    """Kill what is left of these; psutil checks that a pid is still the same process."""
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def files_below(*folders: Path) -> list[Path]:
    """Return every file and socket, no folders, below these."""
    return [path for folder in folders for path in folder.rglob("*") if not path.is_dir()]
