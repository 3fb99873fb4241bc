"""``scripts/bench/instructions.py``: a path that became longer fails, one that did not does not."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import instructions
import pytest
from instructions import Counted

# A hit of the library as it is, and with one more call on its way.
PATHS = """
from types import SimpleNamespace
import cachetools
import kamacache

def paths(argument):
    keys = [f"{argument}:{number}" for number in range(100)]
    lru = cachetools.LRUCache(maxsize=100)
    group = kamacache.Group("g", cache_bytes="1MiB", near_cache_items=0)
    for key in keys:
        lru[key] = b"value"
        group.set(key, b"value")

    def slowed(key):
        lru.get(key)
        return group.get(key)

    def path(name, get):
        return SimpleNamespace(name=name, operations=100, run=lambda: [get(key) for key in keys])

    yield path("reference", lru.__getitem__)
    yield path("hit", group.get)
    yield path("hit again", group.get)
    yield path("hit, slowed", slowed)
"""


@pytest.mark.integration
@pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind is not installed")
def test_slowed_path_fails_where_the_same_path_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slowed_paths.py").write_text(PATHS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    counts = instructions.count_paths("slowed_paths:paths", "key", tmp_path)
    assert [path.name for path in counts] == ["reference", "hit", "hit again", "hit, slowed"]
    ratios = instructions.ratios_of(counts)
    kept = {"hit": ratios["hit"]}
    tolerance = instructions.TOLERANCE
    assert instructions.judge({"hit": ratios["hit again"]}, kept, tolerance) == ([], [], [])
    assert instructions.judge({"hit": ratios["hit, slowed"]}, kept, tolerance)[0] == ["hit"]


def test_failing_program_is_an_error_that_shows_what_it_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "valgrind"
    fake.write_text("#!/bin/sh\necho no such module >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(RuntimeError, match="no such module"):
        instructions.count_paths("nothing:paths", "", tmp_path)


def test_dumps_are_told_apart_by_their_order(tmp_path: Path) -> None:
    totals = [900, 1_010, 2_020, 80, 1_000, 2_000, 90, 110, 210, 90, 100, 300]
    for number, total in enumerate(totals, 1):
        (tmp_path / f"dump.{number}").write_text(f"events: Ir\nsummary: 1\ntotals: {total}\n")
    read = instructions.read_dumps(tmp_path / "dump")
    assert read == totals
    names = ["10 first, of two", "5 second"]
    assert instructions.counted(names, read) == [
        Counted("first, of two", 100.0),
        Counted("second", 22.0),
    ]
    with pytest.raises(RuntimeError, match="second"):
        instructions.counted(names, read[:-1])


def test_judging() -> None:
    kept = {"longer": 1.0, "shorter": 1.0, "same": 1.0, "gone": 1.0}
    ratios = {"longer": 1.11, "shorter": 0.89, "same": 1.09, "new": 5.0}
    assert instructions.judge(ratios, kept, 0.10) == (["longer"], ["shorter"], ["new"])


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str, hit: float = 300) -> int:
    """Run the command with counts that are given; return its exit code."""
    paths = [Counted("reference", 100), Counted("hit", hit)]
    monkeypatch.setattr(instructions, "count_all", lambda: paths)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(sys, "argv", ["instructions.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        instructions.main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_command_keeps_ratios_and_fails_above_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "kept.json"
    path.write_text(json.dumps({"CPython 2.7": {"ratios": {}}}))
    given = (f"--baseline={path}", "--check")
    assert run_main(monkeypatch, *given) == 0
    assert "--update takes them" in capsys.readouterr().out
    assert run_main(monkeypatch, *given, "--update") == 0
    kept = json.loads(path.read_text())
    assert kept.keys() == {"CPython 2.7", instructions.python_key()}
    assert kept[instructions.python_key()]["ratios"] == {"hit": 3.0}
    assert run_main(monkeypatch, *given, hit=329) == 0
    capsys.readouterr()
    assert run_main(monkeypatch, *given, hit=331) == 1
    assert "longer by more than 10%: hit" in capsys.readouterr().out
    assert run_main(monkeypatch, f"--baseline={path}", hit=331) == 0, "only --check fails"
    assert run_main(monkeypatch, *given, hit=260) == 0
    assert "shorter by more than 10%: hit" in capsys.readouterr().out


def test_ratios_of_another_build_are_held_less_strictly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "kept.json"
    given = (f"--baseline={path}", "--check")
    run_main(monkeypatch, *given, "--update")
    monkeypatch.setattr(instructions, "python_build", lambda: "3.11.99 clang -O0")
    assert run_main(monkeypatch, *given, hit=370) == 0
    assert run_main(monkeypatch, *given, hit=380) == 1


def test_without_valgrind_it_says_so_and_passes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["instructions.py", "--check"])
    with pytest.raises(SystemExit) as ended:
        instructions.main()
    assert ended.value.code == 0
    assert "valgrind is not installed" in capsys.readouterr().out
