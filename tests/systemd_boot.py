"""A real systemd as process 1 of namespaces of its own: the units on what they are written for.

It needs root, systemd, overlayfs and a cgroup2 hierarchy. The host's files are the lower layer of
its root; what it writes goes to a tmpfs that ends with it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import psutil

SYSTEMD: Final = Path("/lib/systemd/systemd")
PYTHON: Final = Path("/usr/bin/python3")
_CGROUPS: Final = (Path("/sys/fs/cgroup/unified"), Path("/sys/fs/cgroup"))
_NAMESPACES: Final = ("--mount", "--pid", "--net", "--ipc", "--uts", "--cgroup")
_PATH: Final = "/usr/sbin:/usr/bin:/sbin:/bin"
_TARGET: Final = "kamacache-test.target"

# $1: a folder for the layers; $2: the packages that the virtual environment is to have.
_BOOT: Final = """
base=$1
mount --make-rprivate /
mount -t tmpfs tmpfs "$base"
mkdir "$base/upper" "$base/work" "$base/root"
root=$base/root
mount -t overlay overlay -o "lowerdir=/,upperdir=$base/upper,workdir=$base/work" "$root"
mount -t proc proc "$root/proc"
mount -t sysfs -o ro sysfs "$root/sys"
mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
mount -t tmpfs -o mode=755 tmpfs "$root/dev"
for name in null zero full random urandom tty; do
    touch "$root/dev/$name"; mount --bind "/dev/$name" "$root/dev/$name"
done
mkdir "$root/dev/shm" "$root/dev/pts" "$root/dev/mqueue"
mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"
mount -t devpts -o newinstance,ptmxmode=0666,mode=0620 devpts "$root/dev/pts"
ln -s pts/ptmx "$root/dev/ptmx"; ln -s /proc/self/fd "$root/dev/fd"; touch "$root/dev/console"
mount -t tmpfs -o mode=755 tmpfs "$root/run"
mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
mkdir -p "$root/opt/packages"; mount --bind -o ro "$2" "$root/opt/packages"
for unit in systemd-udevd systemd-logind systemd-resolved systemd-networkd systemd-timesyncd; do
    ln -sf /dev/null "$root/etc/systemd/system/$unit.service"
done
rm -f "$root/etc/machine-id"; tr -d - < /proc/sys/kernel/random/uuid > "$root/etc/machine-id"
printf '%s\\n' '[Unit]' 'Wants=systemd-journald.service' 'DefaultDependencies=no' \\
    > "$root/etc/systemd/system/TARGET"
ip link set lo up
cd "$root"; mkdir -p .old; pivot_root . .old; umount -l /.old
exec env -i container=lxc PATH=/usr/sbin:/usr/bin:/sbin:/bin /lib/systemd/systemd --system \\
    --unit=TARGET --log-target=console --show-status=no
""".replace("TARGET", _TARGET)


def why_not() -> str | None:
    """Return why it cannot be booted here, None where it can."""
    if os.geteuid() != 0:
        return "only root may boot it"
    if not SYSTEMD.exists() or not PYTHON.exists():
        return "systemd or /usr/bin/python3 is not installed"
    if "overlay" not in Path("/proc/filesystems").read_text().split():
        return "the kernel has no overlayfs"
    if _hierarchy() is None:
        return "there is no cgroup2 hierarchy"
    version = subprocess.run(
        [str(PYTHON), "-c", "import sys; print(*sys.version_info[:2])"],
        capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    if version != [str(number) for number in sys.version_info[:2]]:
        return "/usr/bin/python3 is of another version than the packages"
    return None


def _hierarchy() -> Path | None:
    return next((path for path in _CGROUPS if (path / "cgroup.procs").exists()), None)


class Systemd:
    """One systemd, from its boot to its end; a context manager that leaves nothing behind."""

    def __init__(self, folder: Path, packages: Path) -> None:
        """``packages`` is the site-packages folder of what the node needs."""
        hierarchy = _hierarchy()
        assert hierarchy is not None
        self._cgroup = hierarchy / f"kamacache-test-{os.getpid()}"
        self._cgroup.mkdir()
        base = folder / "systemd"
        base.mkdir()
        self._log_path = folder / "systemd.log"
        enter = f'echo $$ > {self._cgroup}/cgroup.procs; exec "$@"'
        with self._log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    *("sh", "-euc", enter, "sh"),
                    *("unshare", *_NAMESPACES, "--fork", "--kill-child", "sh", "-euc", _BOOT, "sh"),
                    *(str(base), str(packages)),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def await_booted(self, deadline_s: float = 60.0) -> None:
        """Wait until it takes commands."""
        until_s = time.monotonic() + deadline_s
        while time.monotonic() < until_s:
            assert self.process.poll() is None, self._log_path.read_text()
            if self.first() and self.run("systemctl", "is-active", _TARGET).returncode == 0:
                return
            time.sleep(0.1)
        raise AssertionError(f"not booted within {deadline_s} s\n{self._log_path.read_text()}")

    def first(self) -> psutil.Process | None:
        """Return process 1, as this side sees it; None before it is there."""
        children = psutil.Process(self.process.pid).children()
        return children[0] if children else None

    @property
    def root(self) -> Path:
        """Its root, as this side sees it."""
        first = self.first()
        assert first is not None
        return Path(f"/proc/{first.pid}/root")

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command inside."""
        first = self.first()
        assert first is not None
        return subprocess.run(
            ["nsenter", f"--target={first.pid}", "--all", "--root", "--wdns=/", *command],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            env={"PATH": _PATH, "LC_ALL": "C"},
        )

    def show(self, unit: str, name: str) -> str:
        """Return one property of a unit."""
        return self.run("systemctl", "show", unit, "-p", name, "--value").stdout.strip()

    def install(self, prefix: str, checkout: Path) -> None:
        """Put a virtual environment with this checkout where the unit looks for it."""
        place = self.root / prefix.lstrip("/")
        place.mkdir(parents=True)
        made = self.run(str(PYTHON), "-m", "venv", "--without-pip", prefix)
        assert made.returncode == 0, made.stderr
        [site] = (place / "lib").glob("python*/site-packages")
        (site / "packages.pth").write_text("/opt/packages\n")
        shutil.copytree(checkout / "kamacache", site / "kamacache")
        program = place / "bin/kamacache-node"
        program.write_text(f"#!{prefix}/bin/python3\nfrom kamacache.cli.node import main\nmain()\n")
        program.chmod(0o755)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.process.poll() is None and (first := self.first()) is not None:
            first.kill()  # with process 1 all of its namespace ends
        self.process.wait(30)
        until_s = time.monotonic() + 10
        while not self._remove() and time.monotonic() < until_s:
            time.sleep(0.05)

    def _remove(self) -> bool:
        """Remove the cgroups, the inner first; a dying process holds its own for a moment."""
        for path in sorted(self._cgroup.rglob("*/"), key=lambda path: -len(path.parts)):
            if path.is_dir() and not path.is_symlink():
                try:
                    path.rmdir()
                except OSError:
                    return False
        try:
            self._cgroup.rmdir()
        except OSError:
            return False
        return True
