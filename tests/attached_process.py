"""A process attached to a node, driven by a test: one JSON line a call, one line an answer."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import kamacache
from kamacache.node.readable import wait_readable
from tests.node_process import ROOT

ANSWER_S = 30.0


class AttachedProcess:
    """A process with a Group of each name it is asked for; ended whatever happens."""

    def __init__(self, run_dir: Path, **group_settings: Any) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.attached_process", json.dumps(group_settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "KAMACACHE_RUN_DIR": str(run_dir)},
        )
        self.pid = self.process.pid

    def ask(self, group: str, method: str, *args: Any, threads: int = 1) -> None:
        """Begin a call, in so many threads at once; `answer` must follow."""
        assert self.process.stdin is not None
        call = {"group": group, "method": method, "args": args, "threads": threads}
        self.process.stdin.write(json.dumps(call).encode() + b"\n")
        self.process.stdin.flush()

    def answer(self, deadline_s: float = ANSWER_S) -> Any:
        """Return the answer: bytes come as text, errors as ``{"error": class name}``."""
        assert self.process.stdout is not None
        readable = wait_readable((self.process.stdout.fileno(),), deadline_s)
        assert readable, f"no answer within {deadline_s} s"
        line = self.process.stdout.readline()
        assert line, "the attached process ended"
        return json.loads(line)

    def call(self, group: str, method: str, *args: Any) -> Any:
        """Call a method of a group and return the answer."""
        self.ask(group, method, *args)
        return self.answer()[0]

    def end(self, deadline_s: float = ANSWER_S) -> int:
        """Let it run to its end, exit handlers included; return the exit code."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.process.wait(deadline_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


@contextlib.contextmanager
def several(count: int, run_dir: Path, **group_settings: Any) -> Iterator[list[AttachedProcess]]:
    """Start so many processes, attached when this is entered."""
    with contextlib.ExitStack() as stack:
        found = [
            stack.enter_context(AttachedProcess(run_dir, **group_settings)) for _ in range(count)
        ]
        for process in found:
            process.ask("", "started")
        for process in found:
            process.answer()
        yield found


def in_threads(count: int, call: Callable[[int], Any], deadline_s: float = ANSWER_S) -> list[Any]:
    """Run ``call(i)`` in so many threads at once; return results, or the exceptions raised."""
    results: list[Any] = [None] * count
    together = threading.Barrier(count)

    def run(index: int) -> None:
        try:
            together.wait(deadline_s)
            results[index] = call(index)
        except BaseException as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(at,), daemon=True) for at in range(count)]
    for thread in threads:
        thread.start()
    end_s = time.monotonic() + deadline_s
    for thread in threads:
        thread.join(max(0.0, end_s - time.monotonic()))
    assert not any(thread.is_alive() for thread in threads), "callers hang"
    return results


def main(settings: dict[str, Any]) -> None:
    """Be the attached process."""
    groups: dict[str, kamacache.Group] = {}

    def one(name: str, method: str, args: Sequence[Any]) -> Any:
        if method == "started":
            return os.getpid()
        group = groups.get(name)
        if group is None:
            group = groups[name] = kamacache.Group(
                name, getter=lambda key: b"own-" + key.encode(), **settings
            )
        try:
            result = getattr(group, method)(
                *(arg.encode() if method == "set" and at else arg for at, arg in enumerate(args))
            )
        except Exception as error:
            return {"error": type(error).__name__}
        return result.decode() if isinstance(result, bytes) else result

    for line in sys.stdin:
        call = json.loads(line)
        name, method, args = call["group"], call["method"], call["args"]
        count = call["threads"]
        if count > 1:
            answers = in_threads(count, lambda _: one(name, method, args))  # noqa: B023
        else:
            answers = [one(name, method, args)]
        print(json.dumps(answers), flush=True)  # noqa: T201


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
