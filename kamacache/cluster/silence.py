"""Whether a peer is still there: asked when nothing is heard, given up when nothing comes.

*Process*: worker. Pure state, looked at every `PEER_LOOK_EVERY_S`. The kernel of a host
acknowledges what it gets for a process that stands still, so only the peer's own words count.
"""

from __future__ import annotations

from enum import Enum
from typing import Final

from kamacache.limits import PEER_LOOK_EVERY_S, PEER_PING_EVERY_S, PEER_SILENCE_S


class Verdict(Enum):
    """What a look finds."""

    FINE = 0
    PING = 1  # ask whether it is there
    DEAD = 2


class Silence:
    """How long nothing was heard on one stream. Set `heard` with all that comes."""

    __slots__ = ("_looked_s", "_pinged", "_silent_s", "heard")

    def __init__(self, now_s: float) -> None:
        self.heard = True
        self._pinged = False
        self._silent_s = 0.0
        self._looked_s = now_s

    def look(self, now_s: float) -> Verdict:
        """Judge what was heard since the last look."""
        # Of a process that stood still itself, only what it could have heard counts as silence.
        passed_s = min(now_s - self._looked_s, _LOOK_MAX_S)
        self._looked_s = now_s
        if self.heard:
            self.heard = self._pinged = False
            self._silent_s = 0.0
            return Verdict.FINE
        self._silent_s += passed_s
        if self._silent_s >= PEER_SILENCE_S:
            return Verdict.DEAD
        if self._silent_s >= PEER_PING_EVERY_S and not self._pinged:
            self._pinged = True
            return Verdict.PING
        return Verdict.FINE


_LOOK_MAX_S: Final = 2 * PEER_LOOK_EVERY_S
