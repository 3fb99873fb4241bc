"""When the requests of an open loop are due, whatever has become of those before.

*Process*: load processes. Each has its share of the rate, drawn from its own seed: independent
Poisson processes add up to one of the whole rate; even arrivals of P processes are shifted by a
P-th of their distance. *Invariant*: what is due does not depend on what the target does; that is
what makes latencies from here on free of coordinated omission.
"""

from __future__ import annotations

from typing import Final

import numpy as np

POISSON: Final = "poisson"
EVEN: Final = "even"
KINDS: Final = (POISSON, EVEN)
_BLOCK: Final = 1_024
_COUNTED_MAX: Final = 1_000_000


class Arrivals:
    """The moments at which one load process's requests are due, in nanoseconds."""

    def __init__(
        self,
        *,
        start_ns: int,
        end_ns: int,
        rate: float,
        kind: str,
        process: int,
        processes: int,
        random: np.random.Generator,
    ) -> None:
        """``rate`` is of all processes together, a second."""
        self._end_ns = end_ns
        self._step_ns = processes * 1e9 / rate
        self._random = random if kind == POISSON else None
        # Of even arrivals, process p has those at p, p + P, p + 2 P ... steps of the whole rate.
        lead_ns = 0.0 if kind == POISSON else process * 1e9 / rate - self._step_ns
        self._last_ns = start_ns + lead_ns
        self._ahead: list[int] = []

    def next(self) -> int | None:
        """Return when the next request is due; None: after the end."""
        if not self._ahead:
            self._ahead = self._draw(_BLOCK)
            self._ahead.reverse()
        due_ns = self._ahead.pop()
        if due_ns < self._end_ns:
            return due_ns
        self._ahead.append(due_ns)
        return None

    def rest(self, end_ns: int) -> int:
        """Count, and skip, the requests due before ``end_ns`` that `next` has not returned.

        Beyond a million it is what is to be expected of the rate.
        """
        counted = 0
        while counted < _COUNTED_MAX:
            while self._ahead:
                if self._ahead[-1] >= end_ns:
                    return counted
                self._ahead.pop()
                counted += 1
            self._ahead = self._draw(_BLOCK)
            self._ahead.reverse()
        return counted + round(max(0.0, end_ns - self._ahead_ns()) / self._step_ns)

    def _ahead_ns(self) -> float:
        return float(self._ahead[-1]) if self._ahead else self._last_ns

    def _draw(self, count: int) -> list[int]:
        if self._random is not None:
            steps = self._random.exponential(self._step_ns, count)
        else:
            steps = np.full(count, self._step_ns)
        moments = self._last_ns + np.cumsum(steps)
        self._last_ns = float(moments[-1])
        drawn: list[int] = moments.astype(np.int64).tolist()
        return drawn
