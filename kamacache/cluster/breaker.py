"""When to dial a peer again: back-off that grows, is jittered, and can be cut short.

*Process*: worker. Pure state: no clock, no timer; the link that owns it waits.

*Why jittered*: when a node comes back, every worker of every other node has lost its link at the
same moment, and would dial at the same moment (Brooker, "Exponential Backoff And Jitter", 2015).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Final

from kamacache.limits import PEER_RETRY_FIRST_S, PEER_RETRY_MAX_S

_DOUBLINGS_MAX: Final = 32  # far above what the greatest wait needs


class Breaker:
    """Counts what failed in a row, and says how long to wait."""

    __slots__ = ("_first_s", "_jitter", "_max_s", "failures")

    def __init__(
        self,
        *,
        first_s: float = PEER_RETRY_FIRST_S,
        max_s: float = PEER_RETRY_MAX_S,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        """``jitter`` returns from 0 to 1: of the half of each wait that is left to chance."""
        self._first_s: Final = first_s
        self._max_s: Final = max_s
        self._jitter: Final = jitter
        self.failures = 0  # since the link last held

    def failed(self, up_s: float = 0.0) -> float:
        """Take note of a failure, and return the seconds to wait before the next try.

        ``up_s`` is how long the link was up before: one that held for `PEER_RETRY_MAX_S` is
        dialled again quickly, one that breaks each time as soon as it is up is not.
        """
        if up_s >= self._max_s:
            self.failures = 0
        wait_s = min(self._first_s * (1 << min(self.failures, _DOUBLINGS_MAX)), self._max_s)
        self.failures += 1
        return wait_s * (1.0 + self._jitter()) / 2

    def hurry(self) -> None:
        """Begin the waits anew: there is a sign that the peer is back."""
        self.failures = 0
