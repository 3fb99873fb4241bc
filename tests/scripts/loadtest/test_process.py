"""A load process by itself: what it says, what it never loads, and how it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from scripts.loadtest.messages import Answer, Done, End, Failed, Load, Loaded, Plan, Ready, Run
from scripts.loadtest.recording import Report, Window
from tests.node_process import ROOT, NodeProcess

COMMAND = [sys.executable, "-P", "-m", "scripts.loadtest.process"]
# As the process runs it, and then says which modules of other worlds it has loaded.
TELLING = [
    sys.executable,
    "-c",
    """
import sys
from scripts.loadtest.process import main
code = main()
for name in ("grpc", "redis", "httpx", "matplotlib", "rich"):
    if name in sys.modules:
        print("loaded", name, file=sys.stderr)
sys.exit(code)
""",
]


def plan(target: str, **changed: Any) -> Plan:
    plain = Plan(
        target=target,
        process=0,
        processes=1,
        group="plain",
        concurrency=1,
        rate=None,
        arrivals="poisson",
        mix="90:10:0",
        popularity="uniform",
        keys=100,
        value_size="10",
        ttl_s=None,
        batch=1,
        repeat_trace=False,
        fill=False,
        getter=None,
        timeout_s=5.0,
        seed=1,
    )
    return msgspec.structs.replace(plain, **changed)


class Child:
    """A load process and its pipes."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process

    def tell(self, said: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(msgspec.json.encode(said) + b"\n")
        self.process.stdin.flush()

    def hear(self) -> Answer:
        assert self.process.stdout is not None
        answer: Answer = msgspec.json.decode(self.process.stdout.readline(), type=Answer)
        return answer

    def hear_all(self) -> list[Answer]:
        """All answers to one command."""
        answers = [self.hear()]
        while not isinstance(answers[-1], Done | Loaded | Failed):
            answers.append(self.hear())
        return answers

    def end(self) -> tuple[int, str]:
        """Return exit code and errors."""
        assert self.process.stderr is not None
        self.tell(End())
        errors = self.process.stderr.read().decode()
        return self.process.wait(20), errors


@contextmanager
def child(command: list[str]) -> Iterator[Child]:
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as process:
        try:
            yield Child(process)
        finally:
            process.kill()


def window(seconds: float) -> Window:
    start_ns = time.monotonic_ns() + 100_000_000
    return Window(start_ns=start_ns, end_ns=start_ns + int(seconds * 1e9), slot_ns=200_000_000)


def run(seconds: float) -> Run:
    return Run(window=window(seconds), prefix=b"load:", stream=0)


@pytest.fixture
def node(short_dir: Path) -> Iterator[NodeProcess]:
    args = ("--workers", "1", "--listen", "none", "--group", "plain:8MiB")
    with NodeProcess(short_dir / "run", *args) as made:
        made.await_ready()
        yield made
        assert made.stop() == 0


@pytest.mark.integration
@pytest.mark.parametrize("concurrency", [1, 4])
@pytest.mark.parametrize("rate", [None, 300.0])
def test_a_local_round_without_grpc(
    node: NodeProcess, concurrency: int, rate: float | None
) -> None:
    with child(TELLING) as one:
        one.tell(plan(f"local:{node.run_dir}", concurrency=concurrency, rate=rate))
        ready = one.hear()
        assert isinstance(ready, Ready)
        assert ready.clock_us > 0
        assert ready.generator_us > 0
        one.tell(Load(prefix=b"load:", read=False))
        assert one.hear_all()[-1] == Loaded(failed=0, sentence=None)
        one.tell(run(0.6))
        *reports, done = one.hear_all()
        assert isinstance(done, Done)
        assert done.seconds == 0.6
        assert all(isinstance(report, Report) for report in reports)
        told = [report for report in reports if isinstance(report, Report)]
        assert sum(report.read for report in told) > 50
        assert sum(report.found for report in told) == sum(report.read for report in told)
        # A get right after its own write may be asked of the worker; else memory answers.
        hits = sum(report.hits or 0 for report in told)
        assert hits >= 0.8 * sum(report.read for report in told)
        code, errors = one.end()
        assert (code, errors) == (0, "")


@pytest.mark.integration
def test_same_seed_same_requests(node: NodeProcess) -> None:
    """Two processes of one plan ask for the same keys: the second finds all that the first set."""
    found = []
    for fill in (True, False):
        with child(COMMAND) as one:
            trace = node.run_dir.with_name("trace")
            trace.write_text("".join(f"{n % 37}\n" for n in range(1000)))
            one.tell(plan(f"local:{node.run_dir}", popularity=f"trace:{trace}", mix="1", fill=fill))
            assert isinstance(one.hear(), Ready)
            one.tell(run(30))
            *reports, done = one.hear_all()
            assert isinstance(done, Done)
            assert done.seconds < 30
            found.append(sum(report.found for report in reports if isinstance(report, Report)))
            one.end()
    assert found == [1000 - 37, 1000]


@pytest.mark.integration
def test_term_ends_a_round_and_int_does_not(node: NodeProcess) -> None:
    with child(COMMAND) as one:
        one.tell(plan(f"local:{node.run_dir}"))
        assert isinstance(one.hear(), Ready)
        one.tell(run(60))
        assert isinstance(one.hear(), Report)
        one.process.send_signal(signal.SIGINT)
        assert isinstance(one.hear(), Report)
        one.process.send_signal(signal.SIGTERM)
        done = one.hear_all()[-1]
        assert isinstance(done, Done)
        assert 0 < done.seconds < 30
        assert one.end()[0] == 0


@pytest.mark.parametrize(
    ("target", "says"), [("local:/nowhere", "no node"), ("redis:/no/socket", "no redis-server")]
)
def test_an_unreachable_target_is_a_sentence(target: str, says: str) -> None:
    with child(COMMAND) as one:
        one.tell(plan(target))
        failed = one.hear()
        assert isinstance(failed, Failed)
        assert failed.target
        assert says in failed.sentence
        assert one.process.wait(20) == 1


def test_a_plan_that_is_none_is_our_own_defect() -> None:
    with child(COMMAND) as one:
        one.tell({"target": 5})
        failed = one.hear()
        assert isinstance(failed, Failed)
        assert not failed.target
        assert one.process.wait(20) == 1


def test_a_process_ends_when_nobody_tells_it_anything() -> None:
    with child(COMMAND) as one:
        assert one.process.stdin is not None
        one.process.stdin.close()
        assert one.process.wait(20) == 1
