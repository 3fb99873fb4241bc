"""kamacache.v1.Peers: what other nodes' workers ask this node.

*Process*: front, on its loop. One stream for each worker of each other node::

    read ─► frames ─┬─ Ping, Hello, a get that is a hit ──────────────────┐
                    │                                                     ▼
                    └─ all else ─► a task ─► this node's workers ─► frames that wait ─► write

*Invariants*: nothing awaits on the way of a hit, and the replies to one message go out together.
What is asked for here is marked `FROM_PEER`, so no worker asks a third node for it. A stream is not
read on while too many of its requests are under way, or too much of what it asked for lies unread.
A request that fails is its own asker's affair; bytes that are no frames end their stream.

*The drain*: `Draining` is said on every stream; a peer answers it with a second `Hello`, behind
which it asks nothing more. A stream then ends when all its answers are written.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Protocol

import grpc

from kamacache.clock import boottime_ms
from kamacache.cluster.proving import Trust
from kamacache.errors import (
    KamaCacheError,
)
from kamacache.front.engine import Engine
from kamacache.front.peer_stream import PeerStream
from kamacache.front.proving import Porter, UnprovenError
from kamacache.front.splitting import (
    Split,
)
from kamacache.limits import (
    PEER_RENEW_S,
    PEER_STREAMS_MAX,
)
from kamacache.repeated import RepeatedLog
from kamacache.rundir.description import NodeDescription
from kamacache.rundir.live import LiveSettings
from kamacache.v1 import kamacache_pb2 as pb
from kamacache.wire.messages import (
    PEER_FORMAT,
    Answers,
    Gets,
    Hello,
    PeerSeen,
    Reply,
    Request,
    Welcome,
)

SERVICE: Final = pb.DESCRIPTOR.services_by_name["Peers"]
SEEN_TIMEOUT_S: Final = 2.0
SEEN_EVERY_S: Final = 0.1  # all workers of one node say hello at once; ours need one word of it
SEEN_MAX: Final = 4_096

log = logging.getLogger("kamacache.front")


class WorkerLink(Protocol):
    """How to ask one worker of this node; see `kamacache.local.alink.AsyncWorkerLinks`."""

    async def ask(self, request: Request, deadline_s: float) -> Reply:
        """Return the reply, of whatever kind. Raises `KamaCacheError`."""

    async def ask_each(
        self, request: Gets, deadline_s: float, part: Callable[[Answers], None]
    ) -> Reply | None:
        """Hand on what is known of keys as it comes; return the failure of those left, or None."""


class PeersServicer:
    """The service, and the streams that are open."""

    def __init__(
        self,
        engines: Mapping[str, Engine],
        workers: Sequence[WorkerLink],
        about: NodeDescription,
        *,
        streams_max: int = PEER_STREAMS_MAX,
        trust: Trust | None = None,
        settling: bool = False,
    ) -> None:
        """``trust`` has the secret by which the nodes know each other; None: they do without.

        ``settling``: the node does not serve yet, as it may have missed writes.
        """
        self.engines: Final = dict(engines)
        self.workers: Final = workers
        self.about: Final = about
        self.name: Final = about.name or about.listen or ""
        self.porter: Final = Porter(trust or Trust(), self.name)
        self.split: Final = Split(about.hash_seed, about.workers)
        self.draining = False
        self.settling = settling
        self.partial_bytes = 0  # of half frames, over all streams
        self.on_streams: Callable[[int], None] = lambda count: None  # told how many there are
        self._repeated = RepeatedLog(log)
        self._streams: set[PeerStream] = set()
        self._streams_max: Final = streams_max
        self._seen_s: dict[str, float] = {}
        self._telling: set[asyncio.Task[None]] = set()

    def handler(self) -> grpc.GenericRpcHandler:
        """Return the service, ready to be added to a server of grpc.aio."""
        # No serializers: the frames in a message are a few bytes behind its beginning.
        return grpc.method_handlers_generic_handler(
            SERVICE.full_name, {"Link": grpc.stream_stream_rpc_method_handler(self.link)}
        )

    async def link(self, _requests: object, context: Any) -> None:
        """Serve one stream until either end has enough of it."""
        if len(self._streams) >= self._streams_max:
            self.warn("a peer link too many is refused", limit=self._streams_max)
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many peer links")
        # Now and by itself: where a first write is cancelled on its way, gRPC believes that these
        # have not gone out, cannot send the status behind them, and the call stands for ever.
        await context.send_initial_metadata(())
        admitted = None
        try:
            if self.porter.trust.secrets is not None:
                admitted = await self.porter.admit(context, self._is_own)
            stream = PeerStream(self, context, asyncio.get_running_loop(), admitted)
            self._streams.add(stream)
            self.on_streams(len(self._streams))
            try:
                await stream.serve()
            finally:
                self._streams.discard(stream)
                self.on_streams(len(self._streams))
        except UnprovenError as error:
            self.warn(str(error), peer=error.peer, client=context.peer())
            await context.abort(error.code, error.told)

    def _is_own(self, hello: Hello) -> bool:
        return hello.node_id == self._life or hello.node == self.name

    def apply(self, live: LiveSettings) -> None:
        """Take the peers' secret of a reload; links that do not know it end soon."""
        trust = self.porter.trust
        trust.apply(live)
        if trust.secrets is not None:
            asyncio.get_running_loop().call_later(PEER_RENEW_S, self._end_unproven)

    def _end_unproven(self) -> None:
        secrets = self.porter.trust.secrets
        for stream in [*self._streams]:
            if secrets is not None and not secrets.has(stream.key):
                stream.end("it was proven with a secret that is gone")

    def drain(self) -> None:
        """Tell every peer to ask other nodes from now on; each stream ends when it is done."""
        self.draining = True
        for stream in [*self._streams]:
            stream.drain()

    def settled(self) -> None:
        """Serve; who took this node for one that drains meanwhile is to say hello again."""
        self.settling = False
        for stream in [*self._streams]:
            stream.settled()

    @property
    def _life(self) -> str:
        return self.about.memory or self.about.epoch

    def welcome(self, hello: Hello) -> Welcome:
        """Answer who says hello, and tell the workers that it is there."""
        if hello.node_id != self._life and not self.draining:
            self._tell_workers(hello.node)
        return Welcome(
            hello.id,
            PEER_FORMAT,
            self.name,
            self._life,
            draining=self.draining or self.settling,
            clock_ms=boottime_ms(),
        )

    def _tell_workers(self, peer: str) -> None:
        now_s = time.monotonic()
        if now_s - self._seen_s.get(peer, float("-inf")) < SEEN_EVERY_S:
            return
        if len(self._seen_s) >= SEEN_MAX:
            self._seen_s.clear()
        self._seen_s[peer] = now_s
        for worker in self.workers:
            task = asyncio.ensure_future(self._tell(worker, peer))
            self._telling.add(task)
            task.add_done_callback(self._telling.discard)

    async def _tell(self, worker: WorkerLink, peer: str) -> None:
        try:
            await worker.ask(PeerSeen(peer=peer), time.monotonic() + SEEN_TIMEOUT_S)
        except KamaCacheError as error:  # it dials by itself, only later
            log.debug("a worker was not told of a peer", extra={"peer": peer, "error": str(error)})

    def warn(self, message: str, exc_info: BaseException | None = None, **fields: Any) -> None:
        """Log a constant message, unless the same was logged just before."""
        self._repeated.warning(message, exc_info=exc_info, **fields)
