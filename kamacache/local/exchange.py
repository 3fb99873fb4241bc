"""What all requests to a worker share: their nesting, errors, retries.

*Process*: every one that asks a worker.

*Why every request may be sent again* when its connection ends before the reply: reads are
harmless; a set stores the same value again, a delete leaves the key absent again. A call that was
not answered may take effect at any moment until it is, so twice is once, seen late; only the
count a delete returns may then be too low. But a request that was taken and lost twice is given
up: a key whose getter kills its worker must not do so for ever. A worker that was killed takes
connections until its process is gone; what it never read is not lost by it (`unread`).
"""

from __future__ import annotations

import errno
import time
from typing import Final, NoReturn

from kamacache import calls
from kamacache.errors import (
    DeadlineExceededError,
    KamaCacheError,
    LoadError,
    NodeUnavailableError,
    from_fields,
)
from kamacache.wire.messages import (
    Done,
    Failure,
    Get,
    GetMany,
    Reply,
    Request,
    Value,
)

LOST_MAX: Final = 2  # times a request may be taken without an answer
TRIES_MAX: Final = 8  # connections tried for one request, those that took nothing included

# What connect() says while a worker restarts: no socket yet, nobody listening, queue full.
RESTARTING: Final = frozenset({errno.ENOENT, errno.ECONNREFUSED, errno.EAGAIN, errno.ECONNRESET})


def unread(error: BaseException | None) -> bool:
    """Tell whether a connection ended with bytes that its worker had not read.

    Linux says ECONNRESET for that alone, and end of file for everything else
    (unix_release_sock() in net/unix/af_unix.c).
    """
    return isinstance(error, ConnectionResetError) and error.errno == errno.ECONNRESET


def nest(request: Request) -> None:
    """Say from which depth a request comes that names many keys or waits for no load.

    The worker looks for cycles itself, key by key; a write may name a key of its own chain.
    """
    outer = calls.current.get()
    if outer is not None:
        request.depth, request.chain = outer.depth + 1, outer.chain


def budget_ms(request: Request, deadline_s: float, shard: int) -> int:
    """Return the milliseconds left, at least 1; raise `DeadlineExceededError` for none."""
    left = deadline_s - time.monotonic()
    if left <= 0:
        raise late(request.group, shard)
    return int(left * 1000) + 1


def late(group: str, shard: int) -> DeadlineExceededError:
    """Return the error of a call whose deadline passed."""
    return DeadlineExceededError(
        f"group {group!r}: worker {shard} did not answer before the deadline",
        group=group,
        shard=shard,
    )


def lost(request: Request, shard: int) -> KamaCacheError:
    """Return the error of a request that was sent `LOST_MAX` times and never answered."""
    if isinstance(request, Get | GetMany):
        return LoadError(
            f"group {request.group!r}: worker {shard} died {LOST_MAX} times during this load",
            group=request.group,
            key=request.key if isinstance(request, Get) else None,
            cause_type="worker died",
        )
    return NodeUnavailableError(
        f"worker {shard} went away before it answered, {LOST_MAX} times", shard=shard
    )


def unreachable(path: str, shard: int, error: OSError | None) -> NodeUnavailableError:
    """Return the error of a worker that cannot be connected to."""
    why = "the node has stopped" if error is None else error.strerror or type(error).__name__
    return NodeUnavailableError(f"worker {shard} cannot be reached at {path}: {why}", shard=shard)


def checked(reply: Reply) -> Reply:
    """Return a reply, or raise the error that it carries."""
    if type(reply) is Failure:
        raise from_fields(reply.kind, reply.message, reply.fields)
    return reply


def value_of(reply: Reply) -> bytes | None:
    """Return the value that a reply carries; None: not found."""
    return reply.value if isinstance(reply, Value) else unexpected(reply)


def count_of(reply: Reply) -> int:
    """Return the count that a reply carries."""
    return reply.count if isinstance(reply, Done) else unexpected(reply)


def unexpected(reply: object) -> NoReturn:
    """Raise the error of a reply of a kind that does not answer the request."""
    raise KamaCacheError(
        f"a worker answered with {type(reply).__name__}; do node and application run one version?"
    )
