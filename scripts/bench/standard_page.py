"""The page of the standard set: Markdown from the JSON of a run, whole or in part.

*Process*: `standard.py`; nothing here measures or starts anything. What was missed, lost or not
measured comes before everything else. A part that is not in the JSON is not on the page; a part
that failed is, with the reason.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import cores_model
import standard_load

Results = Mapping[str, Any]

INTRO = """\
Made by `make bench`; edit `scripts/bench/standard_page.py`, not this page. Absolute times are of
the machine below. What carries over to another one are the ratios: both sides of a ratio run in
turn, in short slices, in one run; a figure is the median of the rounds, with the least and the
greatest behind it.
"""

MODEL = f"""\
From the CPU that a request takes in each role of a node of {cores_model.WORKERS_USUAL} workers and
{cores_model.FRONTS_USUAL} fronts (`scripts/bench/many_cores.py`), what a machine of more cores
carries, and what gives out first (`scripts/bench/cores_model.py`). *Assumed*: the CPU a request
takes in a role does not rise with the cores; a worker and a front each use one core at most; the
busiest worker has its even share of the keys and the hottest key, which has
{cores_model.HOTTEST_KEY_SHARE:.1%} of the requests (zipf 0.99, a million keys); a hit moves
{cores_model.HIT_BYTES} bytes between memory and cores at worst, and a machine
{cores_model.MEMORY_BYTES_PER_S_A_CORE / 1e9:g} GB/s a core up to
{cores_model.MEMORY_BYTES_PER_S_MAX / 1e9:g} GB/s; callers of the fronts are on other hosts; network
and kernel keep up. None of this can be seen on a machine of few cores.
"""
LINE_CHARS = 100


# -- figures -----------------------------------------------------------------------------------


def number(value: float) -> str:
    """Return a number with three or four digits that say something."""
    if value == int(value) and abs(value) < 1e6:
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) >= 100:
        return f"{value:.0f}"
    if abs(value) >= 10:
        return f"{value:.1f}"
    if abs(value) >= 0.995:
        return f"{value:.2f}"
    return f"{value:.3g}"


def spread(low: float, middle: float, high: float, unit: str = "") -> str:
    """Return the median, and least and greatest in brackets where they differ."""
    tail = f" {unit}" if unit and unit != "ratio" else ""
    if number(low) == number(high):
        return f"{number(middle)}{tail}"
    return f"{number(middle)}{tail} ({number(low)} to {number(high)})"


def row(*cells: object) -> str:
    """Return a row of a table; what would end a cell is escaped."""
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Return a table, or nothing where it has no rows."""
    lines = [row(*cells) for cells in rows]
    return [row(*head), row(*["---"] * len(head)), *lines, ""] if lines else []


def script(name: str) -> str:
    """Return how a benchmark is named on the page."""
    return f"`scripts/bench/{name}.py`"


# -- what the results say ----------------------------------------------------------------------


def targets_of(results: Results) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield every target with the name of its benchmark."""
    for name, result in results.get("benchmarks", {}).items():
        for target in result.get("targets", ()):
            yield name, target


def losses_of(results: Results) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Yield the comparisons of the load test, and in each the pairs that another target won.

    Won is: more throughput, or less latency at p50 or p99, in the median of the rounds. Where the
    load test sets the rate, throughput is not compared.
    """
    for digest in results.get("loads", {}).values():
        for pair in standard_load.against(digest):
            slower = pair["speed"][1] < 1 and "--rate=" not in digest["command"]
            if slower or pair["p50"][1] > 1 or pair["p99"][1] > 1:
                yield digest, pair


def not_measured(results: Results) -> Iterator[tuple[str, str]]:
    """Yield what could not be measured, and why."""
    for name, result in results.get("benchmarks", {}).items():
        if "failed" in result:
            yield script(name), result["failed"]
    for name, target in targets_of(results):
        if target["met"] is None:
            yield f"{script(name)}: {target['name']}", target["skipped"]
    for digest in results.get("loads", {}).values():
        if "failed" in digest:
            yield f"load test, {digest['title']}", digest["failed"]
        for target, why in digest.get("skipped", {}).items():
            yield f"load test, {digest['title']}: {target}", why
    yield from results.get("not_run", {}).items()


# -- the page ----------------------------------------------------------------------------------


def page(results: Results, plots: Mapping[str, str] | None = None) -> str:
    """Return the whole page. ``plots`` are paths from the page, by name."""
    drawn = plots or {}
    lines = ["# Benchmarks", "", *INTRO.splitlines(), ""]
    lines += _machine(results)
    lines += _first(results)
    lines += _targets(results, drawn)
    lines += _loads(results, drawn)
    lines += _cores(results, drawn)
    lines += _details(results)
    lines += _commands(results)
    return "\n".join(lines).rstrip() + "\n"


def _machine(results: Results) -> list[str]:
    about = results.get("machine", {})
    lines = ["| | |", "|---|---|"]
    lines += [row(name, text) for name, text in about.items()]
    versions = results.get("versions", {})
    if versions:
        lines.append(row("versions", ", ".join(f"{n} {v}" for n, v in versions.items())))
    lines.append(row("taken", f"{results.get('began', '')}, {results.get('took_s', 0):.0f} s"))
    notes = [*results.get("notes", ())]
    return [*lines, "", *(f"- {note}" for note in notes), *([""] if notes else [])]


def _first(results: Results) -> list[str]:
    """Return what comes first: targets missed, comparisons lost, things not measured."""
    lines = ["## Missed, lost, not measured", ""]
    missed = [
        (
            target["name"],
            target["target"],
            spread(target["min"], target["median"], target["max"]),
            script(name),
        )
        for name, target in targets_of(results)
        if target["met"] is False
    ]
    lines += ["**Targets missed:**" if missed else "No target was missed.", ""]
    lines += table(("what", "target", "measured", "by"), missed)
    losses = [
        (
            digest["title"],
            f"{pair['ours']} / {pair['theirs']}",
            *(spread(*pair[key]) for key in ("speed", "p50", "p99")),
        )
        for digest, pair in losses_of(results)
    ]
    if losses:
        lines += [
            "**Load tests that another server won**, in throughput (ours over theirs, below 1)",
            "or in latency (ours over theirs, above 1):",
            "",
        ]
        head = ("load", "ours / theirs", "throughput", "p50", "p99")
        lines += table(head, losses)
    elif results.get("loads"):
        lines += ["No load test was won by another server.", ""]
    gaps = [*not_measured(results)]
    if gaps:
        lines += ["**Not measured:**", "", *(f"- {what}: {why}" for what, why in gaps), ""]
    return lines


def _targets(results: Results, plots: Mapping[str, str]) -> list[str]:
    rows = [
        (
            "met" if target["met"] else "**missed**",
            target["name"],
            target["target"],
            spread(target["min"], target["median"], target["max"]),
            target["rounds"],
            script(name),
        )
        for name, target in targets_of(results)
        if target["met"] is not None
    ]
    if not rows:
        return []
    met = sum(cells[0] == "met" for cells in rows)
    lines = ["## Targets", "", f"{met} of {len(rows)} met.", ""]
    lines += _image(plots, "targets", "each target's measured value against what it asks")
    return [*lines, *table(("", "what", "target", "measured", "rounds", "by"), rows)]


def _loads(results: Results, plots: Mapping[str, str]) -> list[str]:
    lines: list[str] = []
    for slug, digest in results.get("loads", {}).items():
        if "targets" not in digest:
            continue
        lines += [f"### {digest['title']}", "", f"`{digest['command']}`", ""]
        rows = [
            (
                f"**{name}**" if one["ours"] else name,
                spread(*_rounds_of(one, "operations_per_s")),
                *(number(one[key]) for key in standard_load.PERCENTILES),
                number(one["max_us"]),
                "" if one["hit_ratio"] is None else f"{one['hit_ratio']:.1%}",
                number(one["server_cpu_s_per_1000"] * 1000),
                number(one["client_cpu_s_per_1000"] * 1000),
                number(one["generator_us"]),
                ", ".join(f"{count} {kind}" for kind, count in one["errors"].items()) or "none",
            )
            for name, one in digest["targets"].items()
        ]
        lines += table(
            (
                "target",
                "operations/s",
                "p50 us",
                "p99 us",
                "p99.9 us",
                "max us",
                "hits",
                "server CPU us",
                "client CPU us",
                "of it the test's own",
                "errors",
            ),
            rows,
        )
        ratios = [
            (
                f"{pair['ours']} / {pair['theirs']}",
                *(spread(*pair[key]) for key in ("speed", "p50", "p99")),
                pair["rounds"],
            )
            for pair in standard_load.against(digest)
        ]
        head = ("ours / theirs, by round", "throughput", "p50", "p99", "rounds")
        lines += table(head, ratios)
        notes = [f"- {note}" for note in digest.get("notes", ())]
        lines += [*notes, ""] if notes else []
        lines += _image(plots, slug, f"latency and throughput: {digest['title']}")
    if not lines:
        return []
    intro = [
        "## Load tests",
        "",
        "One workload against several servers in turn, several rounds. CPU is that of one",
        "operation; a batch is one. `local` is a process that is attached to a node on its host.",
        "What the load test does itself for an operation lowers throughput, not latency: the most",
        "where the target answers from memory, since what it takes there is as long as the answer.",
        "",
    ]
    return intro + lines


def _rounds_of(target: Mapping[str, Any], key: str) -> tuple[float, float, float]:
    found = sorted(each[key] for each in target["rounds"].values())
    if not found:
        return (target[key],) * 3
    middle = len(found) // 2
    median = found[middle] if len(found) % 2 else (found[middle - 1] + found[middle]) / 2
    return found[0], median, found[-1]


def _cores(results: Results, plots: Mapping[str, str]) -> list[str]:
    measured = results.get("benchmarks", {}).get("many_cores", {}).get("measured", {})
    if "model" not in measured:
        return []
    lines = ["## Many cores: a model", "", *textwrap.wrap(MODEL, LINE_CHARS), ""]
    roles = [
        (shape, kind, *(number(used.get(role, 0.0)) for role in ("client", "worker", "front")))
        for shape, kinds in measured["cpu_us_by_role"].items()
        for kind, used in kinds.items()
    ]
    lines += table(("node", "one", "client CPU us", "workers", "fronts"), roles)
    rows = [
        (
            each["cores"],
            each["workload"],
            number(each["requests_per_s"]),
            each["first"],
            _needed(each),
        )
        for each in measured["model"]
    ]
    lines += table(
        (
            "cores",
            "workload",
            "requests/s with 8 workers, 4 fronts",
            "saturates first",
            "until cores or memory do",
        ),
        rows,
    )
    return lines + _image(plots, "cores", "requests a second by cores, as the model has it")


def _needed(each: Mapping[str, Any]) -> str:
    if each["workers_needed"] is None:
        return "no number of workers: the hottest key has one"
    return f"{_count(each['workers_needed'], 'worker')}, {_count(each['fronts_needed'], 'front')}"


def _count(number_of: int, what: str) -> str:
    return f"{number_of} {what}{'s' * (number_of != 1)}"


def _details(results: Results) -> list[str]:
    lines: list[str] = []
    for name, result in results.get("benchmarks", {}).items():
        rows = [
            (what, spread(found["min"], found["median"], found["max"], found["unit"]))
            for what, found in result.get("measured", {}).items()
            if isinstance(found, Mapping) and {"min", "median", "max", "unit"} <= found.keys()
        ]
        if rows:
            lines += [f"### {name}", "", *table(("what", "median (least to greatest)"), rows)]
    return ["## Everything measured", "", *lines] if lines else []


def _commands(results: Results) -> list[str]:
    commands = results.get("commands", {})
    if not commands:
        return []
    lines = ["## Commands", "", "`make bench` ran these, in this order:", "", "```sh"]
    return [*lines, *commands.values(), "```", ""]


def _image(plots: Mapping[str, str], name: str, text: str) -> list[str]:
    return [f"![{text}]({plots[name]})", ""] if name in plots else []
