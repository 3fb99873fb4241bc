"""Write the tables of the documentation that follow from the code; ``--check`` compares them.

    scripts/gen_docs.py            rewrite what lies between the marks of each page
    scripts/gen_docs.py --check    exit 1, naming the page, where a table is not what the code says

A page has a pair of marks for each of its tables, ``<!-- NAME: begin -->`` and
``<!-- NAME: end -->``, on lines of their own.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

import click

ROOT: Final = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from kamacache.cli.node import command  # noqa: E402
from kamacache.http.measures import SECTIONS  # noqa: E402
from kamacache.limits import CALL_SECONDS_BUCKETS, LOAD_SECONDS_BUCKETS  # noqa: E402
from kamacache.node.settings import ENVIRONMENT_PREFIX, READERS  # noqa: E402


def flags_table() -> str:
    """Return every flag of ``kamacache-node`` as rows of a table."""
    rows = ["| flag | variable | key in the file | meaning |", "|---|---|---|---|"]
    for option in command.params:
        if not isinstance(option, click.Option) or not option.name:
            continue
        name = max(option.opts, key=len)
        metavar = f" {option.metavar}" if option.metavar else ""
        if isinstance(option.type, click.Choice):
            metavar = f" {','.join(option.type.choices)}"
        known = option.name in READERS
        variable = ENVIRONMENT_PREFIX + option.name.upper()
        has_variable = known or option.name == "config"
        rows.append(
            f"| `{name}{metavar}` | {f'`{variable}`' if has_variable else ''} | "
            f"{f'`{option.name}`' if known else ''} | {_cell(option.help or '')} |"
        )
    return "\n".join(rows)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def metrics_table(section: str) -> str:
    """Return the metrics of a section as rows of a table."""
    rows = ["| metric | type | labels | meaning |", "|---|---|---|---|"]
    for measure in SECTIONS[section]:
        labels = ", ".join(f"`{label}`" for label in measure.labels)
        unit = f", {measure.unit}" if measure.unit else ""
        rows.append(
            f"| `{measure.name}` | {measure.kind}{unit} | {labels} | {_cell(measure.meaning)} |"
        )
    return "\n".join(rows)


def metric_names_table() -> str:
    """Return all metrics, with what each one is of."""
    rows = ["| of | metrics |", "|---|---|"]
    for section, measures in SECTIONS.items():
        names = ", ".join(f"`{measure.name}`" for measure in measures)
        rows.append(f"| {_cell(section.lower())} | {names} |")
    return "\n".join(rows)


def buckets_table() -> str:
    """Return the bounds of the histograms."""
    rows = ["| histograms | upper bounds of the buckets, in seconds |", "|---|---|"]
    for what, bounds in (
        ("of loads", LOAD_SECONDS_BUCKETS),
        ("of calls: to peers, gRPC, HTTP", CALL_SECONDS_BUCKETS),
    ):
        rows.append(f"| {what} | {', '.join(f'{bound:g}' for bound in bounds)}, +Inf |")
    return "\n".join(rows)


TABLES: Final[dict[str, tuple[str, Callable[[], str]]]] = {
    "flags": ("docs/operations.md", flags_table),
    "all metrics": ("docs/operations.md", metric_names_table),
    "buckets": ("docs/metrics.md", buckets_table),
    **{
        f"metrics of {section.lower()}": ("docs/metrics.md", partial(metrics_table, section))
        for section in SECTIONS
    },
}


def filled(page: str, name: str, table: str) -> str:
    """Return a page with a table between its marks; raises ValueError where they are missing."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    pattern = re.compile(f"{re.escape(begin)}\n.*?{re.escape(end)}", re.DOTALL)
    if len(pattern.findall(page)) != 1:
        raise ValueError(f"the marks {begin} and {end} must stand there once, each on its line")
    return pattern.sub(lambda _: f"{begin}\n{table}\n{end}", page)


def main() -> int:
    """Write the tables, or tell which are stale."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 where stale")
    arguments = parser.parse_args()
    stale = 0
    for name, (where, table) in TABLES.items():
        path = ROOT / where
        page = path.read_text()
        fresh = filled(page, name, table())
        if fresh == page:
            continue
        stale += 1
        if arguments.check:
            print(f"{where}: the table of {name} is stale; run scripts/gen_docs.py")
        else:
            path.write_text(fresh)
            print(f"{where}: {name} written")
    return 1 if stale and arguments.check else 0


if __name__ == "__main__":
    sys.exit(main())
