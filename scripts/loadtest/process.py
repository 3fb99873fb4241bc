"""A load process: makes requests as its plan says, and reports.

*Process*: itself, a child of the load test, with pipes to it. It is a fresh interpreter and not a
fork: the client of a local node must not have grpc loaded, and has not (a test looks). SIGINT is
the parent's to act on; SIGTERM ends the test's last round; it dies with its parent.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from typing import IO, Final

import msgspec

from scripts.loadtest.crew import Crew, make_crew
from scripts.loadtest.loops import Stop
from scripts.loadtest.messages import Answer, Command, End, Failed, Load, Plan, Run
from scripts.loadtest.targets.base import TargetError, sentence_of
from scripts.loadtest.timing import die_with_parent, least_timer_slack

GC_THRESHOLD: Final = 50_000  # the cyclic collector's pauses are not the target's
EXIT_FAILED: Final = 1


class Pipe:
    """The way back to the parent: a line for each answer."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def send(self, answer: Answer) -> None:
        """Write and flush; a parent that is gone ends this process."""
        try:
            self._file.write(msgspec.json.encode(answer) + b"\n")
            self._file.flush()
        except BrokenPipeError:
            os._exit(EXIT_FAILED)


def serve(lines: IO[bytes], pipe: Pipe, stop: Stop) -> int:
    """Do what the lines say until they end; return the exit code."""
    crew: Crew | None = None
    try:
        plan = msgspec.json.decode(lines.readline(), type=Plan)
        crew = make_crew(plan, stop, pipe.send)
        pipe.send(crew.open())
        gc.collect()
        gc.freeze()
        gc.set_threshold(GC_THRESHOLD)
        for line in lines:
            command: Command = msgspec.json.decode(line, type=Command)
            match command:
                case End():
                    break
                case Load():
                    pipe.send(crew.load(command))
                case Run():
                    pipe.send(crew.run(command))
    except TargetError as error:
        pipe.send(Failed(sentence=str(error), target=True))
        return EXIT_FAILED
    except Exception as error:
        pipe.send(Failed(sentence=sentence_of(error), target=False))
        raise
    finally:
        if crew is not None:
            crew.close()
    return 0


def main() -> int:
    """Run as a child of the load test."""
    parent = os.getppid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent(signal.SIGKILL)
    if os.getppid() != parent:
        return EXIT_FAILED
    stop = Stop()

    def on_term(number: int, frame: object) -> None:
        stop.requested = True

    signal.signal(signal.SIGTERM, on_term)
    least_timer_slack()
    # What a library prints must not be taken for an answer.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return serve(sys.stdin.buffer, Pipe(answers), stop)


if __name__ == "__main__":
    sys.exit(main())
