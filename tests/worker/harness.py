"""A worker's server on a thread of the test: the real parts but for the fork.

Getters and connections are real; the shard is one in private memory.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvloop

from kamacache import calls
from kamacache.config import GroupSpec
from kamacache.getters import Getter, Loaded
from kamacache.local.link import WorkerLinks
from kamacache.store import private_shard
from kamacache.wire.messages import Get, GetMany, Reply, Value, Values
from kamacache.worker.handlers import Handlers, HostedGroup
from kamacache.worker.main import BACKLOG, listen
from kamacache.worker.pools import GetterThreads
from kamacache.worker.protocol import Server


class Loading:
    """A `Loadable` made of plain functions, with the library's own `Getter`."""

    def __init__(
        self,
        spec: GroupSpec,
        getter: Callable[[Any], Any] | None = None,
        getter_many: Callable[[Any], Any] | None = None,
    ) -> None:
        self.spec = spec
        self._getter = Getter(spec.name, getter, getter_many, lambda value: value)
        self.is_async = self._getter.is_async
        self.has_getter = self._getter.present
        self.has_getter_many = self._getter.has_many
        self.load: Callable[[bytes], Loaded] = self._getter.load
        self.aload = self._getter.aload
        self.load_many = self._getter.load_many
        self.aload_many = self._getter.aload_many

    def run_worker_start(self) -> None:
        """Nothing to open."""

    def run_worker_stop(self) -> None:
        """Nothing to close."""


class Running:
    """A server on its own loop and thread, and links to it."""

    def __init__(self, folder: Path, connections_max: int = 64) -> None:
        self.folder = folder
        self.loop = uvloop.new_event_loop()
        self.groups: dict[str, HostedGroup] = {}
        self.recycled = threading.Event()
        self.threads = GetterThreads(self.loop, self.recycled.set)
        self.handlers = Handlers(self.groups, self.loop)
        self.server = Server(self.handlers, self.loop, connections_max=connections_max)
        self.links = WorkerLinks(folder, 0)
        self._thread = threading.Thread(target=self._run, name="worker-loop")

    @property
    def path(self) -> str:
        return f"{self.folder}/worker-0.sock"

    def group(
        self,
        getter: Callable[[Any], Any] | None = None,
        name: str = "g",
        getter_many: Callable[[Any], Any] | None = None,
        **settings: Any,
    ) -> HostedGroup:
        spec = GroupSpec(name=name, cache_bytes=settings.pop("cache_bytes", 1 << 20), **settings)
        writer, _ = private_shard(spec)
        hosted = HostedGroup(spec, writer, Loading(spec, getter, getter_many), self.threads)
        self.groups[name] = hosted
        return hosted

    def get(self, key: str, timeout: float = 10, group: str = "g") -> bytes | None:
        """Ask as an application does, or from inside a getter."""
        depth, chain = calls.nested(group, key.encode())
        reply = self.links.call(
            Get(group=group, key=key.encode(), depth=depth, chain=chain),
            calls.deadline_after(timeout, 10),
        )
        assert isinstance(reply, Value)
        return reply.value

    def get_many(self, *keys: str, timeout: float = 10) -> Values:
        reply = self.links.call(
            GetMany(group="g", keys=[key.encode() for key in keys]), time.monotonic() + timeout
        )
        assert isinstance(reply, Values)
        return reply

    def call(self, request: Any, timeout: float = 10) -> Reply:
        return self.links.call(request, time.monotonic() + timeout)

    def on_loop(self, call: Callable[[], Any]) -> Any:
        """Run on the server's loop and return the result."""

        async def run() -> Any:
            return call()

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(10)

    def counter(self, name: str, group: str = "g") -> int:
        return self.groups[group].loader.stats()[name]

    def start(self) -> None:
        self._listener = listen(self.path, None)
        self._thread.start()

    def stop(self) -> None:
        self.links.close()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)
        assert not self._thread.is_alive()
        self.threads.close()

    def _run(self) -> None:
        loop = self.loop
        asyncio.set_event_loop(loop)
        server = loop.run_until_complete(
            loop.create_unix_server(self.server.connection, sock=self._listener, backlog=BACKLOG)
        )

        def relieve() -> None:
            self.threads.relieve()
            loop.call_later(0.02, relieve)

        relieve()
        loop.run_forever()
        server.close()
        self.server.abort()
        loop.run_until_complete(asyncio.sleep(0.01))
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0.01))
        if not asyncio.all_tasks(loop):
            loop.close()


@contextmanager
def running(folder: Path, **settings: Any) -> Iterator[Running]:
    """Run a server in ``folder``, which has a short path."""
    worker = Running(folder, **settings)
    worker.start()
    try:
        yield worker
    finally:
        worker.stop()


def in_threads(count: int, call: Callable[[int], Any], deadline_s: float = 20) -> list[Any]:
    """Run ``call(i)`` in ``count`` threads at once; return results or the exceptions raised."""
    results: list[Any] = [None] * count

    def run(index: int) -> None:
        try:
            results[index] = call(index)
        except BaseException as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    end = time.monotonic() + deadline_s
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    assert not any(thread.is_alive() for thread in threads), "callers hang"
    return results


class Gate:
    """A getter that says when it runs, and ends when it is told."""

    def __init__(self, values: Mapping[str, bytes] | None = None) -> None:
        self.values = values or {}
        self.runs = 0
        self.entered = threading.Semaphore(0)
        self.open = threading.Event()

    def __call__(self, key: str) -> bytes:
        self.runs += 1
        self.entered.release()
        assert self.open.wait(20)
        return self.values.get(key, b"v-" + key.encode())

    async def running(self, count: int = 1) -> None:
        """Wait on the loop until the getter was called this often."""
        end = time.monotonic() + 10
        while self.runs < count:
            assert time.monotonic() < end
            await asyncio.sleep(0.005)

    def open_when(self, condition: Callable[[], object]) -> threading.Thread:
        """End the getters once a condition holds, from a thread that is returned running."""

        def wait() -> None:
            end = time.monotonic() + 10
            while not condition() and time.monotonic() < end:
                time.sleep(0.005)
            self.open.set()

        thread = threading.Thread(target=wait)
        thread.start()
        return thread

    def wait_entered(self) -> None:
        assert self.entered.acquire(timeout=10)
