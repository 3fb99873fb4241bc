"""When a worker of a warm start holds its shards for right.

With real nodes: tests/integration/test_warm_restart_cluster.py.
"""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from kamacache.clock import boottime_ms
from kamacache.cluster.farewell import Farewell
from kamacache.cluster.peers import TOLD_ALL, TOLD_NEVER, TOLD_NOT_YET, Peers
from kamacache.rundir.context import Unsettled
from kamacache.wire.messages import Done, Told
from kamacache.worker import settling
from kamacache.worker.handlers import Handlers
from kamacache.worker.settling import Settling

OWN, FIRST, SECOND = "h:1", "h:2", "h:3"


class Answering:
    """A link whose node answers each question with what the test says at that moment."""

    up = True

    def __init__(self, address: str, answer: int) -> None:
        self.address = address
        self.answer = answer
        self.asked = 0
        self.asked_again = asyncio.Event()

    def send(self, request: Told, done: Any, deadline_s: float) -> None:
        self.asked += 1
        if self.asked > 1:
            self.asked_again.set()
        asyncio.get_running_loop().call_soon(done, Done(request.id, self.answer))


class Nodes:
    """The other nodes of the cluster."""

    own = OWN

    def __init__(self, *links: Answering) -> None:
        self.links = list(links)


def settling_of(*links: Answering) -> Settling:
    return Settling(
        Unsettled(members=(OWN, FIRST, SECOND), left_ms=boottime_ms()),
        "life",
        Farewell(unheard=[], since_ms={}, left_ms={}),
        cast(Peers, Nodes(*links)),
        {},
        Handlers({}, asyncio.get_running_loop()),
    )


async def test_all_that_have_told_settle_it(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    await settling_of(Answering(FIRST, TOLD_ALL), Answering(SECOND, TOLD_ALL)).settle()
    assert [record.message for record in caplog.records] == ["settled"]


async def test_what_a_node_told_counts_for_a_moment_only(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(settling, "WARM_ASKED_S", 0.05)
    first, second = Answering(FIRST, TOLD_ALL), Answering(SECOND, TOLD_NOT_YET)
    settled = asyncio.ensure_future(settling_of(first, second).settle())
    async with asyncio.timeout(5):
        await first.asked_again.wait()  # since the other one takes its time
        first.answer = TOLD_NEVER  # it was cut off meanwhile
        second.answer = TOLD_ALL
        await settled
    assert [vars(record)["why"] for record in caplog.records] == [
        f"{FIRST} does not know all that it wrote meanwhile"
    ]
