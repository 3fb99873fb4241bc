"""The command from end to end: real nodes and servers, those that die, and people who stop it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.node_process import ROOT
from tests.scripts.loadtest.servers import loadtest_node, memcached_server, redis_server

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]

COMMAND = [sys.executable, str(ROOT / "scripts" / "load_test.py")]
DEADLINE_S = 90.0


class Command:
    """A load test under way."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    @property
    def output(self) -> str:
        """What it has printed so far."""
        return "".join(self.lines)

    def await_output(self, text: str) -> None:
        """Wait until it has printed this."""
        end_s = time.monotonic() + DEADLINE_S
        while text not in self.output:
            assert self.process.poll() is None, self.output
            assert time.monotonic() < end_s, self.output
            time.sleep(0.01)

    def await_end(self) -> int:
        """Return the exit code."""
        code = self.process.wait(DEADLINE_S)
        self._reader.join(10)
        assert "Traceback" not in self.output, self.output
        return code

    def children(self) -> list[psutil.Process]:
        """Return its load processes."""
        return psutil.Process(self.process.pid).children()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)


@contextmanager
def load_test(*arguments: object) -> Iterator[Command]:
    """Run the command; at the end no load process may be left."""
    with subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "COLUMNS": "200"},
    ) as process:
        command = Command(process)
        try:
            yield command
        finally:
            children = command.children() if process.poll() is None else []
            process.kill()
            process.wait(20)
            _, alive = psutil.wait_procs(children, timeout=20)
            assert not alive, "load processes outlive their parent"


def finished(*arguments: object) -> tuple[int, str]:
    """Return exit code and output."""
    with load_test(*arguments) as command:
        return command.await_end(), command.output


def measured(path: Path) -> dict[str, Any]:
    """Return what was written as JSON."""
    found: dict[str, Any] = json.loads(path.read_text())
    return found


QUICK = ("--quiet", "--keys", 500, "--warmup", 0.2, "--seed", 1)


def test_all_targets_in_turn(short_dir: Path, tmp_path: Path) -> None:
    with (
        loadtest_node(short_dir) as (node, _),
        redis_server(short_dir) as (redis, _),
        memcached_server(short_dir) as (memcached, _),
    ):
        targets = [*node.values(), redis, memcached]
        code, output = finished(
            "--compare", ";".join(targets), "--group", "plain", "--duration", 0.5,
            "--rounds", 2, "--mix", "8:1:1", "--json", tmp_path / "out.json",
            "--plot", tmp_path / "out.png", *QUICK,
        )  # fmt: skip
    assert code == 0, output
    result = measured(tmp_path / "out.json")
    assert (tmp_path / "out.png").stat().st_size > 1000
    rounds = result["rounds"]
    assert [(found["round"], found["target"]) for found in rounds] == [
        (round_, target) for round_ in (0, 1) for target in targets
    ]
    for found in rounds:
        assert found["operations"] > 10, output
        assert not found["errors"], output
        assert found["seconds"] == 0.5
        assert found["hits"] + found["misses"] <= found["keys"]
        assert {op["kind"] for op in found["ops"]} <= {"read", "write", "delete"}
        assert sum(op["count"] for op in found["ops"]) == found["operations"]
        assert sum(one["operations"] for one in found["intervals"]) == found["operations"]
        assert found["use"], found["target"]
        assert not found["interrupted"]
    assert result["arguments"]["seed"] == 1


@pytest.mark.parametrize("concurrency", [pytest.param(1, marks=pytest.mark.soak), 8])
def test_open_loop_keeps_its_rate(short_dir: Path, tmp_path: Path, concurrency: int) -> None:
    with redis_server(short_dir) as (redis, _):
        code, output = finished(
            "--target", redis, "--rate", 200, "--arrivals", "even", "--duration", 2,
            "--processes", 2, "--concurrency", concurrency, "--json", tmp_path / "out.json",
            *QUICK,
        )  # fmt: skip
    assert code == 0, output
    (found,) = measured(tmp_path / "out.json")["rounds"]
    assert found["operations"] + found["behind"] == pytest.approx(400, abs=2)
    assert found["seconds"] == 2.0


def test_a_trace_has_the_hits_that_it_must_have(short_dir: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.txt"
    trace.write_text("".join(f"{number * number % 311}\n" for number in range(2000)))
    distinct = len(set(trace.read_text().split()))
    with loadtest_node(short_dir) as (node, _), redis_server(short_dir) as (redis, _):
        for number, (target, group) in enumerate(
            [(node["local"], "load"), (node["grpc"], "load"), (redis, "load")]
        ):  # fmt: skip
            path = tmp_path / f"{number}.json"
            code, output = finished(
                "--target", target, "--group", group, "--popularity", f"trace:{trace}",
                "--json", path, "--quiet",
            )  # fmt: skip
            assert code == 0, output
            (found,) = measured(path)["rounds"]
            assert found["operations"] == found["keys"] == 2000
            assert (found["hits"], found["misses"]) == (2000 - distinct, distinct), target


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("loop", [pytest.param((), marks=pytest.mark.soak), ("--rate", 100)])
def test_a_redis_that_dies_midway(short_dir: Path, tmp_path: Path, loop: tuple[object]) -> None:
    path = tmp_path / "out.json"
    with (
        redis_server(short_dir) as (redis, pid),
        load_test(
            "--target", redis, "--keys", 100, "--duration", 60, "--json", path, *loop
        ) as command,
    ):
        command.await_output("2.0 s ")
        kill(pid)
        code = command.await_end()
    assert code == 70, command.output
    assert "died midway" in command.output
    (found,) = measured(path)["rounds"]
    assert found["operations"] > 50
    assert found["errors"]
    assert found["failed"]
    assert found["seconds"] < 40


def test_a_target_of_a_comparison_that_dies_ends_it(short_dir: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    with (
        redis_server(short_dir) as (first, _),
        redis_server(other) as (second, pid),
        load_test(
            "--compare", f"{first};{second}", "--keys", 100, "--duration", 0.5, "--rounds", 100,
            "--warmup", 0,
        ) as command,
    ):  # fmt: skip
        command.await_output("2 of 100")
        kill(pid)
        code = command.await_end()
    assert code == 70, command.output
    assert "died midway" in command.output


@pytest.mark.parametrize(
    ("scheme", "concurrency"), [("local", 1), pytest.param("grpc", 4, marks=pytest.mark.soak)]
)
def test_a_node_that_dies_midway(short_dir: Path, scheme: str, concurrency: int) -> None:
    with (
        loadtest_node(short_dir) as (node, process),
        load_test(
            "--target", node[scheme], "--group", "plain", "--keys", 100, "--duration", 60,
            "--concurrency", concurrency,
        ) as command,
    ):  # fmt: skip
        command.await_output("2.0 s ")
        process.children()
        kill(process.pid)
        process.await_end()
        code = command.await_end()
    assert code == 70, command.output
    assert "died midway" in command.output
    assert "NodeUnavailableError" in command.output


@pytest.mark.soak
def test_a_worker_that_comes_back_does_not_end_the_test(short_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    with (
        loadtest_node(short_dir) as (node, process),
        load_test(
            "--target", node["local"], "--group", "plain", "--keys", 100, "--duration", 6,
            "--mix", "1:1", "--json", path,
        ) as command,
    ):  # fmt: skip
        command.await_output("2.0 s ")
        worker = process.role("worker 0")
        assert worker is not None
        worker.kill()
        assert command.await_end() == 0, command.output
    (found,) = measured(path)["rounds"]
    roles = [use["role"] for use in found["use"]]
    assert roles.count("worker 0") == 2
    assert [use["ended"] for use in found["use"] if use["role"] == "worker 0"].count(True) == 1


@pytest.mark.parametrize("loop", [pytest.param((), marks=pytest.mark.soak), ("--rate", 100)])
def test_ctrl_c_ends_with_what_was_measured(
    short_dir: Path, tmp_path: Path, loop: tuple[object]
) -> None:
    path = tmp_path / "out.json"
    with (
        redis_server(short_dir) as (redis, _),
        load_test(
            "--target", redis, "--keys", 100, "--duration", 60, "--processes", 2,
            "--json", path, *loop,
        ) as command,
    ):  # fmt: skip
        command.await_output("2.0 s ")
        command.process.send_signal(signal.SIGINT)
        began_s = time.monotonic()
        assert command.await_end() == 0, command.output
    assert time.monotonic() - began_s < 20
    assert "interrupted after" in command.output
    (found,) = measured(path)["rounds"]
    assert found["interrupted"]
    assert found["operations"] > 50
    assert 2 <= found["seconds"] < 40


def test_ctrl_c_twice_ends_a_hung_target_at_once(short_dir: Path) -> None:
    with redis_server(short_dir) as (redis, pid):
        try:
            with load_test(
                "--target", redis, "--keys", 100, "--duration", 60, "--timeout", 600
            ) as command:
                command.await_output("2.0 s ")
                os.kill(pid, signal.SIGSTOP)
                time.sleep(0.5)  # the request that will hang is under way
                command.process.send_signal(signal.SIGINT)
                command.await_output("once more")
                command.process.send_signal(signal.SIGINT)
                assert command.await_end() == 0, command.output
        finally:
            os.kill(pid, signal.SIGCONT)
    assert "interrupted after" in command.output
    assert "ops/s" in command.output


def test_a_load_process_that_is_killed_ends_the_test(short_dir: Path) -> None:
    with (
        redis_server(short_dir) as (redis, _),
        load_test("--target", redis, "--keys", 100, "--duration", 60, "--processes", 2) as command,
    ):
        command.await_output("2.0 s ")
        command.children()[0].kill()
        assert command.await_end() == 1, command.output
    assert "ended by signal SIGKILL" in command.output


@pytest.mark.soak
def test_load_processes_die_with_a_parent_that_is_killed(
    short_dir: Path, wait_until: Callable[..., None]
) -> None:
    with (
        redis_server(short_dir) as (redis, _),
        load_test("--target", redis, "--keys", 100, "--duration", 60, "--processes", 2) as command,
    ):
        command.await_output("2.0 s ")
        children = command.children()
        assert len(children) == 2
        command.process.kill()
        command.process.wait(20)
        wait_until(lambda: not any(child.is_running() for child in children), 20)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--target", "oracle:1"), 2, "is no target"),
        (("--target", "redis:/no/such.sock", "--quiet"), 69, "no redis-server answers"),
        (("--compare", "redis:/no/a;memcached:/no/b", "--quiet"), 69, "no redis-server answers"),
        (("--target", "redis", "--json", "/no/such/dir/x.json"), 2, "/no/such/dir"),
        (("--target", "redis", "--plot", "x.gif"), 2, ".png"),
        (("--help",), 0, "Exit codes"),
    ],
)
def test_mistakes_are_a_sentence_and_a_code(
    arguments: tuple[str, ...], code: int, says: str
) -> None:
    got, output = finished(*arguments)
    assert (got, says in output) == (code, True), output


def test_values_that_cannot_be_stored_are_said_before_the_test(short_dir: Path) -> None:
    with memcached_server(short_dir) as (memcached, _):
        code, output = finished("--target", memcached, "--value-size", 3_000_000, *QUICK)
    assert code == 1
    assert "no key can be stored" in output


def test_a_round_in_which_nothing_was_due_is_no_result(short_dir: Path) -> None:
    with redis_server(short_dir) as (redis, _):
        code, output = finished("--target", redis, "--rate", 0.001, "--duration", 0.2, *QUICK)
    assert (code, "no request was made" in output) == (1, True), output
