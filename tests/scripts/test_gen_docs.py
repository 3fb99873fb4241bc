"""scripts/gen_docs.py: what the documentation takes from the code is what the code says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kamacache.cli.node import command
from kamacache.node.settings import READERS
from scripts.gen_docs import TABLES, filled, flags_table

ROOT = Path(__file__).resolve().parents[2]


def test_the_tables_of_the_documentation_are_fresh() -> None:
    checked = subprocess.run(
        [sys.executable, "scripts/gen_docs.py", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("name", TABLES)
def test_a_stale_table_is_told(name: str) -> None:
    where, table = TABLES[name]
    page = (ROOT / where).read_text()
    last_row = table().splitlines()[-1]
    assert last_row in page
    assert filled(page.replace(last_row, ""), name, table()) == page


def test_a_page_without_marks_is_an_error() -> None:
    with pytest.raises(ValueError, match="flags: begin"):
        filled("no marks", "flags", "table")


def test_every_setting_has_a_flag_and_every_flag_a_meaning() -> None:
    rows = flags_table().splitlines()[2:]
    for name in READERS:
        assert any(f"| `{name}` |" in row for row in rows), name
    assert all(row.split(" | ")[-1].strip(" |") for row in rows)
    assert len(rows) == len(command.params)
