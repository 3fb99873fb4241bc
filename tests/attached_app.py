"""The app of the nodes that attached processes are tested with: getters that leave a trace.

Each load appends its key and pid to the file ``TRACE`` names. What a getter does is in the key's
first part: ``gate-x`` waits for a file ``x`` in ``GATES``, ``none-`` is not found, ``bad-``
raises, ``die-`` kills its worker.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import kamacache

TRACE = "KAMATEST_TRACE"
GATES = "KAMATEST_GATES"
GATE_S = 20.0
DEPTH = 4


def begun(key: str) -> None:
    """Write the load down; one write, whole among those of other processes."""
    with open(os.environ[TRACE], "ab", buffering=0) as trace:
        trace.write(f"{key} {os.getpid()}\n".encode())
    if key.startswith("none-"):
        raise KeyError(key)
    if key.startswith("bad-"):
        raise RuntimeError("the database says no")
    if key.startswith("die-"):
        os.kill(os.getpid(), signal.SIGKILL)


def gate(key: str) -> Path | None:
    """Return the file that the key's load waits for."""
    return Path(os.environ[GATES], key) if key.startswith("gate-") else None


def load(key: str) -> bytes:
    begun(key)
    waits_for = gate(key)
    end_s = time.monotonic() + GATE_S
    while waits_for is not None and not waits_for.exists() and time.monotonic() < end_s:
        time.sleep(0.005)
    return b"v-" + key.encode()


async def aload(key: str) -> bytes:
    begun(key)
    waits_for = gate(key)
    end_s = time.monotonic() + GATE_S
    while waits_for is not None and not waits_for.exists() and time.monotonic() < end_s:  # noqa: ASYNC110
        await asyncio.sleep(0.005)
    return b"v-" + key.encode()


def load_many(keys: list[str]) -> dict[str, bytes]:
    begun("many:" + "+".join(sorted(keys)))
    return {key: b"v-" + key.encode() for key in keys if not key.startswith("none-")}


def small(name: str, **settings: object) -> kamacache.Group:
    return kamacache.Group(name, **{"cache_bytes": "2MiB", **settings})  # type: ignore[arg-type]


scores = small("scores", getter=load, negative_ttl=60)
ascores = small("ascores", getter=aload)
batch = small("batch", getter_many=load_many, negative_ttl=60)
fifo = small("fifo", getter=load, eviction="s3fifo", cache_bytes="1MiB", ttl=60)

levels: list[kamacache.Group] = []
alevels: list[kamacache.Group] = []


def nested(level: int) -> kamacache.Group:
    """A group whose getter asks the next one, down to the deepest that is allowed."""

    def ask(key: str) -> bytes:
        begun(f"level{level}-{key}")
        below: bytes = b"." if level == DEPTH else levels[level + 1].get(key)
        return f"{level}".encode() + below

    return small(f"level{level}", getter=ask, cache_bytes="64KiB")


def anested(level: int) -> kamacache.Group:
    async def ask(key: str) -> bytes:
        begun(f"alevel{level}-{key}")
        below: bytes = b"." if level == DEPTH else await alevels[level + 1].aget(key)
        return f"{level}".encode() + below

    return small(f"alevel{level}", getter=ask, cache_bytes="64KiB")


levels += [nested(level) for level in range(DEPTH + 1)]
alevels += [anested(level) for level in range(DEPTH + 1)]


def through_b(key: str) -> bytes:
    return bytes(cycle_b.get(key))


def through_a(key: str) -> bytes:
    found = cycle_a.get_many([key]) if key.startswith("many-") else {key: cycle_a.get(key)}
    return bytes(found[key])


cycle_a = small("cycle_a", getter=through_b, cache_bytes="64KiB")
cycle_b = small("cycle_b", getter=through_a, cache_bytes="64KiB")


def write_own(key: str) -> bytes:
    """Set and delete the key that is being loaded, in each form; that is no cycle."""
    writer.set(key, b"1")
    writer.delete(key)
    writer.set_many({key: b"2"})
    writer.delete_many([key])
    return b"3"


async def awrite_own(key: str) -> bytes:
    await awriter.aset(key, b"1")
    await awriter.adelete(key)
    await awriter.aset_many({key: b"2"})
    await awriter.adelete_many([key])
    if key == "blocking":
        awriter.set_many({key: b"4"})
    return b"3"


writer = small("writer", getter=write_own, cache_bytes="64KiB")
awriter = small("awriter", getter=awrite_own, cache_bytes="64KiB")

groups = [
    scores, ascores, batch, fifo, *levels, *alevels, cycle_a, cycle_b, writer, awriter
]  # fmt: skip
