"""What a source does when it fails: tell it once in a while, and wait longer each time.

*Process*: agent.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeVar

from kamacache.errors import KamaCacheError
from kamacache.limits import DISCOVERY_RETRY_FIRST_S, DISCOVERY_RETRY_MAX_S, LOG_EVERY_S

REASONS_MAX: Final = 16
REASON_CHARS_MAX: Final = 300
CLEAN_UP_S: Final = 0.2
_T = TypeVar("_T")

log = logging.getLogger("kamacache.discovery")


class SourceError(KamaCacheError):
    """A source of peers could not be asked, or gave no answer that can be used."""


class Backoff:
    """Waits that double from the first to the longest, each jittered down to half.

    The jitter spreads the nodes of a cluster, which all lose a source in the same moment.
    """

    def __init__(
        self,
        first_s: float = DISCOVERY_RETRY_FIRST_S,
        longest_s: float = DISCOVERY_RETRY_MAX_S,
        fraction: Callable[[], float] = random.random,
    ) -> None:
        self._first_s = first_s
        self._longest_s = longest_s
        self._fraction = fraction
        self._step_s = first_s

    def next_s(self) -> float:
        """Return the next wait."""
        wait_s = self._step_s * (0.5 + self._fraction() / 2)
        self._step_s = min(self._step_s * 2, self._longest_s)
        return wait_s

    def reset(self) -> None:
        """Begin with the first wait again."""
        self._step_s = self._first_s


class Report:
    """Logs a source's failures, each reason at most once in `LOG_EVERY_S`, and their end.

    Reasons must hold no secrets: they come from our own texts and from servers' answers, never
    from what was sent.
    """

    def __init__(self, source: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._source = source
        self._clock = clock
        self._told_s: dict[str, float] = {}
        self._failures = 0

    def failed(self, reason: str) -> None:
        """Take note that the source failed; the last list stays."""
        self._failures += 1
        if self._is_new(reason):
            log.warning(
                "the source of peers fails, its last list stays",
                extra={
                    "source": self._source,
                    "reason": reason[:REASON_CHARS_MAX],
                    "failures": self._failures,
                },
            )

    def works(self) -> None:
        """Take note that the source does its work."""
        if self._failures:
            log.info(
                "the source of peers works again",
                extra={"source": self._source, "failures": self._failures},
            )
        self._failures = 0
        self._told_s.clear()

    def odd(self, what: str) -> None:
        """Tell of something strange that is not a failure of the source."""
        if self._is_new(what):
            log.warning(
                "the source of peers holds what is not understood",
                extra={"source": self._source, "what": what[:REASON_CHARS_MAX]},
            )

    def _is_new(self, reason: str) -> bool:
        now_s = self._clock()
        if now_s - self._told_s.get(reason, -LOG_EVERY_S) < LOG_EVERY_S:
            return False
        if len(self._told_s) >= REASONS_MAX:
            self._told_s.clear()
        self._told_s[reason] = now_s
        return True


async def until_first(*parts: Coroutine[Any, Any, None]) -> None:
    """Run coroutines side by side until one ends; the others are cancelled, and have ended.

    Raises what that one raised.
    """
    tasks = [asyncio.ensure_future(part) for part in parts]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await to_the_end(asyncio.wait(tasks))
    for task in done:
        task.result()


async def to_the_end(part: Coroutine[Any, Any, _T]) -> _T:
    """Run what must not be broken off until it has ended, also where the caller is cancelled.

    Closing a connection is such a thing: a cancelled close leaves it open. So is a request of
    httpx's, cancelled in which it left a socket open in 1 of 20 runs of the tests; where, 3,000
    aimed cancellations did not show. At most `CLEAN_UP_S` longer, twice where it hangs.
    """
    task = asyncio.ensure_future(part)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait((task,), timeout=CLEAN_UP_S)
        if not task.done():
            task.cancel()
            await asyncio.wait((task,), timeout=CLEAN_UP_S)
        if task.done() and not task.cancelled():
            task.exception()  # looked at: nobody else will
        raise


async def for_ever() -> None:
    """Wait until cancelled."""
    await asyncio.Event().wait()
