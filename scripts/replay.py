#!/usr/bin/env python3
"""Replay a trace of keys through the cache and print what came of it as one JSON line.

Without ``--attach`` it drives one shard in this process's own memory: each request is a lookup,
and a miss stores a value of ``--value-bytes``. With ``--attach`` it replays through a running
node from ``--processes`` processes, each taking every P-th request in the trace's order; the
node's getter loads the misses, or, where its group has none, the asking process sets them.

The trace is text, one key a line, gzip if its name ends in .gz. The last line of output is one
JSON object: requests, hits, misses, miss_ratio, resident_items (mean over the second half),
overhead_bytes_per_item (index, segment table, access bytes, record headers and padding, over the
items), log_live_share (of the log's bytes those of live records), loads, seconds.
"""

from __future__ import annotations

import argparse
import gzip
import json
import multiprocessing
import sys
import time
from pathlib import Path
from typing import Any

import kamacache
from kamacache.config import EVICTIONS, GroupSpec, parse_bytes
from kamacache.errors import KamaCacheError
from kamacache.limits import KEY_BYTES_MAX, VALUE_BYTES_CEILING
from kamacache.local.attach import attach_group
from kamacache.store import private_shard

SAMPLE_EVERY = 64  # requests between two looks at the resident items
SAMPLE_EVERY_S = 0.05
REPLAY_TIMEOUT_S = 3600.0


def read_trace(path: Path) -> list[bytes]:
    """Return the keys of a trace, in order; empty lines are skipped."""
    raw = path.read_bytes()
    if path.suffix == ".gz":
        raw = gzip.decompress(raw)
    keys = [key for line in raw.splitlines() if (key := line.strip())]
    for number, key in enumerate(keys, 1):
        if len(key) > KEY_BYTES_MAX:
            raise ValueError(
                f"{path}: key {number} has {len(key)} bytes, the limit is {KEY_BYTES_MAX}"
            )
    if not keys:
        raise ValueError(f"{path} holds no keys; write one key a line")
    return keys


def replay_here(
    keys: list[bytes], policy: str, cache_bytes: int, value_bytes: int
) -> dict[str, Any]:
    """Drive one shard in this process."""
    item_bytes = value_bytes + sum(map(len, keys)) // len(keys)
    spec = GroupSpec(
        name="replay",
        cache_bytes=cache_bytes,
        eviction=policy,
        item_bytes_mean=min(max(item_bytes, 8), VALUE_BYTES_CEILING),
    )
    writer, lookup = private_shard(spec)
    if writer.arena.geometry.total_bytes > cache_bytes:
        least = writer.arena.geometry.total_bytes
        print(f"a shard has at least {least} bytes: that is replayed", file=sys.stderr)
    get, put, value = lookup.get, writer.put, b"v" * value_bytes
    if keys:
        writer.check_size(max(keys, key=len), value)
    misses = 0
    residents: list[int] = []
    half = len(keys) // 2
    began = time.perf_counter()
    for number, key in enumerate(keys):
        if get(key) is None:
            misses += 1
            put(key, value)
        if number >= half and not number % SAMPLE_EVERY:
            residents.append(writer.items)
    seconds = time.perf_counter() - began
    geometry = writer.arena.geometry
    stats = writer.stats()
    payload = sum(len(key) + len(value) for key, value, _ in writer.walk())
    kept = geometry.total_bytes - geometry.log_bytes + stats["live_bytes"]
    return {
        **counted(len(keys), misses),
        "resident_items": round(sum(residents) / max(len(residents), 1), 1),
        "overhead_bytes_per_item": round((kept - payload) / max(writer.items, 1), 2),
        "log_live_share": round(stats["live_bytes"] / geometry.log_bytes, 4),
        "loads": misses,
        "seconds": round(seconds, 3),
    }


def replay_attached(
    keys: list[bytes], run_dir: str, group: str | None, processes: int, value_bytes: int
) -> dict[str, Any]:
    """Replay through a running node from several processes."""
    name, has_getter = choose_group(run_dir, group)
    engine = attach_group(run_dir, name)
    before = engine.stats()
    spawn = multiprocessing.get_context("spawn")
    results: multiprocessing.SimpleQueue[dict[str, Any]] = spawn.SimpleQueue()
    start = spawn.Barrier(processes + 1)
    children = [
        spawn.Process(
            target=replay_share,
            args=(keys[part::processes], run_dir, name, has_getter, value_bytes, start, results),
        )
        for part in range(processes)
    ]
    for child in children:
        child.start()
    samples: list[tuple[float, int]] = []
    try:
        start.wait(60)
        began = time.perf_counter()
        while any(child.is_alive() for child in children):
            if time.perf_counter() - began > REPLAY_TIMEOUT_S:
                raise TimeoutError(f"the replay took more than {REPLAY_TIMEOUT_S:.0f} s")
            samples.append((time.perf_counter() - began, engine.stats()["items"]))
            children[0].join(SAMPLE_EVERY_S)
        seconds = time.perf_counter() - began
    finally:
        for child in children:
            child.terminate()
            child.join()
    shares = [results.get() for child in children if child.exitcode == 0]
    failed = [share["error"] for share in shares if "error" in share]
    if failed or len(shares) != processes:
        raise RuntimeError(f"a replaying process failed: {failed[:1] or 'it died'}")
    after = engine.stats()
    samples.append((seconds, after["items"]))
    late = [items for at, items in samples if at >= seconds / 2]
    misses = sum(share["misses"] for share in shares)
    stored = sum(share["sets"] for share in shares)
    items = max(after["items"], 1)
    # Values that the node loads may have any size: what its records take is known exactly, what
    # of it is key and value only from the sizes seen by this replay.
    requests = len(keys)
    payload = sum(share["payload_bytes"] for share in shares) / requests * items
    outside_log = sum(
        arena.geometry.total_bytes - arena.geometry.log_bytes for arena in engine.arenas()
    )
    log_bytes = sum(arena.geometry.log_bytes for arena in engine.arenas())
    return {
        **counted(requests, misses),
        "resident_items": round(sum(late) / len(late), 1),
        "overhead_bytes_per_item": round((outside_log + after["live_bytes"] - payload) / items, 2),
        "log_live_share": round(after["live_bytes"] / log_bytes, 4),
        "loads": after["loads"] - before["loads"] + stored,
        "seconds": round(seconds, 3),
        "not_found": sum(share["not_found"] for share in shares),
        "processes": processes,
        "group": name,
    }


def replay_share(
    keys: list[bytes],
    run_dir: str,
    name: str,
    has_getter: bool,
    value_bytes: int,
    start: Any,
    results: Any,
) -> None:
    """Be one of the replaying processes."""
    kamacache.attach(run_dir)
    group = kamacache.Group(name, fallback="error")
    value = b"v" * value_bytes
    misses = not_found = sets = payload = 0
    try:
        group.stats()  # maps the shards before the clock starts
        start.wait(60)
        hits_before = in_memory(group)
        for key in keys:
            found = group.get(key, default=None)
            if found is None and not has_getter:
                group.set(key, value)
                found = value
                sets += 1
            elif found is None:
                not_found += 1
            payload += len(key) + len(found or b"")
        misses = len(keys) - (in_memory(group) - hits_before)
        share: dict[str, Any] = {
            "misses": misses,
            "not_found": not_found,
            "sets": sets,
            "payload_bytes": payload,
        }
    except KamaCacheError as error:
        share = {"error": str(error)}
    results.put(share)


def in_memory(group: kamacache.Group) -> int:
    """Return how many gets this process has answered from memory."""
    own = group.stats()["own"]
    return int(own["near_hits"] + own["memory_hits"] + own["negative_hits"])


def choose_group(run_dir: str, wanted: str | None) -> tuple[str, bool]:
    """Return the group to replay through and whether the node can load it."""
    from kamacache.rundir.description import read_description

    groups = {spec.name: spec for spec in read_description(run_dir).groups}
    if wanted is None and len(groups) == 1:
        wanted = next(iter(groups))
    if wanted not in groups:
        raise ValueError(f"choose one of the node's groups with --group: {', '.join(groups)}")
    return wanted, groups[wanted].has_getter


def counted(requests: int, misses: int) -> dict[str, Any]:
    """Return the counts that both ways of replaying share."""
    return {
        "requests": requests,
        "hits": requests - misses,
        "misses": misses,
        "miss_ratio": round(misses / requests, 6),
    }


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace", type=Path, required=True, help="text, one key a line; also .gz")
    parser.add_argument("--policy", choices=EVICTIONS, default="lru")
    parser.add_argument("--cache-bytes", default="64MiB", help="such as 1000000 or 64MiB")
    parser.add_argument("--value-bytes", type=int, default=100)
    parser.add_argument("--attach", metavar="RUN_DIR", help="replay through the node there")
    parser.add_argument("--processes", type=int, default=2, help="with --attach")
    parser.add_argument("--group", help="with --attach, where the node has several")
    args = parser.parse_args()
    if args.value_bytes < 0 or not 1 <= args.processes <= 256:
        parser.error("--value-bytes must be 0 or more, --processes from 1 to 256")
    try:
        keys = read_trace(args.trace)
        if args.attach:
            print("--attach: policy and cache bytes are the node's", file=sys.stderr)
            result = replay_attached(
                keys, args.attach, args.group, args.processes, args.value_bytes
            )
        else:
            cache_bytes = parse_bytes(args.cache_bytes, "--cache-bytes")
            result = replay_here(keys, args.policy, cache_bytes, args.value_bytes)
    except (OSError, ValueError, RuntimeError, KamaCacheError) as error:
        print(f"replay.py: {error}", file=sys.stderr)
        return 1
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
