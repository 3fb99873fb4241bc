"""Waiting for descriptors, whatever their numbers.

*Process*: the program that embeds a node, and the supervisor. Not ``select.select``: it takes no
descriptor from 1,024 on, and a program may have more.
"""

from __future__ import annotations

import math
import select
from collections.abc import Iterable


def wait_readable(fds: Iterable[int], timeout_s: float | None = None) -> list[int]:
    """Return those that can be read, none after ``timeout_s`` seconds; None waits for ever."""
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    timeout_ms = None if timeout_s is None else math.ceil(max(timeout_s, 0.0) * 1000)
    return [fd for fd, _ in poll.poll(timeout_ms)]
