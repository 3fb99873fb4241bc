"""The seam between a Group and what answers it: this process's memory, or a node.

*Process*: every one that holds a Group. *Owns*: which engine new groups get (`use_factory`) and
the set of live groups, so that `attach` and `detach` can turn them over. The set is weak: a group
that the program dropped is gone, and a test may make a group of the same name again.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from kamacache.getters import Loadable
from kamacache.store.reader import Answer, GetEnds


class Engine(Protocol):
    """What answers a group's calls.

    ``deadline_s`` is a time.monotonic(), or None where the asker named no time: the engine then
    takes what the group's load timeout allows, and what is left of the call that this one is
    nested in. None also tells it that a getter may run in the caller's thread, where no one
    could interrupt it.
    Keys are checked already (`kamacache.getters.key_bytes`), values encoded. Each method raises
    `KamaCacheError` only.
    """

    @property
    def lookup(self) -> Callable[[str | bytes], Answer]:
        """Near cache and memory only, never blocks; None: ask by `get`.

        A key of a wrong type may raise TypeError or AttributeError, a wrong str UnicodeError.
        """

    def lookup_many(self, keys: Sequence[str | bytes]) -> list[Answer]:
        """As `lookup` for several keys, in their order."""

    @property
    def direct(self) -> Callable[..., Any] | None:
        """The group's own ``get`` in one frame, made of the group's `EngineUser.get_ends`."""

    def get(self, key: bytes, deadline_s: float | None) -> bytes | None:
        """Return the value, loaded if need be; None: not found."""

    def get_many(self, keys: Sequence[bytes], deadline_s: float | None) -> dict[bytes, bytes]:
        """Return the values of those found; one failed load raises after the others are kept."""

    def set(self, key: bytes, value: bytes, ttl_ms: int | None, deadline_s: float | None) -> None:
        """Keep a value; ttl_ms None: the group's."""

    def set_many(
        self, items: Mapping[bytes, bytes], ttl_ms: int | None, deadline_s: float | None
    ) -> None:
        """Keep several values."""

    def delete(self, key: bytes, deadline_s: float | None) -> bool:
        """Drop a key; tell whether a value was there."""

    def delete_many(self, keys: Sequence[bytes], deadline_s: float | None) -> int:
        """Drop several keys; return how many had a value."""

    def stats(self, deadline_s: float | None = None) -> dict[str, Any]:
        """Return the counters."""

    async def aget(self, key: bytes, deadline_s: float | None) -> bytes | None:
        """As `get`."""

    async def aget_many(
        self, keys: Sequence[bytes], deadline_s: float | None
    ) -> dict[bytes, bytes]:
        """As `get_many`."""

    async def aset(
        self, key: bytes, value: bytes, ttl_ms: int | None, deadline_s: float | None
    ) -> None:
        """As `set`."""

    async def aset_many(
        self, items: Mapping[bytes, bytes], ttl_ms: int | None, deadline_s: float | None
    ) -> None:
        """As `set_many`."""

    async def adelete(self, key: bytes, deadline_s: float | None) -> bool:
        """As `delete`."""

    async def adelete_many(self, keys: Sequence[bytes], deadline_s: float | None) -> int:
        """As `delete_many`."""

    async def astats(self, deadline_s: float | None = None) -> dict[str, Any]:
        """As `stats`."""

    def close(self) -> None:
        """Give up what the engine holds; no call may follow."""


class EngineUser(Loadable, Protocol):
    """A Group as the makers of engines see it."""

    @property
    def fallback(self) -> str:
        """What an attached group does without a node: "getter" or "error"."""

    @property
    def load_bounded(self) -> bool:
        """Whether the user named a load_timeout, which then holds in the caller's thread too."""

    @property
    def get_ends(self) -> GetEnds | None:
        """How ``get`` ends where memory has no value; None: it has more to do for a hit."""

    @property
    def has_worker_hooks(self) -> bool:
        """Whether there is an on_worker_start or on_worker_stop."""

    @property
    def near_cache_items(self) -> int:
        """Entries of the near cache; 0 turns it off."""

    @property
    def near_cache_bytes(self) -> int:
        """Bytes of the near cache."""

    def _use(self, engine: Engine | None) -> None:
        """Answer by this engine from now on; None: by what the process's default gives."""


EngineFactory = Callable[[EngineUser], Engine]

_lock = threading.Lock()
_live: weakref.WeakSet[EngineUser] = weakref.WeakSet()
_factory: EngineFactory | None = None
_chosen = False


def join(user: EngineUser) -> None:
    """Take a new group into the set of live ones."""
    with _lock:
        _live.add(user)


def live() -> list[EngineUser]:
    """Return the groups that exist now."""
    with _lock:
        return list(_live)


def factory() -> EngineFactory | None:
    """Return what makes engines in this process; None: single-instance mode."""
    return _factory


def chosen() -> bool:
    """Tell whether this process attached or detached: then the environment says no more."""
    return _chosen


def use_factory(make: EngineFactory | None) -> None:
    """Let every group, the live and the coming, be answered by engines of this factory.

    None goes back to single-instance mode. A live group starts its new engine at its next use;
    calls already under way end with the old one.
    """
    global _factory, _chosen
    _factory = make
    _chosen = True
    for user in live():
        user._use(None)


def _after_fork_in_child() -> None:
    global _lock
    _lock = threading.Lock()  # another thread may have held it


os.register_at_fork(after_in_child=_after_fork_in_child)
