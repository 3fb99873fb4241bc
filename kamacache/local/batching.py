"""Requests that name many keys: cut into frames by shard, sent in rounds, gathered again.

*Process*: attached ones::

    keys ── by_shard ──► one list a worker ── rounds ──► at most one frame a worker at a time
                                                             └─ outcomes ─► Gathered, count_all

*Invariants*: a frame names at most `BATCH_KEYS_MAX` keys, and items of `BATCH_BYTES_SOFT` bytes
unless a single one is larger. A round is answered before the next is sent, so a call holds one
connection per worker at most.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import TypeVar

from xxhash import xxh3_64_intdigest

from kamacache import calls
from kamacache.errors import KamaCacheError, LoadError, NodeUnavailableError, from_fields
from kamacache.limits import BATCH_BYTES_SOFT, BATCH_KEYS_MAX
from kamacache.local.exchange import count_of, nest, unexpected
from kamacache.rundir.description import NodeDescription
from kamacache.wire.messages import DeleteMany, GetMany, Reply, SetMany, Value, Values

T = TypeVar("T")


def get_batches(
    group: str, keys: Sequence[bytes], about: NodeDescription
) -> Iterator[list[tuple[int, GetMany]]]:
    """Yield rounds of (shard, request) that ask for keys."""
    for batch in _rounds(_by_shard(keys, about), _cut):
        requests = []
        for shard, part in batch:
            request = GetMany(group=group, keys=part)
            nest(request)
            requests.append((shard, request))
        yield requests


def delete_batches(
    group: str, keys: Sequence[bytes], about: NodeDescription
) -> Iterator[list[tuple[int, DeleteMany]]]:
    """Yield rounds of (shard, request) that drop keys."""
    for batch in _rounds(_by_shard(keys, about), _cut):
        requests = [(shard, DeleteMany(group=group, keys=part)) for shard, part in batch]
        for _, request in requests:
            nest(request)
        yield requests


def set_batches(
    group: str, items: Mapping[bytes, bytes], ttl_ms: int | None, about: NodeDescription
) -> Iterator[list[tuple[int, SetMany]]]:
    """Yield rounds of (shard, request) that keep values."""
    seed, workers = about.hash_seed, about.workers
    shards: list[list[tuple[bytes, bytes]]] = [[] for _ in range(workers)]
    if workers == 1:
        shards[0] = list(items.items())
    else:
        for item in items.items():  # `worker_of`, spelled out
            shards[(xxh3_64_intdigest(item[0], seed) >> 48) * workers >> 16].append(item)
    # A batch of usual size is one frame a worker, and not looked through item by item.
    small = (
        len(items) <= BATCH_KEYS_MAX
        and sum(map(len, items)) + sum(map(len, items.values())) <= BATCH_BYTES_SOFT
    )
    for batch in _rounds(shards, len if small else _cut_items):
        requests = [
            (shard, SetMany(group=group, items=part, ttl_ms=ttl_ms)) for shard, part in batch
        ]
        if calls.current.get() is not None:
            for _, request in requests:
                nest(request)
        yield requests


class Gathered:
    """What a get_many has so far."""

    def __init__(self, group: str, values: dict[bytes, bytes]) -> None:
        """Begin with the values that were in memory."""
        self._group = group
        self._asked = len(values)
        self._failed = 0
        self._first: KamaCacheError | None = None
        self.values = values
        self.unreached: list[bytes] = []
        self.error: NodeUnavailableError | None = None

    def take(self, requests: Sequence[GetMany], outcomes: Sequence[Reply | KamaCacheError]) -> None:
        """Take the outcomes of requests, in their order."""
        for request, outcome in zip(requests, outcomes, strict=True):
            self._asked += len(request.keys)
            if isinstance(outcome, NodeUnavailableError):
                self.unreached += request.keys
                self.error = outcome
            elif isinstance(outcome, KamaCacheError):
                self._fail(outcome, len(request.keys))
            elif isinstance(outcome, Values):
                for key, value in zip(request.keys, outcome.values, strict=True):
                    if value is not None:
                        self.values[key] = value
                for failed in outcome.errors:
                    self._fail(from_fields(failed.kind, failed.message, failed.fields), 1)
            elif isinstance(outcome, Value):  # of a single key, too large to share a frame
                if outcome.value is not None:
                    self.values[request.keys[0]] = outcome.value
            else:
                unexpected(outcome)

    def _fail(self, error: KamaCacheError, keys: int) -> None:
        self._failed += keys
        self._first = self._first or error

    def result(self) -> dict[bytes, bytes]:
        """Return the values, or raise the first failure with the number of all."""
        first = self._first
        if first is None:
            return self.values
        if not isinstance(first, LoadError) or self._asked == 1:
            raise first
        raise LoadError(
            f"group {self._group!r}: {self._failed} of {self._asked} keys could not be loaded; "
            f"the first: {first}",
            group=self._group,
            key=first.key,
            cause_type=first.cause_type,
        ) from first


async def acall_all(requests: Iterator[Awaitable[Reply]]) -> list[Reply | KamaCacheError]:
    """Await requests side by side; each has its own outcome, as in `link.call_all`."""
    outcomes = await asyncio.gather(*requests, return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, BaseException) and not isinstance(outcome, KamaCacheError):
            raise outcome
    return outcomes  # type: ignore[return-value] # other exceptions were raised above


def count_all(outcomes: Sequence[Reply | KamaCacheError]) -> int:
    """Return the sum of counts, or raise the first error."""
    count = 0
    for outcome in outcomes:
        if isinstance(outcome, KamaCacheError):
            raise outcome
        count += count_of(outcome)
    return count


def _by_shard(keys: Sequence[bytes], about: NodeDescription) -> list[list[bytes]]:
    seed, workers = about.hash_seed, about.workers
    if workers == 1:
        return [list(keys)]
    shards: list[list[bytes]] = [[] for _ in range(workers)]
    for key in keys:  # `worker_of`, spelled out
        shards[(xxh3_64_intdigest(key, seed) >> 48) * workers >> 16].append(key)
    return shards


def _cut(keys: list[bytes]) -> int:
    """Return how many keys go into the next frame."""
    return min(len(keys), BATCH_KEYS_MAX)


def _cut_items(items: list[tuple[bytes, bytes]]) -> int:
    """Return how many items go into the next frame, one at least."""
    room = BATCH_BYTES_SOFT
    for count, (key, value) in enumerate(items[:BATCH_KEYS_MAX]):
        room -= len(key) + len(value)
        if room < 0:
            return count or 1
    return min(len(items), BATCH_KEYS_MAX)


def _rounds(
    shards: list[list[T]], cut: Callable[[list[T]], int]
) -> Iterator[list[tuple[int, list[T]]]]:
    """Yield rounds of at most one frame for each shard, until all is sent."""
    while any(shards):
        batch = []
        for shard, waiting in enumerate(shards):
            if waiting:
                count = cut(waiting)
                if count == len(waiting):
                    batch.append((shard, waiting))
                    shards[shard] = []
                else:
                    batch.append((shard, waiting[:count]))
                    shards[shard] = waiting[count:]
        yield batch
