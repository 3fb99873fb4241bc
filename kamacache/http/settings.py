"""What the HTTP role is told: where it listens, and the bounds on what clients may ask of it.

*Process*: made by the role itself (or a test).
"""

from __future__ import annotations

from dataclasses import dataclass

from kamacache import limits


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpSettings:
    """One HTTP role's settings."""

    listen: str
    listen_fd: int | None = None  # of a socket that listens there already; None: one is bound
    connections_max: int = limits.HTTP_CONNECTIONS_MAX
    requests_max: int = limits.HTTP_REQUESTS_MAX
    held_bytes_max: int = limits.HTTP_HELD_BYTES_MAX
    request_s: float = limits.HTTP_REQUEST_S
    unread_stall_s: float = limits.UNREAD_STALL_S
    keep_alive_s: int = limits.HTTP_KEEP_ALIVE_S
    drain_timeout_s: float = limits.DRAIN_TIMEOUT_S
