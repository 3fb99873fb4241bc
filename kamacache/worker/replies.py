"""Replies made of outcomes: a value, an error, as many of a batch as a frame takes.

*Process*: worker, in the loop's thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

from kamacache.errors import KamaCacheError, ValueTooLargeError, to_fields
from kamacache.limits import FRAME_BYTES_MAX, KEY_BYTES_MAX
from kamacache.store import Held
from kamacache.wire.messages import (
    PAYLOAD_SLACK_BYTES,
    Absent,
    Failure,
    KeyFailure,
    Reply,
    Value,
    Values,
)
from kamacache.worker.flights import Outcome

VALUE_FRAME_BYTES_MAX: Final = FRAME_BYTES_MAX - PAYLOAD_SLACK_BYTES
_PER_VALUE_BYTES: Final = 8  # msgpack's length in front of each value, with room


class Holder(Protocol):
    """What tells how long a value lives, and its version: the shard."""

    def held(self, key: bytes) -> Held | None: ...


def failure(request_id: int, error: KamaCacheError) -> Failure:
    """Return an error as the reply to a request."""
    return Failure(request_id, *to_fields(error))


def values_reply(request_id: int, keys: Sequence[bytes], outcomes: dict[bytes, Outcome]) -> Reply:
    """Return outcomes in the order of the keys, as many as a frame takes."""
    values: list[bytes | None] = []
    errors: list[KeyFailure] = []
    room = VALUE_FRAME_BYTES_MAX
    for index, key in enumerate(keys):
        outcome = outcomes[key]
        if isinstance(outcome, bytes):
            room -= len(outcome) + _PER_VALUE_BYTES
            if room < 0:
                if not index:
                    return value_reply(request_id, outcome)  # too large alone: says so
                break
            values.append(outcome)
            continue
        values.append(None)
        room -= _PER_VALUE_BYTES
        if outcome is not None:
            errors.append(_key_failure(index, outcome))
            room -= len(errors[-1].message) * 4 + 2 * KEY_BYTES_MAX
            if room < 0:
                break
    return Values(request_id, values, errors)


def _key_failure(index: int, error: KamaCacheError) -> KeyFailure:
    return KeyFailure(index, *to_fields(error))


def value_reply(request_id: int, value: bytes | None) -> Reply:
    """Return a value, or the failure that says that it is too large to be sent."""
    if value is not None and len(value) > VALUE_FRAME_BYTES_MAX:
        return failure(
            request_id,
            ValueTooLargeError(
                f"the value has {len(value)} bytes, and {VALUE_FRAME_BYTES_MAX} can be sent",
                value_bytes=len(value),
                limit_bytes=VALUE_FRAME_BYTES_MAX,
            ),
        )
    return Value(request_id, value)


def peer_value_reply(request_id: int, key: bytes, value: bytes | None, shard: Holder) -> Reply:
    """Return a value as the reply to a peer, which must know how long it may keep it."""
    reply = value_reply(request_id, value)
    if type(reply) is Value:
        reply.ttl_ms, reply.version = meta(key, value, shard)
    return reply


def peek_reply(request_id: int, key: bytes, shard: Holder) -> Reply:
    """Return what is held of a key as one's own, for who has become its owner.

    A mirror is not: it is a copy of what that owner had, and may be older than its last write.
    """
    held = shard.held(key)
    if held is None or held.mirror:
        return Absent(request_id)
    return Value(request_id, held.value, held.ttl_ms or 0, held.version)


def peer_values_reply(
    request_id: int, keys: Sequence[bytes], outcomes: dict[bytes, Outcome], shard: Holder
) -> Reply:
    """Return outcomes as the reply to a peer, as `values_reply`."""
    reply = values_reply(request_id, keys, outcomes)
    if type(reply) is Values:
        metas = [meta(key, value, shard) for key, value in zip(keys, reply.values, strict=False)]
        reply.ttls = [ttl_ms for ttl_ms, _ in metas]
        reply.versions = [version for _, version in metas]
    return reply


def meta(key: bytes, value: bytes | None, shard: Holder) -> tuple[int, int]:
    """Return time to live and version; 0 and 0 where this is not what the shard holds."""
    held = shard.held(key)
    if held is None or held.value != value:
        return 0, 0
    return held.ttl_ms or 0, held.version
