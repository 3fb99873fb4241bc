"""A service manager's end of the notify socket, for tests: what a node tells systemd."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

Message = list[str]


class ServiceManager:
    """Listens at a path, or under an abstract name that begins with ``@``; a context manager."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.told: list[Message] = []  # everything, in its order
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + address[1:] if address[0] == "@" else address)

    def heard(self) -> list[Message]:
        """Return what came since, without waiting."""
        found = []
        while (message := self._receive(0)) is not None:
            found.append(message)
        return found

    def await_told(self, wanted: Callable[[Message], bool], deadline_s: float = 20.0) -> Message:
        """Return the first message from now on that is wanted."""
        until_s = time.monotonic() + deadline_s
        while (left_s := until_s - time.monotonic()) > 0:
            message = self._receive(left_s)
            if message is not None and wanted(message):
                return message
        raise AssertionError(f"not told within {deadline_s} s; all: {self.told}")

    def silent(self, seconds: float) -> bool:
        """Tell whether nothing comes for so long."""
        return self._receive(seconds) is None

    def _receive(self, timeout_s: float) -> Message | None:
        self._socket.settimeout(timeout_s)
        try:
            message = self._socket.recv(4096).decode().split("\n")
        except (TimeoutError, BlockingIOError):
            return None
        self.told.append(message)
        return message

    def close(self) -> None:
        """Listen no more; the path stays."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
