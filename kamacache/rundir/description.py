"""``node.json``: what an attaching process must know of the node that runs here.

*Process*: written by the supervisor, read by all. Written whole to a temporary file and renamed,
so a reader sees a complete description or none. No fsync: it need not outlive a power cut, since
the processes it names do not.
"""

from __future__ import annotations

import os
from typing import Final

import msgspec

from kamacache.config import GroupSpec
from kamacache.errors import NodeUnavailableError
from kamacache.rundir.files import write_whole
from kamacache.rundir.layout import RunDir

DESCRIPTION_FORMAT: Final = 1
_BOOT_ID: Final = "/proc/sys/kernel/random/boot_id"


class NodeDescription(msgspec.Struct, frozen=True, kw_only=True):
    """One life of a node."""

    format: int
    epoch: str
    pid: int
    boot_id: str
    workers: int
    hash_seed: int
    shm_dir: str
    sockets_dir: str
    groups: list[GroupSpec]
    listen: str | None
    version: str
    name: str | None = None  # HOST:PORT on the ring; None: it has none (see kamacache.node.place)
    # The epoch in which the shards were begun: an earlier one after a warm restart.
    memory: str = ""
    clustered: bool = False  # whether it may have peers, now or later
    api: str | None = None  # HOST:PORT of the HTTP role

    def socket_path(self, shard: int) -> str:
        """Where worker ``shard`` listens."""
        return f"{self.sockets_dir}/worker-{shard}.sock"

    @property
    def control_path(self) -> str:
        """The file of the control words."""
        return f"{self.shm_dir}/control"

    @property
    def counters_path(self) -> str:
        """The file of the hit counters."""
        return f"{self.shm_dir}/counters"

    def group_index(self, name: str) -> int:
        """Return the place of a group among the node's; raises KeyError."""
        for index, spec in enumerate(self.groups):
            if spec.name == name:
                return index
        raise KeyError(name)


def read_boot_id() -> str:
    """Return the kernel's random name of this boot; CLOCK_BOOTTIME means nothing across two."""
    with open(_BOOT_ID, encoding="ascii") as file:
        return file.read().strip()


def read_description(run_dir: RunDir | str | os.PathLike[str]) -> NodeDescription:
    """Return what runs at a run directory; raises `NodeUnavailableError` where nothing does.

    A description may outlive its node (SIGKILL of all its processes at once): the control file's
    serve-until says whether the node lives.
    """
    where = run_dir if isinstance(run_dir, RunDir) else RunDir(run_dir)
    try:
        text = where.description_path.read_bytes()
    except OSError as error:
        raise NodeUnavailableError(
            f"no node runs at {where.path} ({error.strerror}: {where.description_path.name})",
            run_dir=str(where.path),
        ) from error
    try:
        found = msgspec.json.decode(text, type=NodeDescription)
    except msgspec.MsgspecError as error:
        raise NodeUnavailableError(
            f"{where.description_path} cannot be understood ({error}); "
            "does another version of kamacache run the node?",
            run_dir=str(where.path),
        ) from error
    if found.format != DESCRIPTION_FORMAT:
        raise NodeUnavailableError(
            f"{where.description_path} has format {found.format} (kamacache {found.version}), "
            f"this process reads format {DESCRIPTION_FORMAT}; use one version on both sides",
            run_dir=str(where.path),
        )
    return found


def write_description(
    run_dir: RunDir, description: NodeDescription, *, gid: int | None = None
) -> None:
    """Publish a description; raises OSError."""
    text = msgspec.json.format(msgspec.json.encode(description), indent=2)
    write_whole(run_dir.description_path, text, gid=gid)
