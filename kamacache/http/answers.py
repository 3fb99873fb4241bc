"""Answers: JSON, errors as status codes, and values sent in pieces.

*Process*: http. Every error of KamaCache becomes a status here, once. An error's body is
``{"error": class name, "message": sentence}``; ASCII, so that whatever a getter put into its
message arrives.
"""

from __future__ import annotations

import json
from typing import Any, Final

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from kamacache.errors import (
    AccessDeniedError,
    ConfigError,
    DeadlineExceededError,
    GroupNotFoundError,
    KamaCacheError,
    KeyNotFoundError,
    KeyTooLongError,
    LoadError,
    NodeUnavailableError,
    ValueTooLargeError,
)
from kamacache.limits import HTTP_PIECE_BYTES

MESSAGE_CHARS_MAX: Final = 500
RETRY_AFTER_S: Final = 1
CHALLENGES: Final = 'Bearer realm="kamacache", Basic realm="kamacache"'  # browsers take the second
# No browser runs a value as a script of the page of another site, whatever is in it.
_AS_IT_IS: Final = {"x-content-type-options": "nosniff"}

STATUSES: Final[dict[type[KamaCacheError], int]] = {
    KeyNotFoundError: 404,
    GroupNotFoundError: 404,
    KeyTooLongError: 400,
    ConfigError: 400,
    ValueTooLargeError: 413,
    LoadError: 502,  # what stands behind this cache failed
    NodeUnavailableError: 503,
    DeadlineExceededError: 504,
}


def answer_json(body: dict[str, Any], status: int = 200, **headers: str) -> Response:
    """Return an answer with a JSON body; header names have ``_`` for ``-``."""
    told = {name.replace("_", "-"): value for name, value in headers.items()}
    return Response(
        json.dumps(body) + "\n",
        status,
        {"cache-control": "no-store", **_AS_IT_IS, **told},
        media_type="application/json",
    )


def answer_error(error: KamaCacheError) -> Response:
    """Return the answer that says what went wrong."""
    if isinstance(error, AccessDeniedError):
        name, message = type(error).__name__, str(error)
        if error.token is not None:
            return answer_failure(403, name, message)
        return answer_failure(401, name, message, www_authenticate=CHALLENGES)
    return answer_failure(STATUSES.get(type(error), 500), type(error).__name__, str(error))


def answer_failure(status: int, kind: str, message: str, **headers: str) -> Response:
    """Return an error's answer by its parts; 503 says when to come back."""
    if status == 503:
        headers.setdefault("retry_after", str(RETRY_AFTER_S))
    body = {"error": kind, "message": message[:MESSAGE_CHARS_MAX]}
    return answer_json(body, status, **headers)


def answer_busy(reason: str) -> Response:
    """Return the answer for what this process will not take on now."""
    return answer_failure(503, NodeUnavailableError.__name__, reason)


class Room:
    """How many bytes of values the process may hold for its clients at once."""

    __slots__ = ("_free_bytes",)

    def __init__(self, bytes_max: int) -> None:
        self._free_bytes = bytes_max

    def take(self, count: int) -> bool:
        """Take so many bytes, or none; whoever gets them gives them back."""
        if count > self._free_bytes:
            return False
        self._free_bytes -= count
        return True

    def give(self, count: int) -> None:
        """Give back what was taken."""
        self._free_bytes += count


class ValueResponse(Response):
    """A value as it is, handed to the connection a piece at a time.

    A piece follows when the client has read most of those before; else one that reads nothing
    would have the whole value in its connection's buffer.
    """

    def __init__(self, value: bytes, headers: dict[str, str], room: Room) -> None:
        super().__init__(
            value,
            200,
            {"cache-control": "no-store", **_AS_IT_IS, **headers},
            media_type="application/octet-stream",
        )
        self._room = room

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the value, or 503 where too many are being sent."""
        held = len(self.body)
        if held <= HTTP_PIECE_BYTES or scope["method"] == "HEAD":
            await super().__call__(scope, receive, send)
            return
        if not self._room.take(held):
            busy = answer_busy("too many large values are being sent; try again")
            await busy(scope, receive, send)
            return
        try:
            await send(
                {
                    "type": "http.response.start",
                    "status": self.status_code,
                    "headers": self.raw_headers,
                }
            )
            value = memoryview(self.body)
            for start in range(0, held, HTTP_PIECE_BYTES):
                end = start + HTTP_PIECE_BYTES
                piece = bytes(value[start:end])
                await send({"type": "http.response.body", "body": piece, "more_body": end < held})
        finally:
            self._room.give(held)
