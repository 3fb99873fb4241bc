"""One link of another node's worker, as the front that it asks serves it.

*Process*: front, on its loop. What holds for all streams is in `kamacache.front.peers`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final, cast

import grpc

from kamacache.cluster.peers import TOLD_NOT_YET
from kamacache.cluster.stream import FrameSender, FrameSplitter
from kamacache.errors import (
    AccessDeniedError,
    ConfigError,
    KamaCacheError,
    NodeUnavailableError,
    to_fields,
)
from kamacache.front.proving import Admitted, UnprovenError, unwanted
from kamacache.front.splitting import (
    all_values,
    joined_counts,
    joined_values,
    like,
    whole_values,
)
from kamacache.hashing import shard_hash, worker_of
from kamacache.limits import (
    CALL_TIMEOUT_MAX_S,
    PARTIAL_BYTES_MAX,
    PEER_DRAIN_S,
    PEER_REQUESTS_MAX,
    PEER_UNSENT_BYTES_MAX,
)
from kamacache.store.served import NO_READS
from kamacache.store.served import Told as HitTold
from kamacache.wire.frames import FrameError, frame
from kamacache.wire.messages import (
    FROM_PEER,
    PEEK,
    Answers,
    DecodeError,
    Delete,
    DeleteMany,
    Done,
    Draining,
    Failure,
    Flush,
    Get,
    GetMany,
    Gets,
    Hello,
    Invalidate,
    KeyFailure,
    Ping,
    Proof,
    Reply,
    Request,
    Set,
    SetMany,
    Told,
    Value,
    Welcome,
    decode_request,
    salvage_id,
)
from kamacache.wire.parts import answered, in_frames

if TYPE_CHECKING:
    from kamacache.front.peers import PeersServicer


class PeerStream:
    """One link of another node's worker."""

    def __init__(
        self,
        servicer: PeersServicer,
        context: Any,
        loop: asyncio.AbstractEventLoop,
        admitted: Admitted | None = None,
    ) -> None:
        """``admitted``: it was proven; None: this node has no secret."""
        self._servicer: Final = servicer
        self._context: Final = context
        self._loop: Final = loop
        self._sender: Final = FrameSender(loop)
        self._frames: Final = FrameSplitter()
        self._tasks: set[asyncio.Task[None]] = set()
        self._room: asyncio.Future[None] | None = None  # the reading side waits for a task's end
        # Keys that the peer has told to drop, until they are gone.
        self._dropping: dict[bytes, asyncio.Task[None]] = {}
        self._ending = asyncio.Event()
        self._held = 0  # bytes of half a frame
        self._last_asked = False  # by a peer that knows that this node drains
        self._peer = ""
        self._admitted: Final = admitted
        self._table: Final[dict[type[Request], Callable[[Any], Reply | None]]] = {
            Get: self._get,
            GetMany: self._get_many,
            Gets: self._gets,
            Set: self._one,
            Delete: self._one,
            SetMany: self._many,
            DeleteMany: self._many,
            Invalidate: self._invalidate,
            Flush: self._flush,
            Ping: self._ping,
            Hello: self._hello,
            Told: self._told,
            Proof: self._renew,
        }
        if servicer.settling:  # for all its life: it is ended when that is over
            for kind in (Get, GetMany, Gets, Set, Delete, SetMany, DeleteMany):
                self._table[kind] = self._refuse
        if admitted is not None:
            welcome = self._hello(admitted.hello)
            welcome.proof = admitted.answer
            self._put(welcome)

    async def serve(self) -> None:
        """Answer until the peer ends the stream, sends garbage, or this node drains."""
        writing = self._loop.create_task(self._sender.run(self._context.write))
        reading = self._loop.create_task(self._read())
        ending = self._loop.create_task(self._end())
        parts: tuple[asyncio.Task[None], ...] = (writing, reading, ending)
        try:
            await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (*parts, *self._tasks):
                task.cancel()
            await asyncio.gather(*parts, *self._tasks, return_exceptions=True)
            self._frames.drop()  # this stream is garbage that only a late collection finds
            self._hold(0)
        for task in (reading, writing):
            error = None if task.cancelled() else task.exception()
            if isinstance(error, UnprovenError):
                raise error
            if isinstance(error, FrameError):
                self._servicer.warn(
                    "a peer sent what is no frame", peer=self._peer, detail=str(error)
                )
            elif error is not None and not self._context.done():
                self._servicer.warn("a peer link failed", error, peer=self._peer)

    @property
    def key(self) -> bytes | None:
        """What it was proven with, last; None: it was not."""
        return None if self._admitted is None else self._admitted.key

    def end(self, why: str) -> None:
        """End it; the node at its other end dials again."""
        self._servicer.warn("a peer link was ended", peer=self._peer, reason=why)
        self._ending.set()

    def _renew(self, request: Proof) -> Reply:
        admitted, secrets = self._admitted, self._servicer.porter.trust.secrets
        proven = None if admitted is None else admitted.renew(request, secrets)
        if proven is None:
            raise AccessDeniedError("the proof is of no secret that this node knows")
        return proven

    # -- the drain -------------------------------------------------------------------------

    def drain(self) -> None:
        """Tell the peer; end when it knows and has its answers, or does not say so in time."""
        self._put(Draining(0))
        self._loop.call_later(PEER_DRAIN_S, self._acknowledged)

    def _acknowledged(self) -> None:
        self._last_asked = True
        if not self._tasks:
            self._ending.set()

    def settled(self) -> None:
        """End when what was answered is written; the peer dials again, a node that serves."""
        self._ending.set()

    async def _end(self) -> None:
        """Return when the peer has all its answers."""
        await self._ending.wait()
        await self._sender.emptied()

    # -- reading ---------------------------------------------------------------------------

    async def _read(self) -> None:
        read, bodies, serve = self._context.read, self._frames.bodies, self._serve
        sender, tasks = self._sender, self._tasks
        while (message := await read()) is not grpc.aio.EOF:
            for body in bodies(message):
                serve(body)
                del body  # a view would keep a buffer from growing
                if sender.waiting_bytes > PEER_UNSENT_BYTES_MAX:
                    await sender.room(PEER_UNSENT_BYTES_MAX)
                while len(tasks) >= PEER_REQUESTS_MAX:
                    self._room = self._loop.create_future()
                    await self._room
            held = self._frames.held_bytes
            if held != self._held:
                self._hold(held)
                if self._servicer.partial_bytes > PARTIAL_BYTES_MAX:
                    raise FrameError("half frames of all peers take too much memory")

    def _hold(self, count: int) -> None:
        self._servicer.partial_bytes += count - self._held
        self._held = count

    def _serve(self, body: bytes | bytearray | memoryview) -> None:
        """Answer one request, or begin to."""
        try:
            request = decode_request(body)
        except DecodeError as error:
            ticket = salvage_id(body)
            if not ticket or not self._peer:
                raise FrameError(f"a frame is no message: {error}") from error
            self._put(
                Failure(
                    ticket,
                    "KamaCacheError",
                    f"{self._servicer.name} does not understand this request ({error}); "
                    "use one version of kamacache on all nodes",
                    {},
                )
            )
            return
        if not self._peer:
            if type(request) is not Hello:
                raise FrameError("a peer did not say who it is")
            if request.nonce:
                raise unwanted(request)
        request.flags |= FROM_PEER
        try:
            reply = self._table[type(request)](request)
        except KamaCacheError as error:
            reply = Failure(request.id, *to_fields(error))
        except Exception as error:
            reply = self._defect(request.id, error)
        if reply is not None:
            self._sender.put(frame(reply))

    def _put(self, reply: Reply) -> None:
        self._sender.put(frame(reply))

    def _defect(self, ticket: int, error: Exception) -> Failure:
        self._servicer.warn("a peer's request failed unexpectedly", error, peer=self._peer)
        message = f"{self._servicer.name} failed: {type(error).__name__}"
        return Failure(ticket, "KamaCacheError", message, {})

    # -- answered here ---------------------------------------------------------------------

    def _ping(self, request: Ping) -> Reply:
        return Done(request.id, 0)

    def _hello(self, request: Hello) -> Welcome:
        if self._peer:  # the answer to Draining: nothing more comes behind it
            self._acknowledged()
        self._peer = request.node or "?"
        return self._servicer.welcome(request)

    def _refuse(self, request: Request) -> Reply | None:
        raise NodeUnavailableError(f"{self._servicer.name} has just come back and is not ready")

    def _told(self, request: Told) -> Reply | None:
        self._begin(request, self._least_told(request))
        return None

    async def _least_told(self, request: Told) -> Reply:
        """Ask all workers: each of them has a link of its own to who asks."""
        shards = range(self._servicer.about.workers)
        parts = [
            (
                shard,
                like(
                    request,
                    Told(
                        peer=request.peer,
                        away_ms=request.away_ms,
                        members=request.members,
                        life=request.life,
                    ),
                ),
            )
            for shard in shards
        ]
        replies = await self._ask_each(parts)
        said = [r.count if type(r) is Done else TOLD_NOT_YET for r in replies]
        return Done(request.id, min(said))

    def _get(self, request: Get) -> Reply | None:
        key = request.key
        if key in self._dropping:
            self._begin(request, self._ask_after(self._dropping[key], request))
            return None
        engine = self._servicer.engines.get(request.group)
        # A peek is the worker's: it knows what is a mirror.
        if engine is not None and not request.flags & PEEK:
            told = engine.served.told(key)
            if isinstance(told, tuple):
                value, ttl_ms, version = told
                return Value(request.id, value, ttl_ms, version)
        return self._one(request)

    def _get_many(self, request: GetMany) -> Reply | None:
        if request.flags & PEEK:
            raise ConfigError("one key is peeked at, not several", setting="flags")
        engine = self._servicer.engines.get(request.group)
        served = NO_READS if engine is None else engine.served
        answers, ttls, versions = served.many_told(request.keys)
        gone = self._dropping
        if not gone:
            whole = whole_values(request, answers, ttls, versions)
            if whole is not None:
                return whole
        found: dict[bytes, HitTold] = {}
        missing: dict[bytes, None] = {}
        for key, value, ttl_ms, version in zip(request.keys, answers, ttls, versions, strict=True):
            if isinstance(value, bytes) and key not in gone:
                found[key] = value, ttl_ms, version
            else:
                missing[key] = None
        if not missing:
            return joined_values(request, found, [], [])
        dropping = {gone[key] for key in missing if key in gone}
        parts = self._servicer.split.gets(request, list(missing))
        self._begin(request, self._ask_missing(request, found, parts, dropping))
        return None

    def _gets(self, request: Gets) -> Reply | None:
        """Answer the hits now, and each of the others when its worker does."""
        if request.flags & PEEK:
            raise ConfigError("one key is peeked at, not several", setting="flags")
        engine = self._servicer.engines.get(request.group)
        served = NO_READS if engine is None else engine.served
        keys = request.keys
        answers, ttls, versions = served.many_told(keys)
        dropping = self._dropping
        found: list[int] = []  # as in `Answers.at`: empty where all were
        if dropping or not all_values(answers):
            found = [
                index
                for index, key in enumerate(keys)
                if isinstance(answers[index], bytes) and key not in dropping
            ]
            if len(found) < len(keys):
                missing = sorted({*range(len(keys))}.difference(found))
                self._begin(request, self._ask_each_of(request, missing))
            answers = [answers[index] for index in found]
            ttls = [ttls[index] for index in found]
            versions = [versions[index] for index in found]
        if answers:
            values = cast("list[bytes | None]", answers)
            for part in in_frames(Answers(request.id, values, found, [], ttls, versions)):
                self._put(part)
        return None

    # -- answered by the workers -----------------------------------------------------------

    def _one(self, request: Get | Set | Delete) -> Reply | None:
        self._begin(request, self._ask(self._shard(request.key), request))
        return None

    def _invalidate(self, request: Invalidate) -> Reply | None:
        """Drop keys; what the same peer asks for behind this sees that they are gone."""
        parts = self._servicer.split.parts(request)
        task = self._begin(request, self._ask_all(request, parts))
        keys = [key for key, _ in request.items]
        self._dropping.update(dict.fromkeys(keys, task))
        task.add_done_callback(partial(self._dropped, keys))
        return None

    def _dropped(self, keys: Sequence[bytes], task: asyncio.Task[None]) -> None:
        for key in keys:
            if self._dropping.get(key) is task:
                del self._dropping[key]

    async def _ask_after(self, dropping: asyncio.Task[None], request: Get) -> Reply:
        await asyncio.wait((dropping,))
        return await self._ask(self._shard(request.key), request)

    def _shard(self, key: bytes) -> int:
        about = self._servicer.about
        return worker_of(shard_hash(key, about.hash_seed), about.workers)

    def _many(self, request: SetMany | DeleteMany) -> Reply | None:
        parts = self._servicer.split.parts(request)
        self._begin(request, self._ask_all(request, parts))
        return None

    def _flush(self, request: Flush) -> Reply | None:
        parts = self._servicer.split.flushes(request)
        self._begin(request, self._ask_all(request, parts))
        return None

    def _begin(
        self, request: Request, asking: Coroutine[Any, Any, Reply | None]
    ) -> asyncio.Task[None]:
        task = self._loop.create_task(self._answer(request.id, asking))
        self._tasks.add(task)
        task.add_done_callback(self._answered)
        return task

    def _answered(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        room, self._room = self._room, None
        if room is not None and not room.done():
            room.set_result(None)
        if self._last_asked and not self._tasks:
            self._ending.set()

    async def _answer(self, ticket: int, asking: Coroutine[Any, Any, Reply | None]) -> None:
        """Send what comes of it, under the peer's id; None: it was sent as it came."""
        try:
            reply = await asking
        except KamaCacheError as error:
            reply = Failure(ticket, *to_fields(error))
        except Exception as error:
            reply = self._defect(ticket, error)
        if reply is not None:
            reply.id = ticket
            self._put(reply)

    async def _ask(self, shard: int, request: Request) -> Reply:
        budget_s = min(request.budget_ms / 1000, CALL_TIMEOUT_MAX_S)
        return await self._servicer.workers[shard].ask(request, time.monotonic() + budget_s)

    async def _ask_each_of(self, request: Gets, missing: Sequence[int]) -> None:
        """Ask the workers for the keys at these places, and answer as they do."""
        keys = request.keys
        if self._dropping:
            dropping = {
                self._dropping[keys[index]] for index in missing if keys[index] in self._dropping
            }
            if dropping:
                await asyncio.wait(dropping)
        shards: dict[int, list[int]] = {}
        for index in missing:
            shards.setdefault(self._shard(keys[index]), []).append(index)
        await asyncio.gather(*(self._ask_some(*part, request) for part in shards.items()))

    async def _ask_some(self, shard: int, places: list[int], whole: Gets) -> None:
        """Ask one worker for the keys at some places, and answer as it does."""

        def answer(part: Answers) -> None:
            part.id = whole.id
            left.difference_update(answered(part))
            part.at = [places[index] for index in part.at or range(len(part.values))]
            for failed in part.errors:
                failed.index = places[failed.index]
            self._put(part)

        left = set(range(len(places)))
        request = like(whole, Gets(group=whole.group, keys=[whole.keys[at] for at in places]))
        budget_s = min(whole.budget_ms / 1000, CALL_TIMEOUT_MAX_S)
        deadline_s = time.monotonic() + budget_s
        failure: Reply | None
        try:
            failure = await self._servicer.workers[shard].ask_each(request, deadline_s, answer)
        except KamaCacheError as error:
            failure = Failure(0, *to_fields(error))
        except Exception as error:
            failure = self._defect(0, error)
        if type(failure) is Failure:
            fields = (failure.kind, failure.message, failure.fields)
            self._put(Answers(whole.id, errors=[KeyFailure(places[at], *fields) for at in left]))

    async def _ask_each(self, parts: Sequence[tuple[int, Request]]) -> list[Reply | KamaCacheError]:
        asked = [self._ask(shard, part) for shard, part in parts]
        if len(asked) == 1:
            return [await asked[0]]
        replies = await asyncio.gather(*asked, return_exceptions=True)
        for reply in replies:
            if isinstance(reply, BaseException) and not isinstance(reply, KamaCacheError):
                raise reply
        return cast("list[Reply | KamaCacheError]", replies)

    async def _ask_all(self, request: Request, parts: Sequence[tuple[int, Request]]) -> Reply:
        return joined_counts(request, await self._ask_each(parts))

    async def _ask_missing(
        self,
        request: GetMany,
        found: Mapping[bytes, HitTold],
        parts: Sequence[tuple[int, GetMany]],
        dropping: Collection[asyncio.Task[None]],
    ) -> Reply:
        if dropping:
            await asyncio.wait(dropping)
        replies = await self._ask_each(parts)
        return joined_values(request, found, [part for _, part in parts], replies)
