"""A peer's request for many keys, split among this node's workers, and their answers joined.

*Process*: front. Pure functions. *Invariant*: an answer to keys is cut where a frame is full, or
where a worker's own was cut, and never before the first key; the peer's link asks for the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, TypeVar, cast

from kamacache.errors import KamaCacheError, to_fields
from kamacache.hashing import shard_hash, worker_of
from kamacache.limits import FRAME_BYTES_MAX, KEY_BYTES_MAX
from kamacache.store import Answer
from kamacache.store.served import Told
from kamacache.wire.messages import (
    PAYLOAD_SLACK_BYTES,
    DeleteMany,
    Done,
    Failure,
    Flush,
    GetMany,
    Invalidate,
    KeyFailure,
    Reply,
    Request,
    SetMany,
    Value,
    Values,
)

REPLY_BYTES_MAX: Final = FRAME_BYTES_MAX - PAYLOAD_SLACK_BYTES
PER_VALUE_BYTES: Final = 32  # lengths, TTL and version beside each value, with room
MESSAGE_CHAR_BYTES: Final = 4  # of an error's message, in UTF-8 at most

NOTHING: Final = Value(0, None)

R = TypeVar("R", bound=Request)
OneReply = Value | KeyFailure  # of one key; indexes and ids are those of a part


class Split:
    """Which keys are which worker's."""

    __slots__ = ("_seed", "_workers")

    def __init__(self, hash_seed: int, workers: int) -> None:
        self._seed: Final = hash_seed
        self._workers: Final = workers

    def _worker(self, key: bytes) -> int:
        return worker_of(shard_hash(key, self._seed), self._workers)

    def gets(self, request: GetMany, keys: Sequence[bytes]) -> list[tuple[int, GetMany]]:
        """Return one request a worker for these keys, in their order."""
        shards: dict[int, list[bytes]] = {}
        for key in keys:
            shards.setdefault(self._worker(key), []).append(key)
        return [
            (shard, like(request, GetMany(keys=part, group=request.group)))
            for shard, part in shards.items()
        ]

    def parts(self, request: SetMany | DeleteMany | Invalidate) -> list[tuple[int, Request]]:
        """Return one request a worker for the keys of a write."""
        group = request.group
        if isinstance(request, DeleteMany):
            keys: dict[int, list[bytes]] = {}
            for key in request.keys:
                keys.setdefault(self._worker(key), []).append(key)
            return [
                (shard, like(request, DeleteMany(keys=part, group=group)))
                for shard, part in keys.items()
            ]
        if isinstance(request, SetMany):
            items: dict[int, list[tuple[bytes, bytes]]] = {}
            for item in request.items:
                items.setdefault(self._worker(item[0]), []).append(item)
            return [
                (shard, like(request, SetMany(items=part, ttl_ms=request.ttl_ms, group=group)))
                for shard, part in items.items()
            ]
        versions: dict[int, list[tuple[bytes, int]]] = {}
        for version in request.items:
            versions.setdefault(self._worker(version[0]), []).append(version)
        return [
            (shard, like(request, Invalidate(items=part, group=group)))
            for shard, part in versions.items()
        ]

    def flushes(self, request: Flush) -> list[tuple[int, Request]]:
        """Return the same request for every worker."""
        return [
            (
                shard,
                like(
                    request,
                    Flush(version=request.version, group=request.group, whole=request.whole),
                ),
            )
            for shard in range(self._workers)
        ]


def like(whole: Request, part: R) -> R:
    """Let a part be asked for as the whole is."""
    part.budget_ms = whole.budget_ms
    part.depth = whole.depth
    part.chain = whole.chain
    part.flags = whole.flags
    part.sent = whole.sent
    part.until_ms = whole.until_ms
    return part


def joined_counts(request: Request, replies: Sequence[Reply | KamaCacheError]) -> Reply:
    """Return the sum of what the workers did, with the latest version; or the first failure."""
    count = version = 0
    for reply in replies:
        if not isinstance(reply, Done):
            return _failure(request.id, reply)
        count += reply.count
        version = max(version, reply.version)
    return Done(request.id, count, version)


def all_values(answers: Sequence[Answer]) -> bool:
    """Tell whether every key had a value."""
    try:
        sum(map(len, answers))  # type: ignore[arg-type] # what is no value has no length
    except TypeError:
        return False
    return True


def whole_values(
    request: GetMany, answers: Sequence[Answer], ttls: list[int], versions: list[int]
) -> Values | None:
    """Return what memory had as the reply, if it had a value for every key and they fit."""
    try:
        size_bytes = sum(map(len, answers))  # type: ignore[arg-type]
    except TypeError:  # one is no value
        return None
    if size_bytes + PER_VALUE_BYTES * len(answers) > REPLY_BYTES_MAX:
        return None
    return Values(request.id, cast("list[bytes | None]", answers), [], ttls, versions)


def joined_values(
    request: GetMany,
    found: Mapping[bytes, Told],
    parts: Sequence[GetMany],
    replies: Sequence[Reply | KamaCacheError],
) -> Reply:
    """Return what memory had and what the workers answered, in the order of the keys."""
    if parts and not found and all(not isinstance(r, Value | Values) for r in replies):
        return _failure(request.id, replies[0])
    told: dict[bytes, OneReply] = {key: Value(0, *entry) for key, entry in found.items()}
    for part, reply in zip(parts, replies, strict=True):
        _tell(told, part, reply)
    whole = Values(request.id, [], [], [], [])
    errors: list[KeyFailure] = []
    room = REPLY_BYTES_MAX
    for index, key in enumerate(request.keys):
        outcome = told.get(key)
        if outcome is None:
            break  # a worker's answer was cut before it
        room -= PER_VALUE_BYTES
        if isinstance(outcome, KeyFailure):
            room -= len(outcome.message) * MESSAGE_CHAR_BYTES + 2 * KEY_BYTES_MAX
        elif outcome.value is not None:
            room -= len(outcome.value)
        if room < 0 and index:
            break
        if isinstance(outcome, KeyFailure):
            errors.append(KeyFailure(index, outcome.kind, outcome.message, outcome.fields))
            outcome = NOTHING
        whole.values.append(outcome.value)
        whole.ttls.append(outcome.ttl_ms)
        whole.versions.append(outcome.version)
    whole.errors = errors
    return whole


def _tell(told: dict[bytes, OneReply], part: GetMany, reply: Reply | KamaCacheError) -> None:
    """Take one worker's answer."""
    if isinstance(reply, Values):
        meta = len(reply.ttls) == len(reply.versions) == len(reply.values)
        for index, (key, value) in enumerate(zip(part.keys, reply.values, strict=False)):
            if meta:
                told[key] = Value(0, value, reply.ttls[index], reply.versions[index])
            else:
                told[key] = Value(0, value)
        for failed in reply.errors:
            told[part.keys[failed.index]] = failed
    elif isinstance(reply, Value):  # of a single key, too large to share a frame
        told[part.keys[0]] = reply
    else:
        failed_all = _failure(0, reply)
        for key in part.keys:
            told[key] = KeyFailure(0, failed_all.kind, failed_all.message, failed_all.fields)


def _failure(ticket: int, reply: Reply | KamaCacheError) -> Failure:
    if isinstance(reply, KamaCacheError):
        return Failure(ticket, *to_fields(reply))
    if isinstance(reply, Failure):
        return Failure(ticket, reply.kind, reply.message, reply.fields)
    return Failure(ticket, "KamaCacheError", f"a worker answered {type(reply).__name__}", {})
