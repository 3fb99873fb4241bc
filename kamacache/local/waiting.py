"""Who waits for replies on one connection of a loop: one request, or the gets of one turn.

*Process*: as `kamacache.local.alink`. What callers that know nothing of each other get in one turn
of the loop goes in one frame, `Gets`, and is answered in one where the worker knows all: a frame
for each key would cost twenty times as much at both ends.

*Invariants*: whoever waits is given one thing, a reply's content or an error. A caller that is
cancelled is passed over; the others of its turn do not notice.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Final, Protocol

from kamacache.errors import KamaCacheError, from_fields, to_fields
from kamacache.limits import REPLY_GRACE_S
from kamacache.local.exchange import unexpected
from kamacache.wire.messages import Answers, Failure, Gets, KeyFailure, Reply, Value
from kamacache.wire.parts import answered

SPREAD_S: Final = REPLY_GRACE_S / 2  # of deadlines in one frame, which is late with its latest


class LostError(Exception):
    """The connection ended before the reply; ``taken``: the worker may have read the request."""

    def __init__(self, taken: bool) -> None:
        super().__init__()
        self.taken = taken


class Waiting(Protocol):
    """What a connection keeps of a request until it is answered."""

    asked_s: float  # when a turn's gets left; 0 once anything came of them, and of all else
    count: int  # of callers
    group: str
    until_s: float

    def take(self, reply: Reply) -> bool:
        """Take a reply; tell whether it was the last."""

    def fail(self, error: Callable[[], Exception]) -> None:
        """Take an error, made anew for each caller, in place of all that is still to come."""


class One:
    """Who waits for the one reply to a request."""

    __slots__ = ("asked_s", "count", "group", "until_s", "waiter")

    def __init__(self, waiter: asyncio.Future[Reply], group: str, until_s: float) -> None:
        self.waiter = waiter
        self.group = group
        self.until_s = until_s
        self.count = 1
        self.asked_s = 0.0

    def take(self, reply: Reply) -> bool:
        """Give it to the caller."""
        if not self.waiter.done():
            self.waiter.set_result(reply)
        return True

    def fail(self, error: Callable[[], Exception]) -> None:
        """Give it to the caller."""
        if not self.waiter.done():
            self.waiter.set_exception(error())


class Turn:
    """The gets of one group that one turn of the loop began."""

    __slots__ = ("asked_s", "count", "first_until_s", "group", "keys", "until_s", "waiters")

    def __init__(self, group: str, until_s: float) -> None:
        self.group = group
        self.until_s = self.first_until_s = until_s
        self.keys: list[bytes] = []
        self.waiters: list[asyncio.Future[bytes | None]] = []
        self.count = 0
        self.asked_s = 0.0

    def take(self, reply: Reply) -> bool:
        """Give each of those who are answered what is theirs."""
        waiters = self.waiters
        if type(reply) is Answers:
            if not reply.at and len(reply.values) == len(waiters):
                for waiter, value in zip(waiters, reply.values, strict=True):
                    if not waiter.done():
                        waiter.set_result(value)
                return True
            for index, value in zip(reply.at, reply.values, strict=True):
                if not waiters[index].done():
                    waiters[index].set_result(value)
            for failed in reply.errors:
                if not waiters[failed.index].done():
                    error = from_fields(failed.kind, failed.message, failed.fields)
                    waiters[failed.index].set_exception(error)
            return all(waiter.done() for waiter in waiters)
        if type(reply) is Value and len(waiters) == 1:
            if not waiters[0].done():
                waiters[0].set_result(reply.value)
        elif type(reply) is Failure:
            # One error each: what a caller adds to its own is not the others'.
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_exception(from_fields(reply.kind, reply.message, reply.fields))
        else:
            self.fail(partial(_unexpected, reply))
        return True

    def fail(self, error: Callable[[], Exception]) -> None:
        """Give one to each who still waits."""
        for waiter in self.waiters:
            if not waiter.done():
                waiter.set_exception(error())


class Parts:
    """Who takes the answers to a `Gets` as they come."""

    __slots__ = ("_part", "asked_s", "count", "group", "left", "until_s", "waiter")

    def __init__(
        self,
        waiter: asyncio.Future[Reply | None],
        request: Gets,
        until_s: float,
        part: Callable[[Answers], None],
    ) -> None:
        self.waiter = waiter  # None, or the failure of all that is left
        self.group = request.group
        self.until_s = until_s
        self.count = 1
        self.asked_s = 0.0
        self.left = dict.fromkeys(range(len(request.keys)))  # indexes not answered
        self._part = part

    def take(self, reply: Reply) -> bool:
        """Hand the answers on."""
        if self.waiter.done():
            return True
        if type(reply) is not Answers:
            self.waiter.set_result(reply)
            return True
        for index in answered(reply):
            self.left.pop(index, None)
        self._part(reply)
        if self.left:
            return False
        self.waiter.set_result(None)
        return True

    def fail(self, error: Callable[[], Exception]) -> None:
        """Give it to the caller."""
        if not self.waiter.done():
            self.waiter.set_exception(error())


def one_answer(index: int, reply: Reply) -> Answers:
    """Return the reply to a `Get` as what is known of one key of a `Gets`."""
    if type(reply) is Value:
        return Answers(0, [reply.value], [index], [], [reply.ttl_ms], [reply.version])
    if type(reply) is Failure:
        failed = KeyFailure(index, reply.kind, reply.message, reply.fields)
        return Answers(0, errors=[failed])
    failed = KeyFailure(index, *to_fields(_unexpected(reply)))
    return Answers(0, errors=[failed])


def _unexpected(reply: Reply) -> KamaCacheError:
    try:
        unexpected(reply)
    except KamaCacheError as error:
        return error
