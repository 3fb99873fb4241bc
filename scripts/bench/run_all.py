#!/usr/bin/env python3
"""`make bench`: run every benchmark, each in a process of its own, and say which targets are met.

    scripts/bench/run_all.py [--quick] [--only NAME ...] [--json FILE] [--check]

Exit code: 0; 1 when a benchmark failed; with ``--check`` also when a target was missed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
BENCHMARKS = (
    "local_hit",
    "readers_scale",
    "local_set",
    "front",
    "peer_link",
    "ring",
    "memory",
    "eviction",
    "startup",
)


def run(name: str, quick: bool, folder: Path) -> dict[str, Any] | None:
    """Run one benchmark; return its results, or None when it failed."""
    out = folder / f"{name}.json"
    command = [sys.executable, str(HERE / f"{name}.py"), f"--json={out}"]
    done = subprocess.run(command + ["--quick"] * quick, check=False)
    if done.returncode or not out.exists():
        print(f"  FAILED  {name}: exit code {done.returncode}")
        return None
    results: dict[str, Any] = json.loads(out.read_text())
    return results


def main() -> None:
    """Run them one after the other: two at once would measure each other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=BENCHMARKS)
    parser.add_argument("--json", type=Path, help="write all results there")
    parser.add_argument("--check", action="store_true", help="exit 1 when a target is missed")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = {}
        for name in args.only:
            results[name] = run(name, args.quick, Path(folder))
            print(flush=True)
    print("== targets ==")
    missed = failed = 0
    for name, result in results.items():
        if result is None:
            failed += 1
            print(f"  FAILED  {name}")
            continue
        for target in result["targets"]:
            if target["met"] is None:
                print(f"  skipped {name}: {target['name']}: {target['skipped']}")
            else:
                word = "met    " if target["met"] else "MISSED "
                print(f"  {word} {name}: {target['name']}: ", end="")
                print(f"{target['median']:.3f}, {target['target']}")
            missed += target["met"] is not True
    if args.json:
        args.json.write_text(json.dumps(results) + "\n")
    sys.exit(1 if failed or (args.check and missed) else 0)


if __name__ == "__main__":
    main()
