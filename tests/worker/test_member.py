"""The worker as a member of a cluster: `kamacache.worker.member`."""

from __future__ import annotations

import asyncio
from typing import cast

from kamacache.cluster.peers import Link
from kamacache.worker.member import RETIRE_LOOK_EVERY_S, retire


class Leaving:
    """The link to a node that left the list of peers."""

    def __init__(self) -> None:
        self.up = True
        self.pending = 1
        self.closed = False

    def stats(self) -> dict[str, int]:
        return {"pending": self.pending}

    async def close(self) -> None:
        self.closed = True


async def test_the_link_to_a_node_that_left_is_closed_when_that_has_answered() -> None:
    link = Leaving()
    retiring = asyncio.ensure_future(retire(cast(Link, link)))
    await asyncio.wait((retiring,), timeout=3 * RETIRE_LOOK_EVERY_S)
    assert not link.closed
    link.pending = 0
    await asyncio.wait_for(retiring, 5)
    assert link.closed


async def test_the_link_to_a_node_that_is_gone_is_closed_at_once() -> None:
    link = Leaving()
    link.up = False
    await asyncio.wait_for(retire(cast(Link, link)), 5)
    assert link.closed
