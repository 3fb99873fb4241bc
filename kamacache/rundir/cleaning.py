"""The clean-up of a run directory: our own epoch's files, and what dead nodes left.

*Process*: the supervisor; and a role whose supervisor died (`clean_orphaned`).

*Invariants*: an epoch's folders are removed by the supervisor that made them, by its children
once it is dead, or by a successor that holds ``supervisor.lock``. So nobody removes a living
node's files.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from pathlib import Path
from typing import Final

from kamacache.errors import NodeUnavailableError
from kamacache.rundir.control import end_serving
from kamacache.rundir.description import read_description
from kamacache.rundir.files import write_whole
from kamacache.rundir.layout import EPOCH_NAME, RunDir, SupervisorLock

PATH_BYTES_MAX: Final = 4_096

# POSIX locks do not tell the threads of a process apart: both the role's loop and its watching
# thread may find the supervisor dead, and the second must not unlink a successor's lock.
_cleaning = threading.Lock()


def clean_stale(run_dir: RunDir, shm_root: str | os.PathLike[str], *, but: str = "") -> int:
    """Remove what dead nodes left, ``but`` one epoch's shards, and return how many folders.

    Only for the holder of the `SupervisorLock`, before it makes its own epoch.
    """
    bases = {run_dir.shm_base(shm_root), *_kept_elsewhere(run_dir, shm_root)}
    with contextlib.suppress(NodeUnavailableError):  # no node.json hides another shm root only
        left = Path(read_description(run_dir).shm_dir)
        if left.parent.name == run_dir.shm_base(shm_root).name:
            bases.add(left.parent)
    run_dir.description_path.unlink(missing_ok=True)
    removed = 0
    for base in (*bases, run_dir.path):
        for name in _epochs(base):
            if name != but or base == run_dir.path:  # of sockets nothing is kept
                removed += remove_epoch_folder(base / name)
    return removed


def clean_epoch(run_dir: RunDir, epoch: str, shm_dir: str | os.PathLike[str]) -> None:
    """Remove all files of one epoch, its node.json included; for the supervisor that made it."""
    _unpublish(run_dir, epoch)
    remove_epoch_folder(Path(shm_dir))
    with contextlib.suppress(OSError):  # not empty: another epoch is there
        Path(shm_dir).parent.rmdir()
    run_dir.kept_path.unlink(missing_ok=True)
    remove_epoch_folder(run_dir.sockets_dir(epoch))


def clean_orphaned(run_dir: RunDir, epoch: str, shm_dir: str | os.PathLike[str]) -> None:
    """Remove the files of a dead supervisor; for each of its children, in any order, at once.

    The epoch's folders are nobody else's. node.json may be a successor's by now, so it is
    touched only under the lock: who gets it is alone, who does not leaves node.json to its holder.
    """
    with _cleaning:
        with contextlib.suppress(OSError):
            lock = SupervisorLock.take(run_dir)
            if isinstance(lock, SupervisorLock):
                _unpublish(run_dir, epoch)
                lock.release()
        remove_epoch_folder(Path(shm_dir))
        with contextlib.suppress(OSError):
            Path(shm_dir).parent.rmdir()
        remove_epoch_folder(run_dir.sockets_dir(epoch))


def remove_epoch_folder(path: Path) -> bool:
    """Remove one epoch's folder; readers that still map its files stop trusting them first."""
    end_serving(path / "control")
    if not path.is_dir():
        return False
    shutil.rmtree(path, ignore_errors=True)
    return True


def note_kept(run_dir: RunDir, shm_dir: str | os.PathLike[str]) -> None:
    """Let the next node know where shards are left; raises OSError.

    One with another shm root throws them away: while it runs they grow old, and a later node with
    the root of before would take them for the latest.
    """
    write_whole(run_dir.kept_path, os.fsencode(Path(shm_dir).parent))


def _kept_elsewhere(run_dir: RunDir, shm_root: str | os.PathLike[str]) -> set[Path]:
    """Return the folder that a node with another shm root left; {}: there is none."""
    here = run_dir.shm_base(os.path.realpath(shm_root))
    with contextlib.suppress(OSError, ValueError):
        left = Path(os.fsdecode(run_dir.kept_path.read_bytes()[:PATH_BYTES_MAX]))
        if left == here:
            return set()
        run_dir.kept_path.unlink()
        if left.is_absolute() and left.name == here.name:
            return {left}
    return set()


def _unpublish(run_dir: RunDir, epoch: str) -> None:
    with contextlib.suppress(NodeUnavailableError):
        if read_description(run_dir).epoch != epoch:
            return
        run_dir.description_path.unlink(missing_ok=True)


def _epochs(base: Path) -> list[str]:
    try:
        return [name for name in os.listdir(base) if EPOCH_NAME.fullmatch(name)]
    except OSError:
        return []
