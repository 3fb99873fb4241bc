"""The requests and replies that cross a worker's Unix socket.

*Process*: all. Each message is a msgspec array ``[tag, id, ...]``; the id is the asker's and comes
back in the reply, so replies may overtake each other. New fields go to the end of a message, with
a default: a receiver ignores what it does not know and fills in what the sender did not.

Requests, all answered once::

    Get        -> Value              Set, SetMany, Delete, DeleteMany, Ping -> Done
    GetMany    -> Values             Stats                                  -> StatsReply
    any        -> Failure            (an error of `kamacache.errors`, by name and fields)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import msgspec

from kamacache.calls import ChainLink


class Request(msgspec.Struct, array_like=True, kw_only=True, gc=False):
    """What every request carries.

    ``budget_ms`` is the time the asker still waits (0: none left), ``depth`` and ``chain`` are
    those of `kamacache.calls`, ``flags`` is kept for marks such as "came from a peer".
    """

    id: int = 0
    group: str = ""
    budget_ms: int = 0
    depth: int = 0
    chain: tuple[ChainLink, ...] = ()
    flags: int = 0


class Get(Request, tag=1, kw_only=True, gc=False):
    """Ask for one key."""

    key: bytes


class GetMany(Request, tag=2, kw_only=True, gc=False):
    """Ask for keys of one worker, at most `BATCH_KEYS_MAX`."""

    keys: list[bytes]


class Set(Request, tag=3, kw_only=True, gc=False):
    """Store a value; ``ttl_ms`` None is the group's default."""

    key: bytes
    value: bytes
    ttl_ms: int | None = None


class SetMany(Request, tag=4, kw_only=True, gc=False):
    """Store values of one worker, in order, at most `BATCH_KEYS_MAX`."""

    items: list[tuple[bytes, bytes]]
    ttl_ms: int | None = None


class Delete(Request, tag=5, kw_only=True, gc=False):
    """Remove one key; answered with the count of those that were there."""

    key: bytes


class DeleteMany(Request, tag=6, kw_only=True, gc=False):
    """Remove keys of one worker; answered with the count of those that were there."""

    keys: list[bytes]


class Stats(Request, tag=7, kw_only=True, gc=False):
    """Ask for the group's numbers in this worker."""


class Ping(Request, tag=8, kw_only=True, gc=False):
    """Ask whether the worker's loop turns; needs no group."""


class Value(msgspec.Struct, array_like=True, tag=1, gc=False):
    """The value; None: the key is not found, and the worker's word is final."""

    id: int
    value: bytes | None


class KeyFailure(msgspec.Struct, array_like=True, gc=False):
    """The error of one key of a `GetMany`, by its index among the keys."""

    index: int
    kind: str
    message: str
    fields: dict[str, Any]


class Values(msgspec.Struct, array_like=True, tag=2, gc=False):
    """The values in the order of the keys, None for one that is not found or failed.

    When not all fit into a frame the worker answers the first of them, one at least; the
    asker's link asks again for the rest (`kamacache.local.link`).
    """

    id: int
    values: list[bytes | None]
    errors: list[KeyFailure] = []


class Done(msgspec.Struct, array_like=True, tag=3, gc=False):
    """How many keys were stored, or were there to be deleted."""

    id: int
    count: int


class StatsReply(msgspec.Struct, array_like=True, tag=4, gc=False):
    """Counters and sizes by name."""

    id: int
    stats: dict[str, int]


class Failure(msgspec.Struct, array_like=True, tag=5, gc=False):
    """An error, as `kamacache.errors.to_fields` writes it. Id 0: the request had none."""

    id: int
    kind: str
    message: str
    fields: dict[str, Any]


AnyRequest = Get | GetMany | Set | SetMany | Delete | DeleteMany | Stats | Ping
Reply = Value | Values | Done | StatsReply | Failure
Body = bytes | bytearray | memoryview

PAYLOAD_SLACK_BYTES: Final = 4_096  # what a frame holds beside values and keys, with room

encoder: Final = msgspec.msgpack.Encoder()
encode: Final = encoder.encode
decode_request: Final[Callable[[Body], AnyRequest]] = msgspec.msgpack.Decoder(AnyRequest).decode
decode_reply: Final[Callable[[Body], Reply]] = msgspec.msgpack.Decoder(Reply).decode
decode_any: Final = msgspec.msgpack.Decoder().decode
DecodeError: Final = msgspec.DecodeError  # ValidationError is one, too


def salvage_id(body: Body) -> int:
    """Return the id of a request that could not be decoded, 0 where there is none."""
    try:
        parts = decode_any(body)
    except DecodeError:
        return 0
    if isinstance(parts, list) and len(parts) > 1 and isinstance(parts[1], int):
        return parts[1]
    return 0
