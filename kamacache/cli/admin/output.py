"""How the commands write: aligned tables, numbers for people, colours on a terminal alone."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from typing import Final, NamedTuple

import click

COLUMNS_MIN: Final = 20
UNKNOWN: Final = "-"

GOOD: Final = "green"
WARNING: Final = "yellow"
BAD: Final = "red"


class Column(NamedTuple):
    """One column of a table; those with the greatest ``optional`` go first where it is narrow."""

    name: str
    right: bool = True
    optional: int = 0


class Cell(NamedTuple):
    """A text in a colour."""

    text: str
    colour: str | None = None


def on_terminal() -> bool:
    """Tell whether a person reads what is printed."""
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def coloured() -> bool:
    """Tell whether colours may be used: on a terminal, unless NO_COLOR is set (no-color.org)."""
    return on_terminal() and not os.environ.get("NO_COLOR")


def paint(text: str, colour: str | None) -> str:
    """Return a text in a colour, where colours are used."""
    return click.style(text, fg=colour) if colour and text.strip() and coloured() else text


def columns_of_terminal() -> int | None:
    """Return the terminal's width; None: no terminal, lines may be of any length."""
    return max(shutil.get_terminal_size().columns, COLUMNS_MIN) if on_terminal() else None


def table(columns: Sequence[Column], rows: Sequence[Sequence[str | Cell]]) -> list[str]:
    """Return the lines of a table, its head first, as wide as the terminal at most."""
    cells = [[cell if isinstance(cell, Cell) else Cell(cell) for cell in row] for row in rows]
    widths = [
        max([len(column.name), *(len(row[at].text) for row in cells)])
        for at, column in enumerate(columns)
    ]
    shown = list(range(len(columns)))
    room = columns_of_terminal()
    if room is not None:
        while sum(widths[at] + 2 for at in shown) - 2 > room:
            least = max(shown, key=lambda at: (columns[at].optional, at))
            if not columns[least].optional:
                break
            shown.remove(least)

    def line(texts: Sequence[Cell]) -> str:
        parts, left = [], room
        for at in shown:
            text, colour = texts[at]
            padded = text.rjust(widths[at]) if columns[at].right else text.ljust(widths[at])
            if at == shown[-1]:
                padded = padded.rstrip()
            if left is not None:
                if len(padded) > left:
                    padded = padded[: max(left - 1, 0)] + "…" * (left > 0)
                left -= len(padded) + 2
            parts.append(paint(padded, colour))
        return "  ".join(parts).rstrip()

    return [line([Cell(column.name) for column in columns]), *map(line, cells)]


def count(number: float | None) -> str:
    """Return a count with its thousands apart."""
    return UNKNOWN if number is None else f"{number:,.0f}"


def size(count_bytes: float | None) -> str:
    """Return bytes with a unit of 1,024."""
    if count_bytes is None:
        return UNKNOWN
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count_bytes) < 1024:
            return f"{count_bytes:.0f} {unit}" if unit == "B" else f"{count_bytes:.1f} {unit}"
        count_bytes /= 1024
    return f"{count_bytes:.1f} TiB"


def share(part: float | None) -> str:
    """Return a share as per cent."""
    return UNKNOWN if part is None else f"{100 * part:.1f} %"


def duration(seconds: float | None) -> str:
    """Return a time with the unit that suits it."""
    if seconds is None:
        return UNKNOWN
    if not seconds:
        return "0 s"
    if seconds < 0.001:
        return f"{seconds * 1e6:.0f} us"
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes, left = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {left} s"


def rate(per_s: float | None) -> str:
    """Return events a second."""
    if per_s is None:
        return UNKNOWN
    return f"{per_s:,.0f}" if per_s >= 100 or per_s == 0 else f"{per_s:.3g}"
