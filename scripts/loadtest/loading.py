"""Storing the keys before a warm test: what could be stored, what could not, when to give up.

*Process*: load processes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from scripts.loadtest.limits import LOAD_FAILURES_MAX, LOAD_PROGRESS_S, LOAD_TIMEOUTS_MAX
from scripts.loadtest.messages import Loaded, Progress
from scripts.loadtest.targets.base import TIMEOUT, TargetError, error_class, sentence_of


class LoadCount:
    """Counts the keys that a load has stored, and those it could not."""

    def __init__(self, send: Callable[[Progress], None]) -> None:
        self._send = send
        self._fresh = 0
        self._told_s = time.monotonic()
        self._stored = 0
        self._failed = 0
        self._in_a_row = self._late_in_a_row = 0
        self._sentence: str | None = None

    def stored(self, keys: int) -> None:
        """Count keys; tell the parent now and then."""
        self._stored += keys
        self._fresh += keys
        self._in_a_row = self._late_in_a_row = 0
        if time.monotonic() - self._told_s >= LOAD_PROGRESS_S:
            self._tell()

    def failed(self, keys: Sequence[bytes], error: Exception) -> Sequence[bytes]:
        """Return those to try one by one; the others are counted.

        One value that is too large fails its batch. Raises `TargetError` where it is useless to
        go on.
        """
        late = error_class(error) == TIMEOUT
        if len(keys) > 1 and not late:
            return keys
        self._failed += len(keys)
        self._sentence = self._sentence or sentence_of(error)
        self._in_a_row += 1
        self._late_in_a_row += late
        if self._in_a_row >= LOAD_FAILURES_MAX or self._late_in_a_row >= LOAD_TIMEOUTS_MAX:
            self._tell()
            gone = "keys cannot be stored any more" if self._stored else "no key can be stored"
            raise TargetError(f"{gone}: {sentence_of(error)}") from error
        return ()

    def loaded(self) -> Loaded:
        """Return the closing words."""
        self._tell()
        return Loaded(failed=self._failed, sentence=self._sentence)

    def _tell(self) -> None:
        self._send(Progress(keys=self._fresh))
        self._fresh, self._told_s = 0, time.monotonic()
