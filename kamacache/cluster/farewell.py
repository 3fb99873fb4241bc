"""What a worker that ends in order leaves to its successor about the other nodes.

*Process*: worker, in the loop's thread; a file beside the shards, which is read once and removed,
so the successor of a worker that was killed finds none. What a worker still had to tell is in
`kamacache.cluster.owed`; this says of what it knows that nothing is missing there.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import msgspec

from kamacache.limits import FAREWELL_BYTES_MAX
from kamacache.rundir.files import write_whole


class Farewell(msgspec.Struct, frozen=True, kw_only=True):
    """The end of one worker; times are CLOCK_BOOTTIME in milliseconds."""

    unheard: list[str]  # nodes that have not acknowledged all that this worker wrote
    since_ms: dict[str, int]  # by node: from when on all that was written is told, or owed
    left_ms: dict[str, int]  # nodes that left the cluster, and when
    lives: dict[str, str] = {}  # by node: the id of the memory that was told


def farewell_path(shm_dir: str, worker: int) -> Path:
    """Return where a worker's lies."""
    return Path(shm_dir) / f"farewell.{worker}"


def say_farewell(path: Path, farewell: Farewell) -> None:
    """Write it; raises OSError."""
    write_whole(path, msgspec.msgpack.encode(farewell))


def take_farewell(path: Path) -> Farewell | None:
    """Return what the last worker of this place left, once; None where it did not end in order."""
    with contextlib.suppress(OSError, msgspec.MsgspecError):
        with path.open("rb") as file:
            data = file.read(FAREWELL_BYTES_MAX)
        path.unlink()  # raises where it stays, to be found again: then it is not believed
        return msgspec.msgpack.decode(data, type=Farewell)
    return None
