"""Loads that take longer than the operator wants to go without a word: ``--slow-load-ms``.

*Process*: worker. A line says how long a load took, and of which group; of the key it says the
length and a digest, by which two lines about one key are seen to be. At most one line of each group
in `LOG_EVERY_S`, with the count of those left out: a slow hour of a database is one fact.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from typing import Final

from kamacache.repeated import RepeatedLog
from kamacache.rundir.live import LiveSettings

KEY_DIGEST_BYTES: Final = 6


def key_digest(key: bytes) -> str:
    """Return what stands for a key in the log; the same on every node, and in every version."""
    return hashlib.blake2b(key, digest_size=KEY_DIGEST_BYTES).hexdigest()


class SlowLoads:
    """What one worker logs of its slow loads."""

    __slots__ = ("_log", "bound_s")

    def __init__(self) -> None:
        """Log nothing, until told otherwise."""
        self._log: Final = RepeatedLog(logging.getLogger("kamacache.worker.slow"))
        self.bound_s = float("inf")

    def apply(self, live: LiveSettings) -> None:
        """Take the bound of these settings; 0: none."""
        self.bound_s = live.slow_load_ms / 1000 if live.slow_load_ms else float("inf")

    def tell(
        self, group: str, keys: Sequence[bytes], depth: int, seconds: float, queued_s: float
    ) -> None:
        """Log a load; ``seconds`` from when it was asked for, ``queued_s`` of them in the queue."""
        self._log.warning(
            "slow load",
            about=group,
            group=group,
            ms=round(seconds * 1e3),
            queued_ms=round(queued_s * 1e3),
            keys=len(keys),
            key_digest=key_digest(keys[0]),
            key_bytes=len(keys[0]),
            depth=depth,
        )
