#!/usr/bin/env python3
"""Whether a hot path has become longer: instructions an operation, against those written down.

Times differ from machine to machine and from minute to minute; the number of instructions that a
path executes hardly does. Each path of `hot_paths` runs under valgrind (callgrind) once and then
twice; the difference, divided by its operations, is what one costs, in user space, start-up and
imports excluded. What is compared is not that number but its ratio to the same number for a
reference, a hit of `cachetools.LRUCache`, taken in the same run: it differs less from one build of
Python to another. `instructions.json` keeps the ratios by version of Python; a path fails when its
ratio is more than 10 % above the one kept there (25 % where another build of that version took
them: gcc -O2 and -O3 of CPython 3.11 differ by up to 10 %, the same build by less than 3 %). One
that is 10 % below is only mentioned: take the file anew then, or what was won is lost unseen.

    scripts/bench/instructions.py [--update] [--only TEXT] [--json FILE] [--check]

``--update`` writes the ratios of this run to `instructions.json` (`make bench-baseline`). Without
valgrind, or without ratios for this version of Python, it says so and ends with 0. With ``--check``
a path that has become longer is exit code 1.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import _harness as harness

BASELINE = Path(__file__).with_suffix(".json")
TOLERANCE = 0.10
TOLERANCE_OF_ANOTHER_BUILD = 0.25
REPEATS = 2  # the least counts: a near-cache entry whose time is over costs more, now and then
RUN_TIMEOUT_S = 300
PACKAGES = ("cachetools", "msgspec", "xxhash")
# A function of libc that nothing else calls: callgrind writes its counts down at each entry.
MARK = "getpgrp"


# -- counting ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Counted:
    """A path and the instructions of one of its operations."""

    name: str
    instructions: float


def run_marked(source: str, argument: str, names: Path) -> None:
    """Run the paths of ``module:function`` with marks between the runs; under callgrind.

    ``names`` gets a line for each path, the number of its operations before its name.
    """
    module, function = source.split(":")
    lines = []
    gc.disable()
    for path in getattr(importlib.import_module(module), function)(argument):
        path.run()
        for _ in range(REPEATS):
            path.run()  # so that nothing is older than the run itself
            gc.collect()
            os.getpgrp()
            path.run()
            os.getpgrp()
            path.run()
            path.run()
            os.getpgrp()
        lines.append(f"{path.operations} {path.name}\n")
        names.write_text("".join(lines))


def count_paths(source: str, argument: str, folder: Path) -> list[Counted]:
    """Count the paths that ``module:function`` yields when called with ``argument``.

    Raises RuntimeError with what the program said where it failed.
    """
    names, dumps = folder / "names", folder / "dump"
    done = subprocess.run(
        [
            "valgrind",
            "--tool=callgrind",
            f"--dump-before={MARK}",
            "--dump-line=no",
            f"--callgrind-out-file={dumps}",
            sys.executable,
            __file__,
            "--inside",
            source,
            argument,
            str(names),
        ],
        capture_output=True,
        text=True,
        errors="replace",
        timeout=RUN_TIMEOUT_S,
        check=False,
        env=harness.clean_environment(PYTHONHASHSEED="0"),
    )
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode} under valgrind:\n{done.stderr[-3000:]}")
    return counted(names.read_text().splitlines(), read_dumps(dumps))


def read_dumps(dumps: Path) -> list[int]:
    """Return the instructions between the marks, in their order."""
    totals: list[int] = []
    for number in count(1):
        dump = dumps.with_name(f"{dumps.name}.{number}")
        if not dump.exists():
            return totals
        found = re.findall(r"^totals: (\d+)$", dump.read_text(errors="replace"), re.MULTILINE)
        totals.append(int(found[-1]))
    raise AssertionError


def counted(names: Iterable[str], totals: list[int]) -> list[Counted]:
    """Return the instructions an operation: what two runs cost more than one."""
    paths = []
    for at, line in enumerate(names):
        operations, _, name = line.partition(" ")
        own = totals[at * 3 * REPEATS : (at + 1) * 3 * REPEATS]
        if len(own) != 3 * REPEATS:
            raise RuntimeError(f"callgrind wrote {len(totals)} dumps, too few for {name!r}")
        once, twice = min(own[1::3]), min(own[2::3])
        paths.append(Counted(name, (twice - once) / int(operations)))
    return paths


# -- comparing ---------------------------------------------------------------------------------


def ratios_of(paths: list[Counted]) -> dict[str, float]:
    """Return each path's instructions over the reference's, which is the first."""
    reference, *others = paths
    return {path.name: round(path.instructions / reference.instructions, 4) for path in others}


def python_key() -> str:
    """Return under which name the ratios of this Python are kept."""
    return f"{platform.python_implementation()} {'.'.join(platform.python_version_tuple()[:2])}"


def python_build() -> str:
    """Return what decides how many instructions a line of Python takes: release and compiler."""
    flags = sysconfig.get_config_var("PY_CFLAGS") or ""
    level = " ".join(re.findall(r"-O\w*", flags)[-1:])  # the last one counts
    given = sysconfig.get_config_var("CONFIG_ARGS") or ""
    tuned = [flag for flag in ("--enable-optimizations", "--with-lto") if flag in given]
    return " ".join([platform.python_version(), platform.python_compiler(), level, *tuned])


def judge(
    ratios: Mapping[str, float], kept: Mapping[str, float], tolerance: float
) -> tuple[list[str], list[str], list[str]]:
    """Return the paths that became longer, those that became shorter, and those not kept yet."""
    longer = [name for name, now in ratios.items() if now > kept.get(name, now) * (1 + tolerance)]
    shorter = [name for name, now in ratios.items() if now < kept.get(name, now) * (1 - tolerance)]
    return longer, shorter, [name for name in ratios if name not in kept]


def read_baseline(path: Path) -> dict[str, Any]:
    """Return what is kept, by version of Python."""
    if not path.exists():
        return {}
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def write_baseline(path: Path, key: str, entry: dict[str, Any]) -> None:
    """Keep the ratios of one version of Python; those of the others stay."""
    whole = {**read_baseline(path), key: entry}
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(whole, indent=2, sort_keys=True) + "\n")
    fresh.replace(path)


# -- the command -------------------------------------------------------------------------------


def count_all() -> list[Counted]:
    """Count the library's paths against a node."""
    with (
        harness.workspace() as folder,
        harness.running_node(folder, groups=GROUPS, workers=2) as node,
    ):
        return count_paths("hot_paths:hot_paths", str(node.run_dir), folder)


GROUPS = ("near:4MiB", "plain:4MiB")  # of hot_paths, which this process does not import


def main() -> None:
    """Count, compare, and keep the counts when told to."""
    if sys.argv[1:2] == ["--inside"]:
        source, argument, names = sys.argv[2:]
        run_marked(source, argument, Path(names))
        return
    args = harness.arguments(
        __doc__,
        update={"action": "store_true", "help": "keep the ratios of this run"},
        baseline={"type": Path, "default": BASELINE, "help": "the file of ratios"},
    )
    report = harness.Report("instructions", args, PACKAGES)
    if shutil.which("valgrind") is None:
        unchecked(report, "valgrind is not installed")
    key = python_key()
    paths = count_all()
    ratios = ratios_of(paths)
    if args.update:
        entry = {
            "build": python_build(),
            "versions": report.results["versions"],
            "reference": {paths[0].name: round(paths[0].instructions)},
            "ratios": ratios,
        }
        write_baseline(args.baseline, key, entry)
    kept = read_baseline(args.baseline).get(key, {})
    before: dict[str, float] = kept.get("ratios", {})
    same = kept.get("build") == python_build()
    tolerance = TOLERANCE if same else TOLERANCE_OF_ANOTHER_BUILD
    width = max(map(len, ratios))
    print(f"  {paths[0].name}: {paths[0].instructions:.0f} instructions; ratios to it, and before")
    for path in paths[1:]:
        was = f"{before[path.name]:8.3f}" if path.name in before else "       -"
        print(f"  {path.name:{width}} {path.instructions:9.0f} {ratios[path.name]:8.3f} {was}")
        report.measured(path.name, {"instructions": path.instructions, "ratio": ratios[path.name]})
    if not before:
        unchecked(report, f"no ratios of {key} in {args.baseline.name}; --update takes them")
    if not same:
        print(f"  kept by another build, {kept['build']}: {tolerance:.0%} more is let pass")
    longer, shorter, unknown = judge(ratios, before, tolerance)
    for name in shorter:
        print(f"  shorter by more than {tolerance:.0%}: {name}; take the ratios anew (--update)")
    for name in unknown:
        print(f"  not kept yet: {name}; take the ratios anew (--update)")
    for name, now in ratios.items():
        if name in before:
            limit = before[name] * (1 + tolerance)
            report.target(f"{name}, instructions over the reference's", [now], at_most=limit)
    if longer:
        print(f"  longer by more than {tolerance:.0%}: {', '.join(longer)}")
    report.finish()


def unchecked(report: harness.Report, why: str) -> None:
    """Say why nothing is compared; that is no failure."""
    report.skip("instructions of the hot paths", why)
    report.missed.clear()
    report.finish()


if __name__ == "__main__":
    main()
