"""The files and mappings of a shard: reserving, opening, checking, locking.

*Process*: the supervisor creates, a worker opens for writing, everyone else maps read-only.
*Invariants*: space is reserved before it is mapped, so that a full tmpfs is an error here and
not a SIGBUS later; a file of another version, geometry, seed or boot is replaced, never reused;
``lockf`` (which dies with its process and is not inherited by a fork) makes the writer single.

`multiprocessing.shared_memory` is not used: its resource tracker destroys a live segment when an
unrelated attacher exits (CPython gh-82300).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from xxhash import xxh3_64_intdigest

from kamacache.config import GroupSpec
from kamacache.errors import StorageError
from kamacache.store.layout import (
    FORMAT,
    H_FORMAT,
    H_IDENTITY,
    H_MAGIC,
    HEADER_WORDS,
    MAGIC,
    Geometry,
    geometry,
)

log = logging.getLogger("kamacache.store")


@dataclass(frozen=True, slots=True)
class ShardIdentity:
    """What must be equal for a file to be this shard's: everything its bytes depend on."""

    spec: GroupSpec
    shard: int
    workers: int
    hash_seed: int
    boot_id: str

    def geometry(self) -> Geometry:
        """Return the geometry that this identity's settings give."""
        return geometry(self.spec.cache_bytes // self.workers, self.spec.item_bytes_mean)

    def digest(self) -> int:
        """Return the word that the header keeps of this identity."""
        sizes = self.geometry()
        text = "\0".join(
            str(part)
            for part in (
                FORMAT,
                self.spec.name,
                self.spec.eviction,
                self.shard,
                self.workers,
                self.hash_seed,
                self.boot_id,
                sizes.slots,
                sizes.segments,
                sizes.segment_bytes,
                sizes.data_bytes,
            )
        )
        return xxh3_64_intdigest(text.encode())


@dataclass(frozen=True, slots=True)
class ShardPaths:
    """The three files of a shard."""

    data: Path
    access: Path
    lock: Path

    @classmethod
    def of(cls, shm_dir: str | Path, group: str, shard: int) -> ShardPaths:
        """Return the paths of a group's shard under the node's shared-memory folder."""
        base = Path(shm_dir)
        return cls(
            data=base / f"{group}-{shard}.data",
            access=base / f"{group}-{shard}.access",
            lock=base / f"{group}-{shard}.lock",
        )


class Arena:
    """Both mappings of one shard, as this process sees them.

    ``data`` and ``words`` are the same bytes: slices of ``data`` copy, aligned items of ``words``
    are single loads and stores. A plain ``struct.pack_into`` onto a shared word tears.
    """

    __slots__ = (
        "access",
        "access_map",
        "data",
        "geometry",
        "index",
        "lock_fd",
        "places",
        "stamps",
        "words",
        "writable",
    )

    def __init__(
        self, data: mmap.mmap, access: mmap.mmap, sizes: Geometry, *, lock_fd: int | None = None
    ) -> None:
        self.data = data
        view = memoryview(data)
        self.writable = not view.readonly
        self.words = view[: len(data) & ~7].cast("B").cast("Q")
        self.index = self.words[HEADER_WORDS : HEADER_WORDS + sizes.slots]
        # The index as `kamacache.store.finding` reads it: whole words, and their low halves.
        self.stamps = self.index.cast("B").cast("d")
        self.places = self.index.cast("B").cast("I")[::2]
        self.access = memoryview(access)
        self.access_map = access  # a single byte of which is read faster
        self.geometry = sizes
        self.lock_fd = lock_fd

    def close(self) -> None:
        """Give up the lock. The mappings end with the last reference: a reader may hold one."""
        if self.lock_fd is not None:
            os.close(self.lock_fd)
            self.lock_fd = None


def private_arena(sizes: Geometry) -> Arena:
    """Return a shard in this process's own memory, copied (not shared) by a fork."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    return Arena(
        mmap.mmap(-1, sizes.data_bytes, flags=flags),
        mmap.mmap(-1, sizes.access_bytes, flags=flags),
        sizes,
    )


def create_files(paths: ShardPaths, identity: ShardIdentity, *, mode: int = 0o600) -> Geometry:
    """Make the shard's files, reserved in full, unless equal ones stand there already.

    A file of another version, geometry, seed or boot is unlinked and replaced: readers that map
    the old one keep their mapping, and see at its header or at serve-until that it is dead.
    Raises `StorageError` where the folder is missing or the space is not there.
    """
    sizes = identity.geometry()
    _check_folder(paths)
    with _translated(paths.data):
        if _matches(paths, identity, sizes):
            return sizes
        _create(paths, identity, sizes, mode)
    return sizes


def _check_folder(paths: ShardPaths) -> None:
    with _translated(paths.data):
        found = paths.data.parent.is_dir()
    if not found:
        raise StorageError(
            f"the shared-memory folder {paths.data.parent} does not exist; create it, or name "
            "another one (--shm-dir)",
            path=str(paths.data.parent),
        )


def _create(paths: ShardPaths, identity: ShardIdentity, sizes: Geometry, mode: int) -> None:
    for path in (paths.data, paths.access):
        path.unlink(missing_ok=True)
    try:
        _reserve(paths.access, sizes.access_bytes, mode)
        fd = _reserve(paths.data, sizes.data_bytes, mode, keep=True)
    except BaseException:
        for path in (paths.data, paths.access):
            path.unlink(missing_ok=True)
        raise
    try:
        with mmap.mmap(fd, sizes.data_bytes) as data:
            header = memoryview(data)[: HEADER_WORDS * 8].cast("Q")
            header[H_FORMAT] = FORMAT
            header[H_IDENTITY] = identity.digest()
            header[H_MAGIC] = MAGIC  # last: a header with magic is whole
            header.release()
    finally:
        os.close(fd)


def open_for_writing(paths: ShardPaths, identity: ShardIdentity) -> Arena:
    """Lock and map a shard as its one writer; call it after the fork, in the worker itself.

    Raises `StorageError` where another process holds the lock, or the files are not this shard's.
    """
    _check_folder(paths)
    with _translated(paths.lock):
        lock_fd = os.open(paths.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.lockf(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock_fd)
        raise StorageError(
            f"shard {paths.data.name} has a writer already (lock {paths.lock} is held); two "
            "nodes must not share a run directory",
            path=str(paths.lock),
        ) from error
    try:
        sizes = create_files(paths, identity)
        with _translated(paths.data):
            with _opened(paths.data, os.O_RDWR) as fd:
                data = mmap.mmap(fd, sizes.data_bytes)
            with _opened(paths.access, os.O_RDWR) as fd:
                access = mmap.mmap(fd, sizes.access_bytes)
    except BaseException:
        os.close(lock_fd)
        raise
    return Arena(data, access, sizes, lock_fd=lock_fd)


def open_for_reading(paths: ShardPaths, identity: ShardIdentity) -> Arena:
    """Map a shard's data read-only and its access bytes read-write.

    Raises `StorageError` where the files are missing or not this shard's.
    """
    sizes = identity.geometry()
    with _translated(paths.data):
        if not _matches(paths, identity, sizes):
            raise StorageError(
                f"{paths.data} is missing or belongs to another node, version or geometry",
                path=str(paths.data),
            )
        with _opened(paths.data, os.O_RDONLY) as fd:
            data = mmap.mmap(fd, sizes.data_bytes, access=mmap.ACCESS_READ)
        with _opened(paths.access, os.O_RDWR) as fd:
            access = mmap.mmap(fd, sizes.access_bytes)
        # What is mapped may be another file than the one looked at: look again.
        if not _is_of(memoryview(data)[: HEADER_WORDS * 8].cast("Q"), identity):
            raise StorageError(f"{paths.data} was replaced just now", path=str(paths.data))
    return Arena(data, access, sizes)


def unlink_files(paths: ShardPaths) -> None:
    """Remove a shard's files; mappings that exist stay readable."""
    for path in (paths.data, paths.access, paths.lock):
        path.unlink(missing_ok=True)


def is_tmpfs(folder: str | Path) -> bool:
    """Tell whether a folder lies on tmpfs, from /proc/self/mountinfo."""
    real = os.path.realpath(folder)
    best, kind = "", ""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as mounts:
        for line in mounts:
            fields, _, tail = line.partition(" - ")
            point = fields.split()[4].replace("\\040", " ")
            inside = real == point or real.startswith(point.rstrip("/") + "/")
            if inside and len(point) >= len(best):
                best, kind = point, tail.split()[0]
    return kind in ("tmpfs", "ramfs", "hugetlbfs")


def warn_unless_tmpfs(folder: str | Path) -> None:
    """Log one warning where the shards would be written back to a disk."""
    if not is_tmpfs(folder):
        log.warning(
            "the shared-memory folder %s is not on tmpfs: pages will be written to its disk, "
            "and reads may wait for it",
            folder,
        )


def _matches(paths: ShardPaths, identity: ShardIdentity, sizes: Geometry) -> bool:
    try:
        if (
            paths.data.stat().st_size != sizes.data_bytes
            or paths.access.stat().st_size != sizes.access_bytes
        ):
            return False
        with paths.data.open("rb") as file:
            header = memoryview(file.read(HEADER_WORDS * 8)).cast("Q")
    except FileNotFoundError:
        return False
    return _is_of(header, identity)


def _is_of(header: memoryview[int], identity: ShardIdentity) -> bool:
    return (
        header[H_MAGIC] == MAGIC
        and header[H_FORMAT] == FORMAT
        and header[H_IDENTITY] == identity.digest()
    )


def _reserve(path: Path, count: int, mode: int, *, keep: bool = False) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        os.fchmod(fd, mode)
        # ftruncate would succeed on a full tmpfs, and the first touch would be a SIGBUS.
        os.posix_fallocate(fd, 0, count)
    except OSError as error:
        os.close(fd)
        if error.errno not in (errno.ENOSPC, errno.ENOMEM, errno.EDQUOT):
            raise
        room = os.statvfs(path.parent)
        available = room.f_bavail * room.f_frsize
        raise StorageError(
            f"{path.parent} has {available} bytes free, {path.name} needs {count}: make the "
            "groups smaller, or the folder larger (in Docker: --shm-size)",
            path=str(path),
            needed_bytes=count,
            available_bytes=available,
        ) from error
    if keep:
        return fd
    os.close(fd)
    return -1


@contextlib.contextmanager
def _translated(path: Path) -> Iterator[None]:
    """Make a `StorageError` of what the system says: no permission, no room, gone just now."""
    try:
        yield
    except StorageError:
        raise
    except (OSError, ValueError) as error:  # ValueError: mmap of a file that shrank
        raise StorageError(f"shard file {path}: {error}", path=str(path)) from error


@contextlib.contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)
