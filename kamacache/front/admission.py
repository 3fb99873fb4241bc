"""How a call gets in: who asks is known before what is asked is read, and that arrives in time.

*Process*: front, on its loop. All methods are given to gRPC as if a stream of requests came, and
are read here: with a unary method gRPC would first take in a message of up to 16 MiB of anyone, and
would wait for it for as long as the caller likes. It costs the server up to 7 % of a call's CPU.

*Invariant*: what is refused for want of a token was not read.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final

import grpc
from google.protobuf.message import DecodeError

from kamacache.errors import KamaCacheError
from kamacache.limits import REQUEST_ARRIVES_S, REQUEST_LOOK_EVERY_S
from kamacache.security.access import Access
from kamacache.security.tokens import Token


class NoRequestError(KamaCacheError):
    """What came is no request, or did not come in time."""


class Admission:
    """The way in of one front."""

    def __init__(self, access: Access, *, arrives_s: float = REQUEST_ARRIVES_S) -> None:
        self._access: Final = access
        self._arrives_s: Final = arrives_s
        self._arriving: dict[asyncio.Task[Any], float] = {}  # the loop's time of their deadlines
        self._timer: asyncio.TimerHandle | None = None

    def identify(self, context: Any) -> Token | None:
        """Return who calls; None where everybody may. Raises `AccessDeniedError`."""
        header = None
        found = 0
        for name, value in context.invocation_metadata():
            if name == "authorization":
                header = value
                found += 1
        if found > 1:  # nobody could say which of them counts
            header = None
        return self._access.identify(header, context.peer())

    async def read(self, context: Any, parse: Callable[[bytes], Any]) -> Any:
        """Return the request; raises `NoRequestError` where there is none in time."""
        task = asyncio.current_task()
        assert task is not None
        loop = task.get_loop()
        self._arriving[task] = loop.time() + self._arrives_s
        if self._timer is None:
            self._timer = loop.call_later(REQUEST_LOOK_EVERY_S, self._look, loop)
        try:
            data = await context.read()
        except asyncio.CancelledError:
            if task in self._arriving:
                raise  # by gRPC: the caller has gone
            task.uncancel()
            raise NoRequestError(
                f"the request did not arrive within {self._arrives_s:g} s"
            ) from None
        finally:
            self._arriving.pop(task, None)
        if data is grpc.aio.EOF:
            raise NoRequestError("the call ended without a request")
        try:
            return parse(data)
        except DecodeError:
            raise NoRequestError("the request is no message of this method") from None

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        """Wake those whose request is late; no timer for each, which would cost each call."""
        now_s = loop.time()
        for task in [task for task, until_s in self._arriving.items() if until_s <= now_s]:
            del self._arriving[task]
            task.cancel()
        self._timer = None
        if self._arriving:
            self._timer = loop.call_later(REQUEST_LOOK_EVERY_S, self._look, loop)

    def close(self) -> None:
        """Look no more."""
        if self._timer is not None:
            self._timer.cancel()
