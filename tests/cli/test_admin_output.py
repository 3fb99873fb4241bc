"""`kamacache.cli.admin.output`: tables and numbers, on a terminal and off it."""

from __future__ import annotations

import pytest

from kamacache.cli.admin import output
from kamacache.cli.admin.output import Cell, Column, count, duration, rate, share, size, table

COLUMNS = [
    *(Column("name", right=False), Column("items"), Column("odd", optional=2), Column("last")),
]
ROWS: list[list[str | Cell]] = [
    ["scores", "1,000", "x", Cell("bad", "red")],
    ["a", "2", "yy", "good"],
]


def test_columns_are_aligned_and_plain_without_a_terminal() -> None:
    assert table(COLUMNS, ROWS) == [
        "name    items  odd  last",
        "scores  1,000    x   bad",
        "a           2   yy  good",
    ]


def test_a_narrow_terminal_loses_optional_columns_then_ends_of_lines(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(output, "on_terminal", lambda: True)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "22")
    assert table(COLUMNS, ROWS)[1] == "scores  1,000   bad"
    monkeypatch.setenv("COLUMNS", "20")
    wide: list[list[str | Cell]] = [["scores-of-a-long-name", "1,000", "x", "y"]]
    assert table(COLUMNS, wide)[1] == "scores-of-a-long-na…"
    assert all(len(line) <= 20 for line in table(COLUMNS, wide))


def test_colours_on_a_terminal_alone_and_not_with_no_color(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert output.paint("x", "red") == "x"
    monkeypatch.setattr(output, "on_terminal", lambda: True)
    assert output.paint("x", "red") == "\x1b[31mx\x1b[0m"
    assert "\x1b[31m" in table(COLUMNS, ROWS)[1]
    monkeypatch.setenv("NO_COLOR", "1")
    assert output.paint("x", "red") == "x"


def test_numbers_for_people() -> None:
    assert [count(1234567), count(None)] == ["1,234,567", "-"]
    assert [size(0), size(1023), size(1 << 20), size(5 << 40)] == [
        *("0 B", "1023 B", "1.0 MiB", "5.0 TiB")
    ]
    assert [share(0.5), share(None)] == ["50.0 %", "-"]
    assert [duration(s) for s in (0, 5e-6, 0.0025, 1.5, 125, 3_725, 90_000)] == [
        *("0 s", "5 us", "2.5 ms", "1.5 s", "2 min 5 s", "1 h 2 min", "1 d 1 h")
    ]
    assert [rate(0), rate(1.25), rate(12_345.6)] == ["0", "1.25", "12,346"]
