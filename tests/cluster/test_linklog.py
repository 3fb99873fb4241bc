"""`kamacache.cluster.linklog`: what is said of a link, at which level, and how often."""

from __future__ import annotations

import logging

import pytest

from kamacache.cluster.linklog import LinkLog


@pytest.fixture
def levels(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.DEBUG, "kamacache.cluster")
    return caplog


def said(levels: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    return [(r.levelname, getattr(r, "reason", "")) for r in levels.records]


def test_peers_that_start_together_are_no_warning(levels: pytest.LogCaptureFixture) -> None:
    link = LinkLog("127.0.0.1:1")
    for _ in range(3):
        link.down("refused", drained=False)
    link.up()
    assert said(levels) == [("INFO", "refused"), ("INFO", "")]


def test_a_peer_that_does_not_come_is_warned_of_once(
    levels: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = LinkLog("127.0.0.1:1")
    link.down("refused", drained=False)
    monkeypatch.setattr("kamacache.cluster.linklog.PEER_STRANGE_S", 0.0)
    for _ in range(3):
        link.down("refused", drained=False)
    assert said(levels) == [("INFO", "refused"), ("WARNING", "refused")]


def test_a_peer_that_goes_is_warned_of_each_time_it_was_there(
    levels: pytest.LogCaptureFixture,
) -> None:
    link = LinkLog("127.0.0.1:1")
    for _ in range(2):
        link.up()
        link.down("broken", drained=False)
        link.down("refused", drained=False)
    link.up()
    link.down("ended", drained=True)
    assert said(levels) == [("INFO", ""), ("WARNING", "broken")] * 2 + [
        ("INFO", ""),
        ("INFO", "ended"),
    ]


def test_what_waiting_does_not_mend_is_an_error_once(levels: pytest.LogCaptureFixture) -> None:
    link = LinkLog("127.0.0.1:1")
    for _ in range(3):
        link.refused("another format")
    assert said(levels) == [("ERROR", "another format")]
