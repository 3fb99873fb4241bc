"""RemoteGroup: a cluster's group as a client holds it; keys, values and codecs end here.

*Process*: the application's. It has the methods of `kamacache.groups.Group` but for the getter,
which is the cluster's, and for ``in``, which would have to load. *Invariants*: what goes down is
bytes, checked; keys come back as they were given.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final, TypeVar

from kamacache import codecs
from kamacache.client.operations import Delete, DeleteMany, Get, GetMany, Set, SetMany, Stats
from kamacache.config import seconds_to_ms, text
from kamacache.errors import (
    ConfigError,
    DeadlineExceededError,
    KeyNotFoundError,
    LoadError,
    NodeUnavailableError,
    ValueTooLargeError,
)
from kamacache.getters import Key, key_bytes
from kamacache.limits import VALUE_BYTES_CEILING

if TYPE_CHECKING:
    from kamacache.client.client import Client

K = TypeVar("K", str, bytes, str | bytes)
Items = Mapping[str, Any] | Mapping[bytes, Any] | Mapping[Key, Any]


class _Raise:
    def __repr__(self) -> str:
        return "<raise KeyNotFoundError>"


RAISE: Final = _Raise()
_BYTES: Final = codecs.BytesCodec()


class RemoteGroup:
    """A group of the cluster; `kamacache.Client.group` makes it.

    Any thread and any event loop may use it. ``group[key]``, ``group[key] = value`` and
    ``del group[key]`` are get, set and delete. Without ``timeout`` (seconds) a call waits as long
    as the client says.
    """

    __contains__ = None  # would have to load
    __iter__ = None

    def __init__(self, client: Client, name: str, codec: str | codecs.Codec = _BYTES) -> None:
        self._client: Final = client
        self._name: Final = text("name", name)
        if not name:
            raise ConfigError("the group's name is empty", setting="name", value=name)
        resolved = codec if codec is _BYTES else codecs.resolve(codec)
        self._encode_value = codecs.encoder(resolved)
        self._decode = codecs.decoder(resolved)

    @property
    def name(self) -> str:
        """The group's name."""
        return self._name

    def __repr__(self) -> str:
        return f"<kamacache.RemoteGroup {self._name!r} of {self._client!r}>"

    # -- one key --------------------------------------------------------------------------------

    def get(self, key: Key, default: Any = RAISE, *, timeout: float | None = None) -> Any:
        """Return a key's value, loaded if need be.

        Raises `KeyNotFoundError` (a KeyError) for a key that the cluster's getter does not know,
        or returns ``default`` if given. Raises `LoadError` where the getter fails,
        `DeadlineExceededError` where ``timeout`` seconds pass, `NodeUnavailableError` where no
        node can be reached, `GroupNotFoundError`, TypeError for a key that is neither str nor
        bytes, ValueError (`KeyTooLongError`) for one that is empty or too long.
        """
        asked = Get(self._name, key_bytes(key))
        self._client._run(asked, timeout)
        return self._answer(key, asked.found, default)

    async def aget(self, key: Key, default: Any = RAISE, *, timeout: float | None = None) -> Any:
        """As `get`."""
        asked = Get(self._name, key_bytes(key))
        await self._client._arun(asked, timeout)
        return self._answer(key, asked.found, default)

    def set(
        self, key: Key, value: Any, *, ttl: float | None = None, timeout: float | None = None
    ) -> None:
        """Keep a value, for ``ttl`` seconds or as long as the group says.

        Raises what the codec raises for a value that it cannot take (TypeError),
        `ValueTooLargeError`. After any other error the value may have been kept.
        """
        self._client._run(self._setting(key, value, ttl), timeout)

    async def aset(
        self, key: Key, value: Any, *, ttl: float | None = None, timeout: float | None = None
    ) -> None:
        """As `set`."""
        await self._client._arun(self._setting(key, value, ttl), timeout)

    def delete(self, key: Key, *, timeout: float | None = None) -> bool:
        """Drop a key from the cache; tell whether a value was there."""
        asked = Delete(self._name, key_bytes(key))
        self._client._run(asked, timeout)
        return asked.found

    async def adelete(self, key: Key, *, timeout: float | None = None) -> bool:
        """As `delete`."""
        asked = Delete(self._name, key_bytes(key))
        await self._client._arun(asked, timeout)
        return asked.found

    # -- many keys ------------------------------------------------------------------------------

    def get_many(self, keys: Iterable[K], *, timeout: float | None = None) -> dict[K, Any]:
        """Return a dict of those found, by the keys as they were given.

        The keys are asked of their owners side by side. Where loads fail, the others are finished,
        then the first error is raised.
        """
        given = _by_bytes(keys)
        asked = GetMany(self._name, given)
        if given:
            self._client._run(asked, timeout)
        return self._answers(given, asked.found)

    async def aget_many(self, keys: Iterable[K], *, timeout: float | None = None) -> dict[K, Any]:
        """As `get_many`."""
        given = _by_bytes(keys)
        asked = GetMany(self._name, given)
        if given:
            await self._client._arun(asked, timeout)
        return self._answers(given, asked.found)

    def set_many(
        self, items: Items, *, ttl: float | None = None, timeout: float | None = None
    ) -> None:
        """Keep several values; nothing is sent unless all can be encoded.

        After an error some may have been kept.
        """
        asked = self._setting_many(items, ttl)
        if asked.keys():
            self._client._run(asked, timeout)

    async def aset_many(
        self, items: Items, *, ttl: float | None = None, timeout: float | None = None
    ) -> None:
        """As `set_many`."""
        asked = self._setting_many(items, ttl)
        if asked.keys():
            await self._client._arun(asked, timeout)

    def delete_many(self, keys: Iterable[K], *, timeout: float | None = None) -> int:
        """Drop several keys; return how many had a value."""
        asked = DeleteMany(self._name, _by_bytes(keys))
        if asked.keys():
            self._client._run(asked, timeout)
        return asked.deleted

    async def adelete_many(self, keys: Iterable[K], *, timeout: float | None = None) -> int:
        """As `delete_many`."""
        asked = DeleteMany(self._name, _by_bytes(keys))
        if asked.keys():
            await self._client._arun(asked, timeout)
        return asked.deleted

    def stats(self, *, timeout: float | None = None) -> dict[str, Any]:
        """Return the group's counters, summed over the nodes that answer.

        ``nodes`` is how many the cluster has, ``nodes_answered`` how many of them are in the sums.
        Raises `NodeUnavailableError` where none answers.
        """
        asked = Stats(self._name)
        try:
            nodes = self._client._run(asked, timeout, everywhere=True)
        except (NodeUnavailableError, DeadlineExceededError):
            if not asked.answers:
                raise
            nodes = len(self._client.addresses)
        return _sums(asked, nodes)

    async def astats(self, *, timeout: float | None = None) -> dict[str, Any]:
        """As `stats`."""
        asked = Stats(self._name)
        try:
            nodes = await self._client._arun(asked, timeout, everywhere=True)
        except (NodeUnavailableError, DeadlineExceededError):
            if not asked.answers:
                raise
            nodes = len(self._client.addresses)
        return _sums(asked, nodes)

    # -- like a dict ----------------------------------------------------------------------------

    def __getitem__(self, key: Key) -> Any:
        return self.get(key)

    def __setitem__(self, key: Key, value: Any) -> None:
        self.set(key, value)

    def __delitem__(self, key: Key) -> None:
        if not self.delete(key):
            raise self._not_found(key)

    # -- keys and values ------------------------------------------------------------------------

    def _setting(self, key: Key, value: Any, ttl: float | None) -> Set:
        return Set(self._name, key_bytes(key), self._encode(value), seconds_to_ms(ttl, "ttl"))

    def _setting_many(self, items: Items, ttl: float | None) -> SetMany:
        if not isinstance(items, Mapping):
            raise TypeError(f"set_many takes a dict, not {type(items).__name__}")
        data = {key_bytes(key): self._encode(value) for key, value in items.items()}
        return SetMany(self._name, data, seconds_to_ms(ttl, "ttl"))

    def _encode(self, value: Any) -> bytes:
        data = self._encode_value(value)
        if len(data) > VALUE_BYTES_CEILING:
            raise ValueTooLargeError(
                f"the value has {len(data)} bytes; no group takes more than {VALUE_BYTES_CEILING}",
                value_bytes=len(data),
                limit_bytes=VALUE_BYTES_CEILING,
                group=self._name,
            )
        return data

    def _answer(self, key: Key, found: bytes | None, default: Any) -> Any:
        if found is not None:
            return self._value(found)
        if default is RAISE:
            raise self._not_found(key)
        return default

    def _answers(
        self, given: Mapping[bytes, list[K]], found: Mapping[bytes, bytes]
    ) -> dict[K, Any]:
        return {
            key: self._value(found[data])
            for data, keys in given.items()
            if data in found
            for key in keys
        }

    def _value(self, data: bytes) -> Any:
        if self._decode is None:
            return data
        try:
            return self._decode(data)
        except Exception as error:
            raise LoadError(
                f"group {self._name!r}: the bytes kept are not what this codec writes "
                f"({type(error).__name__}: {error}); were they set under another codec?",
                group=self._name,
                cause_type=type(error).__name__,
            ) from error

    def _not_found(self, key: Key) -> KeyNotFoundError:
        data = key_bytes(key)
        return KeyNotFoundError(
            f"group {self._name!r} has no such key ({len(data)} bytes)", group=self._name, key=data
        )


def _by_bytes(keys: Iterable[K]) -> dict[bytes, list[K]]:
    """Return the keys as given, by their bytes: "Tom" and b"Tom" are one key."""
    if isinstance(keys, str | bytes):
        raise TypeError(f"give several keys, not one {type(keys).__name__}")
    given: dict[bytes, list[K]] = {}
    for key in dict.fromkeys(keys):
        given.setdefault(key_bytes(key), []).append(key)
    return given


def _sums(asked: Stats, nodes: int) -> dict[str, Any]:
    sums: dict[str, Any] = {}
    for answer in asked.answers:
        for name, value in answer.items():
            sums[name] = sums.get(name, 0) + value
    return {**sums, "nodes": nodes, "nodes_answered": len(asked.answers)}
