"""How a node ends: the reason as a sentence, the exit code that goes with it, the last flush."""

from __future__ import annotations

import contextlib
import sys

from kamacache.rundir.context import EXIT_CONFIG


class NodeEndError(Exception):
    """The node cannot start, or must end: ``code`` is what the process exits with."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


def why_no_node() -> str | None:
    """Return why no node can run on this platform, None where one can."""
    if sys.platform == "linux":
        return None
    return (
        f"a node needs Linux (shared memory with posix_fallocate, pidfds), this is {sys.platform}; "
        "groups without a node work here"
    )


def bad_config(message: str) -> NodeEndError:
    """Return the `NodeEndError` of a setting that cannot work."""
    return NodeEndError(EXIT_CONFIG, message)


def flush_streams() -> None:
    """Write out what is buffered: before a fork, or it comes out twice; before os._exit."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
            if stream is not None:
                stream.flush()
