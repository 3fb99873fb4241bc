"""A target that does nothing: what the load test itself costs is measured on it.

*Process*: load processes, before their first round; and tests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

VALUE = b"v" * 100


class NullSession:
    """Answers every request at once, without a server."""

    not_found: type[BaseException] = KeyError

    def get(self, key: bytes, /) -> object:
        """Return a value."""
        return VALUE

    def set(self, key: bytes, value: bytes, ttl_s: float | None) -> None:
        """Do nothing."""

    def delete(self, key: bytes) -> None:
        """Do nothing."""

    def get_many(self, keys: Sequence[bytes]) -> Sequence[bytes]:
        """Return that none is missing."""
        return ()

    def set_many(self, items: Mapping[bytes, bytes], ttl_s: float | None) -> None:
        """Do nothing."""

    def delete_many(self, keys: Sequence[bytes]) -> None:
        """Do nothing."""

    def memory_hits(self) -> int | None:
        """Return that there is no memory."""
        return None

    def close(self) -> None:
        """Do nothing."""


class AsyncNullSession:
    """As `NullSession`, awaited."""

    not_found: type[BaseException] = KeyError

    async def get(self, key: bytes, /) -> object:
        """Return a value."""
        return VALUE

    async def set(self, key: bytes, value: bytes, ttl_s: float | None) -> None:
        """Do nothing."""

    async def delete(self, key: bytes) -> None:
        """Do nothing."""

    async def get_many(self, keys: Sequence[bytes]) -> Sequence[bytes]:
        """Return that none is missing."""
        return ()

    async def set_many(self, items: Mapping[bytes, bytes], ttl_s: float | None) -> None:
        """Do nothing."""

    async def delete_many(self, keys: Sequence[bytes]) -> None:
        """Do nothing."""

    async def memory_hits(self) -> int | None:
        """Return that there is no memory."""
        return None

    async def close(self) -> None:
        """Do nothing."""
