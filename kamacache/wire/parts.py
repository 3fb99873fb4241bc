"""Answers in parts: what a `Values` left out is asked for again, and joined.

*Process*: every one that asks for many keys. *Invariant*: one key at least is answered each time,
so that who asks again comes to an end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from kamacache.errors import ValueTooLargeError, to_fields
from kamacache.limits import FRAME_BYTES_MAX
from kamacache.wire.messages import (
    PAYLOAD_SLACK_BYTES,
    Answers,
    GetMany,
    KeyFailure,
    Reply,
    Request,
    Value,
    Values,
)

ANSWERS_BYTES_MAX: Final = FRAME_BYTES_MAX - PAYLOAD_SLACK_BYTES
PER_ANSWER_BYTES: Final = 32  # lengths, index, TTL and version beside each value, with room
ERROR_BYTES: Final = 16 << 10  # of one failure, with room


def rest_of(request: Request, reply: Reply) -> GetMany | None:
    """Return the request for the keys that a `Values` left out, None when it is whole."""
    if type(reply) is not Values or type(request) is not GetMany:
        return None
    answered = len(reply.values)
    if answered >= len(request.keys):
        return None
    return GetMany(
        group=request.group,
        depth=request.depth,
        chain=request.chain,
        flags=request.flags,
        keys=request.keys[answered:],
    )


def append(whole: Values, part: Reply) -> None:
    """Put the answer to `rest_of` behind what is there."""
    answered = len(whole.values)
    if type(part) is Values:
        whole.values += part.values
        whole.errors = whole.errors + [
            KeyFailure(failed.index + answered, failed.kind, failed.message, failed.fields)
            for failed in part.errors
        ]
        ttls, versions = part.ttls, part.versions
    elif type(part) is Value:  # one too large for a frame of several answers as a single one
        whole.values.append(part.value)
        ttls, versions = [part.ttl_ms], [part.version]
    else:
        whole.values.append(None)
        ttls, versions = [0], [0]
    if len(whole.ttls) == len(whole.versions) == answered:  # told to a peer
        whole.ttls = whole.ttls + ttls
        whole.versions = whole.versions + versions


def answered(reply: Answers) -> Sequence[int]:
    """Return the indexes of the keys that are answered."""
    at: Sequence[int] = reply.at or range(len(reply.values))
    return [*at, *[failed.index for failed in reply.errors]] if reply.errors else at


def in_frames(reply: Answers) -> Iterator[Answers]:
    """Yield the same answers, each part no larger than a frame.

    A value that no frame takes becomes the error that says so.
    """
    values, errors = reply.values, reply.errors
    size = PER_ANSWER_BYTES * len(values) + ERROR_BYTES * len(errors)
    try:
        size += sum(map(len, values))  # type: ignore[arg-type] # None has no len: see below
    except TypeError:
        size += sum([len(value) for value in values if value is not None])
    if size <= ANSWERS_BYTES_MAX:
        yield reply
        return
    at = reply.at or range(len(values))
    told = bool(reply.versions)
    errors = [*errors]
    part, room = Answers(reply.id, [], [], [], [], []), ANSWERS_BYTES_MAX
    for place, (index, value) in enumerate(zip(at, values, strict=True)):
        need = PER_ANSWER_BYTES + (0 if value is None else len(value))
        if need > ANSWERS_BYTES_MAX:
            errors.append(KeyFailure(index, *to_fields(_too_large(need - PER_ANSWER_BYTES))))
            continue
        if need > room:
            yield part
            part, room = Answers(reply.id, [], [], [], [], []), ANSWERS_BYTES_MAX
        room -= need
        part.values.append(value)
        part.at.append(index)
        if told:
            part.ttls.append(reply.ttls[place])
            part.versions.append(reply.versions[place])
    if part.values:
        yield part
    per_frame = ANSWERS_BYTES_MAX // ERROR_BYTES
    for first in range(0, len(errors), per_frame):
        yield Answers(reply.id, errors=errors[first : first + per_frame])


def _too_large(value_bytes: int) -> ValueTooLargeError:
    return ValueTooLargeError(
        f"the value has {value_bytes} bytes, and {ANSWERS_BYTES_MAX} can be sent",
        value_bytes=value_bytes,
        limit_bytes=ANSWERS_BYTES_MAX,
    )
