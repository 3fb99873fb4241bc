"""docs/command.md names every field of the JSON, and no other; every command is there."""

from __future__ import annotations

import re

import msgspec
import pytest

from kamacache.cli.admin.figures import GroupFigures
from kamacache.cli.admin.peers import PeerFigures, WorkerLink
from kamacache.cli.admin.ring import Explained, RingNode
from kamacache.cli.client import command
from tests.node_process import ROOT

PAGE = (ROOT / "docs/command.md").read_text()


@pytest.mark.parametrize("struct", [GroupFigures, Explained, PeerFigures])
def test_every_field_is_documented(struct: type[msgspec.Struct]) -> None:
    _, _, rest = PAGE.partition(f"<!-- {struct.__name__} -->\n")
    table = rest.partition("\n\n")[0].splitlines()[2:]
    named = [name for row in table for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    beside = {"key", "key_base64"} if struct is Explained else set()
    assert set(named) - beside == set(struct.__struct_fields__)


@pytest.mark.parametrize("struct", [RingNode, WorkerLink])
def test_fields_of_what_is_nested_are_documented(struct: type[msgspec.Struct]) -> None:
    names = struct.__struct_fields__
    assert any(all(f"`{name}`" in row for name in names) for row in PAGE.splitlines())


def test_every_command_has_a_part_of_the_page() -> None:
    titles = re.findall(r"^## (.*)$", PAGE, re.MULTILINE)
    named = {name for title in titles for name in title.split(", ")}
    with command.make_context("kamacache", ["--help"], resilient_parsing=True) as context:
        assert set(command.list_commands(context)) == named
