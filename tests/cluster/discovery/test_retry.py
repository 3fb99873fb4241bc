"""Waiting longer, telling it seldom, and running parts side by side."""

from __future__ import annotations

import asyncio
import logging

import pytest

from kamacache.cluster.discovery.retry import (
    REASONS_MAX,
    Backoff,
    Report,
    SourceError,
    to_the_end,
    until_first,
)
from kamacache.limits import LOG_EVERY_S


def test_waits_double_up_to_the_longest() -> None:
    waits = Backoff(0.1, 1.0, lambda: 1.0)
    assert [round(waits.next_s(), 3) for _ in range(6)] == [0.1, 0.2, 0.4, 0.8, 1.0, 1.0]
    waits.reset()
    assert waits.next_s() == pytest.approx(0.1)


def test_waits_are_jittered_down_to_half() -> None:
    assert Backoff(1.0, 8.0, lambda: 0.0).next_s() == 0.5
    assert all(0.5 <= Backoff(1.0, 8.0).next_s() <= 1.0 for _ in range(100))


def test_a_failure_is_told_once_in_a_while_and_its_end_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "kamacache.discovery")
    now = [0.0]
    report = Report("dns:x", lambda: now[0])
    report.works()
    assert not caplog.records
    for _ in range(100):
        report.failed("refused")
    assert len(caplog.records) == 1
    now[0] += LOG_EVERY_S
    report.failed("refused")
    assert [vars(line)["failures"] for line in caplog.records] == [1, 101]
    report.works()
    report.works()
    assert len(caplog.records) == 3
    assert vars(caplog.records[2])["failures"] == 101
    report.failed("refused")  # a new failure, told at once
    assert len(caplog.records) == 4


def test_reasons_are_bounded_in_number_and_length(caplog: pytest.LogCaptureFixture) -> None:
    report = Report("dns:x", lambda: 0.0)
    for i in range(10 * REASONS_MAX):
        report.failed(f"{i} " + "x" * 10_000)
    assert len(report._told_s) <= REASONS_MAX
    assert max(len(vars(line)["reason"]) for line in caplog.records) <= 300


async def test_parts_end_with_the_first_and_its_error() -> None:
    ended: list[str] = []

    async def waits() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("waits")

    async def fails() -> None:
        await asyncio.sleep(0)
        raise SourceError("broken")

    async def ends() -> None:
        await asyncio.sleep(0)

    with pytest.raises(SourceError, match="broken"):
        await until_first(waits(), fails())
    await until_first(ends(), waits())
    assert ended == ["waits", "waits"]


async def test_parts_end_with_their_caller() -> None:
    ended: list[str] = []

    async def waits() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("waits")

    task = asyncio.create_task(until_first(waits(), waits()))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended == ["waits", "waits"]


async def test_what_must_not_be_broken_off_ends_before_its_cancelled_caller() -> None:
    steps: list[str] = []
    begun = asyncio.Event()

    async def closes() -> str:
        begun.set()
        await asyncio.sleep(0.05)
        steps.append("closed")
        return "done"

    assert await to_the_end(closes()) == "done"
    begun.clear()
    task = asyncio.create_task(to_the_end(closes()))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert steps == ["closed", "closed"]


async def test_what_does_not_end_is_broken_off_after_a_while() -> None:
    ended: list[str] = []
    begun = asyncio.Event()

    async def hangs() -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("hangs")

    task = asyncio.create_task(to_the_end(hangs()))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended == ["hangs"]


async def test_an_error_is_the_callers() -> None:
    async def fails() -> None:
        raise SourceError("broken")

    with pytest.raises(SourceError, match="broken"):
        await to_the_end(fails())
