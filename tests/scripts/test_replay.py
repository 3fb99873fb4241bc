"""``scripts/replay.py``: its one line of JSON, alone and through a node."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest

from tests.node_process import ROOT, NodeProcess

NAMES = {
    "requests", "hits", "misses", "miss_ratio", "resident_items", "overhead_bytes_per_item",
    "loads", "seconds",
}  # fmt: skip


def replay(*args: object) -> tuple[int, str, str]:
    """Return exit code, output and errors of the script."""
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "replay.py", *map(str, args)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    return done.returncode, done.stdout, done.stderr


def result(*args: object) -> dict[str, Any]:
    code, output, errors = replay(*args)
    assert code == 0, errors
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    assert found.keys() >= NAMES
    return found


def zipf(keys: int, requests: int) -> list[str]:
    """A skewed trace, the same each time."""
    state, trace = 1, []
    for _ in range(requests):
        state = state * 6364136223846793005 + 1442695040888963407 & (1 << 64) - 1
        trace.append(f"key-{int(keys ** (state / (1 << 64))):06d}")
    return trace


def exact_lru_misses(trace: list[str], items: int) -> int:
    kept: OrderedDict[str, None] = OrderedDict()
    misses = 0
    for key in trace:
        if key in kept:
            kept.move_to_end(key)
            continue
        misses += 1
        kept[key] = None
        if len(kept) > items:
            kept.popitem(last=False)
    return misses


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.txt"
    path.write_text("\n".join(zipf(5000, 30_000)) + "\n")
    return path


def test_all_fits_and_each_key_is_loaded_once(trace: Path) -> None:
    keys = trace.read_text().split()
    found = result("--trace", trace, "--cache-bytes", "8MiB", "--value-bytes", 100)
    assert found["requests"] == len(keys)
    assert found["misses"] == found["loads"] == len(set(keys))
    assert found["hits"] + found["misses"] == found["requests"]
    assert found["miss_ratio"] == round(found["misses"] / found["requests"], 6)
    assert found["overhead_bytes_per_item"] > 0


@pytest.mark.parametrize("policy", ["lru", "s3fifo"])
def test_small_cache_misses_about_as_exact_lru_does(trace: Path, policy: str) -> None:
    found = result("--trace", trace, "--policy", policy, "--cache-bytes", 300_000)
    assert 0 < found["resident_items"] < 3000
    exact = exact_lru_misses(trace.read_text().split(), round(found["resident_items"]))
    assert found["misses"] == pytest.approx(exact, rel=0.15)


def test_cache_smaller_than_a_shard_can_be_is_said(trace: Path) -> None:
    code, _, errors = replay("--trace", trace, "--cache-bytes", "2KiB")
    assert code == 0
    assert "at least" in errors


def test_gzip_empty_lines_and_any_bytes(tmp_path: Path) -> None:
    path = tmp_path / "trace.gz"
    path.write_bytes(gzip.compress(b"one\n\n\xff\xfe\r\none\n  \n\xff\xfe"))
    found = result("--trace", path, "--value-bytes", 0)
    assert (found["requests"], found["hits"], found["misses"]) == (4, 2, 2)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--trace", "no-such-file"], "no-such-file"),
        (["--value-bytes", "-1"], "--value-bytes"),
        (["--processes", "0"], "--processes"),
        (["--cache-bytes", "much"], "cache-bytes"),
        (["--value-bytes", "100000000"], "limit"),
        (["--attach", "/nowhere/at/all"], "/nowhere/at/all"),
    ],
)
def test_mistakes_are_a_sentence_not_a_traceback(trace: Path, args: list[str], says: str) -> None:
    given = args if "--trace" in args else ["--trace", trace, *args]
    code, output, errors = replay(*given)
    assert (code != 0, output) == (True, "")
    assert says in errors
    assert "Traceback" not in errors


def test_trace_without_keys_or_with_a_key_too_long_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_text("\n \n")
    assert "no keys" in replay("--trace", path)[2]
    path.write_text("short\n" + "x" * 2000)
    assert "key 2 has 2000 bytes" in replay("--trace", path)[2]


@pytest.mark.integration
def test_through_a_node_with_a_getter_and_without(
    trace: Path, short_dir: Path, tmp_path: Path
) -> None:
    run_dir, keys = short_dir / "run", trace.read_text().split()
    (tmp_path / "replayapp.py").write_text(
        "import kamacache\n"
        "def load(key): return b'x' * 50\n"
        "scores = kamacache.Group('scores', cache_bytes='8MiB', getter=load)\n"
    )
    args = ("--workers", "2", "--listen", "none", "--group", "plain:8MiB")
    with NodeProcess(run_dir, *args, "--app", "replayapp:scores", cwd=tmp_path) as node:
        node.await_ready()
        code, _, errors = replay("--trace", trace, "--attach", run_dir)
        assert code == 1
        assert "scores, plain" in errors
        attach = ("--trace", trace, "--attach", run_dir, "--processes", 3, "--group")
        for group in ("scores", "plain"):
            found = result(*attach, group)
            assert found["requests"] == len(keys)
            assert found["hits"] + found["misses"] == found["requests"]
            # Two processes may miss one key at the same time; the node loads it once. Where
            # nothing loads, each of them sets it.
            extra = found["loads"] - len(set(keys))
            assert extra == 0 if group == "scores" else 0 <= extra <= len(set(keys)) * 0.2
            assert len(set(keys)) <= found["misses"] < len(set(keys)) * 1.2
            assert found["not_found"] == 0
        again = result(*attach, "scores")
        assert (again["misses"], again["loads"]) == (0, 0)
        assert again["resident_items"] == len(set(keys))
        assert node.stop() == 0
