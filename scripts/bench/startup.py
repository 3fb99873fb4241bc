#!/usr/bin/env python3
"""How long `import kamacache` takes, and a node of 8 workers until it says that it is ready.

The import is timed inside fresh interpreters; beside it the whole interpreter with and without
the import, interleaved. The node runs with 64 MiB and with 1 GiB, which it reserves at start.
Targets: import under 60 ms and without grpc; ready within 0.8 s plus 0.5 s a GiB.

    scripts/bench/startup.py [--quick] [--rounds N] [--json FILE] [--check]
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable

import _harness as harness

GIB = 1 << 30
SIZES = {"64MiB": 64 << 20, "1GiB": GIB}
TIMED = """\
import time, sys
start = time.perf_counter()
import kamacache
{use}
print(time.perf_counter() - start)
sys.exit("grpc" in sys.modules)
"""


def interpreter(program: str) -> Callable[[], float]:
    """Return a slice: how long an interpreter takes to run ``program`` and end."""

    def run() -> float:
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "-c", program], check=True, env=harness.clean_environment(), timeout=60
        )
        return time.perf_counter() - start

    return run


def inside(use: str) -> Callable[[], float]:
    """Return a slice: how long the import takes by the clock of a fresh interpreter."""

    def run() -> float:
        done = subprocess.run(
            [sys.executable, "-c", TIMED.format(use=use)],
            capture_output=True,
            text=True,
            check=False,
            env=harness.clean_environment(),
            timeout=60,
        )
        if done.returncode:
            raise RuntimeError(f"the import loads grpc, or failed: {done.stderr}")
        return float(done.stdout)

    return run


def node_start(size: str) -> Callable[[], float]:
    """Return a slice: how long a node of 8 workers with a group of ``size`` takes to be ready."""

    def run() -> float:
        with (
            harness.workspace() as folder,
            harness.running_node(folder, groups=(f"scores:{size}",)) as node,
        ):
            return node.ready_s

    return run


def main() -> None:
    """Time the imports, then the nodes."""
    args = harness.arguments(__doc__)
    report = harness.Report("startup", args)
    rounds = args.rounds or (3 if args.quick else 15)
    imports = harness.interleave(
        {
            "interpreter alone": interpreter("pass"),
            "interpreter and import kamacache": interpreter("import kamacache"),
            "import kamacache": inside(""),
            "import kamacache, use of Group and attach": inside(
                "kamacache.Group; kamacache.attach"
            ),
        },
        rounds,
    )
    report.samples(imports, unit="ms", scale=1e3)
    report.target(
        "import kamacache, in ms",
        [seconds * 1000 for seconds in imports["import kamacache"]],
        at_most=60,
    )
    sizes = {"64MiB": SIZES["64MiB"]} if not room_for(2 * GIB) else SIZES
    starts = harness.interleave(
        {f"node of 8 workers, {size}": node_start(size) for size in sizes},
        args.rounds or (1 if args.quick else 7),
        warm_up=0 if args.quick else 1,
    )
    report.samples(starts, unit="s", scale=1)
    for size, count in SIZES.items():
        name = f"node of 8 workers ready, {size}, in s"
        if size in sizes:
            report.target(
                name, starts[f"node of 8 workers, {size}"], at_most=0.8 + 0.5 * count / GIB
            )
        else:
            report.skip(name, "/dev/shm is too small")
    report.finish()


def room_for(count: int) -> bool:
    """Return whether /dev/shm has so many bytes free."""
    try:
        space = os.statvfs("/dev/shm")
    except OSError:
        return False
    return space.f_bavail * space.f_frsize >= count


if __name__ == "__main__":
    main()
