#!/usr/bin/env python3
"""Run the benchmarks, each in a process of its own, and say which targets are met.

    scripts/bench/run_all.py [--quick] [--only NAME ...] [--json FILE] [--check]

`standard.py`, which is `make bench`, runs them with its own limits of time and writes a page.
*Invariant*: what a benchmark started is gone when `run` returns: it gets one SIGINT, upon which it
stops its servers, and after that its whole session is killed.

Exit code: 0; 1 when a benchmark failed; with ``--check`` also when a target was missed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
BENCHMARKS = (
    "local_hit",
    "local_set",
    "front",
    "remote",
    "peer_link",
    "many_cores",
    "memory",
    "big_shard",
    "readers_scale",
    "ring",
    "eviction",
    "startup",
)
END_S = 20.0  # for a benchmark that is told to end


def available() -> list[str]:
    """Return the benchmarks that are there."""
    return [name for name in BENCHMARKS if (HERE / f"{name}.py").exists()]


def run_to_end(command: Sequence[str], limit_s: float | None = None) -> str | None:
    """Run a program until its end; return why it failed, or None.

    Raises KeyboardInterrupt, when what it started is gone.
    """
    process = subprocess.Popen(command, start_new_session=True)
    try:
        code = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        _stop(process)
        return f"not done within {limit_s:.0f} s"
    except BaseException:
        _stop(process)
        raise
    return f"exit code {code}" if code else None


def _stop(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        process.send_signal(signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(END_S)
    with suppress(ProcessLookupError):  # its session: also what it may have left behind
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run(
    name: str, folder: Path, flags: Iterable[str] = (), limit_s: float | None = None
) -> dict[str, Any]:
    """Run one benchmark; return its results, or ``failed`` alone with the reason."""
    out = folder / f"{name}.json"
    command = [sys.executable, str(HERE / f"{name}.py"), f"--json={out}", *flags]
    failed = run_to_end(command, limit_s)
    if failed is None and not out.exists():
        failed = "it wrote no results"
    if failed is not None:
        print(f"  FAILED  {name}: {failed}", flush=True)
        return {"failed": failed}
    results: dict[str, Any] = json.loads(out.read_text())
    return results


def tell(results: Mapping[str, dict[str, Any]]) -> tuple[int, int]:
    """Print all targets; return how many were missed or skipped, and how many runs failed."""
    print("== targets ==")
    missed = failed = 0
    for name, result in results.items():
        if "failed" in result:
            failed += 1
            print(f"  FAILED  {name}: {result['failed']}")
        for target in result.get("targets", ()):
            if target["met"] is None:
                print(f"  skipped {name}: {target['name']}: {target['skipped']}")
            else:
                word = "met    " if target["met"] else "MISSED "
                print(f"  {word} {name}: {target['name']}: ", end="")
                print(f"{target['median']:.3f}, {target['target']}")
            missed += target["met"] is not True
    return missed, failed


def main() -> None:
    """Run them one after the other: two at once would measure each other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="+", choices=available(), default=available())
    parser.add_argument("--json", type=Path, help="write all results there")
    parser.add_argument("--check", action="store_true", help="exit 1 when a target is missed")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = {}
        for name in args.only:
            results[name] = run(name, Path(folder), ["--quick"] * args.quick)
            print(flush=True)
    missed, failed = tell(results)
    if args.json:
        args.json.write_text(json.dumps(results) + "\n")
    sys.exit(1 if failed or (args.check and missed) else 0)


if __name__ == "__main__":
    main()
