"""Log lines for failures that repeat: one per kind and interval, with the count left out.

*Process*: all. A client that sends garbage in a loop must not fill a disk, nor a peer that comes
and goes, nor a getter's slow hour.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, Final

from kamacache.limits import LOG_EVERY_S, LOG_KINDS_MAX

ExcInfo = bool | BaseException | None


class RepeatedLog:
    """Logs each message at most once in `LOG_EVERY_S`, for each of what it is ``about``.

    Messages are constants, so few; what a message is about (a group, a peer) has a bound: beyond
    `LOG_KINDS_MAX` the oldest is forgotten, and may be logged again too early.
    """

    __slots__ = ("_clock", "_last_s", "_log", "_skipped")

    def __init__(self, log: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._log: Final = log
        self._clock: Final = clock
        self._last_s: dict[tuple[str, str], float] = {}
        self._skipped: dict[tuple[str, str], int] = {}

    def warning(
        self, message: str, *, exc_info: ExcInfo = None, about: str = "", **fields: Any
    ) -> None:
        """Log a constant message with its fields, unless the same was logged just before."""
        self._say(logging.WARNING, message, exc_info, about, fields)

    def error(
        self, message: str, *, exc_info: ExcInfo = None, about: str = "", **fields: Any
    ) -> None:
        """Do the same for what is an error."""
        self._say(logging.ERROR, message, exc_info, about, fields)

    def exception(self, message: str, *, about: str = "", **fields: Any) -> None:
        """Do the same, with the exception that is being handled."""
        self._say(logging.ERROR, message, True, about, fields)

    def _say(
        self, level: int, message: str, exc_info: ExcInfo, about: str, fields: dict[str, Any]
    ) -> None:
        kind = (message, about)
        now_s = self._clock()
        if now_s - self._last_s.get(kind, -LOG_EVERY_S) < LOG_EVERY_S:
            self._skipped[kind] = self._skipped.get(kind, 0) + 1
            return
        self._last_s.pop(kind, None)  # to the end: the first is the oldest
        if len(self._last_s) >= LOG_KINDS_MAX:
            oldest = next(iter(self._last_s))
            del self._last_s[oldest]
            self._skipped.pop(oldest, None)
        self._last_s[kind] = now_s
        fields["skipped"] = self._skipped.pop(kind, 0)
        self._log.log(level, message, extra=fields, exc_info=exc_info)
