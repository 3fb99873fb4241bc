"""What files of secrets held when they were good last, for a role that is forked over bad ones.

*Process*: those of `kamacache.security.check` keep it, the roles inherit it with their fork.
*Invariant*: it is used for the same files only; another name is another secret.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final, Generic, TypeVar

from kamacache.errors import ConfigError
from kamacache.rundir.live import SecurityFiles

Held = TypeVar("Held")

log = logging.getLogger("kamacache.security")


class LastProven(Generic[Held]):
    """One kind of files, read and proven; and what they held at the last check."""

    def __init__(
        self,
        trouble: str,
        paths: Callable[[SecurityFiles], object],
        read: Callable[[SecurityFiles], Held],
    ) -> None:
        """``trouble`` is logged where they are bad; ``read`` raises `ConfigError` then."""
        self._trouble: Final = trouble
        self._paths: Final = paths
        self._read: Final = read
        self._last: tuple[object, Held] | None = None

    def check(self, files: SecurityFiles) -> None:
        """Read the files and keep what they hold; raises `ConfigError`."""
        self._last = self._paths(files), self._read(files)

    def load(self, files: SecurityFiles) -> Held:
        """Return what the files hold.

        Where they are bad now, and were good when they were checked before this process was forked,
        it is what they held then, and the log says so. Else raises `ConfigError`.
        """
        try:
            return self._read(files)
        except ConfigError as error:
            if self._last is None or self._last[0] != self._paths(files):
                raise
            log.error(self._trouble, extra={"reason": str(error)})
            return self._last[1]
