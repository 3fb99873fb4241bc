"""What a node that was told to drain leaves for the next one: its shards, and a note on them.

*Process*: the supervisor. The note, ``kept.json``, lies in the epoch's folder of shared memory. It
is written last, when no role runs any more, and removed first by the node that takes the folder
over; so a folder without it is that of a node that crashed, and is thrown away::

    drain ► roles gone ► all but shards, owed.*, farewell.* removed ► kept.json
    start ► ports held, space there ► kept.json removed ► folder renamed ► shards opened

*Invariants*: what is in a kept folder was whole and right when the node stopped. Whether it still
is, `KeptFolder.why_cold` and, in a cluster, the other nodes say (`kamacache.worker.settling`).
Nothing in a folder is believed that is not a plain file of this user's.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from kamacache.clock import boottime_ms
from kamacache.config import GroupSpec
from kamacache.limits import KEPT_NOTE_BYTES_MAX
from kamacache.rundir.description import NodeDescription, read_boot_id
from kamacache.rundir.files import write_whole
from kamacache.rundir.layout import EPOCH_NAME

KEPT_FORMAT: Final = 1
NOTE: Final = "kept.json"
# What may change of a group without a change of what its values are, and for how long they hold.
_FREE: Final = frozenset(("load_timeout_s", "load_threads", "has_getter"))


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    """What the next node must know of the one that left its shards."""

    format: int
    version: str  # of kamacache: another one may read the records otherwise
    boot_id: str
    workers: int
    hash_seed: int
    memory: str  # see `NodeDescription`
    groups: list[GroupSpec]
    name: str | None  # in its cluster; None: it was of none
    members: list[tuple[str, int]]  # of the cluster, itself included, with their weights
    left_ms: int  # CLOCK_BOOTTIME at which it began to stop: others may stand in from then on
    stopped_ms: int


@dataclass(frozen=True, slots=True)
class KeptFolder:
    """A folder of shards that may be taken over."""

    path: Path
    kept: Kept

    @property
    def away_s(self) -> float:
        """Seconds since the node stopped."""
        return (boottime_ms() - self.kept.stopped_ms) / 1000

    def why_cold(self, *, version: str, workers: int, name: str | None, away_max_s: float) -> str:
        """Return why none of it can be used, "" where it can."""
        kept = self.kept
        if away_max_s <= 0:
            return "warm restart is off"
        if kept.boot_id != read_boot_id():
            return "the machine was started anew"
        if kept.version != version:
            return f"it was version {kept.version}, this is {version}"
        if kept.workers != workers:
            return f"it had {kept.workers} workers, this node has {workers}"
        if kept.name != name:
            return (
                f"its name in the cluster was {kept.name or 'none'}, this node's is "
                f"{name or 'none'}"
            )
        if not 0 <= self.away_s <= away_max_s:
            return f"it stopped {self.away_s:.0f} s ago, and at most {away_max_s:g} s are allowed"
        return ""

    def changed(self, spec: GroupSpec) -> list[str]:
        """Return the settings for which a group must begin anew; [] also where it is new."""
        for was in self.kept.groups:
            if was.name == spec.name:
                before, now = msgspec.structs.asdict(was), msgspec.structs.asdict(spec)
                return [name for name in now if name not in _FREE and now[name] != before[name]]
        return []

    def files(self, groups: Iterable[GroupSpec]) -> set[str]:
        """Return the names of the files that a node with these groups can use."""
        known = {spec.name for spec in self.kept.groups}
        names = [s.name for s in groups if s.name in known and not self.changed(s)]
        shards = range(self.kept.workers)
        ends = ("data", "access", "lock")
        return {f"{name}-{shard}.{end}" for name in names for shard in shards for end in ends} | {
            f"{kind}.{shard}" for kind in ("owed", "farewell") for shard in shards
        }

    def usable_bytes(self, files: AbstractSet[str]) -> int:
        """Return the memory that these files take already."""
        with contextlib.suppress(OSError):
            with os.scandir(self.path) as entries:
                found = [e.stat(follow_symlinks=False) for e in entries if e.name in files]
            return sum(about.st_blocks * 512 for about in found)
        return 0

    def take(self, to: Path, files: AbstractSet[str]) -> None:
        """Make the folder the new epoch's own, with these files alone; raises OSError."""
        (self.path / NOTE).unlink()  # first: from here on a crash is a cold start
        with os.scandir(self.path) as entries:
            for entry in entries:
                if entry.name not in files or not _is_ours(entry.stat(follow_symlinks=False)):
                    _remove(entry)
        self.path.rename(to)


def keep_shards(about: NodeDescription, members: Sequence[tuple[str, int]], left_ms: int) -> None:
    """Leave the shards of a node whose roles have ended; raises OSError.

    ``members`` are those of its cluster, itself included, with weights; none: it had no peers.
    """
    folder = Path(about.shm_dir)
    kept = Kept(
        format=KEPT_FORMAT,
        version=about.version,
        boot_id=about.boot_id,
        workers=about.workers,
        hash_seed=about.hash_seed,
        memory=about.memory,
        groups=about.groups,
        name=about.name if about.clustered else None,
        members=list(members),
        left_ms=left_ms,
        stopped_ms=boottime_ms(),
    )
    files = KeptFolder(folder, kept).files(about.groups)
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name not in files:
                _remove(entry)
    write_whole(folder / NOTE, msgspec.json.encode(kept))


def find_kept(base: Path) -> KeptFolder | None:
    """Return the latest folder that was kept below a run directory's own in shared memory."""
    found: list[KeptFolder] = []
    with contextlib.suppress(OSError):
        folders = [base / name for name in os.listdir(base) if EPOCH_NAME.fullmatch(name)]
        found += [KeptFolder(path, kept) for path in folders if (kept := read_note(path))]
    return max(found, key=lambda folder: folder.kept.stopped_ms, default=None)


def read_note(folder: Path) -> Kept | None:
    """Return a folder's note; None where there is none that can be believed and understood."""
    try:
        if not stat.S_ISDIR(os.lstat(folder).st_mode):
            return None
        # Not to wait for a writer of a pipe, nor to follow a link.
        fd = os.open(folder / NOTE, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(fd, "rb") as file:
            if not _is_ours(os.fstat(fd)):
                return None
            kept = msgspec.json.decode(file.read(KEPT_NOTE_BYTES_MAX), type=Kept)
    except (OSError, ValueError, msgspec.MsgspecError):
        return None
    except Exception:  # what a group's settings say of nonsense
        return None
    return kept if kept.format == KEPT_FORMAT else None


def _is_ours(about: os.stat_result) -> bool:
    return stat.S_ISREG(about.st_mode) and about.st_uid == os.geteuid()


def _remove(entry: os.DirEntry[str]) -> None:
    if entry.is_dir(follow_symlinks=False):
        shutil.rmtree(entry.path)
    else:
        os.unlink(entry.path)
