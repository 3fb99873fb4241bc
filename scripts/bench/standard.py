#!/usr/bin/env python3
"""`make bench`: the standard set in under ten minutes, and docs/benchmarks.md made from it.

    scripts/bench/standard.py [--quick] [--only NAME ...] [--page FILE] [--results FILE] [--check]
    scripts/bench/standard.py --from RESULTS [--page FILE]

It runs the benchmarks of this folder, each with a limit of time, and load tests of a node against
redis-server and memcached, which it starts itself; what is not installed is left out, and said.
The results go to ``--results`` after each part (default: build/benchmarks.json); the page is
replaced at the very end, in one step. Ctrl-C ends what runs, leaves the page as it was and exits
with 130; ``--from`` makes a page of what there is. With --quick everything runs shortly, and the
page is made and thrown away: it shows that all of it works, and measures nothing. With --only the
page goes beside the results, unless ``--page`` names another place.

Exit code: 0; 1 when a part failed (the page says which); with ``--check`` also when a target was
missed; 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import _harness as harness
import psutil
import run_all
import standard_load
import standard_page

PAGE = harness.ROOT / "docs" / "benchmarks.md"
RESULTS = harness.ROOT / "build" / "benchmarks.json"
FORMAT = 1
TOTAL_S = 590.0  # no part may take longer than what is left of it
PART_LEAST_S = 5.0  # with less than this left a part is not begun


@dataclass(frozen=True)
class Part:
    """One benchmark of the standard set."""

    name: str
    seconds: float  # after which it begins no further round
    limit_s: float  # after which it is ended
    flags: tuple[str, ...] = ()


PARTS = (
    Part("local_hit", 20, 60),
    Part("local_set", 15, 45),
    Part("front", 30, 60),
    Part("remote", 35, 75),
    Part("peer_link", 25, 60),
    Part("many_cores", 35, 75),
    Part("memory", 60, 150),
    Part("big_shard", 70, 150),
    Part("readers_scale", 15, 45),
    Part("ring", 10, 30),
    Part("eviction", 30, 60, ("--quick",)),  # of all traces it takes many minutes
    Part("startup", 20, 45),
)
QUICK_LIMIT_S = 60.0
# Not in --quick: what takes too long even in its short form, and load tests much like others.
NOT_QUICK = (
    "eviction",
    *(
        each.slug
        for each in standard_load.COMPARISONS
        if each.slug not in standard_load.QUICK_SLUGS
    ),
)


def machine() -> dict[str, str]:
    """Return what the page says of the machine."""
    model = ""
    with Path("/proc/cpuinfo").open() as lines:
        for line in lines:
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return {
        "machine": f"{os.cpu_count()} cores, {model or platform.processor()}",
        "memory": f"{psutil.virtual_memory().total / (1 << 30):.0f} GiB",
        "system": f"Linux {platform.release().partition('-')[0]}, {platform.machine()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}, "
        f"{platform.python_compiler()}",
    }


class Run:
    """One run of the set: what was found so far, and the time that is left."""

    def __init__(self, results: Path, *, quick: bool) -> None:
        self._path = results
        self._quick = quick
        self._end_s = time.monotonic() + TOTAL_S
        self._began_s = time.monotonic()
        self._load_before = os.getloadavg()[0]
        self.found: dict[str, Any] = {
            "format": FORMAT,
            "began": datetime.now(UTC).isoformat(timespec="seconds"),
            "took_s": 0.0,
            "quick": quick,
            "machine": machine(),
            "versions": {},
            "notes": [],
            "commands": {},
            "benchmarks": {},
            "loads": {},
            "not_run": {},
        }

    def left_s(self) -> float:
        """Return how much of the ten minutes is left."""
        return self._end_s - time.monotonic()

    def part(self, part: Part, folder: Path) -> None:
        """Run a benchmark, keep what it says."""
        if not (run_all.HERE / f"{part.name}.py").exists():
            self.not_run(standard_page.script(part.name), "there is no such benchmark")
            return
        if self._out_of_time(standard_page.script(part.name)):
            return
        if self._quick:
            flags, limit_s = ["--quick"], QUICK_LIMIT_S
        else:
            flags, limit_s = [f"--seconds={part.seconds:g}", *part.flags], part.limit_s
        command = " ".join([f"scripts/bench/{part.name}.py", *flags])
        self.found["commands"][part.name] = command
        began_s = time.monotonic()
        found = run_all.run(part.name, folder, flags, min(limit_s, self.left_s()))
        found["took_s"] = time.monotonic() - began_s
        self.found["benchmarks"][part.name] = found
        self.found["versions"] |= {
            name: text
            for name, text in found.get("versions", {}).items()
            if name != "python" and not name.startswith("transparent_hugepage")
        }
        self.save()

    def loads(self, comparisons: list[standard_load.Comparison], plots: Path) -> None:
        """Run load tests against servers that are started for all of them together."""
        if not comparisons:
            return
        if not standard_load.SCRIPT.exists():
            self.not_run("load tests", f"there is no {standard_load.SCRIPT.name}")
            return
        if self._out_of_time("load tests"):
            return
        with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
            servers = stack.enter_context(standard_load.servers())
            self.found["versions"] |= servers.versions
            for comparison in comparisons:
                if self._out_of_time(f"load test, {comparison.title}"):
                    continue
                print(f"== load test: {comparison.title} ==", flush=True)
                began_s = time.monotonic()
                self.found["loads"][comparison.slug] = standard_load.run(
                    comparison,
                    servers,
                    Path(folder),
                    quick=self._quick,
                    plot=plots / f"{comparison.slug}.png",
                    limit_s=min(standard_load.LIMIT_S, self.left_s()),
                )
                took_s = time.monotonic() - began_s
                self.found["loads"][comparison.slug]["took_s"] = took_s
                command = standard_load.shown_command(comparison, quick=self._quick)
                self.found["commands"][comparison.slug] = command
                self.save()

    def _out_of_time(self, what: str) -> bool:
        if self.left_s() >= PART_LEAST_S:
            return False
        self.not_run(what, f"the {TOTAL_S:.0f} s of the standard set were over")
        return True

    def not_run(self, what: str, why: str) -> None:
        """Note a part that was not begun."""
        print(f"  not run  {what}: {why}", flush=True)
        self.found["not_run"][what] = why

    def save(self) -> None:
        """Write what was found so far."""
        self.found["took_s"] = time.monotonic() - self._began_s
        cores = os.cpu_count() or 1
        busy = f"Other work was running at the start: load {self._load_before:.1f}, {cores} cores."
        self.found["notes"] = [busy] if self._load_before > cores / 2 else []
        self._path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self._path.with_suffix(".new")
        fresh.write_text(json.dumps(self.found) + "\n")
        fresh.replace(self._path)


# -- the page ----------------------------------------------------------------------------------


def write_page(found: dict[str, Any], page: Path, drawn: Path) -> None:
    """Write the page, and its plots into the folder beside it that has its name.

    ``drawn`` has the plots of the load tests. The page is replaced last, in one step.
    """
    import standard_plots

    with tempfile.TemporaryDirectory() as made:
        files = standard_plots.draw(found, Path(made))
        for slug, digest in found.get("loads", {}).items():
            if "targets" in digest and (drawn / f"{slug}.png").exists():
                files[slug] = drawn / f"{slug}.png"
        text = standard_page.page(
            found, {name: f"{page.stem}/{path.name}" for name, path in files.items()}
        )
        if files:
            folder = page.with_suffix("")
            folder.mkdir(parents=True, exist_ok=True)
            for path in files.values():
                standard_plots.shrink(path, folder / path.name)
        fresh = page.with_suffix(".new")
        fresh.write_text(text)
        fresh.replace(page)


def measure(
    results: Path, chosen: Callable[[str], bool], plots: Path, *, quick: bool
) -> dict[str, Any]:
    """Run what is chosen; return what was found."""
    run = Run(results, quick=quick)
    with tempfile.TemporaryDirectory() as folder:
        for part in PARTS:
            if chosen(part.name):
                run.part(part, Path(folder))
                print(flush=True)
    run.loads([each for each in standard_load.COMPARISONS if chosen(each.slug)], plots)
    run.save()
    return run.found


def failures(found: dict[str, Any]) -> int:
    """Return how many parts failed."""
    parts = [*found["benchmarks"].values(), *found["loads"].values()]
    return sum("failed" in part for part in parts)


def main() -> int:
    """Measure and write, or write alone; return the exit code."""
    names = [*(part.name for part in PARTS), *(each.slug for each in standard_load.COMPARISONS)]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="shows only that all of it runs")
    parser.add_argument("--only", nargs="+", choices=names, help="these parts alone")
    parser.add_argument("--page", type=Path, help="default: docs/benchmarks.md")
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON of what was found")
    parser.add_argument("--from", dest="source", type=Path, help="measure nothing, use this JSON")
    parser.add_argument("--check", action="store_true", help="exit 1 when a target is missed")
    args = parser.parse_args()
    plots = (args.source or args.results).parent / "plots"
    if args.source is not None:
        write_page(json.loads(args.source.read_text()), args.page or PAGE, plots)
        return 0
    plots.mkdir(parents=True, exist_ok=True)
    skipped = NOT_QUICK if args.quick and not args.only else ()

    def chosen(name: str) -> bool:
        return name in (args.only or names) and name not in skipped

    try:
        found = measure(args.results, chosen, plots, quick=args.quick)
    except KeyboardInterrupt:
        print(f"\ninterrupted: the page is as it was; {args.results} has what was found")
        return 130
    missed, _ = run_all.tell(found["benchmarks"])
    with tempfile.TemporaryDirectory() as folder:
        kept = args.results.with_suffix(".md") if args.only else PAGE
        page = args.page or (Path(folder) / "benchmarks.md" if args.quick else kept)
        write_page(found, page, plots)
        print(f"{found['took_s']:.0f} s; {'the page can be made' if args.quick else page}")
    return 1 if failures(found) or (args.check and missed) else 0


if __name__ == "__main__":
    sys.exit(main())
