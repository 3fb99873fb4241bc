"""The agent's life with a source of peers: ready, failures, and leaving."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial

import pytest

from kamacache.agent import main
from kamacache.agent.publisher import Publisher
from kamacache.errors import ConfigError
from kamacache.rundir.description import NodeDescription
from tests.agent.conftest import OWN, Source, members

DEADLINE_S = 10.0


class Agent:
    """`follow` under way, and what it said."""

    def __init__(self, about: NodeDescription, source: Source) -> None:
        self.publisher = Publisher(about, OWN, asyncio.get_running_loop().call_later)
        self.told, self.at_once = asyncio.Event(), asyncio.Event()
        self.ready = 0
        self.source = source
        self.task = asyncio.create_task(
            main.follow(
                source, self.publisher, self._on_ready, told=self.told, at_once=self.at_once
            )
        )

    def _on_ready(self) -> None:
        self.ready += 1

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not condition():  # noqa: ASYNC110 - polled: what it looks at is plain
                await asyncio.sleep(0.002)

    async def end(self) -> None:
        self.told.set()
        async with asyncio.timeout(DEADLINE_S):
            await self.task


@asynccontextmanager
async def an_agent(about: NodeDescription, source: Source) -> AsyncIterator[Agent]:
    agent = Agent(about, source)
    try:
        yield agent
    finally:
        agent.task.cancel()
        await asyncio.wait((agent.task,))
        agent.publisher.close()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "DISCOVERY_FIRST_S", 0.05)
    monkeypatch.setattr(main, "DISCOVERY_LEAVE_S", 0.05)
    monkeypatch.setattr(main, "LEAVE_AT_ONCE_S", 0.05)
    monkeypatch.setattr(main, "RESTART_BACKOFF_FIRST_S", 0.001)


async def test_agent_is_ready_when_its_first_list_stands(
    about: NodeDescription, source: Source
) -> None:
    async with an_agent(about, source) as agent:
        await agent.until(lambda: source.running)
        assert not agent.ready
        source.say(1, 2)
        await agent.until(lambda: agent.ready)
        assert agent.publisher.standing.members == tuple(members(1, 2))
        source.say(1, 3)
        assert agent.publisher.standing.members == tuple(members(1, 3))
        await agent.end()
        assert (agent.ready, source.leaves) == (1, 1)


async def test_agent_whose_source_says_nothing_is_ready_all_the_same(
    about: NodeDescription, source: Source, quick: None
) -> None:
    async with an_agent(about, source) as agent:
        await agent.until(lambda: agent.ready)
        assert agent.publisher.standing.number == 1
        source.say(1, 2)
        assert agent.publisher.standing.number == 2


async def test_list_that_cannot_be_a_cluster_does_not_make_the_agent_ready(
    about: NodeDescription, source: Source
) -> None:
    async with an_agent(about, source) as agent:
        await agent.until(lambda: source.running)
        source.say(2, 2)
        for _ in range(10):
            await asyncio.sleep(0)
        assert not agent.ready
        source.say(2)
        await agent.until(lambda: agent.ready)


@pytest.mark.parametrize(
    "error", [None, OSError("gone"), RuntimeError("bug"), asyncio.CancelledError()]
)
async def test_source_that_ends_is_run_again_and_the_last_list_stays(
    about: NodeDescription, source: Source, quick: None, error: BaseException | None
) -> None:
    async with an_agent(about, source) as agent:
        await agent.until(lambda: source.running)
        source.say(1, 2)
        await agent.until(lambda: agent.ready)
        for run in range(2, 5):
            source.end(error)
            await agent.until(partial(source.is_in_run, run))
        assert agent.publisher.standing.members == tuple(members(1, 2))
        await agent.end()
        assert source.leaves == 1


async def test_source_that_refuses_its_settings_ends_the_agent_before_its_first_list_only(
    about: NodeDescription, source: Source, quick: None
) -> None:
    async with an_agent(about, source) as agent:
        await agent.until(lambda: source.running)
        source.say(1)
        await agent.until(lambda: agent.ready)
        source.end(ConfigError("no such file"))
        await agent.until(lambda: source.runs == 2)
        assert not agent.task.done()
    fresh = Source()
    async with an_agent(about, fresh) as agent:
        await agent.until(lambda: fresh.running)
        fresh.end(ConfigError("no such file"))
        with pytest.raises(ConfigError, match="no such file"):
            await agent.task
        assert not agent.ready


async def test_agent_told_to_stop_before_it_is_ready_leaves_and_never_says_ready(
    about: NodeDescription, source: Source
) -> None:
    async with an_agent(about, source) as agent:
        await agent.until(lambda: source.running)
        await agent.end()
        assert (agent.ready, source.leaves) == (0, 1)


async def test_leaving_is_bounded(about: NodeDescription, source: Source, quick: None) -> None:
    async with an_agent(about, source) as agent:
        await agent.until(lambda: source.running)
        source.leave_gate.clear()
        await agent.end()
        assert source.leaves == 1


async def test_quit_cuts_leaving_short(
    about: NodeDescription, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(main, "DISCOVERY_LEAVE_S", 600.0)
    monkeypatch.setattr(main, "LEAVE_AT_ONCE_S", 0.05)
    async with an_agent(about, source) as agent:
        await agent.until(lambda: source.running)
        source.leave_gate.clear()
        agent.told.set()
        await agent.until(lambda: source.leaves)
        assert not agent.task.done()
        agent.at_once.set()
        await agent.end()


async def test_source_that_cannot_be_left_is_a_log_line(
    about: NodeDescription, source: Source, caplog: pytest.LogCaptureFixture
) -> None:
    async with an_agent(about, source) as agent:
        await agent.until(lambda: source.running)
        source.leave_error = OSError("refused")
        await agent.end()
    assert "could not be left" in caplog.text
