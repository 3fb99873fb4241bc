"""What a client can ask, as messages, and what the replies add up to.

*Process*: the application's. An operation names keys; `kamacache.client.exchange` decides which of
them travel together, and hands every reply back with the keys that it answers. ``pb`` is the module
of the messages, given in since importing it is for whoever makes the first call.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol


class Operation(Protocol):
    """One call of the user's."""

    group: str
    method: str  # of the Cache service

    def keys(self) -> Iterable[bytes]:
        """Return all its keys."""

    def size_bytes(self, key: bytes) -> int:
        """Return what a key brings into a message."""

    def request(self, pb: Any, keys: Sequence[bytes]) -> Any:
        """Return the message for some of its keys: for one, where the method takes one."""

    def take(self, keys: Sequence[bytes], reply: Any) -> None:
        """Add a reply to the result."""


class _One:
    """Of one key."""

    def __init__(self, group: str, key: bytes) -> None:
        self.group = group
        self._key = key

    def keys(self) -> Iterable[bytes]:
        """Return the key."""
        return (self._key,)

    def size_bytes(self, key: bytes) -> int:
        """Return 0: one key is one message, however large."""
        return 0


class Get(_One):
    """The value of one key; None: not found."""

    method = "Get"
    found: bytes | None = None

    def request(self, pb: Any, keys: Sequence[bytes]) -> Any:
        """Return a GetRequest."""
        return pb.GetRequest(group=self.group, key=self._key)

    def take(self, keys: Sequence[bytes], reply: Any) -> None:
        """Keep the value."""
        self.found = reply.value if reply.found else None


class Set(_One):
    """A value for one key."""

    method = "Set"

    def __init__(self, group: str, key: bytes, value: bytes, ttl_ms: int | None) -> None:
        super().__init__(group, key)
        self._value = value
        self._ttl_ms = ttl_ms

    def request(self, pb: Any, keys: Sequence[bytes]) -> Any:
        """Return a SetRequest."""
        return pb.SetRequest(
            group=self.group, key=self._key, value=self._value, ttl_ms=self._ttl_ms
        )

    def take(self, keys: Sequence[bytes], reply: Any) -> None:
        """Nothing to keep."""


class Delete(_One):
    """One key dropped."""

    method = "Delete"
    found = False

    def request(self, pb: Any, keys: Sequence[bytes]) -> Any:
        """Return a DeleteRequest."""
        return pb.DeleteRequest(group=self.group, key=self._key)

    def take(self, keys: Sequence[bytes], reply: Any) -> None:
        """Keep whether it was there."""
        self.found = reply.found


class _Many:
    """Of distinct keys."""

    def __init__(self, group: str, keys: Iterable[bytes]) -> None:
        self.group = group
        self._keys = keys

    def keys(self) -> Iterable[bytes]:
        """Return the keys."""
        return self._keys

    def size_bytes(self, key: bytes) -> int:
        """Return the key's length."""
        return len(key)


class GetMany(_Many):
    """The values of those found."""

    method = "BatchGet"

    def __init__(self, group: str, keys: Iterable[bytes]) -> None:
        super().__init__(group, keys)
        self.found: dict[bytes, bytes] = {}

    def request(self, pb: Any, keys: Sequence[bytes]) -> Any:
        """Return a BatchGetRequest."""
        return pb.BatchGetRequest(group=self.group, keys=keys)

    def take(self, keys: Sequence[bytes], reply: Any) -> None:
        """Add the values."""
        self.found.update(zip(keys, reply.values, strict=True))
        for index in reply.missing:
            del self.found[keys[index]]


class SetMany(_Many):
    """Values for keys."""

    method = "BatchSet"

    def __init__(self, group: str, items: dict[bytes, bytes], ttl_ms: int | None) -> None:
        super().__init__(group, items)
        self._items = items
        self._ttl_ms = ttl_ms

    def size_bytes(self, key: bytes) -> int:
        """Return the lengths of key and value."""
        return len(key) + len(self._items[key])

    def request(self, pb: Any, keys: Sequence[bytes]) -> Any:
        """Return a BatchSetRequest."""
        values = [self._items[key] for key in keys]
        return pb.BatchSetRequest(group=self.group, keys=keys, values=values, ttl_ms=self._ttl_ms)

    def take(self, keys: Sequence[bytes], reply: Any) -> None:
        """Nothing to keep."""


class DeleteMany(_Many):
    """Keys dropped."""

    method = "BatchDelete"
    deleted = 0

    def request(self, pb: Any, keys: Sequence[bytes]) -> Any:
        """Return a BatchDeleteRequest."""
        return pb.BatchDeleteRequest(group=self.group, keys=keys)

    def take(self, keys: Sequence[bytes], reply: Any) -> None:
        """Count those that were there."""
        self.deleted += reply.deleted


class Stats:
    """The counters of a group, from each node: no keys."""

    method = "Stats"

    def __init__(self, group: str) -> None:
        self.group = group
        self.answers: list[dict[str, int]] = []

    def keys(self) -> Iterable[bytes]:
        """Return none."""
        return ()

    def size_bytes(self, key: bytes) -> int:
        """Return 0."""
        return 0

    def request(self, pb: Any, keys: Sequence[bytes]) -> Any:
        """Return a StatsRequest."""
        return pb.StatsRequest(group=self.group)

    def take(self, keys: Sequence[bytes], reply: Any) -> None:
        """Keep a node's counters."""
        self.answers += [dict(group.values) for group in reply.groups]
