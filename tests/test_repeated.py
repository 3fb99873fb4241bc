"""Tests of log lines for failures that repeat."""

from __future__ import annotations

import logging

import pytest

from kamacache.limits import LOG_EVERY_S, LOG_KINDS_MAX
from kamacache.repeated import RepeatedLog


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def log(clock: Clock) -> RepeatedLog:
    return RepeatedLog(logging.getLogger("test.repeated"), clock)


def skipped(caplog: pytest.LogCaptureFixture) -> list[tuple[str, int]]:
    return [(record.message, vars(record)["skipped"]) for record in caplog.records]


def test_a_message_comes_once_in_an_interval_then_with_what_was_left_out(
    log: RepeatedLog, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(3):
        log.warning("odd")
    clock.now_s += LOG_EVERY_S
    log.warning("odd")
    clock.now_s += LOG_EVERY_S
    log.warning("odd")
    assert skipped(caplog) == [("odd", 0), ("odd", 2), ("odd", 0)]


def test_what_a_message_is_about_is_told_apart(
    log: RepeatedLog, caplog: pytest.LogCaptureFixture
) -> None:
    for peer in ("a", "b", "a"):
        log.error("down", about=peer, peer=peer)
    assert [vars(record)["peer"] for record in caplog.records] == ["a", "b"]
    assert {record.levelname for record in caplog.records} == {"ERROR"}


def test_the_exception_goes_along(log: RepeatedLog, caplog: pytest.LogCaptureFixture) -> None:
    try:
        raise ValueError("why")
    except ValueError as error:
        log.exception("one")
        log.warning("two", exc_info=error)
    for record in caplog.records:
        assert record.exc_info is not None
        assert record.exc_info[0] is ValueError


def test_the_kinds_that_are_remembered_have_a_bound(
    log: RepeatedLog, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(LOG_KINDS_MAX + 1):
        log.warning("down", about=str(number))
    caplog.clear()
    log.warning("down", about=str(LOG_KINDS_MAX))
    assert not caplog.records
    log.warning("down", about="0")  # forgotten, as the oldest
    assert len(caplog.records) == 1
