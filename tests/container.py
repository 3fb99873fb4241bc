"""A container without an engine: this checkout's node behind the walls of the image.

unshare and mount build what an engine does: a read-only root of bind mounts, the image's user, no
capability and none to gain, a pid namespace of which the node is process 1, a network of its own.
Needs root, and util-linux.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import psutil

from kamacache.node.readable import wait_readable
from tests.node_process import ROOT

USER: Final = 10001
_NEEDS: Final = ("unshare", "nsenter", "setpriv", "chroot", "mount", "ip")
_SHARED: Final = ("/usr", "/lib", "/lib64", "/bin", "/sbin", "/etc")
_NAMESPACES: Final = ("--mount", "--pid", "--net", "--ipc", "--uts")
_BECOME: Final = (
    *("setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups"),
    *("--bounding-set=-all", "--inh-caps=-all", "--no-new-privs", "--"),
)
_PATH: Final = "/usr/sbin:/usr/bin:/sbin:/bin"


def why_not() -> str | None:
    """Return why no container can run here, None where one can."""
    missing = [name for name in _NEEDS if shutil.which(name, path=_PATH) is None]
    if missing:
        return f"{' and '.join(missing)} not installed"
    if os.geteuid() != 0:
        return "only root may make such namespaces"
    tried = subprocess.run(
        ["unshare", *_NAMESPACES, "--fork", "mount", "-t", "tmpfs", "tmpfs", "/mnt"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    return tried.stderr.strip() or None


class Container:
    """One container and its process 1; a context manager that leaves nothing behind."""

    def __init__(
        self,
        folder: Path,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        tmpfs: Sequence[str] = (),
        volumes: Mapping[str, Path] | None = None,
        shm: str = "64m",
    ) -> None:
        """``tmpfs`` may be written to, beside /dev/shm; ``volumes`` may not: inside, outside."""
        self._root = folder / "root"
        self._root.mkdir()
        self._log_path = folder / "log"
        self._environment = {"PATH": _PATH, "PYTHONPATH": str(ROOT), **environment}
        script = _script(self._root, command, tmpfs, volumes or {}, shm)
        with self._log_path.open("wb") as log:
            self.process = subprocess.Popen(
                ["unshare", *_NAMESPACES, "--fork", "--kill-child", "sh", "-euc", script],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                env=self._environment,
            )

    @property
    def log(self) -> str:
        """What it wrote to stderr so far."""
        return self._log_path.read_text()

    def line(self, deadline_s: float = 20.0) -> str:
        """Return the next line of its stdout, empty at its end."""
        assert self.process.stdout is not None
        readable = wait_readable((self.process.stdout.fileno(),), deadline_s)
        assert readable, f"nothing said within {deadline_s} s\n{self.log}"
        return self.process.stdout.readline().decode().rstrip("\n")

    def first(self, deadline_s: float = 10.0) -> psutil.Process:
        """Return process 1, as this side sees it."""
        until_s = time.monotonic() + deadline_s
        while not (children := psutil.Process(self.process.pid).children()):
            assert time.monotonic() < until_s, self.log
            time.sleep(0.01)
        return children[0]

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command inside, as ``docker exec`` does."""
        first = str(self.first().pid)
        return subprocess.run(
            ["nsenter", f"--target={first}", "--all", "--root", "--wdns=/", *_BECOME, *command],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
            env=self._environment,
        )

    def end(self, deadline_s: float = 30.0) -> int:
        """Return the exit code of process 1."""
        return self.process.wait(deadline_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.process.poll() is None:
            for child in psutil.Process(self.process.pid).children():
                child.kill()  # with process 1 all of its namespace ends
            self.process.wait(30)
        if self.process.stdout is not None:
            self.process.stdout.close()


def _script(
    root: Path,
    command: Sequence[str],
    tmpfs: Sequence[str],
    volumes: Mapping[str, Path],
    shm: str,
) -> str:
    """Return what makes the root, in the new namespaces, and becomes process 1."""
    lines = ["ip link set lo up", f"mount -t tmpfs -o mode=755 tmpfs {root}"]
    binds = {}
    for path in map(Path, _SHARED):
        if path.is_symlink():
            lines.append(f"ln -s {os.readlink(path)} {root}{path}")
        elif path.is_dir():
            binds[str(path)] = path
    # One may lie below another: the outer first.
    binds |= {path: Path(path) for path in sorted({sys.base_prefix, sys.prefix, str(ROOT)})}
    written = dict.fromkeys(tmpfs, "mode=1777,size=16m") | {"/dev/shm": f"mode=1777,size={shm}"}
    lines.append(f"mkdir -p {root}/proc {root}/dev")
    lines += [
        f"touch {root}/dev/{device}; mount --bind /dev/{device} {root}/dev/{device}"
        for device in ("null", "zero", "urandom")
    ]
    lines.append(f"mount -t proc proc {root}/proc")
    lines += [
        f"mkdir -p {root}{folder}; mount -t tmpfs -o {options} tmpfs {root}{folder}"
        for folder, options in written.items()
    ]
    lines += [
        f"mkdir -p {root}{inside}; mount --bind -o ro {outside} {root}{inside}"
        for inside, outside in {**binds, **volumes}.items()
    ]
    lines.append(f"mount -o remount,bind,ro {root}")
    lines.append(f"exec chroot {root} {shlex.join(_BECOME)} {shlex.join(command)}")
    return "\n".join(lines)
