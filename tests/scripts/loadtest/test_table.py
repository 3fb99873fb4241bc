"""The tables at the end, read as a person does: as text of 80 columns."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from scripts.loadtest import figures
from scripts.loadtest.results import TestResult
from scripts.loadtest.table import print_tables
from tests.scripts.loadtest.made_results import node_use, op, round_result, whole_test

LOCAL, MEMCACHED = "local:/run/kamacache", "memcached:[::1]:11211"
WIDTH = 80


def printed(result: TestResult) -> list[str]:
    """Return the lines on a console of 80 columns."""
    stream = io.StringIO()
    print_tables(result, Console(file=stream, width=WIDTH, markup=False, highlight=False))
    return stream.getvalue().splitlines()


def line_of(lines: list[str], *starts: str) -> str:
    """Return what follows these words in the only line that starts with them, evenly spaced."""
    found = [line.split() for line in lines if line.split()[: len(starts)] == list(starts)]
    assert len(found) == 1, lines
    return " ".join(found[0][len(starts) :])


def test_a_target_has_percentiles_of_its_real_histogram() -> None:
    latencies = [100.0] * 900 + [2_000.0] * 90 + [50_000.0] * 9 + [400_000.0]
    result = whole_test(
        round_result(LOCAL, ops=[op("read", latencies)], hits=750, misses=250, seconds=2.0)
    )
    lines = printed(result)
    assert f"local is {LOCAL}: 2.0 s" in lines
    assert line_of(lines, "local", "500") == ("100 µs 100 µs 2.00 ms 50.0 ms 400 ms 75.0% 0")


def test_kinds_have_rows_of_their_own_and_may_be_empty() -> None:
    result = whole_test(
        round_result(LOCAL, ops=[op("read", [10.0] * 9), op("write", [30.0]), op("delete", [])])
    )
    lines = printed(result)
    assert line_of(lines, "read").startswith("9.0 10.0 µs ")
    assert line_of(lines, "write").startswith("1.0 30.0 µs ")
    assert line_of(lines, "delete") == " ".join(["0.0", *[figures.NOTHING] * 5])


def test_a_target_whose_operations_all_failed_has_no_latency_but_its_errors() -> None:
    result = whole_test(
        round_result(
            LOCAL,
            ops=[],
            errors={"NodeUnavailableError": 3, "timeout": 1},
            first_errors=["NodeUnavailableError: no node at [::1]"],
            failed="the node is gone",
        )
    )
    lines = printed(result)
    assert line_of(lines, "local", "0.0") == " ".join([*[figures.NOTHING] * 6, "4"])
    assert line_of(lines, "local", "3") == "75.0% NodeUnavailableError"
    assert line_of(lines, "local", "1") == "25.0% timeout"
    assert "local: the node is gone" in lines
    assert "local, first error: NodeUnavailableError: no node at [::1]" in lines


def test_cpu_of_each_server_process_is_told_for_1000_requests() -> None:
    use = [node_use("worker-0", 11, cpu_s=0.004), node_use("front-0", 12, cpu_s=0.001)]
    result = whole_test(
        round_result(LOCAL, ops=[op("read", [10.0] * 1000)], use=use, client_cpu_s=0.25)
    )
    lines = printed(result)
    assert line_of(lines, "local", "worker-0") == "11 4.00 ms 4.00 MiB 1.00 MiB"
    assert line_of(lines, "front-0") == "12 1.00 ms 4.00 MiB 1.00 MiB"
    assert line_of(lines, "all") == "5.00 ms 2.00 MiB"
    assert line_of(lines, "load", "test") == "250 ms"


def test_without_server_processes_there_is_no_table_of_them() -> None:
    assert not [line for line in printed(whole_test(round_result(LOCAL))) if "CPU" in line]


def test_compared_targets_have_the_median_and_the_spread_of_the_rounds() -> None:
    rounds = [
        round_result(target, number, ops=[op("read", [us] * count)])
        for number, slower in ((1, 2), (2, 4), (3, 8))
        for target, count, us in ((LOCAL, 80, 10.0), (MEMCACHED, 80 // slower, 10.0 * slower))
    ]
    lines = printed(whole_test(*rounds))
    assert f"memcached is {MEMCACHED}: 3.0 s in 3 rounds" in lines
    assert line_of(lines, "memcached", "3") == ("0.25 0.12..0.50 4.00 2.00..8.00 4.00 2.00..8.00")
    assert [line for line in lines if line.startswith("to local ")]


def test_rounds_without_a_ratio_are_told() -> None:
    lines = printed(
        whole_test(
            round_result(LOCAL, 1),
            round_result(MEMCACHED, 1),
            round_result(LOCAL, 2),
            round_result(MEMCACHED, 2, ops=[], errors={"timeout": 5}),
        )
    )
    assert line_of(lines, "memcached", "1").startswith("1.00 ")
    told = "memcached: 1 of 2 rounds are in no ratio, since it or local finished nothing in them"
    assert told in " ".join(line.strip() for line in lines)


def test_a_process_that_ended_has_no_memory() -> None:
    gone = node_use("worker-0", 11, cpu_s=0.004, private_bytes=0)
    lines = printed(whole_test(round_result(LOCAL, use=[gone])))
    assert line_of(lines, "local", "worker-0") == f"11 2.00 s {figures.NOTHING} {figures.NOTHING}"


def test_batches_are_told_in_keys_too() -> None:
    lines = printed(whole_test(round_result(LOCAL, keys=200)))
    assert f"local is {LOCAL}: 1.0 s, 200 keys/s" in lines


def test_what_a_reader_must_know_stands_beneath_once() -> None:
    result = whole_test(
        round_result(LOCAL, 1, failed=f"{LOCAL}: it died", notes=[f"{LOCAL}: it died"]),
        round_result(LOCAL, 2, interrupted=True, notes=["a core was busy"]),
        notes=[f"{LOCAL}: the load test took half of the time", "two processors for all of it"],
    )
    lines = printed(result)
    assert (
        lines[-5:]
        == [
            "",
            "local, round 1: it died",
            "local, round 2: interrupted after 1.0 s",
            "local, round 2: a core was busy",
            "local: the load test took half of the time",
            "two processors for all of it",
        ][-5:]
    )
    assert lines.count("local, round 1: it died") == 1


def test_the_workload_stands_above() -> None:
    arguments = {"mix": "90:10:0", "processes": 2, "concurrency": 1, "rate": None}
    lines = printed(whole_test(round_result(LOCAL), arguments=arguments))
    assert lines[1:3] == [
        "mix 90:10:0",
        "closed loop, 2 processes of 1 request at a time",
    ]


@pytest.mark.parametrize("us", [0.9, 123.4, 99_000.0, 59_000_000.0])
def test_no_table_is_wider_than_80_columns_nor_cut(us: float) -> None:
    kinds = [op(kind, [us] * 20_000) for kind in ("read", "write", "delete")]
    use = [node_use("worker-15", 4_194_304, cpu_s=9.0, private_bytes=900 << 20)]
    result = whole_test(
        *(
            round_result(
                target,
                number,
                ops=kinds,
                operations=900_000,
                errors={"SomeErrorOfALongName": 999_999},
                hits=99_999,
                misses=1,
                use=use,
            )
            for number in (1, 2, 3)
            for target in (MEMCACHED, "memcached:/var/run/one/more/of/these/memcached.sock")
        )
    )
    lines = printed(result)
    assert max(map(len, lines)) <= WIDTH
    assert not [line for line in lines if "…" in line]
    # Not folded, either: each row is one line.
    assert sum("delete" in line for line in lines) == 2


def test_an_empty_test_says_so() -> None:
    assert printed(whole_test()) == ["nothing was measured"]
