"""The load tests of the standard set: the comparisons, their servers, and what is kept of them.

*Process*: `standard.py`. *Owns*: the node, redis-server and memcached of these runs. The load is
made by `scripts/load_test.py`, started as a user would; its JSON is reduced here to what the page
shows: for each target and round throughput and latencies, and a summary over the rounds.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _harness as harness
import run_all

SCRIPT = harness.ROOT / "scripts" / "load_test.py"
GROUP = "load"
OURS = ("local", "grpc", "http")  # schemes; what begins otherwise is what we compare with
PERCENTILES = ("p50_us", "p99_us", "p999_us")


@dataclass(frozen=True)
class Comparison:
    """One run of the load test: the same workload against several targets in turn."""

    slug: str
    title: str
    targets: tuple[str, ...]  # names of `Servers.specs`; the first is ours
    flags: tuple[str, ...]


UNIX = ("local", "redis", "memcached")
NETWORK = ("grpc", "http", "redis-tcp", "memcached-tcp")
ZIPF = ("--keys=50000", "--popularity=zipf:0.99", "--value-size=100")

COMPARISONS = (
    Comparison(
        "read-mostly",
        "One host, two processes: 95 % reads, 5 % writes, zipf",
        UNIX,
        (*ZIPF, "--processes=2", "--concurrency=1", "--mix=95:5:0"),
    ),
    Comparison(
        "writes",
        "One host, two processes: writes alone",
        UNIX,
        (*ZIPF, "--processes=2", "--concurrency=1", "--mix=0:100:0"),
    ),
    Comparison(
        "batches",
        "One host, one process: batches of 100, 90 % reads",
        UNIX,
        (*ZIPF, "--processes=1", "--concurrency=1", "--mix=90:10:0", "--batch=100"),
    ),
    Comparison(
        "open-loop",
        "One host, two processes: 4,000 operations a second whatever the answers take",
        UNIX,
        (*ZIPF, "--processes=2", "--mix=95:5:0", "--rate=4000"),
    ),
    Comparison(
        "network",
        "Over TCP, one process, 16 at a time: 95 % reads",
        NETWORK,
        # HTTP has no batches, so that its keys are stored one by one.
        (*ZIPF, "--processes=1", "--concurrency=16", "--mix=95:5:0", "--keys=1000"),
    ),
)
FULL = ("--rounds=3", "--duration=1.5", "--warmup=0.5")
QUICK = ("--rounds=1", "--duration=0.3", "--warmup=0.1", "--keys=1000")
QUICK_SLUGS = ("batches", "network")  # between them they have every target
LIMIT_S = 60.0  # of one comparison


# -- servers -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Servers:
    """Where the targets are, and why some are not."""

    specs: dict[str, str]
    missing: dict[str, str]
    versions: dict[str, str]


def listens(port: int) -> bool:
    """Return whether something listens on this TCP port of the loopback."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def tcp_server(command: Sequence[str], port: int) -> Iterator[None]:
    """Run a server that listens on a TCP port until the end of the block."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        harness.wait_for(
            lambda: process.poll() is not None or listens(port), f"{command[0]} at port {port}"
        )
        if process.poll() is not None:
            raise RuntimeError(f"{command[0]} ended with {process.returncode}")
        yield
    finally:
        process.terminate()
        process.wait(timeout=20)


@contextmanager
def servers() -> Iterator[Servers]:
    """Start a node of as many workers as there are cores, and the others where they are there."""
    with ExitStack() as stack:
        folder = stack.enter_context(harness.workspace())
        api = harness.free_port()
        node = stack.enter_context(
            harness.running_node(
                folder,
                f"--api=127.0.0.1:{api}",
                groups=(f"{GROUP}:256MiB",),
                workers=max(2, os.cpu_count() or 2),
            )
        )
        found = Servers(
            {
                "local": f"local:{node.run_dir}",
                "grpc": f"grpc:{node.address}",
                "http": f"http:127.0.0.1:{api}",
            },
            {},
            {},
        )
        _add_redis(found, stack, folder)
        _add_memcached(found, stack, folder)
        yield found


def _add_redis(found: Servers, stack: ExitStack, folder: Path) -> None:
    program = harness.find_server("redis-server")
    if program is None:
        found.missing.update(dict.fromkeys(("redis", "redis-tcp"), "redis-server is not installed"))
        return
    path, port = folder / "redis.sock", harness.free_port()
    command = [program, "--port", str(port), "--bind", "127.0.0.1", "--unixsocket", str(path)]
    command += ["--save", "", "--appendonly", "no", "--dir", str(folder)]
    stack.enter_context(harness.unix_server(command, path))
    found.specs["redis"] = f"redis:{path}"
    found.specs["redis-tcp"] = f"redis:127.0.0.1:{port}"
    found.versions["redis-server"] = harness.server_version(program)


def _add_memcached(found: Servers, stack: ExitStack, folder: Path) -> None:
    program = harness.find_server("memcached")
    if program is None:
        both = ("memcached", "memcached-tcp")
        found.missing.update(dict.fromkeys(both, "memcached is not installed"))
        return
    path, port = stack.enter_context(harness.memcached_server(folder)), harness.free_port()
    command = [program, "-l", "127.0.0.1", "-p", str(port), "-U", "0", "-m", "256"]
    command += ["-u", "root"] * (os.geteuid() == 0)
    stack.enter_context(tcp_server(command, port))
    found.specs["memcached"] = f"memcached:{path}"
    found.specs["memcached-tcp"] = f"memcached:127.0.0.1:{port}"
    found.versions["memcached"] = harness.server_version(program)


# -- one comparison ----------------------------------------------------------------------------


def command_of(
    comparison: Comparison, specs: dict[str, str], *, quick: bool
) -> tuple[list[str], dict[str, str]]:
    """Return the load test's arguments, and the names of the targets by their specs."""
    names = {specs[name]: name for name in comparison.targets if name in specs}
    compared = [f"--compare={spec}" for spec in names]
    flags = [*comparison.flags, *(QUICK if quick else FULL)]
    return [*compared, f"--group={GROUP}", *flags], names


def shown_command(comparison: Comparison, *, quick: bool = False) -> str:
    """Return the command as a reader would type it, with names for the places."""
    places = {"local": "local:RUN_DIR", "redis": "redis:SOCKET", "memcached": "memcached:SOCKET"}
    specs = {
        name: places.get(name, f"{name.removesuffix('-tcp')}:HOST:PORT")
        for name in comparison.targets
    }
    return " ".join(["scripts/load_test.py", *command_of(comparison, specs, quick=quick)[0]])


def run(
    comparison: Comparison,
    found: Servers,
    folder: Path,
    *,
    quick: bool,
    plot: Path | None = None,
    limit_s: float = LIMIT_S,
) -> dict[str, Any]:
    """Run one comparison; return its digest, with ``failed`` or ``skipped`` where that applies."""
    digest: dict[str, Any] = {
        "title": comparison.title,
        "command": shown_command(comparison, quick=quick),
        "skipped": {
            name: found.missing[name] for name in comparison.targets if name in found.missing
        },
    }
    out = folder / f"{comparison.slug}.json"
    arguments, names = command_of(comparison, found.specs, quick=quick)
    command = [sys.executable, str(SCRIPT), *arguments, f"--json={out}", "--quiet"]
    if plot is not None:
        command.append(f"--plot={plot}")
    failed = run_all.run_to_end(command, limit_s)
    if failed is None and not out.exists():
        failed = "it wrote no results"
    if failed is not None:
        print(f"  FAILED  {comparison.slug}: {failed}", flush=True)
        return digest | {"failed": failed}
    return digest | digest_of(json.loads(out.read_text()), names)


def digest_of(document: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """Return what is kept of the load test's JSON; targets by name, in their order.

    *Errors* are kept by class; a round that failed is not among the rounds.
    """
    targets: dict[str, Any] = {}
    for summary in document["targets"]:
        name = names.get(summary["target"], summary["target"])
        targets[name] = {
            "ours": name.partition("-")[0] in OURS,
            **{key: summary[key] for key in ("operations_per_s", "hit_ratio", "errors")},
            **{key: summary[key] for key in (*PERCENTILES, "max_us", "behind")},
            "client_cpu_s_per_1000": summary["client_cpu_s_per_1000"],
            "server_cpu_s_per_1000": sum(use["cpu_s_per_1000"] for use in summary["use"]),
            "generator_us": 0.0,  # of an operation's time, what the load test itself took
            "rounds": {},
        }
    for each in document["rounds"]:
        name = names.get(each["target"], each["target"])
        if each["failed"] is None and each["seconds"] > 0 and name in targets:
            targets[name]["rounds"][str(each["round"])] = round_of(each)
            targets[name]["generator_us"] = each["generator_us"]
    notes = [_named(note, names) for note in document["notes"]]
    return {"targets": targets, "versions": document["versions"], "notes": notes}


def _named(note: str, names: dict[str, str]) -> str:
    """Return a note with names of targets for their specs, which are other ones in each run."""
    for spec in sorted(names, key=len, reverse=True):
        note = note.replace(spec, names[spec])
    return note


def round_of(found: dict[str, Any]) -> dict[str, float]:
    """Return throughput and latencies of one round."""
    from scripts.loadtest.histogram import Histogram

    whole = Histogram.merged(op["histogram"] for op in found["ops"])
    p50, p99 = whole.percentiles_us((50.0, 99.0))
    return {
        "operations_per_s": found["operations"] / found["seconds"],
        "p50_us": p50,
        "p99_us": p99,
    }


def against(digest: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield for each pair of ours and another the ratios of their common rounds.

    ``speed`` is our throughput over theirs, ``p50`` and ``p99`` our latency over theirs; each is
    (least, median, greatest).
    """
    targets = digest.get("targets", {})
    for name, ours in targets.items():
        for other, theirs in targets.items():
            if not ours["ours"] or theirs["ours"]:
                continue
            common = [turn for turn in ours["rounds"] if turn in theirs["rounds"]]
            if not common:
                continue
            pairs = [(ours["rounds"][turn], theirs["rounds"][turn]) for turn in common]
            yield {
                "ours": name,
                "theirs": other,
                "rounds": len(common),
                **{
                    label: harness.spread([a[key] / max(b[key], 1e-9) for a, b in pairs])
                    for label, key in (
                        ("speed", "operations_per_s"),
                        ("p50", "p50_us"),
                        ("p99", "p99_us"),
                    )
                },
            }
