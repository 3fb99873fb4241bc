"""The paths of a run directory, and the lock that makes its node the only one.

*Process*: all for the paths; the supervisor alone prepares and locks.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import stat
import struct
from pathlib import Path
from typing import Final

from xxhash import xxh3_64_hexdigest

from kamacache.errors import ConfigError

EPOCH_NAME: Final = re.compile(r"[0-9a-f]{16}")
SOCKET_PATH_BYTES_MAX: Final = 107  # sun_path of AF_UNIX, less the closing zero
SHM_ROOT: Final = "/dev/shm"
LOCK_TRIES_MAX: Final = 100

_FLOCK: Final = struct.Struct("@hhqqi")  # struct flock: type, whence, start, length, pid


def new_epoch() -> str:
    """Return a fresh name for one life of a supervisor."""
    return secrets.token_hex(8)


def default_run_dir() -> Path:
    """Return the run directory of a node that was given none.

    ``$XDG_RUNTIME_DIR/kamacache``, else ``/run/kamacache`` for root, else
    ``/tmp/kamacache-<uid>`` (`RunDir.prepare` refuses it when another user owns it).
    """
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and os.path.isdir(runtime):
        return Path(runtime) / "kamacache"
    if os.geteuid() == 0 and os.path.isdir("/run"):
        return Path("/run/kamacache")
    return Path(f"/tmp/kamacache-{os.geteuid()}")


class RunDir:
    """The paths below one run directory. Makes nothing until `prepare`."""

    __slots__ = ("path",)

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path: Final = Path(os.path.realpath(path))

    def __repr__(self) -> str:
        return f"RunDir({str(self.path)!r})"

    def __fspath__(self) -> str:
        return str(self.path)

    @property
    def lock_path(self) -> Path:
        """The file whose lock makes the node of this directory the only one."""
        return self.path / "supervisor.lock"

    @property
    def description_path(self) -> Path:
        """The file that says what runs here."""
        return self.path / "node.json"

    @property
    def kept_path(self) -> Path:
        """The file that says in which shm root the last node left its shards."""
        return self.path / "kept"

    def sockets_dir(self, epoch: str) -> Path:
        """The folder of the workers' sockets."""
        return self.path / epoch

    def shm_base(self, shm_root: str | os.PathLike[str] = SHM_ROOT) -> Path:
        """The folder below the shm root that belongs to this run directory."""
        digest = xxh3_64_hexdigest(os.fsencode(self.path))
        return Path(shm_root) / f"kamacache-{os.geteuid()}-{digest}"

    def shm_dir(self, shm_root: str | os.PathLike[str], epoch: str) -> Path:
        """The folder of one epoch's shared-memory files."""
        return self.shm_base(shm_root) / epoch

    def prepare(self, *, gid: int | None = None) -> None:
        """Make the directory for its owner alone (0700), or for a group too (0750).

        Raises `ConfigError` where it cannot be made, belongs to another user, or is too long a
        path for a Unix socket in it.
        """
        self.check_length()
        own_folder(self.path, "run_dir", gid=gid)

    def check_length(self) -> None:
        """Raise `ConfigError` where the path is too long for the sockets in it."""
        longest = len(os.fsencode(self.path)) + len("/0123456789abcdef/worker-255.sock.new")
        if longest > SOCKET_PATH_BYTES_MAX:
            raise ConfigError(
                f"run directory {self.path} is {longest - SOCKET_PATH_BYTES_MAX} bytes too long "
                f"for the Unix sockets in it ({SOCKET_PATH_BYTES_MAX} bytes); choose a shorter one",
                setting="run_dir",
                value=str(self.path),
            )


def own_folder(path: Path, setting: str, *, gid: int | None = None) -> None:
    """Make ``path`` (and its parents) a folder that only we, and the group ``gid``, may enter.

    Under a world-writable parent such as /dev/shm someone else may have made it first; that, a
    symbolic link, and a folder of another user are a `ConfigError`, not a place for our data.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700)
        found = os.lstat(path)
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            raise ConfigError(
                f"{path} is not a folder that belongs to uid {os.geteuid()} "
                f"(it belongs to uid {found.st_uid}); choose another {setting}",
                setting=setting,
                value=str(path),
            )
        if gid is None:
            os.chmod(path, 0o700)
        else:
            _give(path, gid)
            os.chmod(path, 0o750)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be made a folder of this node: {error.strerror}; "
            f"choose another {setting}",
            setting=setting,
            value=str(path),
        ) from error


def _give(path: Path, gid: int) -> None:
    try:
        os.chown(path, -1, gid)
    except OSError as error:  # EPERM: not a member; EINVAL: a user namespace has no such group
        raise ConfigError(
            f"{path} cannot be given to group {gid}: {error.strerror}; the node's user must be a "
            "member of --socket-group (in a systemd unit: SupplementaryGroups=, PrivateUsers=no)",
            setting="socket_group",
            value=str(gid),
        ) from error


def share_files(shm_dir: Path, gid: int) -> None:
    """Let a group attach: it reads the shards, and writes access bytes and counters alone.

    Once more after a writer opened its shard: a file it had to make anew is its owner's alone.
    """
    for entry in os.scandir(shm_dir):
        if entry.name.endswith(".lock"):
            continue
        writable = entry.name == "counters" or entry.name.endswith(".access")
        with contextlib.suppress(FileNotFoundError):  # another writer replaces it just now
            os.chown(entry.path, -1, gid)
            os.chmod(entry.path, 0o660 if writable else 0o640)


class SupervisorLock:
    """The lock of a run directory: POSIX lockf, freed by the kernel when its holder dies.

    Not ``flock``: a forked child that outlives the supervisor would keep it. A POSIX lock is
    dropped when the process closes *any* descriptor of the file, so nothing else may open it in
    the supervisor.
    """

    __slots__ = ("_fd", "_path")

    def __init__(self, fd: int, path: Path) -> None:
        self._fd = fd
        self._path = path

    @classmethod
    def take(cls, run_dir: RunDir) -> SupervisorLock | int:
        """Return the lock, or the pid of the process that holds it (0 when it cannot be told)."""
        for _ in range(LOCK_TRIES_MAX):
            fd = os.open(run_dir.lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            holder = cls._try(fd)
            if holder is not None:
                return holder
            # A holder that ended between our open and our lock removed the file: the lock we
            # have is on a file that nobody else will find. The name must still mean this file.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), os.stat(run_dir.lock_path)):
                    return cls(fd, run_dir.lock_path)
            os.close(fd)
        return 0

    @classmethod
    def holder(cls, run_dir: RunDir) -> int | None:
        """Return the pid of who holds the lock, without trying for it; None: nobody does.

        0: a process of another pid namespace. Raises OSError, such as where it may not be asked.
        """
        try:
            fd = os.open(run_dir.lock_path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            return cls._asked(fd)
        finally:
            os.close(fd)

    @staticmethod
    def _asked(fd: int) -> int | None:
        ask = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        kind, _, _, _, pid = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_GETLK, ask))
        # A holder in another pid namespace reads as 0 or -1.
        return None if kind == fcntl.F_UNLCK else max(int(pid), 0)

    @staticmethod
    def _try(fd: int) -> int | None:
        """Lock and return None; or close the file and return the holder's pid."""
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = SupervisorLock._asked(fd)
            os.close(fd)
            return holder or 0
        except BaseException:
            os.close(fd)
            raise
        return None

    @property
    def fd(self) -> int:
        """The descriptor, for a forked child to close: that drops nothing of the parent's."""
        return self._fd

    def release(self) -> None:
        """Remove the file and give the lock up, in this order: see `take`."""
        if self._fd >= 0:
            self._path.unlink(missing_ok=True)
            os.close(self._fd)
            self._fd = -1
