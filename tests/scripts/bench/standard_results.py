"""Results of a standard set, as `standard.py` would keep them, for the tests of what reads them."""

from __future__ import annotations

from typing import Any


def target(name: str = "hit", *, met: bool = True, asked: str = "at most 5") -> dict[str, Any]:
    return {
        "name": name,
        "target": asked,
        "met": met,
        "min": 3.5,
        "median": 4.0 if met else 6.25,
        "max": 7.0,
        "rounds": 60,
    }


def load_target(
    *, ours: bool, speeds: tuple[float, ...] = (1000.0, 1200.0, 1100.0), p99_us: float = 50.0
) -> dict[str, Any]:
    return {
        "ours": ours,
        "operations_per_s": speeds[0],
        "hit_ratio": 0.991 if ours else None,
        "errors": {} if ours else {"ConnectionError": 3},
        "p50_us": 10.0,
        "p99_us": p99_us,
        "p999_us": 900.0,
        "max_us": 12_000.0,
        "behind": 0,
        "client_cpu_s_per_1000": 0.02,
        "server_cpu_s_per_1000": 0.01,
        "generator_us": 5.0,
        "rounds": {
            str(turn): {"operations_per_s": speed, "p50_us": 10.0, "p99_us": p99_us}
            for turn, speed in enumerate(speeds)
        },
    }


def load(**more: Any) -> dict[str, Any]:
    return {
        "title": "Reads and writes",
        "command": "scripts/load_test.py --compare=local:RUN_DIR --compare=redis:SOCKET",
        "skipped": {},
        "targets": {
            "local": load_target(ours=True),
            "redis": load_target(ours=False, speeds=(100.0, 110.0, 120.0)),
        },
        **more,
    }


def results(**more: Any) -> dict[str, Any]:
    """One benchmark whose targets are met and missed, one load test, no model."""
    return {
        "format": 1,
        "began": "2026-01-02T03:04:05+00:00",
        "took_s": 321.4,
        "quick": False,
        "machine": {"machine": "2 cores, a processor", "python": "CPython 3.11.7"},
        "versions": {"redis": "8.1.0"},
        "notes": [],
        "commands": {"local_hit": "scripts/bench/local_hit.py --seconds=25"},
        "benchmarks": {
            "local_hit": {
                "targets": [target("fast hit"), target("slow | hit", met=False)],
                "measured": {
                    "a hit": {"min": 1.0, "median": 1.5, "max": 2.0, "unit": "us"},
                    "something else": [1, 2],
                },
            }
        },
        "loads": {"read-mostly": load()},
        "not_run": {},
        **more,
    }
