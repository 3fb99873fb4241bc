"""`kamacache.store.arena`: files made, refused, replaced and locked."""

from __future__ import annotations

import logging
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from kamacache.errors import StorageError
from kamacache.store import ShardPaths, ShardWriter, arena, make_lookup, touch_of, unlink_files
from kamacache.store.arena import (
    ShardIdentity,
    create_files,
    open_for_reading,
    open_for_writing,
    warn_unless_tmpfs,
)
from kamacache.store.layout import FORMAT, H_FORMAT, H_MAGIC
from tests.store.shards import BOOT_ID, SEED, identity_of

ROOT = Path(__file__).parents[2]
HOLD = """
import os, sys
from pathlib import Path
from kamacache.store.arena import ShardPaths, open_for_writing
from tests.store.shards import identity_of
arena = open_for_writing(ShardPaths.of(sys.argv[1], "g", 0), identity_of())
if "fork" in sys.argv:
    if os.fork() == 0:
        sys.stdin.read()  # outlives its parent, with the lock file open
        os._exit(0)
print("open", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def paths(shm_root: Path, request: pytest.FixtureRequest) -> Iterator[ShardPaths]:
    folder = shm_root / f"arena-{os.getpid()}"
    folder.mkdir()
    yield ShardPaths.of(folder, "g", 0)
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def write_one(paths: ShardPaths, identity: ShardIdentity) -> None:
    mapped = open_for_writing(paths, identity)
    writer = ShardWriter(mapped, group="g", eviction="lru", hash_seed=identity.hash_seed)
    writer.put(b"k", b"v")
    writer.close()


def read_one(paths: ShardPaths, identity: ShardIdentity) -> object:
    mapped = open_for_reading(paths, identity)
    return make_lookup((mapped,), hash_seed=identity.hash_seed, touch=touch_of("lru")).get(b"k")


def test_what_one_process_writes_another_mapping_reads(paths: ShardPaths) -> None:
    write_one(paths, identity_of())
    assert read_one(paths, identity_of()) == b"v"


def test_readers_cannot_write_data_but_access_bytes(paths: ShardPaths) -> None:
    create_files(paths, identity_of())
    reader = open_for_reading(paths, identity_of())
    assert not reader.writable
    with pytest.raises(TypeError):
        reader.words[100] = 1
    with pytest.raises(TypeError):
        reader.data[0:1] = b"x"
    reader.access[0] = 9
    assert open_for_reading(paths, identity_of()).access[0] == 9


def test_files_are_reserved_in_full_and_the_owner_s_alone(paths: ShardPaths) -> None:
    old = os.umask(0)
    try:
        sizes = create_files(paths, identity_of(cache_bytes=1 << 20))
        open_for_writing(paths, identity_of(cache_bytes=1 << 20)).close()
    finally:
        os.umask(old)
    for path, size in ((paths.data, sizes.data_bytes), (paths.access, sizes.access_bytes)):
        assert path.stat().st_size == size
        assert path.stat().st_blocks * 512 >= size
    assert sizes.total_bytes == 1 << 20
    for path in (paths.data, paths.access, paths.lock):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_equal_files_are_kept(paths: ShardPaths) -> None:
    write_one(paths, identity_of())
    node = paths.data.stat().st_ino
    create_files(paths, identity_of())
    open_for_writing(paths, identity_of()).close()
    assert paths.data.stat().st_ino == node
    assert read_one(paths, identity_of()) == b"v"


@pytest.mark.parametrize(
    "other",
    [
        identity_of(seed=SEED + 1),
        identity_of(boot_id=BOOT_ID.replace("1", "2")),
        identity_of(eviction="s3fifo"),
        identity_of(cache_bytes=1 << 20),
        identity_of(item_bytes_mean=64),
        identity_of(name="h"),
        replace(identity_of(), shard=1, workers=2),
    ],
    ids=["seed", "boot", "policy", "size", "mean", "group", "shard"],
)
def test_files_of_another_shard_are_refused_by_readers_and_replaced_by_the_writer(
    paths: ShardPaths, other: ShardIdentity
) -> None:
    write_one(paths, identity_of())
    before = open_for_reading(paths, identity_of())
    with pytest.raises(StorageError, match="another node, version or geometry"):
        open_for_reading(paths, other)
    create_files(paths, other)
    assert read_one(paths, other) is None
    with pytest.raises(StorageError):
        open_for_reading(paths, identity_of())
    # Who maps the old files keeps them.
    assert make_lookup((before,), hash_seed=SEED, touch=touch_of("lru")).get(b"k") == b"v"


@pytest.mark.parametrize("damage", ["format", "magic", "short", "empty", "no access", "random"])
def test_a_damaged_file_is_refused_by_readers_and_replaced_by_the_writer(
    paths: ShardPaths, damage: str
) -> None:
    write_one(paths, identity_of())
    mapped = open_for_writing(paths, identity_of())
    if damage == "format":
        mapped.words[H_FORMAT] = FORMAT + 1
    elif damage == "magic":
        mapped.words[H_MAGIC] = 0
    elif damage == "short":
        os.truncate(paths.data, 4096)
    elif damage == "empty":
        os.truncate(paths.data, 0)
    elif damage == "no access":
        paths.access.unlink()
    else:
        paths.data.write_bytes(os.urandom(mapped.geometry.data_bytes))
    mapped.close()
    with pytest.raises(StorageError):
        open_for_reading(paths, identity_of())
    write_one(paths, identity_of())
    assert read_one(paths, identity_of()) == b"v"


def test_files_replaced_while_a_reader_opens_are_refused(
    paths: ShardPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    create_files(paths, identity_of(seed=1))
    # As when the look at the header was just before another node's start.
    monkeypatch.setattr(arena, "_matches", lambda *_: True)
    with pytest.raises(StorageError, match="replaced"):
        open_for_reading(paths, identity_of(seed=2))
    with pytest.raises(StorageError):
        open_for_reading(paths, identity_of(cache_bytes=1 << 20))  # shorter than its geometry
    paths.data.unlink()
    with pytest.raises(StorageError):
        open_for_reading(paths, identity_of(seed=1))


def test_a_missing_folder_is_an_error_that_names_it(tmp_path: Path) -> None:
    paths = ShardPaths.of(tmp_path / "no" / "folder", "g", 0)
    for attempt in (create_files, open_for_writing):
        with pytest.raises(StorageError, match="no/folder does not exist") as caught:
            attempt(paths, identity_of())
        assert caught.value.path == str(tmp_path / "no" / "folder")
    with pytest.raises(StorageError):
        open_for_reading(paths, identity_of())


# -- one writer ----------------------------------------------------------------------------


def hold(paths: ShardPaths, *more: str) -> subprocess.Popen[str]:
    """Start a process that has the shard open for writing."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(paths.data.parent), *more],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "open\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait(10)
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        pipe.close()


def test_a_second_writer_is_refused_until_the_first_is_dead(paths: ShardPaths) -> None:
    process = hold(paths)
    try:
        with pytest.raises(StorageError, match="has a writer already") as caught:
            open_for_writing(paths, identity_of())
        assert caught.value.path == str(paths.lock)
        # Readers and creators are not writers.
        create_files(paths, identity_of())
        assert read_one(paths, identity_of()) is None
    finally:
        end(process)
    write_one(paths, identity_of())


def test_a_forked_grandchild_does_not_hold_a_dead_writer_s_lock(paths: ShardPaths) -> None:
    process = hold(paths, "fork")
    try:
        with pytest.raises(StorageError):
            open_for_writing(paths, identity_of())
        os.kill(process.pid, signal.SIGKILL)
        process.wait(10)
        write_one(paths, identity_of())  # the grandchild still runs
    finally:
        end(process)  # and ends when its standard input does


def test_closing_gives_the_lock_up_and_is_harmless_twice(paths: ShardPaths) -> None:
    mapped = open_for_writing(paths, identity_of())
    mapped.close()
    mapped.close()
    process = hold(paths)
    end(process)


def test_a_failed_opening_leaves_no_lock_behind(paths: ShardPaths) -> None:
    paths.data.mkdir()  # not a file at all
    try:
        with pytest.raises(StorageError):
            open_for_writing(paths, identity_of())
    finally:
        paths.data.rmdir()
    end(hold(paths))


# -- space and permission ------------------------------------------------------------------


@pytest.fixture
def small_tmpfs(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_tmpfs_of_8_mib_is_an_error_and_not_a_sigbus(small_tmpfs: Path) -> None:
    paths = ShardPaths.of(small_tmpfs, "g", 0)
    identity = identity_of(cache_bytes=64 << 20)
    for attempt in (create_files, open_for_writing):
        with pytest.raises(StorageError, match="make the groups smaller") as caught:
            attempt(paths, identity)
        needed, available = caught.value.needed_bytes, caught.value.available_bytes
        assert needed is not None
        assert available is not None
        assert available <= 8 << 20 < needed <= 64 << 20
    assert not paths.data.exists()
    assert not paths.access.exists()
    write_one(paths, identity_of(cache_bytes=4 << 20))


def test_every_byte_of_a_tmpfs_that_is_just_large_enough_can_be_written(small_tmpfs: Path) -> None:
    paths = ShardPaths.of(small_tmpfs, "g", 0)
    mapped = open_for_writing(paths, identity_of(cache_bytes=7 << 20))
    mapped.data[512:] = b"\xff" * (len(mapped.data) - 512)
    mapped.access[:] = b"\xff" * len(mapped.access)
    mapped.close()


def test_a_missing_permission_is_a_storage_error(paths: ShardPaths) -> None:
    create_files(paths, identity_of())
    paths.data.parent.chmod(0o755)
    code = """
import os, sys
from kamacache.errors import StorageError
from kamacache.store.arena import *
from tests.store.shards import identity_of
if os.getuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
else:
    sys.exit(77)
for attempt in (open_for_reading, open_for_writing, create_files):
    try:
        attempt(ShardPaths.of(sys.argv[1], "g", 0), identity_of())
    except StorageError as error:
        assert "ermission" in str(error), error
    else:
        sys.exit(1)
"""
    ended = subprocess.run(
        [sys.executable, "-c", code, str(paths.data.parent)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    if ended.returncode == 77:
        pytest.skip("becoming another user needs root")
    assert ended.returncode == 0, ended.stderr


def test_a_folder_that_is_not_on_tmpfs_is_warned_of_once(
    tmp_path: Path, shm_root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        if arena.is_tmpfs("/dev/shm"):
            warn_unless_tmpfs("/dev/shm")
            warn_unless_tmpfs(shm_root)
            assert not caplog.records
        warn_unless_tmpfs("/proc")
    assert [record.args for record in caplog.records] == [("/proc",)]


def test_unlinking_leaves_mappings_readable(paths: ShardPaths) -> None:
    write_one(paths, identity_of())
    mapped = open_for_reading(paths, identity_of())
    unlink_files(paths)
    unlink_files(paths)
    assert list(paths.data.parent.iterdir()) == []
    assert make_lookup((mapped,), hash_seed=SEED, touch=touch_of("lru")).get(b"k") == b"v"
