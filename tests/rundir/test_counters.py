"""Counters: one writer a slot, nothing lost when a process dies or forks."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kamacache.errors import NodeUnavailableError
from kamacache.rundir import counters as counters_module
from kamacache.rundir.counters import Counters, create_counters, open_counters, read_totals


@pytest.fixture
def counters(tmp_path: Path) -> Iterator[Counters]:
    create_counters(tmp_path / "counters", 2, slots=4)
    opened = open_counters(tmp_path / "counters")
    yield opened
    opened.close()


def in_child(work: Callable[[], None]) -> int:
    """Run ``work`` in a forked child and return its exit status; the child never returns."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_totals_are_per_group_and_sum_processes(counters: Counters, tmp_path: Path) -> None:
    mine = counters.claim(0)
    mine.add([3, 2, 1])
    counters.claim(1).add([10])

    def child() -> None:
        other = open_counters(tmp_path / "counters")
        other.claim(0).add([5])
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(child) == -signal.SIGKILL
    mine.add([1])
    totals = read_totals(tmp_path / "counters", 0)
    assert (totals["gets"], totals["near_hits"], totals["memory_hits"]) == (9, 2, 1)
    assert counters.totals(1)["gets"] == 10


def test_fold_keeps_the_counts_of_the_dead_and_frees_their_slots(counters: Counters) -> None:
    living = counters.claim(0)
    living.add([1])
    for _ in range(20):  # five times the slots

        def child() -> None:
            slot = counters.claim(0)
            slot.add([1, 0, 0, 0, 0, 0, 0, 0, 2])

        assert in_child(child) == 0
        counters.fold()
    assert counters.totals(0)["gets"] == 21
    assert counters.totals(0)["peer_hits"] == 40
    assert counters.fold() == 0  # the living one's slot is not taken from it


def test_forked_child_counts_in_a_slot_of_its_own(counters: Counters) -> None:
    slot = counters.claim(0)
    slot.add([1])
    read, write = os.pipe()

    def child() -> None:
        slot.add([100])
        os.write(write, b"x")
        signal.pause()

    pid = os.fork()
    if pid == 0:
        child()
    try:
        os.read(read, 1)
        slot.add([1])
        assert counters.totals(0)["gets"] == 102
        assert counters.fold() == 0
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(read)
        os.close(write)
    assert counters.fold() == 1
    assert counters.totals(0)["gets"] == 102


def test_child_forked_while_a_thread_opens_or_claims_counts(
    counters: Counters, tmp_path: Path
) -> None:
    held, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        with counters_module._opening, counters._claiming:
            held.set()
            go_on.wait(10)

    def child() -> None:
        signal.alarm(5)  # where it waits for a lock that nobody releases
        open_counters(tmp_path / "counters").claim(0).add([1])

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        assert held.wait(10)
        assert in_child(child) == 0
    finally:
        go_on.set()
        thread.join(10)
    assert counters.totals(0)["gets"] == 1


def test_process_without_a_slot_counts_nothing_and_says_so_once(
    counters: Counters, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(4):
        counters.claim(0)
    counters.claim(0).add([7])
    counters.claim(1).add([7])
    assert counters.totals(0)["gets"] == counters.totals(1)["gets"] == 0
    assert len(caplog.records) == 1


def test_opening_twice_gives_the_same_object(counters: Counters, tmp_path: Path) -> None:
    assert open_counters(tmp_path / "counters") is counters


def test_foreign_and_missing_files_are_unavailable(tmp_path: Path) -> None:
    with pytest.raises(NodeUnavailableError):
        open_counters(tmp_path / "none")
    (tmp_path / "short").write_bytes(b"x")
    (tmp_path / "foreign").write_bytes(b"x" * 4096)
    for name in ("short", "foreign"):
        with pytest.raises(NodeUnavailableError):
            open_counters(tmp_path / name)


def test_counters_of_a_node_that_is_gone_are_let_go(tmp_path: Path) -> None:
    def opened() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = opened()
    for life in range(5):
        path = tmp_path / f"counters{life}"
        create_counters(path, 1, slots=4)
        slot = open_counters(path).claim(0)
        slot.add([1])
        path.unlink()
        slot.add([1])  # who still holds a slot may go on
        del slot
    last = tmp_path / "counters"
    create_counters(last, 1, slots=4)
    opened_last = open_counters(last)
    assert opened() <= before + 2  # the file and its mapping
    opened_last.close()
    assert opened() == before


def test_all_totals_are_the_totals_of_each_group(counters: Counters) -> None:
    counters.claim(0).add([3, 2, 1])
    counters.claim(1).add([10])

    def child() -> None:
        counters.claim(0).add([5])

    assert in_child(child) == 0
    assert counters.all_totals() == [counters.totals(0), counters.totals(1)]
    assert counters.fold() == 1
    assert counters.all_totals() == [counters.totals(0), counters.totals(1)]
    assert counters.all_totals()[0]["gets"] == 8
