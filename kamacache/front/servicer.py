"""kamacache.v1.Cache over a node's groups: hits from shared memory, the rest from the workers.

*Process*: front, on its loop. A hit never leaves this process, and no await lies on its way::

    Get ── lookup (memory) ── hit ───────────────────────────► reply
               └── miss ── aget ──► worker of the key's shard ─► reply

*Who may*: gets need the group's read scope, sets and deletes its write scope; `Stats` tells of the
groups that the token may read, or of all; `Members` any token. Where the scope is missing a group
that is and one that is not are the same refusal.

*Invariants*: every error leaves as a status of `kamacache.cluster.status`; a caller's deadline goes
down with the call; what a batch collects is bounded by the message limit.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, NoReturn

import grpc
from google.protobuf.message_factory import GetMessageClass

import kamacache
from kamacache.cluster.membership import Membership
from kamacache.cluster.status import FIELD_ITEMS_MAX, BatchRangeError, to_status
from kamacache.errors import (
    AccessDeniedError,
    ConfigError,
    DeadlineExceededError,
    GroupNotFoundError,
    KamaCacheError,
    KeyTooLongError,
    NodeUnavailableError,
)
from kamacache.front.admission import Admission, NoRequestError
from kamacache.front.engine import Engine
from kamacache.front.settings import FrontSettings
from kamacache.limits import CALL_TIMEOUT_MAX_S, KEY_BYTES_MAX, TTL_MS_MAX
from kamacache.repeated import RepeatedLog
from kamacache.security.access import Access
from kamacache.security.tokens import Token
from kamacache.store import Negative
from kamacache.store.entries import Entry
from kamacache.v1 import kamacache_pb2 as pb

SERVICE: Final = pb.DESCRIPTOR.services_by_name["Cache"]
ALONE: Final = Membership(number=0, own="", members=())
SLICE_KEYS: Final = 256  # looked up before a batch's bytes are counted again, and may be too many

log = logging.getLogger("kamacache.front")

Handle = Callable[..., Awaitable[Any]]
Check = Callable[[Token, str, Any], None]


class CacheServicer:
    """The methods of the service, each taking a request and its gRPC context."""

    def __init__(
        self,
        engines: Mapping[str, Engine],
        settings: FrontSettings,
        membership: Callable[[], Membership] = lambda: ALONE,
        access: Access | None = None,
    ) -> None:
        self._access = access or Access()
        self.admission = Admission(self._access, arrives_s=settings.request_s)
        self._engines = dict(engines)
        self._settings = settings
        self._membership = membership
        self.settling = False  # the node may have missed writes: nothing is answered
        self._log = RepeatedLog(log)

    def handlers(self) -> dict[str, grpc.RpcMethodHandler[Any, Any]]:
        """Return the handler of each method, by its name."""
        reads: dict[str, Handle] = {"Get": self.get, "BatchGet": self.batch_get}
        writes: dict[str, Handle] = {
            "Set": self.set,
            "Delete": self.delete,
            "BatchSet": self.batch_set,
            "BatchDelete": self.batch_delete,
        }
        others: dict[str, Handle] = {"Stats": self.stats, "Members": self.members}
        handles = {
            **{name: (handle, self._may_read) for name, handle in reads.items()},
            **{name: (handle, self._may_write) for name, handle in writes.items()},
            **{name: (handle, None) for name, handle in others.items()},
        }
        return {
            method.name: grpc.stream_unary_rpc_method_handler(
                self._guarded(*handles[method.name], GetMessageClass(method.input_type).FromString),
                response_serializer=GetMessageClass(method.output_type).SerializeToString,
            )
            for method in SERVICE.methods
        }

    async def get(self, request: pb.GetRequest, context: Any) -> pb.GetResponse:
        """Answer one key."""
        engine = self._engines.get(request.group) or self._no_group(request.group)
        key = request.key
        told = engine.served.told(key)
        if told is None:
            return await self._loaded(engine, key, context)
        if isinstance(told, Negative):
            return pb.GetResponse()
        value, ttl_ms, version = told
        return pb.GetResponse(found=True, value=value, ttl_ms=ttl_ms or None, version=version)

    async def _loaded(self, engine: Engine, key: bytes, context: Any) -> pb.GetResponse:
        _check_key(key)
        value = await engine.aget(key, self._deadline_s(context))
        if value is None:
            return pb.GetResponse()
        entry = engine.lookup_entry(key)
        # The value may have been replaced, expired or evicted since: then its TTL is not told.
        if isinstance(entry, Entry) and entry.value == value:
            return pb.GetResponse(
                found=True, value=value, ttl_ms=entry.ttl_ms, version=entry.version
            )
        return pb.GetResponse(found=True, value=value)

    async def set(self, request: pb.SetRequest, context: Any) -> pb.SetResponse:
        """Store one value."""
        engine = self._engines.get(request.group) or self._no_group(request.group)
        _check_key(request.key)
        await engine.aset(request.key, request.value, _ttl_ms(request), self._deadline_s(context))
        return pb.SetResponse()

    async def delete(self, request: pb.DeleteRequest, context: Any) -> pb.DeleteResponse:
        """Remove one key."""
        engine = self._engines.get(request.group) or self._no_group(request.group)
        _check_key(request.key)
        return pb.DeleteResponse(found=await engine.adelete(request.key, self._deadline_s(context)))

    async def batch_get(self, request: pb.BatchGetRequest, context: Any) -> pb.BatchGetResponse:
        """Answer many keys: those in memory at once, the rest in one call to the workers."""
        engine = self._engines.get(request.group) or self._no_group(request.group)
        keys = self._checked(request.keys)
        values: list[Any] = []
        held_bytes = 0
        complete = True
        for start in range(0, len(keys), SLICE_KEYS):
            found: list[Any] = engine.lookup_many(keys[start : start + SLICE_KEYS])
            try:
                held_bytes += sum(map(len, found))
            except TypeError:  # not all are bytes
                complete = False
                held_bytes += _bytes_of(found)
            self._check_reply_bytes(held_bytes)
            values += found
        missing: list[int] = []
        if not complete:
            values = await self._completed(engine, keys, values, context)
            missing = [i for i, value in enumerate(values) if value is None]
            for i in missing:
                values[i] = b""
        reply = pb.BatchGetResponse(values=values, missing=missing)
        if request.meta:
            _add_meta(reply, engine, keys, values)
        return reply

    async def _completed(
        self, engine: Engine, keys: list[bytes], answers: list[Any], context: Any
    ) -> list[bytes | None]:
        """Return a value a key, None where there is none; what memory did not answer is asked."""
        asked = dict.fromkeys(k for k, v in zip(keys, answers, strict=True) if v is None)
        loaded: dict[bytes, bytes] = {}
        if asked:
            for key in asked:
                _check_key(key)
            loaded = await engine.aget_many(list(asked), self._deadline_s(context))
        # A list, since one key may be asked for twice; NEGATIVE becomes None, as a miss does.
        values = [
            v if isinstance(v, bytes) else loaded.get(k) for k, v in zip(keys, answers, strict=True)
        ]
        self._check_reply_bytes(_bytes_of(values))
        return values

    async def batch_set(self, request: pb.BatchSetRequest, context: Any) -> pb.BatchSetResponse:
        """Store many values; of a key that comes twice the last one holds."""
        engine = self._engines.get(request.group) or self._no_group(request.group)
        keys = self._checked(request.keys)
        if len(keys) != len(request.values):
            raise ConfigError(
                f"{len(keys)} keys but {len(request.values)} values: a batch needs one for each",
                setting="values",
            )
        for key in keys:
            _check_key(key)
        items = dict(zip(keys, request.values, strict=True))
        await engine.aset_many(items, _ttl_ms(request), self._deadline_s(context))
        return pb.BatchSetResponse()

    async def batch_delete(
        self, request: pb.BatchDeleteRequest, context: Any
    ) -> pb.BatchDeleteResponse:
        """Remove many keys."""
        engine = self._engines.get(request.group) or self._no_group(request.group)
        keys = list(dict.fromkeys(self._checked(request.keys)))
        for key in keys:
            _check_key(key)
        deleted = await engine.adelete_many(keys, self._deadline_s(context))
        return pb.BatchDeleteResponse(deleted=deleted)

    async def stats(
        self, request: pb.StatsRequest, context: Any, token: Token | None
    ) -> pb.StatsResponse:
        """Answer the counters of one group, or of all that may be seen."""
        names = [request.group] if request.group else sorted(self._engines)
        if token is not None and not token.stats:
            if request.group:
                self._access.permit(token, request.group, context.peer(), write=False)
            names = [name for name in names if token.may_read(name)]
        if request.group and request.group not in self._engines:
            self._no_group(request.group, token)
        reply = pb.StatsResponse()
        for name in names:
            values = await self._engines[name].astats()
            numbers = {key: value for key, value in values.items() if type(value) is int}
            reply.groups.add(name=name, values=numbers)
        return reply

    async def members(
        self, request: pb.MembersRequest, context: Any, token: Token | None
    ) -> pb.MembersResponse:
        """Answer who belongs to the cluster."""
        known = self._membership()
        reply = pb.MembersResponse(
            own=known.own,
            number=known.number,
            version=kamacache.__version__,
            unix_ms=time.time_ns() // 1_000_000,
        )
        for member in known.members:
            reply.members.add(address=member.address, weight=member.weight)
        return reply

    def _deadline_s(self, context: Any) -> float | None:
        left_s: float | None = context.time_remaining()
        if left_s is None:
            return None
        if left_s <= 0:
            raise DeadlineExceededError("the deadline passed before the call was looked at")
        return time.monotonic() + min(left_s, CALL_TIMEOUT_MAX_S)

    def _no_group(self, group: str, token: Token | None = None) -> NoReturn:
        seen = [name for name in sorted(self._engines) if token is None or token.knows(name)]
        known = seen[:FIELD_ITEMS_MAX]
        more = f" and {len(seen) - len(known)} more" * (len(seen) > len(known))
        raise GroupNotFoundError(
            f"this node has no group {group[:64]!r}; it has {', '.join(known) or 'none'}{more}",
            group=group[:64],
            known=known,
        )

    def _checked(self, keys: Sequence[bytes]) -> list[bytes]:
        limit = self._settings.batch_keys_max
        if len(keys) > limit:
            raise BatchRangeError(f"a batch of {len(keys)} keys; the limit is {limit}: split it")
        return list(keys)

    def _check_reply_bytes(self, held_bytes: int) -> None:
        limit = self._settings.message_bytes_max
        if held_bytes > limit:
            raise BatchRangeError(
                f"the values asked for have {held_bytes} bytes or more, a reply at most {limit}: "
                "ask for fewer keys at once"
            )

    def _may_read(self, token: Token, group: str, context: Any) -> None:
        self._access.permit(token, group, context.peer(), write=False)
        if group not in self._engines:
            self._no_group(group, token)

    def _may_write(self, token: Token, group: str, context: Any) -> None:
        self._access.permit(token, group, context.peer(), write=True)
        if group not in self._engines:
            self._no_group(group, token)

    def _guarded(
        self, handle: Handle, check: Check | None, parse: Callable[[bytes], Any]
    ) -> Handle:
        """Return the method for gRPC; without a check it is the handle's, which gets the token."""
        access, identify, read = self._access, self.admission.identify, self.admission.read

        async def answer(_requests: object, context: Any) -> Any:
            try:
                if self.settling:
                    raise NodeUnavailableError("the node has just come back and is not ready yet")
                token = None if access.tokens is None else identify(context)
                request = await read(context, parse)
                if check is None:
                    return await handle(request, context, token)
                if token is not None:
                    check(token, request.group, context)
                return await handle(request, context)
            except AccessDeniedError as error:
                await access.wait(error)
                await context.abort(*to_status(error))
            except NoRequestError as error:
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
            except KamaCacheError as error:
                await context.abort(*to_status(error))
            except Exception as error:
                self._log_defect(error)
                await context.abort(grpc.StatusCode.INTERNAL, "internal error; the log says more")

        return answer

    def _log_defect(self, error: Exception) -> None:
        self._log.error("unexpected error in a call", exc_info=error)


def _bytes_of(answers: list[Any]) -> int:
    return sum(len(answer) for answer in answers if isinstance(answer, bytes))


def _check_key(key: bytes) -> None:
    # Not before a lookup: what is in memory had a good key.
    if not 1 <= len(key) <= KEY_BYTES_MAX:
        raise KeyTooLongError(
            f"the key has {len(key)} bytes; 1 to {KEY_BYTES_MAX} are allowed",
            key_bytes=len(key),
            limit_bytes=KEY_BYTES_MAX,
        )


def _ttl_ms(request: pb.SetRequest | pb.BatchSetRequest) -> int | None:
    if not request.HasField("ttl_ms"):
        return None
    if not 1 <= request.ttl_ms <= TTL_MS_MAX:
        raise ConfigError(
            f"ttl_ms is {request.ttl_ms}; it must be from 1 to {TTL_MS_MAX}, or absent",
            setting="ttl_ms",
            value=str(request.ttl_ms),
        )
    return request.ttl_ms


def _add_meta(
    reply: pb.BatchGetResponse, engine: Engine, keys: list[bytes], values: list[bytes]
) -> None:
    for key, value in zip(keys, values, strict=True):
        entry = engine.lookup_entry(key)
        if isinstance(entry, Entry) and entry.value == value:
            reply.ttl_ms.append(entry.ttl_ms or 0)
            reply.versions.append(entry.version)
        else:
            reply.ttl_ms.append(0)
            reply.versions.append(0)
