"""``file:/path.toml`` and ``file:/path.json``: a list in a file, read again when it changes.

*Process*: agent. The file is one array named ``members``, of ``"HOST:PORT=WEIGHT"`` and of tables::

    members = ["10.0.0.1:8001", {address = "10.0.0.2:8001", weight = 2}]

The file is looked at every `DISCOVERY_FILE_EVERY_S`; inotify would say it sooner, and nothing of a
file that lies on a network or comes from a container's volume. It counts as changed when its time,
inode or size did, so that a rename over it is seen, and is read when it stayed as it is for
`DISCOVERY_FILE_SETTLE_S`: half a file of ``[[members]]`` tables is a valid file of fewer members.

*Invariant*: a file that is gone, empty, malformed, or names nobody changes nothing.
"""

from __future__ import annotations

import asyncio
import os
import tomllib
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from kamacache.cluster.discovery.lists import changes_only, distinct
from kamacache.cluster.discovery.retry import Report, SourceError
from kamacache.cluster.discovery.urls import Source
from kamacache.cluster.membership import Member, check_address
from kamacache.errors import ConfigError
from kamacache.limits import (
    DISCOVERY_BYTES_MAX,
    DISCOVERY_FILE_EVERY_S,
    DISCOVERY_FILE_SETTLE_S,
)
from kamacache.rundir.files import open_at_once

# What of a file changes when it does: times, device and inode, size.
_Mark = tuple[int, int, int, int, int]


class FileDiscovery:
    """Publishes what a file says."""

    def __init__(self, source: Source) -> None:
        """Check the path; the file need not be there yet. Raises `ConfigError`."""
        source.allow_options()
        if not os.path.isabs(source.path):
            raise source.refused("the path must begin with /")
        if not source.path.endswith((".toml", ".json")):
            raise source.refused("the file's name must end in .toml or .json")
        self._path = source.path
        self._report = Report(source.shown)

    async def run(self, publish: Callable[[Sequence[Member]], None]) -> None:
        """Publish the file's list whenever it changes."""
        say = changes_only(publish)
        read: _Mark | bool | None = False  # None: that there is no file was seen, too
        while True:
            mark = _mark(self._path)
            if mark != read:
                await asyncio.sleep(DISCOVERY_FILE_SETTLE_S)
                if _mark(self._path) == mark:
                    read = mark
                    self._read(say)
            await asyncio.sleep(DISCOVERY_FILE_EVERY_S)

    async def leave(self) -> None:
        """Do nothing: whoever writes the file takes this node off it."""

    def _read(self, say: Callable[[Sequence[Member]], None]) -> None:
        try:
            members = read_members(self._path)
        except SourceError as error:
            self._report.failed(str(error))
            return
        self._report.works()
        say(members)


def read_members(path: str) -> tuple[Member, ...]:
    """Return the members that a file names. Raises `SourceError`."""
    try:
        # Without waiting: else a pipe in the file's place would hold the agent for ever.
        with open(path, "rb", opener=open_at_once) as file:
            data = file.read(DISCOVERY_BYTES_MAX + 1) or b""  # None: a pipe with nothing in it
        if len(data) > DISCOVERY_BYTES_MAX:
            raise SourceError(f"{path} has more than {DISCOVERY_BYTES_MAX} bytes")
        found = _decoded(path, data)
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # TOML, JSON, UTF-8
        raise SourceError(f"{path} cannot be understood: {error}") from error
    entries = found.get("members") if isinstance(found, dict) else None
    if not isinstance(entries, list) or not entries:
        raise SourceError(f'{path} names nobody; write members = ["HOST:PORT", ...]')
    try:
        return distinct(_member(path, entry) for entry in entries)
    except ConfigError as error:
        raise SourceError(f"{path}: {error}") from error


def _decoded(path: str, data: bytes) -> Any:
    if path.endswith(".json"):
        return msgspec.json.decode(data)
    return tomllib.loads(data.decode())


def _member(path: str, entry: Any) -> Member:
    if isinstance(entry, str):
        return check_address(entry, "members")
    if isinstance(entry, dict) and entry.keys() <= {"address", "weight"}:
        address, weight = entry.get("address"), entry.get("weight", 1)
        if isinstance(address, str) and "=" not in address and type(weight) is int:
            return check_address(f"{address}={weight}", "members")
    raise SourceError(
        f'{path}: {str(entry)[:80]!r} is no member; write "HOST:PORT", "HOST:PORT=WEIGHT" or '
        '{address = "HOST:PORT", weight = 1}'
    )


def _mark(path: str) -> _Mark | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ctime_ns, found.st_dev, found.st_ino, found.st_size
