"""Counts the HTTP requests: by what answered them, method and status, and how long they took.

*Process*: http, on its loop. *Owns*: the HTTP region of the node's meters, which outlives the
process.
"""

from __future__ import annotations

import time
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kamacache.rundir.meters import HTTP, HTTP_CODES, HTTP_HANDLERS, HTTP_METHODS, Region

_IN_FLIGHT: Final = HTTP.at("in_flight")
_CONNECTIONS: Final = HTTP.at("connections")
_OTHER: Final = "other"


class HttpMeter:
    """What is counted of the requests of one process."""

    def __init__(self, region: Region | None = None) -> None:
        """Without a region, as in a test, nobody sees the counts."""
        self.region: Final = region or Region(HTTP)
        self._words: Final = self.region.words
        self.connections(0)
        self._words[_IN_FLIGHT] = 0

    def connections(self, count: int) -> None:
        """Say how many connections there are."""
        self._words[_CONNECTIONS] = count

    async def count(
        self, name: str, app: ASGIApp, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Let an app answer, and count it under a name; a request that nobody answered as 500."""
        status = 500

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        words, began_s = self._words, time.monotonic()
        words[_IN_FLIGHT] += 1
        try:
            await app(scope, receive, noting)
        finally:
            words[_IN_FLIGHT] -= 1
            method, code = scope["method"], str(status)
            if method not in HTTP_METHODS:
                method = _OTHER
            if code not in HTTP_CODES:
                code = _OTHER
            words[HTTP.at(f"{name} {method} {code}")] += 1
            self.region.observe(time.monotonic() - began_s, HTTP_HANDLERS.index(name))
