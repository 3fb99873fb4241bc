"""What the ``kamacache`` command asks: a node behind a run directory, or (in `client`) an address.

*Process*: the command's own, short-lived.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Protocol

from kamacache.store.entries import Entry

if TYPE_CHECKING:
    from kamacache.local.attached import AttachedEngine


class Target(Protocol):
    """A node, however it is reached. Raises `KamaCacheError`."""

    def groups(self) -> list[str]:
        """Return the names of the node's groups."""

    def get(self, group: str, key: bytes) -> Entry | None:
        """Return the entry; None: not found."""

    def set(self, group: str, key: bytes, value: bytes, ttl_ms: int | None) -> None:
        """Store."""

    def delete(self, group: str, key: bytes) -> bool:
        """Remove; return whether it was there."""

    def stats(self, group: str) -> dict[str, Any]:
        """Return the group's counters."""


class LocalTarget:
    """The node of a run directory, attached to."""

    def __init__(self, run_dir: str, timeout_s: float) -> None:
        self._run_dir = run_dir
        self._deadline_s = time.monotonic() + timeout_s
        self._engines: dict[str, AttachedEngine] = {}

    def groups(self) -> list[str]:
        """Return the names of the node's groups."""
        from kamacache.rundir.description import read_description

        return sorted(spec.name for spec in read_description(self._run_dir).groups)

    def get(self, group: str, key: bytes) -> Entry | None:
        """Read memory, then ask the worker."""
        engine = self._engine(group)
        value: object = engine.lookup(key)
        if value is None:
            value = engine.get(key, self._deadline_s)
        if not isinstance(value, bytes):
            return None
        entry = engine.lookup_entry(key)
        # Where it was replaced, expired or evicted since, its TTL is not known.
        return entry if isinstance(entry, Entry) and entry.value == value else Entry(value, None, 0)

    def set(self, group: str, key: bytes, value: bytes, ttl_ms: int | None) -> None:
        """Store."""
        self._engine(group).set(key, value, ttl_ms, self._deadline_s)

    def delete(self, group: str, key: bytes) -> bool:
        """Remove; return whether it was there."""
        return self._engine(group).delete(key, self._deadline_s)

    def stats(self, group: str) -> dict[str, Any]:
        """Return the group's counters."""
        return self._engine(group).stats()

    def _engine(self, group: str) -> AttachedEngine:
        from kamacache.local.attach import attach_group

        if group not in self._engines:
            self._engines[group] = attach_group(self._run_dir, group)
        return self._engines[group]
