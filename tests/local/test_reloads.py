"""Tests of how a role takes up what a reload may change."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kamacache.local.reloads import follow_reloads, take_reload
from kamacache.rundir.context import WORD_RELOAD, RoleContext
from kamacache.rundir.description import NodeDescription
from kamacache.rundir.layout import RunDir
from kamacache.rundir.live import LiveSettings, live_path, write_live


class Told:
    """A role's context, the supervisor's end of its words, and what was applied."""

    def __init__(self, folder: Path) -> None:
        self.ours, its = socket.socketpair()
        self.ours.setblocking(False)
        self.folder = folder
        self.applied: list[LiveSettings] = []
        described = NodeDescription(
            format=1, epoch="e", pid=os.getpid(), boot_id="b", workers=1, hash_seed=1,
            shm_dir=str(folder), sockets_dir=str(folder), groups=[], version="0", listen=None,
        )  # fmt: skip
        self.context = RoleContext(
            role="front",
            index=0,
            run_dir=RunDir(folder),
            description=described,
            words_fd=its.detach(),
            parent_pid=os.getpid(),
            parent_pidfd=-1,
        )

    def reload(self, number: int, level: str = "info") -> None:
        """Publish settings and say the word."""
        write_live(self.folder, LiveSettings(number=number, log_level=level))
        with contextlib.suppress(BlockingIOError):  # as the supervisor does
            self.ours.send(f"{WORD_RELOAD}\n".encode())


@pytest.fixture
def told(tmp_path: Path) -> Iterator[Told]:
    level = logging.getLogger().level
    told = Told(tmp_path)
    yield told
    logging.getLogger().setLevel(level)
    told.ours.close()
    os.close(told.context.words_fd)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def test_a_word_applies_what_is_published_with_the_log_level_first(told: Told) -> None:
    seen: list[int] = []

    def apply(live: LiveSettings) -> None:
        seen.append(logging.getLogger().level)
        told.applied.append(live)

    follow_reloads(told.context, asyncio.get_running_loop(), apply)
    told.reload(1, "error")
    await until(lambda: bool(told.applied))
    assert seen == [logging.ERROR]


async def test_words_said_before_a_role_listens_are_taken_as_one(told: Told) -> None:
    for number in range(1, 1001):  # more than the socket has room for
        told.reload(number)
    follow_reloads(told.context, asyncio.get_running_loop(), told.applied.append)
    await until(lambda: bool(told.applied))
    assert [live.number for live in told.applied] == [1000]


def test_an_applier_that_fails_keeps_the_others_from_nothing(
    told: Told, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(live: LiveSettings) -> None:
        raise ValueError("cannot")

    told.reload(7)
    take_reload(told.context, refuse, told.applied.append)
    assert [live.number for live in told.applied] == [7]
    assert [record.message for record in caplog.records] == ["a reload could not be taken up"]


def test_settings_that_cannot_be_read_change_nothing(
    told: Told, caplog: pytest.LogCaptureFixture
) -> None:
    live_path(told.folder).write_text("{")
    take_reload(told.context, told.applied.append)
    assert not told.applied
    assert [record.levelname for record in caplog.records] == ["ERROR"]


async def test_a_supervisor_that_is_gone_is_not_listened_to(told: Told) -> None:
    loop = asyncio.get_running_loop()
    follow_reloads(told.context, loop, told.applied.append)
    told.ours.close()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not loop.remove_reader(told.context.words_fd)  # it had removed itself
