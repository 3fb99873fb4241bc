"""``roster.json``: the processes of a node, for who shows or measures them.

*Process*: written by the supervisor when something of it has changed, read by the HTTP role and
the ``kamacache`` command. Written whole and renamed, so a reader sees one moment.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import msgspec

from kamacache.errors import NodeUnavailableError
from kamacache.rundir.files import write_whole

State = Literal["starting", "ready", "stopping"]


class RosterRole(msgspec.Struct, frozen=True, kw_only=True):
    """One place for a process."""

    role: str
    index: int
    pid: int  # 0: no process now
    ready: bool
    restarts: int  # deaths after it had been ready
    started_ms: int  # CLOCK_BOOTTIME of the last fork; 0: never
    cpu_before_s: float = 0.0  # of processes that had this place before


class Roster(msgspec.Struct, frozen=True, kw_only=True):
    """All of them, the supervisor's own beside."""

    state: State
    pid: int  # the supervisor's
    began_ms: int  # CLOCK_BOOTTIME
    reloads: int = 0  # that were taken
    reloads_refused: int = 0
    roles: list[RosterRole] = []


def roster_path(sockets_dir: str | os.PathLike[str]) -> Path:
    """Return where the roster of an epoch lies."""
    return Path(sockets_dir) / "roster.json"


def write_roster(
    sockets_dir: str | os.PathLike[str], roster: Roster, *, gid: int | None = None
) -> None:
    """Publish the roster; raises OSError. For the supervisor."""
    write_whole(roster_path(sockets_dir), msgspec.json.encode(roster), gid=gid)


def read_roster(sockets_dir: str | os.PathLike[str]) -> Roster:
    """Return the roster as it is now; raises `NodeUnavailableError` where it is gone."""
    path = roster_path(sockets_dir)
    try:
        return msgspec.json.decode(path.read_bytes(), type=Roster)
    except (OSError, msgspec.MsgspecError) as error:
        raise NodeUnavailableError(f"{path} cannot be read: {error}") from error
