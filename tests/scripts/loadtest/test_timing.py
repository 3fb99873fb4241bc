"""Waiting until a moment, on an event loop and without one."""

from __future__ import annotations

import asyncio
import time

import uvloop

from scripts.loadtest.timing import Alarm, least_timer_slack, sleep_until

TRIES = 20


def test_an_alarm_wakes_within_less_than_a_millisecond() -> None:
    async def run() -> list[int]:
        alarm = Alarm(asyncio.get_running_loop())
        late_ns = []
        try:
            for _ in range(TRIES):
                moment_ns = time.monotonic_ns() + 3_300_000
                await alarm.until(moment_ns)
                late_ns.append(time.monotonic_ns() - moment_ns)
        finally:
            alarm.close()
        return late_ns

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        late_ns = runner.run(run())
    assert min(late_ns) >= 0  # never early
    assert min(late_ns) < 900_000  # the loop's own timers count whole milliseconds


def test_a_moment_that_has_passed_is_not_waited_for() -> None:
    async def run() -> None:
        alarm = Alarm(asyncio.get_running_loop())
        try:
            await alarm.until(time.monotonic_ns() - 1)
            await alarm.until(0)
        finally:
            alarm.close()

    asyncio.run(asyncio.wait_for(run(), 10))
    sleep_until(0)


def test_a_thread_sleeps_until_the_moment() -> None:
    least_timer_slack()
    moment_ns = time.monotonic_ns() + 5_000_000
    sleep_until(moment_ns)
    assert time.monotonic_ns() >= moment_ns
