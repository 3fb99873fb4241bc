"""The app of the nodes of cluster tests: getters over one database, every load written down.

*Process*: the workers of all nodes of one cluster, and its drivers. `PLACE` in the environment is
the folder of `tests.cluster_nodes.Cluster`, `NODE` this node's address. What a load does is in the
key's first part: ``none-`` is not found, ``bad-`` raises, ``gate-`` waits for a file. Files in
the folder ``knobs`` make loads slower, for all nodes or one: ``delay``, ``delay-127.0.0.2:12001``.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import kamacache

PLACE = "KAMATEST_PLACE"
NODE = "KAMATEST_NODE"
GATE_S = 30.0
MIRROR_TTL_S = 5.0  # the default of a group
SHORT_MIRROR_TTL_S = 1.0  # of the group "short" and of "register"


@dataclass(frozen=True)
class Load:
    """One call of a getter, as it was written down; ``began_s`` is CLOCK_MONOTONIC."""

    node: str
    pid: int
    group: str
    key: str
    began_s: float


class Database:
    """A file a key, replaced whole, so that a read has one write's value; and the list of loads.

    ``default`` values exist for keys that were never written, but for those of group "register".
    """

    def __init__(self, place: Path) -> None:
        self._rows = place / "rows"
        self._knobs = place / "knobs"
        self._gates = place / "gates"
        self._loads = place / "loads"
        for folder in (self._rows, self._knobs, self._gates):
            folder.mkdir(exist_ok=True)

    # -- rows -------------------------------------------------------------------------------------

    def write(self, key: str, value: bytes | None) -> None:
        """Store a value, or None: the key is gone. Atomic."""
        row = self._row(key)
        if value is None:
            with contextlib.suppress(FileNotFoundError):
                row.unlink()
            return
        new = f"{row}.{os.getpid()}-{threading.get_ident()}"
        with open(new, "wb", buffering=0) as file:
            file.write(value)
        os.replace(new, row)

    def read(self, key: str) -> bytes | None:
        """Return a key's value, None where there is none."""
        try:
            with open(self._row(key), "rb", buffering=0) as file:
                return file.read()
        except FileNotFoundError:
            return None

    def _row(self, key: str) -> Path:
        return self._rows / base64.urlsafe_b64encode(key.encode()).decode()

    # -- loads ------------------------------------------------------------------------------------

    def note(self, group: str, key: str) -> None:
        """Write a load down; one write, whole among those of other processes."""
        line = f"{os.environ.get(NODE, '-')} {os.getpid()} {group} {key} {time.monotonic()}\n"
        with open(self._loads, "ab", buffering=0) as file:
            file.write(line.encode())

    def loads(self, key: str | None = None, *, group: str | None = None) -> list[Load]:
        """Return what was loaded, by all nodes, in time's order."""
        found = []
        text = self._loads.read_text() if self._loads.exists() else ""
        for line in text.splitlines():
            node, pid, of_group, of_key, began_s = line.split(" ")
            if key in (None, of_key) and group in (None, of_group):
                found.append(Load(node, int(pid), of_group, of_key, float(began_s)))
        return found

    # -- knobs ------------------------------------------------------------------------------------

    def delay(self, seconds: float, node: str | None = None) -> None:
        """Let every load last so long, at one node or at all."""
        knob = self._knobs / ("delay" if node is None else f"delay-{node}")
        new = knob.with_name(f"{knob.name}.new")
        new.write_text(str(seconds))
        new.replace(knob)

    def delay_s(self) -> float:
        """Return how long a load lasts in this process."""
        slowest_s = 0.0
        for name in ("delay", f"delay-{os.environ.get(NODE, '-')}"):
            with contextlib.suppress(FileNotFoundError):
                slowest_s = max(slowest_s, float((self._knobs / name).read_text()))
        return slowest_s

    def gate(self, key: str) -> Path:
        """Return the file that a ``gate-`` key's load waits for."""
        return self._gates / key

    def open_gate(self, key: str) -> None:
        """Let the loads of a ``gate-`` key end."""
        self.gate(key).touch()

    def shut(self, key: str, end_s: float) -> bool:
        """Tell whether a load of the key has to wait on."""
        return key.startswith("gate-") and time.monotonic() < end_s and not self.gate(key).exists()


def _default(key: str) -> bytes:
    return b"v-" + key.encode()


def _begun(group: str, key: str) -> bytes | None:
    """Write the load down and return what the database holds at this moment."""
    database.note(group, key)
    if key.startswith("none-"):
        raise KeyError(key)
    if key.startswith("bad-"):
        raise RuntimeError(f"the database says no to {key}")
    return database.read(key)


def _load(group: str, key: str) -> bytes | None:
    value = _begun(group, key)
    delay_s = database.delay_s()
    if delay_s:
        time.sleep(delay_s)  # after the read: what is returned is as old as it can be
    end_s = time.monotonic() + GATE_S
    while database.shut(key, end_s):
        time.sleep(0.005)
    return value


def load(key: str) -> bytes:
    return _load("scores", key) or _default(key)


def load_short(key: str) -> bytes:
    return _load("short", key) or _default(key)


def load_register(key: str) -> bytes:
    value = _load("register", key)
    if value is None:
        raise KeyError(key)
    return value


async def aload(key: str) -> bytes:
    value = _begun("ascores", key)
    await asyncio.sleep(database.delay_s())
    end_s = time.monotonic() + GATE_S
    while database.shut(key, end_s):  # noqa: ASYNC110
        await asyncio.sleep(0.005)
    return value or _default(key)


def load_many(keys: list[str]) -> dict[str, bytes]:
    found = {}
    for key in keys:
        with contextlib.suppress(KeyError):
            found[key] = _begun("batch", key) or _default(key)
    time.sleep(database.delay_s())
    return found


database: Database
groups: list[kamacache.Group] = []

if PLACE in os.environ:
    database = Database(Path(os.environ[PLACE]))
    groups = [
        kamacache.Group("scores", cache_bytes="4MiB", getter=load, negative_ttl=60),
        kamacache.Group("ascores", cache_bytes="2MiB", getter=aload, negative_ttl=60),
        kamacache.Group("batch", cache_bytes="2MiB", getter_many=load_many, negative_ttl=60),
        kamacache.Group(
            "short", cache_bytes="2MiB", getter=load_short, mirror_ttl=SHORT_MIRROR_TTL_S
        ),
        kamacache.Group(
            "register",
            cache_bytes="2MiB",
            getter=load_register,
            negative_ttl=60,
            mirror_ttl=SHORT_MIRROR_TTL_S,
        ),
        kamacache.Group("plain", cache_bytes="16MiB"),
    ]
