"""What a link says in the log: that it is up, or why it is down, and each once.

*Process*: worker. No grpc.
"""

from __future__ import annotations

import logging
import time
from typing import Final

from kamacache.limits import PEER_STRANGE_S

log = logging.getLogger("kamacache.cluster")


class LinkLog:
    """The log lines of the link to one address."""

    __slots__ = ("_address", "_early", "_known", "_said", "_since_s")

    def __init__(self, address: str) -> None:
        self._address: Final = address
        self._since_s = time.monotonic()
        self._known = False  # it was up before
        self._said = ""  # why it is down, once that was said
        self._early = False

    def up(self) -> None:
        """Say that it is up."""
        self._known, self._said, self._early = True, "", False
        log.info("the link to a peer is up", extra={"peer": self._address})

    def draining(self) -> None:
        """Say that the peer is about to stop."""
        log.info("a peer drains", extra={"peer": self._address})

    def down(self, reason: str, *, drained: bool) -> None:
        """Say why a try failed or the stream ended; further tries that fail are no news."""
        # Nodes that are started together find each other within seconds.
        early = not self._known and time.monotonic() - self._since_s < PEER_STRANGE_S
        if self._said and (early or not self._early):
            return
        self._say(logging.INFO if drained or early else logging.WARNING, reason)
        self._early = early

    def refused(self, reason: str) -> None:
        """Say that waiting will not mend it."""
        if self._said != reason:
            self._say(logging.ERROR, reason)
        self._early = False

    def _say(self, level: int, reason: str) -> None:
        self._said = reason
        fields = {"peer": self._address, "reason": reason}
        log.log(level, "the link to a peer is down", extra=fields)
