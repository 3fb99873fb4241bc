"""A peer link to a real node: its front killed, or stopped, its workers killed, its drain."""

from __future__ import annotations

import asyncio
import random
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest

from kamacache.cluster.exchange import Outcome, PeerLostError
from kamacache.cluster.link import LinkEnd, PeerLink
from kamacache.limits import PEER_SILENCE_S
from kamacache.wire.messages import (
    PEEK,
    Absent,
    Delete,
    DeleteMany,
    Done,
    Flush,
    Get,
    GetMany,
    Invalidate,
    Request,
    Set,
    SetMany,
    Value,
    Values,
)
from tests.node_process import NodeProcess

pytestmark = pytest.mark.integration

WAIT_S = 20.0
GROUP = "scores"
APP = """\
import pathlib, time
import kamacache

def load(key):
    with open("loads", "a") as file:
        file.write(key + "\\n")
    if key.startswith("slow"):
        gate = pathlib.Path("gate")
        end = time.monotonic() + 20
        while not gate.exists() and time.monotonic() < end:
            time.sleep(0.01)
    if key.startswith("no"):
        raise KeyError(key)
    return key.encode() * 2

group = kamacache.Group("scores", cache_bytes="64MiB", getter=load, negative_ttl=60)
"""


@pytest.fixture
def folder(short_dir: Path) -> Path:
    (short_dir / "peer_app.py").write_text(APP)
    return short_dir


@pytest.fixture
def node(folder: Path) -> Iterator[NodeProcess]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    args = (
        *("--workers=2", "--fronts=1", "--app=peer_app:group"),
        *(f"--listen={address}", f"--peers={address},127.0.0.9:9"),
    )
    with NodeProcess(folder / "run", *args, cwd=folder) as found:
        found.await_ready()
        try:
            yield found
        finally:
            if found.process.poll() is None:
                found.stop()


@asynccontextmanager
async def linked(node: NodeProcess, life: str = "a peer's life") -> AsyncIterator[PeerLink]:
    """A link of a worker of the other node, which this process plays."""
    link = PeerLink(
        str(node.description().name),
        LinkEnd("127.0.0.9:9", life, 0),
        asyncio.get_running_loop(),
        clock=lambda: time.time_ns() // 1_000_000 << 12,
        on_change=lambda link: None,
    )
    link.start()
    try:
        await asyncio.wait_for(link.wait_settled(), WAIT_S)
        yield link
    finally:
        await asyncio.wait_for(link.close(), WAIT_S)


async def ask(link: PeerLink, request: Request, timeout_s: float = WAIT_S) -> Outcome:
    answered: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
    link.send(request, answered.set_result, time.monotonic() + timeout_s)
    return await asyncio.wait_for(answered, timeout_s + WAIT_S)


async def get(link: PeerLink, key: str) -> bytes | None:
    outcome = await ask(link, Get(group=GROUP, key=key.encode()))
    assert isinstance(outcome, Value), outcome
    return outcome.value


async def until(condition: Callable[[], object], what: str = "") -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, what or "not within the deadline"
        await asyncio.sleep(0.005)


def role(node: NodeProcess, title: str) -> psutil.Process:
    found = node.role(title)
    assert found is not None, title
    return found


async def test_gets_of_many_askers_are_loaded_once_and_then_read_from_memory(
    node: NodeProcess, folder: Path
) -> None:
    keys = [f"key{number}" for number in range(300)]
    async with linked(node) as link:
        assert link.usable
        for _ in range(2):
            values = await asyncio.gather(*(get(link, key) for key in keys + keys[:50]))
            assert values == [key.encode() * 2 for key in keys + keys[:50]]
        assert await get(link, "no such") is None
        reply = await ask(link, GetMany(group=GROUP, keys=[b"no such", b"key1", b"fresh"]))
        assert isinstance(reply, Values)
        assert reply.values == [None, b"key1key1", b"freshfresh"]
        assert len(reply.ttls) == len(reply.versions) == 3
        assert all(reply.versions)
    loads = (folder / "loads").read_text().split()
    assert sorted(loads) == sorted([*keys, "no", "such", "fresh"])


async def test_writes_peeks_and_invalidations_reach_the_workers(node: NodeProcess) -> None:
    async with linked(node) as link:
        stored = await ask(link, Set(group=GROUP, key=b"k", value=b"v1"))
        assert isinstance(stored, Done)
        assert stored.version > 0
        peeked = await ask(link, Get(group=GROUP, key=b"k", flags=PEEK))
        assert isinstance(peeked, Value)
        assert (peeked.value, peeked.version) == (b"v1", stored.version)
        absent = await ask(link, Get(group=GROUP, key=b"absent", flags=PEEK))
        assert isinstance(absent, Absent)

        link.invalidate(GROUP, [(b"k", stored.version)])  # what is as new stays
        await until(lambda: not link.pending_invalidations)
        peeked = await ask(link, Get(group=GROUP, key=b"k", flags=PEEK))
        assert isinstance(peeked, Value)
        link.invalidate(GROUP, [(b"k", stored.version + 1)])
        await until(lambda: not link.pending_invalidations)
        assert isinstance(await ask(link, Get(group=GROUP, key=b"k", flags=PEEK)), Absent)

        items = [(b"m%d" % number, b"v") for number in range(100)]
        many = await ask(link, SetMany(group=GROUP, items=items))
        assert isinstance(many, Done)
        assert many.count == 100
        told = await ask(link, Invalidate(group=GROUP, items=[(b"m1", many.version + 1)]))
        assert isinstance(told, Done)
        deleted = await ask(link, DeleteMany(group=GROUP, keys=[key for key, _ in items[:50]]))
        assert isinstance(deleted, Done)
        assert deleted.count == 49
        one = await ask(link, Delete(group=GROUP, key=b"m60"))
        assert isinstance(one, Done)
        assert one.count == 1
        flushed = await ask(link, Flush(group=GROUP, version=one.version + (1 << 30)))
        assert isinstance(flushed, Done)
        assert isinstance(await ask(link, Get(group=GROUP, key=b"m70", flags=PEEK)), Absent)


async def test_values_larger_than_a_message_cross(node: NodeProcess) -> None:
    largest = random.Random(3).randbytes(300_000)
    async with linked(node) as link:
        items = [(b"large%d" % number, largest) for number in range(20)]
        for item in items:
            assert isinstance(await ask(link, Set(group=GROUP, key=item[0], value=largest)), Done)
        reply = await ask(link, GetMany(group=GROUP, keys=[key for key, _ in items]))
        assert isinstance(reply, Values)
        assert [value == largest for value in reply.values] == [True] * len(items)
        assert link.stats()["connects"] == 1


async def test_a_front_that_is_killed_is_noticed_and_its_successor_found(
    node: NodeProcess, folder: Path
) -> None:
    async with linked(node) as link:
        assert await get(link, "k") == b"kk"
        asking = asyncio.ensure_future(ask(link, Get(group=GROUP, key=b"slow")))
        await until(lambda: link.stats()["pending"] == 1)
        role(node, "front 0").kill()
        outcome = await asking
        assert isinstance(outcome, PeerLostError)
        assert not link.usable
        (folder / "gate").touch()
        await until(lambda: link.usable, "the front is back")
        assert await get(link, "k") == b"kk"


async def test_a_front_that_stands_still_is_noticed_though_its_kernel_answers(
    node: NodeProcess,
) -> None:
    async with linked(node) as link:
        front = role(node, "front 0")
        front.suspend()
        try:
            began_s = time.monotonic()
            outcome = await ask(link, Get(group=GROUP, key=b"k"))
            took_s = time.monotonic() - began_s
            assert isinstance(outcome, PeerLostError)
            assert PEER_SILENCE_S * 0.5 < took_s < PEER_SILENCE_S + 3
            began_s = time.monotonic()
            assert isinstance(await ask(link, Get(group=GROUP, key=b"k")), PeerLostError)
            assert time.monotonic() - began_s < 0.5  # nobody waits twice
        finally:
            front.resume()
        await until(lambda: link.usable)
        assert await get(link, "k") == b"kk"


async def test_a_worker_that_dies_is_asked_again_and_the_link_stays(
    node: NodeProcess, folder: Path
) -> None:
    async with linked(node) as link:
        asking = [
            asyncio.ensure_future(ask(link, Get(group=GROUP, key=b"slow%d" % number)))
            for number in range(8)
        ]
        await until(lambda: (folder / "loads").exists())
        await until(lambda: len((folder / "loads").read_text().split()) == 8)
        role(node, "worker 0").kill()
        (folder / "gate").touch()
        outcomes = await asyncio.gather(*asking)
        values = [getattr(outcome, "value", outcome) for outcome in outcomes]
        assert values == [b"slow%d" % number * 2 for number in range(8)]
        assert link.stats()["connects"] == 1


async def test_a_node_that_drains_says_so_answers_and_does_not_wait_for_idle_links(
    node: NodeProcess, folder: Path
) -> None:
    changes: list[tuple[bool, bool]] = []
    async with linked(node) as link, linked(node, "another worker's") as idle:
        link._on_change = lambda link: changes.append((link.up, link.usable))  # type: ignore[misc]
        asking = asyncio.ensure_future(ask(link, Get(group=GROUP, key=b"slow")))
        await until(lambda: (folder / "loads").exists())
        node.process.send_signal(signal.SIGTERM)
        await until(lambda: not link.usable and not idle.usable)
        assert link.up
        (folder / "gate").touch()
        outcome = await asking
        assert isinstance(outcome, Value)
        assert outcome.value == b"slowslow"
        began_s = time.monotonic()
        assert await asyncio.to_thread(node.await_end) == 0
        assert time.monotonic() - began_s < 5.0
        await until(lambda: not link.up)
        assert changes[0] == (True, False)
        lost = await ask(link, Get(group=GROUP, key=b"k"))
        assert isinstance(lost, PeerLostError)
        assert lost.sent is False
    assert "the front drains" in node.log
