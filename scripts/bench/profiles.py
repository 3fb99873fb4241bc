#!/usr/bin/env python3
"""`make profile`: a CPU profile of each hot path, by py-spy, as an SVG and for speedscope.app.

The paths are those of `hot_paths.py`. Each runs alone in a process of its own for some seconds,
against a node where it needs one, and py-spy samples that process: of what crosses a socket it is
the application's part, or the worker's part by itself.

    scripts/bench/profiles.py [--only TEXT] [--seconds N] [--folder DIR] [--native]

``--native`` adds the frames of C code, where py-spy can unwind them. Exit code: 0; 1 when a
profile could not be taken; 2 without py-spy.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import _harness as harness
import hot_paths

FOLDER = harness.ROOT / "build" / "profiles"
FORMATS = {"flamegraph": "svg", "speedscope": "speedscope.json"}
RATE_HZ = 500


def find_py_spy() -> str | None:
    """Return py-spy's program: beside this Python, or on the path."""
    return shutil.which("py-spy", path=sysconfig.get_path("scripts")) or shutil.which("py-spy")


def loop(name: str, run_dir: Path, seconds: float) -> None:
    """Be the process that is sampled: go through one path until the time is over."""
    path = next(each for each in hot_paths.hot_paths(run_dir) if each.name == name)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        path.run()


def record(program: str, path: str, run_dir: Path, out: Path, args: argparse.Namespace) -> bool:
    """Take one profile in every format; return whether it worked."""
    for kind, ending in FORMATS.items():
        command = [program, "record", "--format", kind, "--rate", str(RATE_HZ), "--nonblocking"]
        command += ["--native"] * args.native
        command += ["--output", str(out.with_suffix(f".{ending}")), "--", sys.executable, __file__]
        command += ["--loop", path, str(run_dir), str(args.seconds)]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            env=harness.clean_environment(),
            timeout=args.seconds + 60,
        )
        if done.returncode:
            print(f"  FAILED  {path}: {done.stderr.strip()[-300:]}")
            return False
    print(f"  {path}: {out.with_suffix('.svg')}", flush=True)
    return True


def main() -> int:
    """Start a node, take the profiles; return the exit code."""
    if sys.argv[1:2] == ["--loop"]:
        loop(sys.argv[2], Path(sys.argv[3]), float(sys.argv[4]))
        return 0
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="paths whose name has this text")
    parser.add_argument("--seconds", type=float, default=5.0, help="for each profile")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where they go")
    parser.add_argument("--native", action="store_true", help="with the frames of C code")
    args = parser.parse_args()
    program = find_py_spy()
    if program is None:
        print("py-spy is not installed: pip install py-spy, or the extra 'bench'", file=sys.stderr)
        return 2
    args.folder.mkdir(parents=True, exist_ok=True)
    with (
        harness.workspace() as folder,
        harness.running_node(folder, groups=hot_paths.GROUPS, workers=2) as node,
    ):
        names = [each.name for each in hot_paths.hot_paths(node.run_dir)]
        worked = [
            record(program, name, node.run_dir, args.folder / re.sub(r"\W+", "-", name), args)
            for name in names
            if args.only in name
        ]
    if not worked:
        print(f"no path has {args.only!r} in its name: {', '.join(names)}", file=sys.stderr)
    return 0 if worked and all(worked) else 1


if __name__ == "__main__":
    sys.exit(main())
