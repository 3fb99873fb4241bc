"""No fork in the middle of a call: gRPC's fork handlers do not survive one.

*Process*: the application's. *Owns*: the hooks of `os.register_at_fork`, which run before gRPC's
own, since those that were registered last run first: so this module imports grpc.

    thread that forks:   close the gate ─► wait until no call is inside ─► gRPC's hooks ─► fork
    other threads:       a new call waits at the gate, until the fork is over

A child that was forked while a thread was inside gRPC crashed in 1 of 100 cases (grpcio 1.85.1),
at its own first call or later. *Invariant*: a fork waits `CLIENT_FORK_WAIT_S` at most. A call that
takes longer, for a slow load, then makes gRPC unusable in the child, which is told so.
"""

from __future__ import annotations

import os
import threading
import time

import grpc  # noqa: F401 -- before our hooks, so that its own come after them

from kamacache.limits import CLIENT_FORK_WAIT_S


class ForkGate:
    """How many threads are inside gRPC, and whether more may enter."""

    def __init__(self) -> None:
        self.crossed = False  # in a child: a call was under way when it was forked
        self._reset()

    def _reset(self) -> None:
        self._changed = threading.Condition()  # over an RLock: a signal's handler may fork
        self._inside = 0
        self._forking = False

    def __enter__(self) -> None:
        """Begin a call; wait where a fork is under way."""
        with self._changed:
            while self._forking:
                self._changed.wait(CLIENT_FORK_WAIT_S)
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        """End a call."""
        self.leave()

    def enter_beside(self) -> None:
        """Begin a call beside one that this thread has begun, which may not wait."""
        with self._changed:
            self._inside += 1

    def leave(self) -> None:
        """End a call, in any thread."""
        with self._changed:
            self._inside -= 1
            if not self._inside and self._forking:
                self._changed.notify_all()

    # -- hooks -----------------------------------------------------------------------------

    def before_fork(self) -> None:
        """Close the gate and wait for those inside."""
        until_s = time.monotonic() + CLIENT_FORK_WAIT_S
        with self._changed:
            self._forking = True
            while self._inside and (left_s := until_s - time.monotonic()) > 0:
                self._changed.wait(left_s)
            self.crossed = self._inside > 0

    def after_in_parent(self) -> None:
        """Open it."""
        with self._changed:
            self._forking = self.crossed = False
            self._changed.notify_all()

    def after_in_child(self) -> None:
        """Begin anew: the threads that were inside are the parent's."""
        self._reset()


gate = ForkGate()

os.register_at_fork(
    before=gate.before_fork,
    after_in_parent=gate.after_in_parent,
    after_in_child=gate.after_in_child,
)
