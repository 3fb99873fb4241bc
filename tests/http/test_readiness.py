"""`kamacache.http.readiness`: ready, a worker that stands still, a node that is gone."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import Any

from kamacache.http.readiness import Readiness
from kamacache.limits import READY_EVERY_S, READY_PING_S
from tests.attached_estate import Estate


async def why(readiness: Readiness, said: str | None) -> None:
    """Wait until the readiness says so."""
    async with asyncio.timeout(10):
        while True:
            reason = await readiness.why_not()
            if reason is None and said is None:
                return
            if reason is not None and said is not None and said in reason:
                return
            await asyncio.sleep(READY_EVERY_S)


async def test_ready_follows_the_workers_and_the_node(short_dir: Path, environment: Any) -> None:
    with Estate(short_dir).node() as node:
        node.await_ready()
        readiness = Readiness(node.description())
        assert await readiness.why_not() is None
        worker = node.role("worker 1")
        assert worker is not None
        worker.send_signal(signal.SIGSTOP)
        loop = asyncio.get_running_loop()
        await why(readiness, "worker 1 answered no ping")
        began_s = loop.time()
        await asyncio.sleep(READY_EVERY_S)
        assert "worker 1" in (await readiness.why_not() or "")
        assert loop.time() - began_s < READY_PING_S + 5
        worker.send_signal(signal.SIGCONT)
        await why(readiness, None)
        readiness.draining = True
        assert await readiness.why_not() == "the node is draining"
        readiness.draining = False
        node.stop()
        await why(readiness, "supervisor")
        readiness.close()


async def test_many_who_ask_share_one_round(short_dir: Path, environment: Any) -> None:
    with Estate(short_dir).node() as node:
        node.await_ready()
        readiness = Readiness(node.description())
        rounds: list[None] = []
        ping_all = readiness._ping_all

        async def counted() -> str | None:
            rounds.append(None)
            return await ping_all()

        readiness._ping_all = counted  # type: ignore[method-assign]
        assert await asyncio.gather(*(readiness.why_not() for _ in range(50))) == [None] * 50
        assert len(rounds) == 1
        readiness.close()
        node.stop()
