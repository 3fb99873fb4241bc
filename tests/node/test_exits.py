"""Where no node can run, it says why."""

from __future__ import annotations

import sys

import pytest

import kamacache
from kamacache.cli import node as command
from kamacache.node.exits import why_no_node
from kamacache.rundir.context import EXIT_ROLE


def test_linux_can() -> None:
    assert why_no_node() is None


def test_elsewhere_command_and_node_say_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert command._run(None, {}) == EXIT_ROLE
    assert "needs Linux" in capsys.readouterr().err
    node = kamacache.Node(None, workers=1)
    node.register_group(kamacache.Group("scores"))
    with pytest.raises(kamacache.ConfigError, match="this is darwin"):
        node.start()
