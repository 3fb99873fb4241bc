"""The tables at the end: what each target did, what it cost, how they compare.

*Process*: the load test's own, after the last round. Eighty columns are enough for every table: a
target is named by its scheme, and what stands for what is said above. *Invariant*: what was not
measured is no number: a target whose processes are elsewhere has no row of CPU, and operations
that never ended have a dash for their latency.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Final

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from scripts.loadtest import figures
from scripts.loadtest.headline import headline
from scripts.loadtest.live import open_console
from scripts.loadtest.ratios import Ratios, Spread, compare
from scripts.loadtest.results import OpSummary, RoundResult, Summary, TestResult

TOTAL: Final = "all"
INDENT: Final = " "
LATENCY_CHARS: Final = 8
RATIO_LEGEND: Final = (
    "Median of the rounds, least..greatest; above 1: more ops/s, longer latencies."
)
KEYS_SHOWN_RATIO: Final = 1.01  # keys an operation, from where batches are spoken of


def print_tables(result: TestResult, console: Console | None = None) -> None:
    """Print everything that was found out, to stdout unless told otherwise."""
    console = open_console(sys.stdout) if console is None else console
    if not result.targets:
        console.print(Text("nothing was measured"))
        return
    names = figures.labels(result.targets)
    summaries = [result.summary(target) for target in result.targets]
    for line in heading(result, names):
        console.print(Text(line))
    console.print(latency_table(summaries, names))
    for table in (error_table(summaries, names), use_table(summaries, names)):
        if table is not None:
            console.print()
            console.print(table)
    compared = compare(result)
    if compared:
        console.print()
        console.print(ratio_table(compared, names))
        console.print(Text(RATIO_LEGEND, style="dim"))
    remarks = list(say_remarks(result, names))
    if remarks:
        console.print()
    for remark in remarks:
        console.print(Text(remark))


def heading(result: TestResult, names: dict[str, str]) -> Iterable[str]:
    """Yield what was tested, a line for each target."""
    yield ""
    yield from headline(result.arguments)
    for target in result.targets:
        rounds = result.of(target)
        seconds = figures.seconds(sum(found.seconds for found in rounds))
        in_rounds = f" in {len(rounds)} rounds" if len(rounds) > 1 else ""
        name = f"{names[target]} is {target}" if names[target] != target else target
        summary = result.summary(target)
        batches = summary.keys_per_s > summary.operations_per_s * KEYS_SHOWN_RATIO
        keys = f", {figures.rate(summary.keys_per_s)} keys/s" if batches else ""
        yield f"{name}: {seconds}{in_rounds}{keys}"
    yield ""


def latency_table(summaries: list[Summary], names: dict[str, str]) -> Table:
    """Return throughput, percentiles, hit ratio and errors; a row for each kind beneath."""
    table = _table("", "ops/s", "p50", "p90", "p99", "p99.9", "max", "hits", "errors", pad=0)
    for column in table.columns[1:7]:
        column.min_width = LATENCY_CHARS
    for summary in summaries:
        table.add_row(
            Text(names[summary.target], style="bold"),
            Text(figures.rate(summary.operations_per_s), style="bold"),
            *_latencies(summary),
            figures.share(summary.hit_ratio),
            _errors(summary.error_count),
            end_section=len(summary.ops) <= 1,
        )
        kinds = summary.ops if len(summary.ops) > 1 else []
        for number, op in enumerate(kinds, 1):
            per_s = op.count / summary.seconds if summary.seconds > 0 else None
            table.add_row(
                f"{INDENT}{op.kind}",
                figures.rate(per_s),
                *_latencies(op),
                "",
                "",
                end_section=number == len(kinds),
            )
    return table


def error_table(summaries: list[Summary], names: dict[str, str]) -> Table | None:
    """Return the errors by class, or None: there were none."""
    if not any(summary.errors for summary in summaries):
        return None
    table = _table("", "errors", "of all", left=1)
    table.add_column("class", justify="left", overflow="fold")
    for summary in summaries:
        tried = summary.operations + summary.error_count
        for name, count in summary.errors.items():
            table.add_row(
                Text(names[summary.target]),
                figures.amount(count),
                figures.share(count / tried),
                Text(name),
            )
    return table


def use_table(summaries: list[Summary], names: dict[str, str]) -> Table | None:
    """Return what each server process cost, or None where none could be looked at."""
    if not any(summary.use for summary in summaries):
        return None
    table = _table("", "process", "pid", "CPU / 1,000 ops", "resident", "private", left=2)
    for summary in summaries:
        for number, use in enumerate(summary.use):
            table.add_row(
                Text(names[summary.target] if not number else ""),
                Text(use.role),
                str(use.pid),
                _cpu(use.cpu_s_per_1000),
                figures.memory(use.rss_bytes) if use.rss_bytes else figures.NOTHING,
                figures.memory(use.private_bytes) if use.private_bytes else figures.NOTHING,
            )
        if len(summary.use) > 1:
            table.add_row(
                "",
                TOTAL,
                "",
                _cpu(sum(use.cpu_s_per_1000 for use in summary.use)),
                "",  # shared pages would count once for each process
                figures.memory(sum(use.private_bytes for use in summary.use)),
            )
        table.add_row(
            "" if summary.use else Text(names[summary.target]),
            "load test",
            "",
            _cpu(summary.client_cpu_s_per_1000),
            "",
            "",
            end_section=True,
        )
    return table


def ratio_table(compared: list[Ratios], names: dict[str, str]) -> Table:
    """Return the ratios to the first target: the rounds' median, then least..greatest."""
    base = names[compared[0].base]
    table = _table(f"to {base}", "rounds", "ops/s", "p50", "p99")
    for ratios in compared:
        table.add_row(
            Text(names[ratios.target], style="bold"),
            str(ratios.rounds),
            *(_spread(spread) for spread in (ratios.throughput, ratios.p50, ratios.p99)),
        )
    return table


def say_remarks(result: TestResult, names: dict[str, str]) -> Iterable[str]:
    """Yield what a reader of the numbers must know, a sentence each, none twice."""
    said: list[str] = []
    for found in result.rounds:
        where = _where(found, names, result)
        if found.interrupted:
            said.append(f"{where}: interrupted after {figures.seconds(found.seconds)}")
        sentences = [found.failed, *found.notes] if found.failed else found.notes
        said += [f"{where}: {sentence.removeprefix(f'{found.target}: ')}" for sentence in sentences]
    for target in result.targets:
        name = names[target]
        for found in result.of(target):
            said += [f"{name}, first error: {sentence}" for sentence in found.first_errors]
    for note in result.notes:
        target, _, rest = note.partition(": ")
        said.append(f"{names[target]}: {rest}" if target in names else note)
    for ratios in compare(result):
        rounds = len(result.of(ratios.target))
        if ratios.rounds < rounds:
            said.append(
                f"{names[ratios.target]}: {rounds - ratios.rounds} of {rounds} rounds are in no"
                f" ratio, since it or {names[ratios.base]} finished nothing in them"
            )
    yield from dict.fromkeys(said)


def _where(found: RoundResult, names: dict[str, str], result: TestResult) -> str:
    several = len(result.of(found.target)) > 1
    return f"{names[found.target]}{f', round {found.round}' if several else ''}"


def _latencies(of: Summary | OpSummary) -> list[str]:
    all_us = (of.p50_us, of.p90_us, of.p99_us, of.p999_us, of.max_us)
    return [figures.latency(us if of.max_us > 0 else None) for us in all_us]


def _errors(count: int) -> Text:
    return Text(figures.amount(count), style="red" if count else "")


def _spread(spread: Spread) -> Text:
    text = Text(figures.ratio(spread.median), style="bold")
    return text.append(
        f"  {figures.ratio(spread.least)}..{figures.ratio(spread.greatest)}", style="not bold"
    )


def _cpu(cpu_s: float) -> str:
    return figures.latency(cpu_s * 1e6)


def _table(*columns: str, left: int = 1, pad: int = 1) -> Table:
    """Return a table whose first ``left`` columns are names and whose others are numbers."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, pad, 0, 0), pad_edge=False, show_edge=False)
    for number, column in enumerate(columns):
        name = number < left
        table.add_column(
            Text(column),
            justify="left" if name else "right",
            no_wrap=not name,
            overflow="fold" if name else "ellipsis",
        )
    return table
