"""How targets compare: each round's ratio to the first target, and how far the rounds disagree.

Targets take turns, so a round's numbers were taken within seconds of each other and a machine that
slows down slows both: the ratio of a round is worth more than the ratio of two averages. What is
shown is the median of the rounds' ratios and the least and the greatest of them. *Invariant*: a
round counts only where both targets finished operations in it and neither died.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Final

import msgspec

from scripts.loadtest.results import RoundResult, TestResult

SMALLEST: Final = 0.001  # a nanosecond; a latency of less was not measured


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """The ratios of all rounds in one line."""

    median: float
    least: float
    greatest: float


class Ratios(msgspec.Struct, frozen=True, kw_only=True):
    """One target against the first one; each is this target's number over the first's."""

    target: str
    base: str
    rounds: int  # in which both were measured
    throughput: Spread  # above 1: more operations a second
    p50: Spread  # above 1: slower
    p99: Spread


def compare(result: TestResult) -> list[Ratios]:
    """Return every other target's ratios to the first; none where no round has both."""
    base, *others = result.targets or [""]
    compared = (_against(base, other, result) for other in others)
    return [ratios for ratios in compared if ratios is not None]


def _against(base: str, target: str, result: TestResult) -> Ratios | None:
    first = {found.round: found for found in result.of(base) if _usable(found)}
    pairs = [
        (found, first[found.round])
        for found in result.of(target)
        if _usable(found) and found.round in first
    ]
    if not pairs:
        return None
    return Ratios(
        target=target,
        base=base,
        rounds=len(pairs),
        throughput=_spread(pairs, lambda found: found.operations / found.seconds),
        p50=_spread(pairs, lambda found: found.histogram.percentiles_us((50.0,))[0]),
        p99=_spread(pairs, lambda found: found.histogram.percentiles_us((99.0,))[0]),
    )


def _usable(found: RoundResult) -> bool:
    return found.operations > 0 and found.seconds > 0 and found.failed is None


def _spread(
    pairs: list[tuple[RoundResult, RoundResult]], number: Callable[[RoundResult], float]
) -> Spread:
    ratios = [number(found) / max(number(first), SMALLEST) for found, first in pairs]
    return Spread(median=median(ratios), least=min(ratios), greatest=max(ratios))
