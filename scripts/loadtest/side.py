"""One target with its load processes, and how a test and its rounds end.

*Process*: the parent.
"""

from __future__ import annotations

from typing import NamedTuple

from scripts.loadtest import limits
from scripts.loadtest.children import Gang
from scripts.loadtest.results import TestResult
from scripts.loadtest.tally import Tally
from scripts.loadtest.targets.base import Counters, SessionOptions, Target


class Outcome(NamedTuple):
    """How the test ended."""

    result: TestResult
    code: int
    sentence: str | None  # what went wrong, or cut it short


class EndOfTestError(Exception):
    """The test cannot go on. A sentence, and the exit code."""

    def __init__(self, sentence: str, code: int) -> None:
        super().__init__(sentence)
        self.code = code


class Side:
    """One target with its load processes."""

    def __init__(self, index: int, target: Target, gang: Gang, session: SessionOptions) -> None:
        self.index = index
        self.target = target
        self.gang = gang
        self.session = session
        self.loaded = False

    @property
    def found_is_hit(self) -> bool:
        """Whether what comes was there: nothing is loaded by the target."""
        return not self.target.loads_misses()


def is_dead(tally: Tally, now_s: float) -> bool:
    return tally.errors_in_a_row > 0 and now_s - tally.success_s > limits.DEAD_AFTER_S


def hits_and_misses(
    tally: Tally, before: Counters | None, after: Counters | None
) -> tuple[int | None, int | None]:
    """Return hits and misses: as the load processes know them, else as the server counted."""
    if tally.hits is not None:
        return tally.hits, max(tally.read - tally.hits, 0)
    if before is None or after is None:
        return None, None
    # A key that its getter does not know was loaded, too, and is not found.
    missed = max(after.missed - before.missed, tally.read - tally.found)
    missed = min(max(missed, 0), tally.read)
    return tally.read - missed, missed


def base36(number: int) -> str:
    digits = ""
    while number:
        number, digit = divmod(number, 36)
        digits = "0123456789abcdefghijklmnopqrstuvwxyz"[digit] + digits
    return digits or "0"
