"""What the benchmarks share: interleaved rounds, ratios with their spread, real servers.

A machine that other work slows down slows it for minutes, so two numbers taken one after the
other say little about each other. Every comparison here runs both sides in one process tree, in
short slices, in turn; the ratio is taken within each round, and what is reported is the median
of these ratios beside their least and greatest. Which side goes first changes from round to round.

Exit code: 0; with ``--check`` 1 when a target was missed or could not be measured.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent.parent
if str(ROOT) not in sys.path:  # so that a benchmark runs from a checkout that is not installed
    sys.path.insert(1, str(ROOT))

Samples = dict[str, list[float]]

SERVER_START_S = 20.0
ROUNDS_LEAST = 3  # however little time there is

_until_s = float("inf")  # of time.monotonic(): no round begins after it


# -- rounds ----------------------------------------------------------------------------------


def interleave(sides: Mapping[str, Callable[[], float]], rounds: int, warm_up: int = 1) -> Samples:
    """Run one slice of every side, round after round; return what each slice returned.

    The order is turned by one place each round, so that no side always follows the same other.
    The cyclic collector is off meanwhile, as in `timeit`, and runs between the rounds. With
    ``--seconds`` there are fewer rounds where the machine is slow.
    """
    names = list(sides)
    samples: Samples = {name: [] for name in names}
    for _ in range(warm_up):
        for name in names:
            sides[name]()
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            if turn >= ROUNDS_LEAST and time.monotonic() > _until_s:
                break
            shift = turn % len(names)
            for name in names[shift:] + names[:shift]:
                samples[name].append(sides[name]())
            gc.collect()
    finally:
        gc.enable()
    return samples


def per_call(calls: int, body: Callable[[], object]) -> float:
    """Return the seconds that one of ``calls`` calls in ``body`` took."""
    start = time.perf_counter()
    body()
    return (time.perf_counter() - start) / calls


def ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """Return ``over / under`` for each round."""
    return [a / b for a, b in zip(over, under, strict=True)]


# -- report ----------------------------------------------------------------------------------


def arguments(doc: str | None, **extra: Mapping[str, Any]) -> argparse.Namespace:
    """Parse the flags that all benchmarks share, and ``extra`` ones of this benchmark."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few rounds: shows only that it runs")
    parser.add_argument("--rounds", type=int, help="rounds of the comparison")
    parser.add_argument("--seconds", type=float, help="begin no more rounds after this time")
    parser.add_argument("--json", metavar="FILE", help="write the results there; - is stdout")
    parser.add_argument("--check", action="store_true", help="exit 1 when a target is missed")
    for name, options in extra.items():
        parser.add_argument("--" + name.replace("_", "-"), **options)
    args = parser.parse_args()
    global _until_s
    if args.seconds is not None:
        _until_s = time.monotonic() + args.seconds
    return args


@dataclass
class Report:
    """One benchmark's results, printed as they come and written as JSON at the end."""

    name: str
    args: argparse.Namespace
    packages: tuple[str, ...] = ()
    results: dict[str, Any] = field(default_factory=dict)
    missed: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        import kamacache

        versions = {"python": platform.python_version(), "kamacache": kamacache.__version__}
        for package in self.packages:
            try:
                versions[package] = version(package)
            except PackageNotFoundError:
                versions[package] = "not installed"
        self.results = {
            "benchmark": self.name,
            "versions": versions,
            "machine": f"{os.cpu_count()} cores, {platform.machine()}, Linux {platform.release()}",
            "quick": self.args.quick,
            "load_before": os.getloadavg()[0],
            "measured": {},
            "targets": [],
        }
        print(f"== {self.name} ==")
        print("  " + ", ".join(f"{name} {text}" for name, text in versions.items()))

    def version(self, name: str, text: str) -> None:
        """Note the version of something that is no Python package."""
        self.results["versions"][name] = text
        print(f"  {name} {text}")

    def samples(self, samples: Samples, unit: str = "us", scale: float = 1e6) -> None:
        """Print and keep each side's rounds: least, median, greatest."""
        width = max(map(len, samples))
        for name, rounds in samples.items():
            low, middle, high = spread([value * scale for value in rounds])
            print(
                f"  {name:{width}}  {middle:10.3f} {unit}   "
                f"({low:.3f} .. {high:.3f}, {len(rounds)} rounds)"
            )
            self.measured(
                name,
                {"min": low, "median": middle, "max": high, "unit": unit, "rounds": len(rounds)},
            )

    def measured(self, name: str, value: Any) -> None:
        """Keep a result that is printed elsewhere or not at all."""
        self.results["measured"][name] = value

    def ratio(self, name: str, rounds: Sequence[float]) -> None:
        """Print and keep a ratio that no target speaks of."""
        low, middle, high = spread(rounds)
        print(f"  {name}: {middle:.2f}   ({low:.2f} .. {high:.2f})")
        self.measured(
            name,
            {"min": low, "median": middle, "max": high, "unit": "ratio", "rounds": len(rounds)},
        )

    def target(
        self,
        name: str,
        rounds: Sequence[float],
        *,
        at_most: float | None = None,
        at_least: float | None = None,
    ) -> None:
        """Print and keep what a target asks for, and whether the median meets it."""
        low, middle, high = spread(rounds)
        if at_most is not None:
            met, asked = middle <= at_most, f"at most {at_most:g}"
        elif at_least is not None:
            met, asked = middle >= at_least, f"at least {at_least:g}"
        else:
            raise TypeError("a target has at_most or at_least")
        shown = f"{middle:.3f}" if len(rounds) == 1 else f"{middle:.3f}   ({low:.3f} .. {high:.3f})"
        print(f"  {'met   ' if met else 'MISSED'}  {name}: {asked}, measured {shown}")
        self.results["targets"].append(
            {
                "name": name,
                "target": asked,
                "met": met,
                "min": low,
                "median": middle,
                "max": high,
                "rounds": len(rounds),
            }
        )
        if not met:
            self.missed.append(name)

    def skip(self, what: str, why: str) -> None:
        """Say that something could not be measured; with --check that is a miss."""
        print(f"  skipped  {what}: {why}")
        self.results["targets"].append({"name": what, "met": None, "skipped": why})
        self.missed.append(what)

    def finish(self) -> NoReturn:
        """Say so when other work ran beside this, write the JSON, and exit."""
        before, after, cores = self.results["load_before"], os.getloadavg()[0], os.cpu_count() or 1
        self.results["load_after"] = after
        if before > cores / 2:
            print(f"  other work was running: load {before:.1f} at the start on {cores} cores")
        text = json.dumps(self.results)
        if self.args.json == "-":
            print(text, flush=True)
        elif self.args.json:
            Path(self.args.json).write_text(text + "\n")
        sys.exit(1 if self.args.check and self.missed else 0)


def spread(rounds: Sequence[float]) -> tuple[float, float, float]:
    """Return least, median and greatest."""
    return min(rounds), statistics.median(rounds), max(rounds)


# -- servers ---------------------------------------------------------------------------------


@contextmanager
def workspace() -> Iterator[Path]:
    """A temporary folder with a path short enough for a Unix socket's 107 bytes."""
    path = Path(tempfile.mkdtemp(prefix="kcb-", dir="/tmp"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _end(process: subprocess.Popen[Any]) -> None:
    """Ask a server to end, and make it."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(timeout=10)


def wait_for(condition: Callable[[], object], what: str, timeout_s: float = SERVER_START_S) -> None:
    """Poll until ``condition`` holds; fail with ``what`` when the time is over."""
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {timeout_s} s: {what}")
        time.sleep(0.002)


def accepts(path: Path) -> bool:
    """Return whether something listens on this Unix socket."""
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


def find_server(name: str) -> str | None:
    """Return the path of a server's program, or None."""
    return shutil.which(name)


def server_version(program: str) -> str:
    """Return what a server's program says of its version, shortened to the number."""
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    words = [word.removeprefix("v=") for word in said.stdout.split()]
    return next((word for word in words if word[:1].isdigit()), said.stdout.strip())


@contextmanager
def unix_server(command: Sequence[str], path: Path) -> Iterator[Path]:
    """Run a server until the end of the block; ``path`` is the Unix socket it will listen on."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: process.poll() is not None or accepts(path), f"{command[0]} at {path}")
        if process.poll() is not None:
            raise RuntimeError(f"{command[0]} ended with {process.returncode}")
        yield path
    finally:
        _end(process)


@contextmanager
def redis_server(folder: Path) -> Iterator[Path]:
    """A redis-server without persistence, on a Unix socket only."""
    path = folder / "redis.sock"
    command = ["redis-server", "--port", "0", "--unixsocket", str(path), "--dir", str(folder)]
    with unix_server([*command, "--save", "", "--appendonly", "no"], path):
        yield path


@contextmanager
def memcached_server(folder: Path) -> Iterator[Path]:
    """A memcached on a Unix socket only."""
    path = folder / "memcached.sock"
    command = ["memcached", "-s", str(path), "-m", "256"]
    if os.geteuid() == 0:
        command += ["-u", "root"]
    with unix_server(command, path):
        yield path


def free_port() -> int:
    """Return a TCP port of the loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass(frozen=True)
class RunningNode:
    """A node that a benchmark started."""

    run_dir: Path
    address: str
    pid: int
    ready_s: float  # from the start of the command to its line that says ready


def clean_environment(**more: str) -> dict[str, str]:
    """Return this environment without settings of KamaCache, with the checkout on the path."""
    kept = {name: text for name, text in os.environ.items() if not name.startswith("KAMACACHE_")}
    path = os.pathsep.join(filter(None, (str(ROOT), kept.get("PYTHONPATH", ""))))
    cold = {"KAMACACHE_WARM_RESTART_MAX_DOWNTIME": "0"}  # nothing is left after a measurement
    return {**kept, "PYTHONPATH": path, **cold, **more}


@contextmanager
def running_node(
    folder: Path,
    *flags: str,
    groups: Sequence[str] = (),
    workers: int = 8,
    address: str | None = None,
) -> Iterator[RunningNode]:
    """Run `kamacache-node` until the end of the block, with these groups (name:size).

    In a flag, ``{address}`` stands for where it listens: ``address``, or a free port.
    """
    run_dir = folder / "run"
    address = address or f"127.0.0.1:{free_port()}"
    command = [
        sys.executable,
        "-c",
        "from kamacache.cli.node import main; main()",
        f"--workers={workers}",
        f"--listen={address}",
        f"--run-dir={run_dir}",
        *(f"--group={group}" for group in groups),
        *(flag.replace("{address}", address) for flag in flags),
    ]
    log_path = folder / "node.log"
    with log_path.open("w") as log:
        start = time.perf_counter()
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            cwd=folder,
            env=clean_environment(),
        )
    ready = threading.Event()
    took: list[float] = []

    def read_output() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if not took and "ready" in line.lower():
                took.append(time.perf_counter() - start)
                ready.set()
        ready.set()

    reader = threading.Thread(target=read_output, daemon=True)
    reader.start()
    try:
        if not ready.wait(60) or not took:
            raise RuntimeError(f"the node did not become ready:\n{log_path.read_text()[-4000:]}")
        yield RunningNode(run_dir, address, process.pid, took[0])
    finally:
        _end(process)
        reader.join(timeout=5)
        if process.stdout is not None:
            process.stdout.close()
