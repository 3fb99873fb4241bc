"""A node's words and description without a node, and a source of peers that a test drives."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from kamacache.cluster.membership import Member, make_membership, write_membership
from kamacache.rundir.control import ControlWriter
from kamacache.rundir.description import DESCRIPTION_FORMAT, NodeDescription

OWN = Member("10.0.0.1:8001", 2)


def members(*numbers: int) -> list[Member]:
    """Return nodes by number; 1 is the node itself."""
    return [OWN if n == 1 else Member(f"10.0.0.{n}:8001") for n in numbers]


@pytest.fixture
def about(tmp_path: Path) -> Iterator[NodeDescription]:
    """A node that stands alone as number 1, as the supervisor leaves it."""
    described = NodeDescription(
        format=DESCRIPTION_FORMAT, epoch="e", pid=1, boot_id="b", workers=1, hash_seed=1,
        shm_dir=str(tmp_path), sockets_dir=str(tmp_path), groups=[], listen=OWN.address,
        version="0", name=OWN.address, clustered=True,
    )  # fmt: skip
    control = ControlWriter(described.control_path)
    write_membership(described, make_membership(1, OWN.address, [OWN]), control.words)
    yield described
    control.close()


class Source:
    """A source of peers: it publishes, fails and ends when the test says so."""

    def __init__(self) -> None:
        self.runs = 0
        self.running = False
        self.leaves = 0
        self.leave_error: Exception | None = None
        self.leave_gate = asyncio.Event()
        self.leave_gate.set()
        self._publish: Callable[[Sequence[Member]], None] = lambda found: None
        self._end: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def run(self, publish: Callable[[Sequence[Member]], None]) -> None:
        self.runs += 1
        self.running = True
        self._publish = publish
        try:
            await asyncio.shield(self._end)
        finally:
            self.running = False

    async def leave(self) -> None:
        assert not self.running
        self.leaves += 1
        await self.leave_gate.wait()
        if self.leave_error is not None:
            raise self.leave_error

    def is_in_run(self, number: int) -> bool:
        return self.running and self.runs == number

    def say(self, *numbers: int) -> None:
        self._publish(members(*numbers))

    def end(self, error: BaseException | None = None) -> None:
        """Let this run end, or fail; the next one goes on."""
        ended, self._end = self._end, asyncio.get_running_loop().create_future()
        if isinstance(error, asyncio.CancelledError):
            ended.cancel()
        elif error is not None:
            ended.set_exception(error)
        else:
            ended.set_result(None)


@pytest.fixture
async def source() -> Source:
    return Source()
