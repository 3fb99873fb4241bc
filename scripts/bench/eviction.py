#!/usr/bin/env python3
"""How near `lru` comes to exact LRU, and how far `s3fifo` goes below it, on real traces.

Each trace is replayed by scripts/replay.py with a cache whose resident items are 1, 10 and 20 %
of the trace's keys: its bytes are adjusted until they are, within 5 % (at 1 % a shard of least
size may hold fewer). The reference is exact LRU (PyPI's libcachesim) over the whole trace, cold,
with as many objects as were resident. Targets, on the miss ratio over exact LRU's at 10 and 20 %:
`lru` at most 1.02 on average and 1.08 anywhere; `s3fifo` at most 0.95 on average. The runs are
deterministic: there are no rounds.

    scripts/bench/eviction.py [--traces DIR] [--quick] [--json FILE] [--check]

Traces are text, one key a line, .gz too; the default folder is ../shared/traces beside the
repository. Without traces it says so and ends. All traces take many minutes; with --quick it is
the shortest one at 10 % alone.
"""

from __future__ import annotations

import gzip
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _harness as harness

TRACES = harness.ROOT.parent / "shared" / "traces"
SHARES = (0.01, 0.10, 0.20)
JUDGED = (0.10, 0.20)
SHARES_QUICK = (0.10,)
POLICIES = ("lru", "s3fifo")
VALUE_BYTES = 200
RESIDENT_WITHIN = 0.05
# A shard has at least 64 segments of 4 KiB; where the items wanted are few, larger values make
# the cache that holds them larger than that, so that the size asked for is the size it has.
LOG_BYTES_LEAST = 320 << 10
ATTEMPTS = 10


@dataclass(frozen=True)
class Trace:
    """A trace and what is known of it."""

    name: str
    path: Path
    ids: list[int]
    keys: int


def read_traces(folder: Path) -> Iterator[Trace]:
    """Yield the traces of a folder, keys numbered in the order in which they come."""
    for path in sorted([*folder.glob("*.txt"), *folder.glob("*.txt.gz")]):
        numbers: dict[str, int] = {}
        with opened(path) as lines:
            ids = [numbers.setdefault(line.strip(), len(numbers)) for line in lines if line.strip()]
        yield Trace(path.name.removesuffix(".gz").removesuffix(".txt"), path, ids, len(numbers))


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Open a text file that may be compressed."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        yield file


def exact_lru(ids: list[int], objects: int) -> float:
    """Return libcachesim's miss ratio for LRU over the whole trace."""
    import libcachesim

    cache = libcachesim.LRU(cache_size=objects)
    request = libcachesim.Request()
    request.obj_size = 1
    hits = 0
    for number in ids:
        request.obj_id = number
        hits += cache.get(request)
    if cache.get_n_obj() > objects:
        raise RuntimeError("the reference keeps more objects than it was given")
    return 1 - hits / len(ids)


def replay(trace: Trace, policy: str, cache_bytes: int, value_bytes: int) -> dict[str, Any]:
    """Return what scripts/replay.py says in its last line."""
    done = subprocess.run(
        [
            sys.executable,
            str(harness.ROOT / "scripts" / "replay.py"),
            f"--trace={trace.path}",
            f"--policy={policy}",
            f"--cache-bytes={cache_bytes}",
            f"--value-bytes={value_bytes}",
        ],
        capture_output=True,
        text=True,
        check=False,
        env=harness.clean_environment(),
        timeout=600,
    )
    if done.returncode:
        raise RuntimeError(f"replay.py failed on {trace.name}:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def replay_at(trace: Trace, policy: str, wanted: int) -> dict[str, Any]:
    """Replay with the cache size that keeps ``wanted`` items resident, or nearly."""
    value_bytes = max(VALUE_BYTES, -(-LOG_BYTES_LEAST // wanted))
    cache_bytes = float(wanted * (value_bytes + 60))
    best: dict[str, Any] = {}
    for _ in range(ATTEMPTS):
        result = replay(trace, policy, int(cache_bytes), value_bytes)
        result |= {"cache_bytes": int(cache_bytes), "value_bytes": value_bytes, "wanted": wanted}
        resident = result["resident_items"]
        if not best or abs(resident - wanted) < abs(best["resident_items"] - wanted):
            best = result
        if abs(resident - wanted) <= RESIDENT_WITHIN / 5 * wanted:
            break
        cache_bytes *= wanted / resident
    return best


def main() -> None:
    """Replay each trace at each size under both policies and compare."""
    args = harness.arguments(
        __doc__, traces={"type": Path, "default": TRACES, "help": "folder of traces"}
    )
    report = harness.Report("eviction", args, ("libcachesim",))
    traces = list(read_traces(args.traces)) if args.traces.is_dir() else []
    if not traces:
        report.skip("lru and s3fifo against exact LRU", f"no traces in {args.traces}")
        report.finish()
    if args.quick:
        traces = [min(traces, key=lambda trace: len(trace.ids))]
    shares = SHARES_QUICK if args.quick else SHARES
    asked = [share for share in shares if share in JUDGED]
    at = " and ".join(f"{share * 100:g}" for share in asked) + " %"
    over: dict[tuple[str, float], dict[str, float]] = {}
    print("  trace            share  policy   items   value B     misses  exact LRU  ratio")
    for trace in traces:
        for share in shares:
            for policy in POLICIES:
                wanted = max(1, round(trace.keys * share))
                result = replay_at(trace, policy, wanted)
                if share in JUDGED and abs(result["resident_items"] / wanted - 1) > RESIDENT_WITHIN:
                    report.skip(f"{trace.name} {share:.0%} {policy}", "no cache size fits")
                reference = exact_lru(trace.ids, round(result["resident_items"]))
                ratio = result["miss_ratio"] / reference
                over.setdefault((policy, share), {})[trace.name] = ratio
                report.measured(
                    f"{trace.name} {share:.0%} {policy}",
                    {**result, "exact_lru_miss_ratio": reference, "ratio": ratio},
                )
                print(
                    f"  {trace.name:15} {share:6.0%}  {policy:7}{result['resident_items']:7.0f}"
                    f"{result['value_bytes']:10}{result['miss_ratio']:11.4f}{reference:11.4f}"
                    f"{ratio:7.3f}",
                    flush=True,
                )
    for (policy, share), by_trace in sorted(over.items()):
        low, _, high = harness.spread([*by_trace.values()])
        mean = statistics.mean(by_trace.values())
        print(f"  {policy} at {share:.0%}: {mean:.3f} on average   ({low:.3f} .. {high:.3f})")
        report.measured(f"{policy} {share:.0%}", {"mean": mean, "min": low, "max": high})
    judged = {
        policy: [ratio for share in asked for ratio in over[policy, share].values()]
        for policy in POLICIES
    }
    lru, s3fifo = statistics.mean(judged["lru"]), statistics.mean(judged["s3fifo"])
    report.target(f"lru / exact LRU, average of {at}", [lru], at_most=1.02)
    report.target(f"lru / exact LRU, the worst of {at}", [max(judged["lru"])], at_most=1.08)
    report.target(f"s3fifo / exact LRU, average of {at}", [s3fifo], at_most=0.95)
    report.finish()


if __name__ == "__main__":
    main()
