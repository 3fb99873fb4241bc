"""The load tests of the standard set: their commands, and what is kept of what they say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
import run_all
import standard_load
from standard_load import Comparison, Servers

from scripts.loadtest.histogram import Histogram
from scripts.loadtest.output import document
from scripts.loadtest.results import NodeUse, OpResult, RoundResult, TestResult
from tests.scripts.bench.standard_results import load, load_target

COMPARISON = Comparison("one", "A title", ("local", "redis-tcp"), ("--keys=10",))
SPECS = {"local": "local:/run/x", "redis-tcp": "redis:127.0.0.1:1"}


def round_of(target: str, number: int, *, us: int, **more: Any) -> RoundResult:
    latencies = Histogram()
    latencies.record([us * 1_000] * 100)
    fields: dict[str, Any] = {
        "target": target,
        "round": number,
        "seconds": 2.0,
        "operations": 100,
        "keys": 100,
        "found": 90,
        "hits": 90,
        "misses": 10,
        "errors": {},
        "first_errors": [],
        "ops": [OpResult(kind="read", count=100, histogram=latencies.encode())],
        "intervals": [],
        "use": [NodeUse(role="worker", pid=1, cpu_s=0.5, rss_bytes=1, private_bytes=1)],
        "start_delay": Histogram().encode(),
        "behind": 0,
        "behind_s": 0.0,
        "client_cpu_s": 0.25,
        "generator_us": 1.0,
        **more,
    }
    return RoundResult(**fields)


def test_digest_keeps_throughput_and_latency_of_each_round() -> None:
    rounds = [
        round_of("local:/run/x", 0, us=100),
        round_of("redis:127.0.0.1:1", 0, us=400),
        round_of("local:/run/x", 1, us=200, failed="the target died"),
        round_of("redis:127.0.0.1:1", 1, us=400),
    ]
    test = TestResult(
        arguments={},
        machine={},
        versions={"redis": "8"},
        began="",
        rounds=rounds,
        notes=["local:/run/x: as fast as can be"],
    )
    found = json.loads(msgspec.json.encode(document(test)))
    digest = standard_load.digest_of(found, {spec: name for name, spec in SPECS.items()})
    assert digest["notes"] == ["local: as fast as can be"]
    local, redis = digest["targets"]["local"], digest["targets"]["redis-tcp"]
    assert (local["ours"], redis["ours"]) == (True, False)
    assert local["rounds"].keys() == {"0"}, "a round that failed is none"
    assert redis["rounds"]["1"]["operations_per_s"] == 50
    assert redis["rounds"]["1"]["p50_us"] == pytest.approx(400, rel=0.01)
    assert redis["server_cpu_s_per_1000"] == pytest.approx(5)
    (pair,) = standard_load.against(digest)
    assert (pair["ours"], pair["theirs"], pair["rounds"]) == ("local", "redis-tcp", 1)
    assert pair["p99"][1] == pytest.approx(0.25, rel=0.01)


def test_ratios_are_taken_within_each_round() -> None:
    digest = load(
        targets={
            "local": load_target(ours=True, speeds=(10.0, 20.0, 90.0)),
            "grpc": load_target(ours=True, speeds=(1.0,)),
            "redis": load_target(ours=False, speeds=(5.0, 20.0, 30.0)),
        }
    )
    pairs = {pair["ours"]: pair for pair in standard_load.against(digest)}
    assert pairs.keys() == {"local", "grpc"}
    assert pairs["local"]["speed"] == (1.0, 2.0, 3.0)
    assert pairs["grpc"]["rounds"] == 1


def test_command_names_every_target_there_is() -> None:
    arguments, names = standard_load.command_of(COMPARISON, SPECS, quick=True)
    assert arguments[:2] == ["--compare=local:/run/x", "--compare=redis:127.0.0.1:1"]
    assert "--keys=10" in arguments
    assert set(standard_load.QUICK) <= set(arguments)
    assert names == {"local:/run/x": "local", "redis:127.0.0.1:1": "redis-tcp"}
    shown = standard_load.shown_command(COMPARISON)
    assert shown.startswith(
        "scripts/load_test.py --compare=local:RUN_DIR --compare=redis:HOST:PORT"
    )


def test_missing_server_is_told_and_the_others_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def run_to_end(command: list[str], limit_s: float) -> str:
        commands.append(command)
        return "exit code 69"

    monkeypatch.setattr(run_all, "run_to_end", run_to_end)
    found = Servers({"local": "local:/run/x"}, {"redis-tcp": "redis-server is not installed"}, {})
    digest = standard_load.run(COMPARISON, found, tmp_path, quick=True)
    assert digest["skipped"] == {"redis-tcp": "redis-server is not installed"}
    assert digest["failed"] == "exit code 69"
    assert [part for part in commands[0] if part.startswith("--compare")] == [
        "--compare=local:/run/x"
    ]


@pytest.mark.integration
def test_servers_start_and_what_is_not_installed_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = shutil.which
    hidden = {"memcached"}
    monkeypatch.setattr(shutil, "which", lambda name: None if name in hidden else real(name))
    with standard_load.servers() as found:
        assert {"local", "grpc", "http"} <= found.specs.keys()
        assert found.missing["memcached"] == "memcached is not installed"
        assert ("redis" in found.specs) is (real("redis-server") is not None)
