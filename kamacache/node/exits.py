"""How a node ends: the reason as a sentence, and the exit code that goes with it."""

from __future__ import annotations

from kamacache.rundir.context import EXIT_CONFIG


class NodeEndError(Exception):
    """The node cannot start, or must end: ``code`` is what the process exits with."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


def bad_config(message: str) -> NodeEndError:
    """Return the `NodeEndError` of a setting that cannot work."""
    return NodeEndError(EXIT_CONFIG, message)
