"""Log lines for failures that repeat: one per kind and interval, with the count left out.

*Process*: worker. A client that sends garbage in a loop must not fill a disk.
"""

from __future__ import annotations

import logging
import time
from typing import Any

from kamacache.limits import LOG_EVERY_S


class RepeatedLog:
    """Logs each message at most once in `LOG_EVERY_S`. Messages are constants, so few."""

    __slots__ = ("_last_s", "_log", "_skipped")

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._last_s: dict[str, float] = {}
        self._skipped: dict[str, int] = {}

    def warning(self, message: str, exc_info: bool = False, **fields: Any) -> None:
        """Log a constant message with its fields, unless the same was logged just before."""
        now = time.monotonic()
        if now - self._last_s.get(message, -LOG_EVERY_S) < LOG_EVERY_S:
            self._skipped[message] = self._skipped.get(message, 0) + 1
            return
        self._last_s[message] = now
        fields["skipped"] = self._skipped.pop(message, 0)
        self._log.warning(message, extra=fields, exc_info=exc_info)
