"""Getters: what the user gives to load a value, made uniform for whoever runs it.

*Process*: the one that runs getters: a worker, a process in single-instance mode, or an attached
process whose node is gone. *Invariants*:

- A getter is given a key as str where the key's bytes are valid UTF-8, and as bytes otherwise,
  in every mode, whatever type the asker used: ``get(b"Tom")`` and ``get("Tom")`` are one key.
- It comes out as the value's bytes, as None for a key that does not exist (``KeyError``, a nested
  `KeyNotFoundError` included), or as a `LoadError` with the getter's exception as its cause.
- KeyboardInterrupt, SystemExit and cancellation pass through as they are: whoever runs the
  getter decides what they mean there.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, Final, Protocol, runtime_checkable

from kamacache.config import GroupSpec
from kamacache.errors import ConfigError, KeyTooLongError, LoadError
from kamacache.limits import KEY_BYTES_MAX

Key = str | bytes
Loaded = bytes | None  # the encoded value; None: there is no such key
GetterFunction = Callable[[Any], Any]
Hook = Callable[[], Any]


@runtime_checkable
class Loadable(Protocol):
    """A group as the process that runs its getter sees it; `kamacache.groups.Group` is one.

    Each load raises nothing but `LoadError`, and what passes through (see the module). Of the
    two forms only the one that ``is_async`` names may be called.
    """

    @property
    def spec(self) -> GroupSpec:
        """The group's settings."""

    @property
    def is_async(self) -> bool:
        """Whether the getter is awaited (`aload`) or called (`load`)."""

    @property
    def has_getter(self) -> bool:
        """Whether there is anything to load with; `getter_many` alone counts."""

    @property
    def has_getter_many(self) -> bool:
        """Whether many keys can be loaded by one call."""

    def load(self, key: bytes) -> Loaded:
        """Call the getter; blocks as long as it does."""

    async def aload(self, key: bytes) -> Loaded:
        """Await the getter."""

    def load_many(self, keys: Sequence[bytes]) -> dict[bytes, Loaded]:
        """Call ``getter_many``; the result has every key asked for, None where there is none."""

    async def aload_many(self, keys: Sequence[bytes]) -> dict[bytes, Loaded]:
        """Await ``getter_many``."""

    def run_worker_start(self) -> Awaitable[None] | None:
        """Run ``on_worker_start``; an awaitable where the hook is async: await it on the loop."""

    def run_worker_stop(self) -> Awaitable[None] | None:
        """Run ``on_worker_stop``; likewise."""


_STR: Final = frozenset({str})
_BYTES: Final = frozenset({bytes})


def key_bytes(key: Key) -> bytes:
    """Return a key's bytes, checked.

    Raises `TypeError` for a key that is neither str nor bytes, `ValueError` for text that UTF-8
    cannot write (a lone surrogate), `KeyTooLongError` outside 1 to `KEY_BYTES_MAX` bytes.
    """
    if isinstance(key, str):
        try:
            data = key.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the key has a lone surrogate at index {error.start}, which UTF-8 cannot write; "
                "give such a key as bytes"
            ) from error
    elif isinstance(key, bytes):
        data = bytes(key)  # a subclass must not reach the store with its own __eq__ or __hash__
    else:
        raise TypeError(f"a key is str or bytes, not {type(key).__name__}")
    if not 0 < len(data) <= KEY_BYTES_MAX:
        what = "empty" if not data else f"{len(data)} bytes long"
        raise KeyTooLongError(
            f"the key is {what}; a key has 1 to {KEY_BYTES_MAX} bytes",
            key_bytes=len(data),
            limit_bytes=KEY_BYTES_MAX,
        )
    return data


def keys_bytes(keys: Iterable[Key]) -> list[bytes]:
    """Return the bytes of several keys, checked as by `key_bytes`; many at the cost of few."""
    several = list(keys)
    kinds = set(map(type, several))
    if kinds == _STR:
        try:
            data = list(map(str.encode, several))  # type: ignore[arg-type]
        except UnicodeEncodeError:
            data = []
    else:
        data = several if kinds == _BYTES else []  # type: ignore[assignment]
    lengths = set(map(len, data))
    if not lengths or min(lengths) < 1 or max(lengths) > KEY_BYTES_MAX:
        return [key_bytes(key) for key in several]  # says what is wrong with one
    return data


def key_for_getter(key: bytes) -> Key:
    """Return what a getter is given for a key: str where the bytes are UTF-8, else the bytes."""
    try:
        return key.decode()
    except UnicodeDecodeError:
        return key


def is_async_callable(function: object) -> bool:
    """Tell whether calling this gives a coroutine: async def, a partial or an object of one."""
    while isinstance(function, functools.partial):
        function = function.func
    if isinstance(function, type):
        return False  # calling a class makes an instance, whatever calling that would give
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004 -- the method itself is looked at
    )


class Getter:
    """A group's ``getter`` and ``getter_many``, and the encoder of what they return.

    Where only ``getter_many`` is given, single keys are loaded with it too.
    """

    __slots__ = ("_encode", "_group", "_many", "_one", "is_async")

    def __init__(
        self,
        group: str,
        getter: GetterFunction | None,
        getter_many: GetterFunction | None,
        encode: Callable[[Any], bytes],
    ) -> None:
        for setting, function in (("getter", getter), ("getter_many", getter_many)):
            if function is not None and not callable(function):
                raise ConfigError(
                    f"group {group!r}: {setting} is {function!r}, which cannot be called",
                    setting=setting,
                    value=repr(function),
                )
        kinds = {is_async_callable(f) for f in (getter, getter_many) if f is not None}
        if len(kinds) > 1:
            raise ConfigError(
                f"group {group!r}: getter and getter_many must both be async or both not",
                setting="getter_many",
            )
        self.is_async = True in kinds
        self._group = group
        self._one = getter
        self._many = getter_many
        self._encode = encode

    @property
    def present(self) -> bool:
        """Whether there is anything to load with."""
        return self._one is not None or self._many is not None

    @property
    def has_many(self) -> bool:
        """Whether many keys can be loaded by one call."""
        return self._many is not None

    def load(self, key: bytes) -> Loaded:
        """Call the getter for one key."""
        if self._one is None:
            return self.load_many([key])[key]
        try:
            value = self._one(key_for_getter(key))
        except KeyError:
            return None
        except Exception as error:
            raise self._failed(error, key) from error
        return self._encoded(value, key)

    async def aload(self, key: bytes) -> Loaded:
        """Await the getter for one key."""
        if self._one is None:
            return (await self.aload_many([key]))[key]
        try:
            value = await self._one(key_for_getter(key))
        except KeyError:
            return None
        except Exception as error:
            raise self._failed(error, key) from error
        return self._encoded(value, key)

    def load_many(self, keys: Sequence[bytes]) -> dict[bytes, Loaded]:
        """Call ``getter_many``; keys that it leaves out do not exist."""
        assert self._many is not None
        try:
            found = self._many([key_for_getter(key) for key in keys])
        except Exception as error:
            raise self._failed(error, None) from error
        return self._matched(found, keys)

    async def aload_many(self, keys: Sequence[bytes]) -> dict[bytes, Loaded]:
        """Await ``getter_many``."""
        assert self._many is not None
        try:
            found = await self._many([key_for_getter(key) for key in keys])
        except Exception as error:
            raise self._failed(error, None) from error
        return self._matched(found, keys)

    def _matched(self, found: object, keys: Sequence[bytes]) -> dict[bytes, Loaded]:
        if not isinstance(found, Mapping):
            if inspect.iscoroutine(found):
                found.close()
            raise LoadError(
                f"group {self._group!r}: getter_many returned {type(found).__name__}; it must "
                "return a dict from key to value",
                group=self._group,
                cause_type="TypeError",
            )
        values = {key.encode() if isinstance(key, str) else key: v for key, v in found.items()}
        return {key: self._encoded(values[key], key) if key in values else None for key in keys}

    def _encoded(self, value: object, key: bytes) -> bytes:
        if inspect.isawaitable(value):
            if inspect.iscoroutine(value):
                value.close()  # or Python warns that it was never awaited
            raise LoadError(
                f"group {self._group!r}: the getter returned an awaitable; declare it async def",
                group=self._group,
                key=key,
                cause_type="TypeError",
            )
        try:
            return self._encode(value)
        except Exception as error:
            raise LoadError(
                f"group {self._group!r}: the getter's value cannot be kept: {error}",
                group=self._group,
                key=key,
                cause_type=type(error).__name__,
            ) from error

    def _failed(self, error: Exception, key: bytes | None) -> LoadError:
        # A nested LoadError keeps the type that began it: "cycle" stays "cycle" on the way up.
        cause_type = error.cause_type if isinstance(error, LoadError) else None
        which = "getter" if key is not None else "getter_many"
        return LoadError(
            f"group {self._group!r}: the {which} raised {type(error).__name__}: {error}",
            group=self._group,
            key=key,
            cause_type=cause_type or type(error).__name__,
        )
