"""The worker's process, from its fork to its end.

*Process*: worker. `run` is called in the forked child, and returns the exit code::

    open shards ─► hooks ─► listen ─► peers ─► "ready" ─► serve ─┬─ "drain" ─► "idle" ─► "end" ─► 0
                                                        ├─ SIGQUIT ─► 0, at once
                                                        └─ too many hung getters ─► EXIT_RECYCLE

*The drain* is the supervisor's (`kamacache.rundir.context` has the words): loads that nobody's load
asked for are refused, all else goes on until "end" comes, or `drain_timeout_s` is over. A SIGTERM
is passed on to the supervisor, since it may have gone to the whole process group; SIGINT, which a
terminal sends to that group, is ignored. That the supervisor is dead is noticed by a thread of
`kamacache.node.roles`.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import stat
import sys
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

import uvloop

from kamacache.cluster.environment import set_grpc_environment
from kamacache.errors import KamaCacheError
from kamacache.getters import Loadable
from kamacache.limits import CONNECTIONS_MAX
from kamacache.local.attach import attach_role
from kamacache.local.reloads import take_reload
from kamacache.repeated import RepeatedLog
from kamacache.rundir.context import (
    EXIT_APP,
    EXIT_OK,
    EXIT_ROLE,
    WORD_DRAIN,
    WORD_END,
    WORD_IDLE,
    WORD_RELOAD,
    WORD_TERM,
    RoleContext,
)
from kamacache.rundir.layout import share_files
from kamacache.rundir.meters import Meters
from kamacache.store import open_writer
from kamacache.worker.flushing import Flushing
from kamacache.worker.handlers import Handlers, HostedGroup
from kamacache.worker.pools import GetterThreads
from kamacache.worker.protocol import Server
from kamacache.worker.slow import SlowLoads

if TYPE_CHECKING:
    from kamacache.worker.member import ClusterMember
    from kamacache.worker.settling import Settling

EXIT_RECYCLE: Final = 75  # EX_TEMPFAIL: hung getters; start a fresh worker
BACKLOG: Final = 1_024
UPKEEP_EVERY_S: Final = 1.0
RELIEVE_EVERY_S: Final = 0.1
IDLE_LOOK_EVERY_S: Final = 0.01  # while draining
CLOSE_WITHIN_S: Final = 1.0  # for replies to be written after the drain
SWITCH_INTERVAL_S: Final = 0.001  # a getter that computes gives the loop the GIL 1,000 times a s

log = logging.getLogger("kamacache.worker")
repeated = RepeatedLog(log)


def run(context: RoleContext, groups: Sequence[Loadable] | None = None) -> int:
    """Be worker ``context.index`` until told to stop; return the exit code.

    ``groups`` are the app's, with their getters; None: those of the context.
    """
    loop = uvloop.new_event_loop()
    asyncio.set_event_loop(loop)
    worker = Worker(context, context.groups if groups is None else groups, loop)
    try:
        return loop.run_until_complete(worker.serve())
    finally:
        # Getter threads are daemons and may hang: no joining, and no loop.close() under them.
        asyncio.set_event_loop(None)


class Worker:
    """One worker's parts, and the order in which they begin and end."""

    def __init__(
        self, context: RoleContext, groups: Sequence[Loadable], loop: asyncio.AbstractEventLoop
    ) -> None:
        self._context: Final = context
        self._loadables: Final = {group.spec.name: group for group in groups}
        self._loop: Final = loop
        self._groups: dict[str, HostedGroup] = {}
        self._member: ClusterMember | None = None  # None: a node without peers
        self._slow: Final = SlowLoads()
        self._slow.apply(context.live)
        about = context.description
        self._meters: Final = Meters(about.shm_dir, writable=True).worker(context.index)
        self._threads: Final = GetterThreads(loop, self._recycle, self._meters.own)
        self._handlers: Final = Handlers(self._groups, loop, self._stats)
        Flushing(self._groups, loop).join(self._handlers)  # a member of a cluster has its own
        self._server: Final = Server(
            self._handlers, loop, connections_max=CONNECTIONS_MAX, meters=self._meters.own
        )
        self._stopping = asyncio.Event()  # to drain, or to end
        self._ending = asyncio.Event()
        self._exit_code = EXIT_OK
        self._started: list[Loadable] = []  # whose on_worker_start ran
        self._listener: asyncio.AbstractServer | None = None
        self._settling: Settling | None = None  # of a warm start in a cluster
        self._at_once = True  # it ends otherwise than by the supervisor's word

    async def serve(self) -> int:
        """Begin, serve, end; return the exit code."""
        self._watch()
        try:
            code = await self._begin()
            if code != EXIT_OK or (self._settling is not None and not self._settling.served):
                return code  # not ready: told to end before it was settled
            upkeep = [
                self._loop.create_task(self._every(UPKEEP_EVERY_S, self._upkeep)),
                self._loop.create_task(self._every(RELIEVE_EVERY_S, self._threads.relieve)),
            ]
            gc.collect()
            gc.freeze()  # what the app brought is no garbage; do not look at it again
            self._context.report_ready()
            await self._stopping.wait()
            await self._finish_loads()
            for task in upkeep:
                task.cancel()
            return self._exit_code
        finally:
            await self._end()

    # -- begin -----------------------------------------------------------------------------

    async def _begin(self) -> int:
        """Open everything; an exit code other than 0 was reported as the failure."""
        context = self._context
        about = context.description
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        try:
            if about.clustered:
                # Here and not at the top: it loads grpc.
                set_grpc_environment()
                from kamacache.worker.member import ClusterMember

                self._member = ClusterMember(
                    about, context.index, self._groups, self._loop, context.live, self._meters
                )
            for index, spec in enumerate(about.groups):
                shard = open_writer(
                    about.shm_dir,
                    spec,
                    context.index,
                    about.workers,
                    about.hash_seed,
                    about.boot_id,
                )
                self._groups[spec.name] = HostedGroup(
                    spec,
                    shard,
                    self._loadables.get(spec.name),
                    self._threads,
                    None if self._member is None else self._member.peers,
                    self._meters.groups[index],
                )
                self._groups[spec.name].loader.slow = self._slow
            if self._member is not None:  # before anyone can ask
                self._member.join(self._handlers)
                if context.unsettled is not None:
                    self._settling = self._member.unsettled(context.unsettled, self._handlers)
            if context.socket_gid is not None:
                share_files(Path(about.shm_dir), context.socket_gid)
        except (KamaCacheError, OSError) as error:
            context.report_failed(EXIT_ROLE, f"worker {context.index}: {error}")
            return EXIT_ROLE
        # Getters that ask other groups of this node do so like any application.
        attach_role(context.run_dir, about)
        if self._settling is None and not await self._start_app():
            return EXIT_APP
        try:
            listener = listen(context.socket_path, context.socket_gid)
            self._listener = await self._loop.create_unix_server(
                self._server.connection, sock=listener, backlog=BACKLOG
            )
        except OSError as error:
            context.report_failed(
                EXIT_ROLE,
                f"worker {context.index} cannot listen on {context.socket_path}: {error}",
            )
            return EXIT_ROLE
        if self._member is not None:
            await self._member.start()
        if self._settling is not None:
            await self._settle(self._settling)
            if self._stopping.is_set():
                return EXIT_OK
            if not await self._start_app():  # only now: it may read groups of this node
                return EXIT_APP
            self._settling.serve()
        return EXIT_OK

    async def _settle(self, settling: Settling) -> None:
        """Settle, or return when this worker is told to stop before."""
        parts = [
            self._loop.create_task(part) for part in (settling.settle(), self._stopping.wait())
        ]
        try:
            await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
            if parts[0].done():
                parts[0].result()
        finally:
            for part in parts:
                part.cancel()

    async def _start_app(self) -> bool:
        """Run the app's hooks; False: one failed, which was reported."""
        for name, loadable in self._loadables.items():
            if name not in self._groups:
                continue
            try:
                await self._hook(loadable.run_worker_start)
            except Exception as error:
                log.exception("on_worker_start raised", extra={"group": name})
                self._context.report_failed(
                    EXIT_APP,
                    f"group {name!r}: on_worker_start raised {type(error).__name__}: {error}",
                )
                return False
            self._started.append(loadable)
        return True

    def _watch(self) -> None:
        loop = self._loop
        loop.add_reader(self._context.words_fd, self._on_words)
        loop.add_signal_handler(signal.SIGTERM, self._context.tell, WORD_TERM)
        loop.add_signal_handler(signal.SIGQUIT, self._end_now, EXIT_OK)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    async def _hook(self, hook: Callable[[], Awaitable[None] | None]) -> None:
        awaitable = hook()
        if awaitable is not None:
            await awaitable

    # -- serve -----------------------------------------------------------------------------

    async def _every(self, seconds: float, call: Callable[[], None]) -> None:
        while True:
            await asyncio.sleep(seconds)
            try:
                call()
            except Exception:
                repeated.exception("upkeep failed")

    def _upkeep(self) -> None:
        self._server.sweep()
        for group in self._groups.values():
            group.loader.tick()
            group.shard.maintain()

    def _stats(self) -> dict[str, int]:
        return {
            "connections": len(self._server.connections),
            "connections_refused": self._server.refused,
            "getters_hung": self._threads.hung,
            "getters_replaced": self._threads.replaced,
            **({} if self._member is None else self._member.stats()),
        }

    # -- end -------------------------------------------------------------------------------

    def _on_words(self) -> None:
        words = self._context.hear()
        if not words:
            # The supervisor is dead. The thread that watches it ends this process, when it has
            # removed the files: ending here would cut it short.
            self._loop.remove_reader(self._context.words_fd)
        for word in dict.fromkeys(words):
            if word == WORD_DRAIN:
                self._handlers.draining = True
                self._stopping.set()
            elif word == WORD_RELOAD:
                member = [self._member.reload] if self._member else []
                take_reload(self._context, self._slow.apply, *member)
            elif word == WORD_END:
                self._at_once = False
                self._loop.remove_reader(self._context.words_fd)
                self._give_up_loads()
                self._end_now(EXIT_OK)

    def _end_now(self, code: int) -> None:
        if not self._ending.is_set():
            self._exit_code = code
        self._handlers.draining = True
        self._ending.set()
        self._stopping.set()

    def _recycle(self) -> None:
        if not self._stopping.is_set():
            log.error(
                "too many getters hang; this worker ends and a fresh one takes its place",
                extra={"shard": self._context.index, "hung": self._threads.hung},
            )
            self._end_now(EXIT_RECYCLE)

    async def _finish_loads(self) -> None:
        """Serve on until told to end: loads of ours, and those of others that need ours."""
        deadline_s = self._loop.time() + self._context.drain_timeout_s
        said_idle = False
        while not self._ending.is_set() and self._loop.time() < deadline_s:
            if not said_idle and not self._handlers.loading:
                said_idle = True
                self._context.tell(WORD_IDLE)
            await asyncio.sleep(IDLE_LOOK_EVERY_S)
        if not self._ending.is_set():
            self._give_up_loads()

    def _give_up_loads(self) -> None:
        if self._handlers.loading:
            log.warning(
                "loads did not end in time; they are given up",
                extra={"shard": self._context.index},
            )

    async def _end(self) -> None:
        if self._listener is not None:
            self._unlink_socket()
            self._listener.close()
        # Settled in this turn of the loop, a reply is sent in the next.
        await asyncio.sleep(0)
        self._server.close()
        deadline_s = self._loop.time() + CLOSE_WITHIN_S
        while self._server.connections and self._loop.time() < deadline_s:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        self._server.abort()
        self._threads.close()
        if self._member is not None:
            if not self._at_once and self._context.keeps:
                await self._member.say_farewell()
            await self._member.close()
        for loadable in self._started:
            try:
                await self._hook(loadable.run_worker_stop)
            except Exception:
                log.exception("on_worker_stop raised", extra={"group": loadable.spec.name})
        for group in self._groups.values():
            group.shard.close()

    def _unlink_socket(self) -> None:
        with suppress(OSError):
            os.unlink(self._context.socket_path)


def listen(path: str, gid: int | None) -> socket.socket:
    """Return a listening socket that only we, or a group too, may connect to.

    Bound under another name and renamed: who finds the path finds it listening, and a socket
    that a dead worker left there is replaced in one step.
    """
    fresh = f"{os.path.splitext(path)[0]}.new"  # no longer than the path: sun_path has 107 bytes
    with suppress(FileNotFoundError):
        os.unlink(fresh)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        before = os.umask(0o177)
        try:
            listener.bind(fresh)
        finally:
            os.umask(before)
        if gid is not None:
            os.chown(fresh, -1, gid)
            os.chmod(fresh, stat.S_IRUSR | stat.S_IWUSR | stat.S_IRGRP | stat.S_IWGRP)
        listener.listen(BACKLOG)
        listener.setblocking(False)
        os.rename(fresh, path)
    except BaseException:
        listener.close()
        raise
    return listener
