"""Sending a call's parts and waiting for them: for threads, and for one event loop.

*Process*: the application's. Loaded by the first call; with it comes grpc. *Invariant*: questions
for the members run beside the calls, and nobody waits for them but the first call.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from queue import Empty, SimpleQueue
from typing import Any, Final

import grpc

from kamacache.client.access import Access
from kamacache.client.channels import LoopChannels, ThreadChannels, believed
from kamacache.client.exchange import Exchange, Part
from kamacache.client.forks import gate
from kamacache.client.nodes import Nodes, Question
from kamacache.cluster.status import from_rpc
from kamacache.errors import KamaCacheError, NodeUnavailableError
from kamacache.limits import CLIENT_JOIN_S, CLIENT_PROBE_S
from kamacache.v1 import kamacache_pb2 as pb

_SILENT: Final = grpc.StatusCode.DEADLINE_EXCEEDED
# A node that says so lives; the call itself will hear it, too, and raise it.
_DENIED: Final = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)


class Transport:
    """Of all threads that call and wait."""

    def __init__(self, nodes: Nodes, access: Access) -> None:
        self._nodes: Final = nodes
        self._metadata: Final = access.metadata
        self._tls: Final = access.tls
        self._channels: Final = ThreadChannels(nodes, access)

    def run(self, exchange: Exchange) -> None:
        """Send the parts until the last has ended; raises the call's first error."""
        with gate:
            self._run(exchange)
        exchange.check()

    def _run(self, exchange: Exchange) -> None:
        if exchange.operation.method == "Get":
            self._get(exchange)
        done: SimpleQueue[Part] = SimpleQueue()
        try:
            while True:
                self._keep_up()
                for part in exchange.to_send():
                    self._send(exchange, part, done)
                if not exchange.under_way:
                    break
                wait_s = exchange.wake_s - time.monotonic()
                try:
                    self._take(exchange, done.get(timeout=max(0.0, wait_s)))
                except Empty:
                    for part in exchange.overdue():
                        part.call.cancel()
        finally:
            _cancel(exchange)

    def _get(self, exchange: Exchange) -> None:
        """Send a get and wait in gRPC itself: half the CPU of a future, which takes two threads.

        Nobody can look after the node meanwhile. So the time is short, and what is not answered
        in it is asked for again, as a future: that joins the load, which goes on. A write is not
        sent so: one copy could be late, and undo what others wrote after the other.
        """
        for part in exchange.to_send():
            request = exchange.operation.request(pb, part.keys)
            left_s = exchange.deadline_s - part.sent_s
            patience_s = exchange.patience_s(part.sent_s)
            try:
                stub = self._channels.stub(part.node)
                reply = stub.Get(request, timeout=min(patience_s, left_s), metadata=self._metadata)
            except grpc.RpcError as error:
                code = error.code()
                if code is _SILENT and patience_s < left_s:
                    exchange.unanswered(part)
                    return
                exchange.failed(part, code, from_rpc(error, part.node.address, tls=self._tls))
            except ValueError as error:  # closed by another thread a moment ago
                exchange.failed(part, grpc.StatusCode.CANCELLED, NodeUnavailableError(str(error)))
            except NodeUnavailableError as error:  # not to be called
                exchange.failed(part, grpc.StatusCode.UNAVAILABLE, error)
            else:
                exchange.answered(part, reply)

    def join(self, deadline_s: float) -> None:
        """Wait, a bounded time, until a seed has said who the members are."""
        arrived = threading.Event()
        with gate:
            for question in self._nodes.join(arrived.set):
                self._ask(question)
        left_s = deadline_s - time.monotonic()
        arrived.wait(max(0.0, min(CLIENT_JOIN_S, left_s / 4)))

    def close(self) -> None:
        """End all calls and connections."""
        for channel in self._channels.take_all():
            channel.close()

    def _send(self, exchange: Exchange, part: Part, done: SimpleQueue[Part]) -> None:
        operation = exchange.operation
        request = operation.request(pb, part.keys)
        timeout_s = max(0.0, exchange.deadline_s - part.sent_s)
        try:
            method = getattr(self._channels.stub(part.node), operation.method)
            part.call = method.future(request, timeout=timeout_s, metadata=self._metadata)
        except ValueError as error:  # closed by another thread a moment ago
            exchange.failed(part, grpc.StatusCode.CANCELLED, NodeUnavailableError(str(error)))
            return
        except NodeUnavailableError as error:  # not to be called
            exchange.failed(part, grpc.StatusCode.UNAVAILABLE, error)
            return
        part.call.add_done_callback(lambda _: done.put(part))

    def _take(self, exchange: Exchange, part: Part) -> None:
        call = part.call
        code = call.code()
        if code is grpc.StatusCode.OK:
            exchange.answered(part, call.result())
        else:
            exchange.failed(part, code, from_rpc(call, part.node.address, tls=self._tls))

    def _keep_up(self) -> None:
        for question in self._nodes.probes():
            self._ask(question)
        question_or_none = self._nodes.refresher()
        if question_or_none is not None:
            self._ask(question_or_none)
            self._channels.tidy()

    def _ask(self, question: Question) -> None:
        gate.enter_beside()  # the question goes on when this call is over
        try:
            stub = self._channels.stub(question.node)
            call = stub.Members.future(
                pb.MembersRequest(), timeout=CLIENT_PROBE_S, metadata=self._metadata
            )
        except (ValueError, KamaCacheError) as error:  # closed a moment ago
            gate.leave()
            self._nodes.no_members(question, str(error), silent=False)
            return
        call.add_done_callback(lambda call: self._told(question, call))

    def _told(self, question: Question, call: Any) -> None:
        gate.leave()
        code = call.code()  # in a thread of grpc's
        if code is grpc.StatusCode.OK:
            self._nodes.members(question, *believed(call.result()))
        elif code in _DENIED:
            self._nodes.members(question, (), 0)
        else:
            why = str(from_rpc(call, question.node.address, tls=self._tls))
            self._nodes.no_members(question, why, silent=code is _SILENT)


class LoopTransport:
    """Of the tasks of one event loop."""

    def __init__(self, nodes: Nodes, access: Access, loop: asyncio.AbstractEventLoop) -> None:
        self._nodes: Final = nodes
        self._metadata: Final = access.metadata
        self._tls: Final = access.tls
        self._loop: Final = loop
        self._channels: Final = LoopChannels(nodes, access, loop)
        self._tasks: set[asyncio.Task[None]] = set()  # questions under way, each bounded

    async def run(self, exchange: Exchange) -> None:
        """As `Transport.run`."""
        done: deque[Part] = deque()
        bell = _Bell(self._loop)
        try:
            while True:
                self._keep_up()
                for part in exchange.to_send():
                    self._send(exchange, part, done, bell)
                if not exchange.under_way:
                    break
                if not done:
                    await bell.wait(exchange.wake_s - time.monotonic())
                if not done:
                    for part in exchange.overdue():
                        part.call.cancel()
                while done:
                    await self._take(exchange, done.popleft())
        finally:
            _cancel(exchange)
        exchange.check()

    async def join(self, deadline_s: float) -> None:
        """As `Transport.join`."""
        bell = _Bell(self._loop)

        def wake() -> None:  # from any thread
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
                self._loop.call_soon_threadsafe(bell.ring)

        for question in self._nodes.join(wake):
            self._ask(question)
        await bell.wait(min(CLIENT_JOIN_S, (deadline_s - time.monotonic()) / 4))

    async def aclose(self) -> None:
        """End all calls and connections."""
        for task in list(self._tasks):
            task.cancel()
        for channel in self._channels.take_all():
            await channel.close()

    def close(self) -> None:
        """As `aclose`, from anywhere: the loop does it when it runs on."""
        if self._loop.is_closed():
            self._channels.take_all()
            return
        with contextlib.suppress(RuntimeError):  # closed meanwhile
            self._loop.call_soon_threadsafe(self._close_soon)

    def _close_soon(self) -> None:
        task = self._loop.create_task(self.aclose())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _send(self, exchange: Exchange, part: Part, done: deque[Part], bell: _Bell) -> None:
        operation = exchange.operation
        request = operation.request(pb, part.keys)
        timeout_s = max(0.0, exchange.deadline_s - part.sent_s)
        try:
            method = getattr(self._channels.stub(part.node), operation.method)
            part.call = method(request, timeout=timeout_s, metadata=self._metadata)
        except grpc.aio.UsageError as error:  # closed a moment ago
            exchange.failed(part, grpc.StatusCode.CANCELLED, NodeUnavailableError(str(error)))
            return
        except NodeUnavailableError as error:  # not to be called
            exchange.failed(part, grpc.StatusCode.UNAVAILABLE, error)
            return

        def ended(_: Any) -> None:
            done.append(part)
            bell.ring()

        part.call.add_done_callback(ended)

    async def _take(self, exchange: Exchange, part: Part) -> None:
        call, address = part.call, part.node.address
        if call.cancelled():  # by us, or with its channel
            error = NodeUnavailableError(f"the connection to {address} was closed")
            exchange.failed(part, grpc.StatusCode.CANCELLED, error)
            return
        try:
            reply = await call  # has ended: this does not wait
        except grpc.aio.AioRpcError as error:
            exchange.failed(part, error.code(), from_rpc(error, address, tls=self._tls))
        else:
            exchange.answered(part, reply)

    def _keep_up(self) -> None:
        for question in self._nodes.probes():
            self._ask(question)
        question_or_none = self._nodes.refresher()
        if question_or_none is not None:
            self._ask(question_or_none)
            self._channels.tidy()

    def _ask(self, question: Question) -> None:
        task = self._loop.create_task(self._question(question))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _question(self, question: Question) -> None:
        try:
            stub: Any = self._channels.stub(question.node)
            reply = await stub.Members(
                pb.MembersRequest(), timeout=CLIENT_PROBE_S, metadata=self._metadata
            )
        except grpc.aio.AioRpcError as error:
            if error.code() in _DENIED:
                self._nodes.members(question, (), 0)
                return
            why = str(from_rpc(error, question.node.address, tls=self._tls))
            self._nodes.no_members(question, why, silent=error.code() is _SILENT)
        except (grpc.aio.UsageError, KamaCacheError) as error:  # closed a moment ago
            self._nodes.no_members(question, str(error), silent=False)
        else:
            self._nodes.members(question, *believed(reply))


class _Bell:
    """Wakes one task, now or when time is up; cheaper than a task or a timeout of asyncio's."""

    __slots__ = ("_loop", "_rung", "_waiter")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._rung = False
        self._waiter: asyncio.Future[None] | None = None

    def ring(self, *_: object) -> None:
        """Wake; in the loop's thread."""
        self._rung = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def wait(self, wait_s: float) -> None:
        """Return when it was rung since the last time, or after ``wait_s`` seconds."""
        if not self._rung:
            self._waiter = self._loop.create_future()
            timer = self._loop.call_later(max(0.0, wait_s), self.ring)
            try:
                await self._waiter
            finally:
                timer.cancel()
        self._rung = False


def _cancel(exchange: Exchange) -> None:
    """Cancel what an exchange that ends early has under way."""
    for part in exchange.under_way:
        if part.call is not None:
            part.call.cancel()
