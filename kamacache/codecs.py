"""Codecs: how a group's values become bytes and come back.

*Process*: all that hold a Group. *Invariants*: encode runs where a value is made (a getter or a
set), decode where it is read; the cache itself only ever sees bytes. A codec that would run code
found in the cache (pickle) is used only where the user names it.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, Final, Protocol, runtime_checkable

import msgspec

from kamacache.errors import ConfigError


@runtime_checkable
class Codec(Protocol):
    """What a user's own codec must have; both methods are called from any thread."""

    def encode(self, value: Any, /) -> bytes:
        """Return the value's bytes; raise `TypeError` or `ValueError` for one it cannot take."""

    def decode(self, data: bytes, /) -> Any:
        """Return the value of bytes that `encode` made."""


class BytesCodec:
    """Values are bytes already. Groups skip `decode`, so a hit costs nothing more."""

    def encode(self, value: Any, /) -> bytes:
        """Return bytes, or a copy of a bytearray or memoryview; anything else is a TypeError."""
        if isinstance(value, bytes):
            return value
        if isinstance(value, bytearray | memoryview):
            return bytes(value)
        hint = {
            str: "encode it, or use codec='str'",
            type(None): "raise KeyError in a getter for a key that does not exist",
        }.get(type(value), "use codec='json' or 'msgpack' for other types")
        raise TypeError(f"codec 'bytes' takes bytes, not {type(value).__name__}; {hint}")

    def decode(self, data: bytes, /) -> bytes:
        """Return the bytes as they are."""
        return data


class StrCodec:
    """Text as UTF-8."""

    def encode(self, value: Any, /) -> bytes:
        """Return the text's UTF-8; anything but str is a TypeError."""
        if not isinstance(value, str):
            raise TypeError(f"codec 'str' takes str, not {type(value).__name__}")
        return value.encode()

    def decode(self, data: bytes, /) -> str:
        """Return the text; bytes that are not UTF-8 are a UnicodeDecodeError."""
        return data.decode()


class JsonCodec:
    """JSON by msgspec, which knows datetimes, UUIDs, dataclasses and Structs too when encoding."""

    def __init__(self) -> None:
        self.encode = msgspec.json.Encoder().encode
        self.decode = msgspec.json.Decoder().decode


class MsgpackCodec:
    """MessagePack by msgspec: smaller and faster than JSON, and it keeps bytes as bytes."""

    def __init__(self) -> None:
        self.encode = msgspec.msgpack.Encoder().encode
        self.decode = msgspec.msgpack.Decoder().decode


class PickleCodec:
    """Pickle: who can set a value can run code in every reader. Only where asked for by name."""

    def encode(self, value: Any, /) -> bytes:
        """Return the newest pickle format this Python writes."""
        return pickle.dumps(value, pickle.HIGHEST_PROTOCOL)

    def decode(self, data: bytes, /) -> Any:
        """Return the value; this runs what the pickle says."""
        return pickle.loads(data)


_BY_NAME: Final[dict[str, Callable[[], Codec]]] = {
    "bytes": BytesCodec,
    "str": StrCodec,
    "json": JsonCodec,
    "msgpack": MsgpackCodec,
    "pickle": PickleCodec,
}


def resolve(codec: str | Codec) -> Codec:
    """Return the codec of a name, or the object itself; raise `ConfigError` for what is neither.

    A module such as ``json`` or ``pickle`` is refused, since it has no encode and decode.
    """
    if isinstance(codec, str):
        if codec not in _BY_NAME:
            raise ConfigError(
                f"codec is {codec!r}; choose one of {', '.join(_BY_NAME)}, or give an object "
                "with encode and decode",
                setting="codec",
                value=codec,
            )
        return _BY_NAME[codec]()
    if isinstance(codec, type) or not (
        callable(getattr(codec, "encode", None)) and callable(getattr(codec, "decode", None))
    ):
        raise ConfigError(
            f"codec is {codec!r}; give a name ({', '.join(_BY_NAME)}) or an object with encode "
            "and decode",
            setting="codec",
            value=repr(codec),
        )
    return codec


def encoder(codec: Codec) -> Callable[[Any], bytes]:
    """Return the codec's encode; a user's own is checked to give bytes."""
    if type(codec) in _BY_NAME.values():
        return codec.encode

    def checked(value: Any) -> bytes:
        data = codec.encode(value)
        if isinstance(data, bytes):
            return data
        if isinstance(data, bytearray | memoryview):
            return bytes(data)
        raise TypeError(
            f"{type(codec).__name__}.encode returned {type(data).__name__}; it must return bytes"
        )

    return checked


def decoder(codec: Codec) -> Callable[[bytes], Any] | None:
    """Return the codec's decode, or None where the bytes are the value."""
    return None if isinstance(codec, BytesCodec) else codec.decode
