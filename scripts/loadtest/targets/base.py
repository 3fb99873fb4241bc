"""What a load process may ask of a cache, whichever it is: the seam between workload and target.

*Process*: the parent looks at targets (`Target`), load processes talk to them (sessions).
*Invariants*: a target is made from its text alone, so a load process makes its own; nothing here
or in `scripts.loadtest.targets.local` imports grpc; foreign exceptions pass through a session as
they are and are named by `error_class` where they are counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final, Protocol

import msgspec

if TYPE_CHECKING:
    import psutil

TIMEOUT: Final = "timeout"


class TargetError(Exception):
    """A target cannot be tested: unreachable, or it lacks what is asked of it. A sentence."""


class SessionOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What a session must know of the workload."""

    group: str
    concurrency: int  # of this process: how many connections it may need
    timeout_s: float


class ServerProcess(msgspec.Struct, frozen=True):
    """A process of the server, found on this machine."""

    role: str
    process: psutil.Process


class Counters(msgspec.Struct, frozen=True, kw_only=True):
    """What a server counts by itself, from its start."""

    missed: int  # keys that were loaded, or waited for a load


class SyncSession(Protocol):
    """One process's, or one thread's, way to a target that blocks."""

    not_found: type[BaseException]  # what `get` raises for a key that is not there, if it does

    def get(self, key: bytes, /) -> object:
        """Return the value; None, or `not_found` raised: there is none."""

    def set(self, key: bytes, value: bytes, ttl_s: float | None) -> None:
        """Store."""

    def delete(self, key: bytes) -> None:
        """Remove; no error where it was not there."""

    def get_many(self, keys: Sequence[bytes]) -> Sequence[bytes]:
        """Read distinct keys; return those that came without a value."""

    def set_many(self, items: Mapping[bytes, bytes], ttl_s: float | None) -> None:
        """Store all."""

    def delete_many(self, keys: Sequence[bytes]) -> None:
        """Remove all."""

    def memory_hits(self) -> int | None:
        """Return how many gets of this process its memory answered so far; None: not known."""

    def close(self) -> None:
        """Disconnect."""


class AsyncSession(Protocol):
    """One process's way to a target on its event loop; made and used in that loop."""

    not_found: type[BaseException]

    async def get(self, key: bytes, /) -> object:
        """As `SyncSession.get`."""

    async def set(self, key: bytes, value: bytes, ttl_s: float | None) -> None:
        """Store."""

    async def delete(self, key: bytes) -> None:
        """Remove; no error where it was not there."""

    async def get_many(self, keys: Sequence[bytes]) -> Sequence[bytes]:
        """Read distinct keys; return those that came without a value."""

    async def set_many(self, items: Mapping[bytes, bytes], ttl_s: float | None) -> None:
        """Store all."""

    async def delete_many(self, keys: Sequence[bytes]) -> None:
        """Remove all."""

    async def memory_hits(self) -> int | None:
        """As `SyncSession.memory_hits`."""

    async def close(self) -> None:
        """Disconnect."""


class Target(Protocol):
    """One cache under test."""

    name: str  # as it was given, shown everywhere
    client: str  # the client and its version, for the report
    server: str  # what it says of itself; known after `check`
    concurrent: str  # "async" or "threads": how the client does more than one thing at a time

    def check(self, options: SessionOptions) -> None:
        """Ask the target something. Raises `TargetError`: a sentence with a remedy."""

    def groups(self) -> list[str]:
        """Return the names of its groups, where it can be asked without knowing one."""

    def loads_misses(self) -> bool:
        """Whether the target itself loads what it lacks; known after `check`."""

    def counters(self) -> Counters | None:
        """Return the server's own counts; None where it has none to tell. Never raises."""

    def processes(self) -> list[ServerProcess]:
        """Return the server's processes where they run on this machine. Never raises."""

    def open(self, options: SessionOptions) -> SyncSession:
        """Return a session that blocks."""

    async def open_async(self, options: SessionOptions) -> AsyncSession:
        """Return a session for the running loop; raises NotImplementedError for threads."""

    def close(self) -> None:
        """Give up what `check` and `counters` hold."""


def error_class(error: BaseException) -> str:
    """Name an error as it is counted: all clients' timeouts alike, the rest by its class."""
    name = type(error).__name__
    if isinstance(error, TimeoutError) or "Timeout" in name:
        return TIMEOUT
    return name


def sentence_of(error: BaseException) -> str:
    """Return an error as one line, its class first, not longer than a screen."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:400] if text else type(error).__name__
