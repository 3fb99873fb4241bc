"""Every error that KamaCache raises, with the values that explain it.

*Process*: all. *Invariant*: an error crosses a process boundary as ``(kind, message, fields)``
and is the same class on the other side (`to_fields` / `from_fields`); nothing is pickled.
"""

from __future__ import annotations

from typing import Any, ClassVar


class KamaCacheError(Exception):
    """Root of all errors of this library.

    Subclasses name their values in ``fields``; each is an attribute of the instance.
    """

    fields: ClassVar[tuple[str, ...]] = ()

    def __init__(self, message: str = "", **values: Any) -> None:
        super().__init__(message)
        self.message = message
        unknown = set(values) - set(self.fields)
        if unknown:
            raise TypeError(f"{type(self).__name__} has no fields {sorted(unknown)}")
        for name in self.fields:
            setattr(self, name, values.get(name))

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self).__name__, self.message, to_fields(self)[2])


class KeyNotFoundError(KamaCacheError, KeyError):
    """The getter does not know the key, or there is no getter and nothing was set."""

    fields = ("group", "key")
    group: str | None
    key: bytes | None


class LoadError(KamaCacheError):
    """The getter raised, or the load could not be run; nothing was kept."""

    fields = ("group", "key", "cause_type")
    group: str | None
    key: bytes | None
    cause_type: str | None


class KeyTooLongError(KamaCacheError, ValueError):
    """The key's bytes are fewer than 1 or more than the limit."""

    fields = ("key_bytes", "limit_bytes")
    key_bytes: int | None
    limit_bytes: int | None


class ValueTooLargeError(KamaCacheError, ValueError):
    """The value does not fit into one segment of its shard."""

    fields = ("value_bytes", "limit_bytes", "group")
    value_bytes: int | None
    limit_bytes: int | None
    group: str | None


class GroupNotFoundError(KamaCacheError, LookupError):
    """The node has no group of that name."""

    fields = ("group", "known")
    group: str | None
    known: list[str] | None


class NodeUnavailableError(KamaCacheError, ConnectionError):
    """No node answers at the run directory, or it is shutting down."""

    fields = ("run_dir", "shard")
    run_dir: str | None
    shard: int | None


class DeadlineExceededError(KamaCacheError, TimeoutError):
    """The call's time was over before the answer came; the load may still go on."""

    fields = ("timeout_s", "group", "shard")
    timeout_s: float | None
    group: str | None
    shard: int | None


class AccessDeniedError(KamaCacheError, PermissionError):
    """The call brought no token that the node knows (``token`` is None), or one that may not."""

    fields = ("token", "group")
    token: str | None
    group: str | None


class StorageError(KamaCacheError, OSError):
    """A shard's files cannot be made, reserved, opened or locked."""

    fields = ("path", "needed_bytes", "available_bytes")
    path: str | None
    needed_bytes: int | None
    available_bytes: int | None


class ConfigError(KamaCacheError, ValueError):
    """A setting cannot work; names the setting, its value and the remedy."""

    fields = ("setting", "value")
    setting: str | None
    value: str | None


_BY_NAME: dict[str, type[KamaCacheError]] = {
    cls.__name__: cls
    for cls in (
        KamaCacheError,
        KeyNotFoundError,
        LoadError,
        KeyTooLongError,
        ValueTooLargeError,
        GroupNotFoundError,
        NodeUnavailableError,
        DeadlineExceededError,
        AccessDeniedError,
        StorageError,
        ConfigError,
    )
}


def to_fields(error: KamaCacheError) -> tuple[str, str, dict[str, Any]]:
    """Return ``(class name, message, values)`` of an error, fit for a frame."""
    kind = type(error).__name__
    if kind not in _BY_NAME:
        kind = "KamaCacheError"
    values = {name: getattr(error, name) for name in _BY_NAME[kind].fields}
    return kind, error.message, values


def from_fields(kind: str, message: str, values: dict[str, Any]) -> KamaCacheError:
    """Rebuild an error that crossed a process boundary; an unknown kind becomes the root."""
    cls = _BY_NAME.get(kind, KamaCacheError)
    return cls(message, **{name: values[name] for name in cls.fields if name in values})


def _rebuild(kind: str, message: str, values: dict[str, Any]) -> KamaCacheError:
    return from_fields(kind, message, values)
