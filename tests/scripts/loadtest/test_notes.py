"""What a reader must know of a result is said, and nothing where there is nothing to say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from scripts.loadtest.histogram import Histogram
from scripts.loadtest.notes import not_found_notes, target_notes
from scripts.loadtest.recording import Window
from scripts.loadtest.results import OpResult, RoundResult
from scripts.loadtest.tally import Tally


def histogram(*latencies_us: float) -> str:
    made = Histogram()
    made.record([int(us * 1000) for us in latencies_us])
    return made.encode()


def round_of(**changed: Any) -> RoundResult:
    plain = RoundResult(
        target="redis:/x",
        round=0,
        seconds=10.0,
        operations=100_000,
        keys=100_000,
        found=100_000,
        hits=100_000,
        misses=0,
        errors={},
        first_errors=[],
        ops=[OpResult(kind="read", count=1, histogram=histogram(100))],
        intervals=[],
        use=[],
        start_delay="",
        behind=0,
        behind_s=0.0,
        client_cpu_s=5.0,
        generator_us=1.0,
    )
    return msgspec.structs.replace(plain, **changed)


def notes(
    rounds: Sequence[RoundResult],
    target: str = "redis:/x",
    clock_us: float = 0.1,
    *,
    opened: bool = False,
) -> list[str]:
    return target_notes(target, rounds, processes=1, clock_us=clock_us, opened=opened)


def test_an_honest_round_needs_no_note() -> None:
    assert notes([round_of()]) == []
    assert notes([]) == []
    assert notes([round_of(operations=0)]) == []


def test_the_load_tests_own_share_is_told() -> None:
    (note,) = notes([round_of(generator_us=20.0)])
    assert note.startswith("redis:/x: ")
    assert "20%" in note
    assert "20.00 us" in note
    assert notes([round_of(generator_us=20.0)], opened=True) == []


def test_latencies_that_are_mostly_clock_are_told() -> None:
    (note,) = notes([round_of()], clock_us=15.0)
    assert "15.00 us" in note


def test_a_busy_client_is_told_unless_it_is_the_target() -> None:
    (note,) = notes([round_of(client_cpu_s=9.8)])
    assert "busy 98%" in note
    assert notes([round_of(client_cpu_s=9.8)], "local:/x") == []


def test_what_was_never_begun_is_told_of_whole_rounds() -> None:
    late = round_of(behind=1234, behind_s=3.0)
    (note,) = notes([late], opened=True)
    assert "1,234 requests" in note
    assert "3.0 s" in note
    for early in ({"interrupted": True}, {"failed": "died"}, {"behind_s": 0.01}):
        assert notes([msgspec.structs.replace(late, **early)], opened=True) == []


def test_a_late_start_is_told() -> None:
    (note,) = notes([round_of(start_delay=histogram(50))], opened=True)
    assert "after they were due" in note
    assert notes([round_of(start_delay=histogram(2))], opened=True) == []


def test_keys_that_a_getter_does_not_know_are_told() -> None:
    tally = Tally(
        target="local",
        round_=0,
        processes=1,
        window=Window(start_ns=0, end_ns=1, slot_ns=1),
        found_is_hit=False,
        show=lambda interval: None,
    )
    assert not_found_notes(tally, renamed=True, loads=True) == []
    tally.read, tally.found = 1000, 400
    (note,) = not_found_notes(tally, renamed=True, loads=True)
    assert "600 of 1,000 keys" in note
    assert "--as-is" in note
    (note,) = not_found_notes(tally, renamed=False, loads=True)
    assert "--key-prefix" in note
    assert not_found_notes(tally, renamed=True, loads=False) == []
    tally.found = 995
    assert not_found_notes(tally, renamed=True, loads=True) == []
