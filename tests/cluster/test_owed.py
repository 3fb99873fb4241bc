"""What a worker owes to nodes that are away, for its successor: `kamacache.cluster.owed`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from kamacache.cluster.owed import Entry, OwedFile
from kamacache.limits import MEMBERS_MAX, OWED_FILE_BYTES, OWED_NAMES_BYTES

A, B = "10.0.0.1:8001", "10.0.0.2:8001"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "owed.0"


def found(path: Path) -> tuple[frozenset[str] | None, list[Entry]]:
    """Return what a successor reads."""
    successor = OwedFile(path)
    try:
        return successor.to_flush, [*successor.entries()]
    finally:
        successor.close()


def fill(owed: OwedFile, *addresses: str) -> None:
    """Add keys until one does not fit."""
    for number in range(OWED_FILE_BYTES // 1_000):
        owed.add(addresses, "g", [(b"%04d" % number + b"x" * 1_000, number)])


def test_a_fresh_file_owes_nothing(path: Path) -> None:
    OwedFile(path).close()
    assert found(path) == (frozenset(), [])
    assert path.stat().st_size == OWED_FILE_BYTES
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_successor_finds_the_entries_in_order(path: Path) -> None:
    owed = OwedFile(path)
    owed.add([A], "g", [(b"k\x00\xff", 1), (b"l", 2)])
    owed.add([A, B], "h", [(b"k", 3)])
    assert found(path) == (
        frozenset(),
        [Entry((A,), "g", [(b"k\x00\xff", 1), (b"l", 2)]), Entry((A, B), "h", [(b"k", 3)])],
    )


def test_what_does_not_fit_becomes_a_flush_of_those_it_was_for(path: Path) -> None:
    owed = OwedFile(path)
    fill(owed, A)
    owed.add([B], "g", [(b"small", 1)])
    flush, entries = found(path)
    assert flush == frozenset({A})
    assert len(entries) > OWED_FILE_BYTES // 1_000 - 40
    assert entries[-1] == Entry((B,), "g", [(b"small", 1)])
    owed.add([A], "g", [(b"covered", 1)])
    assert found(path) == (flush, entries)


def test_more_names_than_fit_are_every_node(path: Path) -> None:
    owed = OwedFile(path)
    names = [f"{'n' * 60}-{number}.internal:8001" for number in range(MEMBERS_MAX)]
    assert sum(map(len, names)) > OWED_NAMES_BYTES
    owed.add_flush(names)
    assert found(path)[0] is None
    owed.settle(set(names))
    assert found(path)[0] is None  # too many still
    owed.settle({A})
    assert found(path) == (frozenset({A}), [])


def test_it_is_empty_when_nobody_is_behind(path: Path) -> None:
    owed = OwedFile(path)
    owed.add([A], "g", [(b"k", 1)])
    owed.add_flush([B])
    owed.settle({A, B})
    assert found(path) == (frozenset({B}), [Entry((A,), "g", [(b"k", 1)])])
    owed.settle(set())
    assert found(path) == (frozenset(), [])
    owed.add([B], "g", [(b"l", 2)])
    assert found(path) == (frozenset(), [Entry((B,), "g", [(b"l", 2)])])


def test_a_node_that_is_away_for_ever_leaves_room_for_others(path: Path) -> None:
    owed = OwedFile(path)
    fill(owed, A)
    fill(owed, B)  # for which there is no room left
    assert found(path)[0] == frozenset({A, B})
    owed.settle({A})
    assert found(path) == (frozenset({A}), [])
    owed.add([A, B], "g", [(b"k", 1)])
    assert found(path) == (frozenset({A}), [Entry((B,), "g", [(b"k", 1)])])


def test_a_successor_goes_on_where_the_former_ended(path: Path) -> None:
    OwedFile(path).add([A], "g", [(b"k", 1)])
    owed = OwedFile(path)
    owed.add([A], "g", [(b"l", 2)])
    assert [entry.items for entry in found(path)[1]] == [[(b"k", 1)], [(b"l", 2)]]


def test_a_foreign_file_is_begun_anew(path: Path) -> None:
    path.write_bytes(os.urandom(4096))
    OwedFile(path)
    assert found(path) == (frozenset(), [])


WRITER = """
import sys
from kamacache.cluster.owed import OwedFile
owed = OwedFile(sys.argv[1])
going_on = 0
while True:
    for number in range(500):
        going_on += 1
        if going_on == int(sys.argv[2]):
            print("kill me", flush=True)  # and go on
        owed.add(["a:1"], "g", [(b"key-%d" % number * 20, number)])
    owed.settle({"b:1"} if number % 2 else set())
    owed.settle(set())
"""


def test_a_kill_at_any_moment_leaves_whole_entries(path: Path) -> None:
    for after in (1, 77, 499, 500, 501, 900, 1_000, 1_777):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), str(after)], stdout=subprocess.PIPE
        ) as writer:
            assert writer.stdout is not None
            writer.stdout.readline()
            writer.send_signal(signal.SIGKILL)
        flush, entries = found(path)
        assert flush is None or flush <= {"a:1", "b:1"}
        numbers = [entry.items[0][1] for entry in entries]
        assert all(b in (0, a + 1) for a, b in pairwise(numbers)), numbers
