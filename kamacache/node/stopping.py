"""How a node ends: whom to tell what, in which order, and when patience is over.

*Process*: the supervisor. No clock of its own: times come in as arguments::

    drain    TERM ──► agent, which leaves the source of peers
             agent gone, or LEAVE_TIMEOUT_S ──► TERM ──► fronts, HTTP, which finish their calls
             both gone ──► "drain" ──► workers
             all workers "idle", or DRAIN_TIMEOUT_S ──► "end" ──► workers
    at once  QUIT ──► all roles
    then     KILL ──► what is left: DRAIN_MARGIN_S or AT_ONCE_GRACE_S later, or when told twice

*Why this order*: other nodes ask a node that has left the cluster no more, so that few calls reach
its fronts when they begin to refuse; and calls in flight at the fronts need workers that load.

*Why "idle" once is enough*: a worker that drains begins loads for other loads only, and says "idle"
when it has none. Every nested load stands below one that nobody's load asked for, which keeps its
own worker from saying "idle". So when all have said it, no load that someone waits for is left.
A worker must not end before: a load in another worker may need it for a nested get.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from typing import Final, Literal

import structlog

from kamacache.clock import boottime_ms
from kamacache.limits import DISCOVERY_LEAVE_S, DRAIN_TIMEOUT_S
from kamacache.node.children import Child
from kamacache.rundir.context import WORD_DRAIN, WORD_END, Role

AT_ONCE_GRACE_S: Final = 1.0
LEAVE_TIMEOUT_S: Final = DISCOVERY_LEAVE_S + 1.0  # its own bound, and the end of its process
DRAIN_MARGIN_S: Final = 2.0  # beyond the roles' own deadline

_CALLERS: Final[tuple[Role, ...]] = ("front", "http")

How = Literal["drain", "at once"]

log = structlog.get_logger("kamacache.node")


class Stopping:
    """The end of a node, once it has begun."""

    def __init__(self, children: Sequence[Child], how: How, now_s: float) -> None:
        """Begin: tell those who are to end first."""
        self.how: How = how
        self.began_ms = boottime_ms()
        self._children = children
        self._leave_until_s = now_s + LEAVE_TIMEOUT_S
        self._drain_until_s = now_s + DRAIN_TIMEOUT_S
        self._kill_at_s = self._drain_until_s + DRAIN_MARGIN_S
        self._callers_told = False  # fronts and HTTP, on behalf of those who call
        self._workers_told = ""
        if how == "at once":
            self.hasten(now_s)
            return
        log.info("node stops", how=how)
        for child in children:
            if child.role == "agent" or not child.ready:
                _end_one(child)
        self._tell_callers(now_s)

    def hasten(self, now_s: float) -> None:
        """End all roles at once; told again, kill them."""
        if self._workers_told == WORD_END and self.how == "at once":
            self._kill_at_s = now_s
            return
        log.info("node stops", how="at once")
        self.how = "at once"
        self._callers_told = True
        self._workers_told = WORD_END
        self._kill_at_s = now_s + AT_ONCE_GRACE_S
        for child in self._children:
            if child.ready:
                child.send(signal.SIGQUIT)
            else:
                _end_one(child)

    def kill(self, now_s: float) -> None:
        """Wait no longer for anyone."""
        self._kill_at_s = now_s

    @property
    def why_lost(self) -> str:
        """Why the shards may not be left to the next node; "": they may, when all roles ended."""
        if self.how != "drain":
            return "the node was told to stop at once"
        workers = [child for child in self._children if child.role == "worker"]
        late = [child.index for child in workers if not child.ended_well]
        return f"worker {late[0]} did not end in order" if late else ""

    def tick(self, now_s: float) -> float:
        """Do what is due; return the time at which to come again, if nothing happens before."""
        late = now_s >= self._drain_until_s
        living = [child for child in self._children if child.pid]
        self._tell_callers(now_s)
        ended = self._callers_told and not any(c.role in _CALLERS for c in living)
        if not self._workers_told and (late or ended):
            self._tell_workers(WORD_DRAIN)
        if self._workers_told == WORD_DRAIN and (
            late or all(c.idle for c in living if c.role == "worker")
        ):
            self._tell_workers(WORD_END)
        if now_s >= self._kill_at_s:
            for child in living:
                log.warning(
                    "role did not end in time, killed", child=child.name, child_pid=child.pid
                )
                child.send(signal.SIGKILL)
            self._kill_at_s = now_s + AT_ONCE_GRACE_S
        due_s = [self._kill_at_s]
        if not late:
            due_s.append(self._drain_until_s)
        if not self._callers_told:
            due_s.append(self._leave_until_s)
        return min(due_s)

    def _tell_callers(self, now_s: float) -> None:
        agents = [child for child in self._children if child.role == "agent" and child.pid]
        if self._callers_told or (agents and now_s < self._leave_until_s):
            return
        self._callers_told = True
        for agent in agents:
            log.warning(
                "agent did not leave in time, killed", child=agent.name, child_pid=agent.pid
            )
            agent.send(signal.SIGKILL)
        for child in self._children:
            if child.role in _CALLERS and child.ready:
                _end_one(child)

    def _tell_workers(self, word: str) -> None:
        self._workers_told = word
        for child in self._children:
            if child.role == "worker":
                child.tell(word)


def _end_one(child: Child) -> None:
    """Tell a role that is no worker, or is not ready, to end: whichever it heeds already."""
    child.send(signal.SIGTERM)
    if child.role == "worker":
        child.tell(WORD_END)
