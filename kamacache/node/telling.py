"""What a node says of itself, where that has changed: roster.json, and the service manager.

*Process*: the supervisor. The words for the manager are `kamacache.node.notify`'s; this decides
which of them hold. A status names what does not run, so that ``systemctl status`` shows it::

    starting: 3 of 10 processes are ready
    8 workers, listening on 127.0.0.1:8001, HTTP on 127.0.0.1:9999; 1 of 8 workers restarting
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence

import structlog

from kamacache.clock import boottime_ms
from kamacache.node.children import Child
from kamacache.node.notify import Notifier
from kamacache.rundir.description import NodeDescription
from kamacache.rundir.roster import Roster, RosterRole, State, write_roster

log = structlog.get_logger("kamacache.node")


class Teller:
    """Tells of one node; `tell` in every turn of the supervisor's loop."""

    reloads = 0  # that were taken
    reloads_refused = 0
    trouble = ""  # that the last reload left

    def __init__(self, notifier: Notifier, *, socket_gid: int | None) -> None:
        self._notifier = notifier
        self._socket_gid = socket_gid
        self._began_ms = boottime_ms()
        self._roster: Roster | None = None  # as it was written last
        self._state: State = "starting"
        self.status = ""  # as it was told last

    def tell(
        self, state: State, children: Sequence[Child], described: NodeDescription, now_s: float
    ) -> float:
        """Say what is new; return when to come again (time.monotonic), if nothing happens."""
        said = status(state, children, described)
        self._tell_manager(state, f"{said}; {self.trouble}" if self.trouble else said)
        if state != "ready":
            self._notifier.extend(now_s)
        self._write_roster(state, children, described)
        return self._notifier.watchdog(now_s)

    def _tell_manager(self, state: State, status: str) -> None:
        before, self._state = self._state, state
        changed, self.status = status != self.status, status
        if state == before:
            if changed:
                self._notifier.status(status)
        elif state == "ready":
            self._notifier.ready(status)
        else:
            self._notifier.stopping()

    def _write_roster(
        self, state: State, children: Sequence[Child], described: NodeDescription
    ) -> None:
        roles = [
            RosterRole(
                role=child.role,
                index=child.index,
                pid=child.pid,
                ready=child.ready,
                restarts=child.restarts,
                started_ms=child.started_ms,
                cpu_before_s=child.cpu_before_s,
            )
            for child in children
        ]
        roster = Roster(
            state=state,
            pid=os.getpid(),
            began_ms=self._began_ms,
            reloads=self.reloads,
            reloads_refused=self.reloads_refused,
            roles=roles,
        )
        if roster == self._roster:
            return
        try:
            write_roster(described.sockets_dir, roster, gid=self._socket_gid)
        except OSError as error:  # nobody's service depends on it
            log.warning("the roster cannot be written", why=str(error))
        self._roster = roster


def status(state: State, children: Sequence[Child], described: NodeDescription) -> str:
    """Return in a line how a node does, for people."""
    if state == "starting":
        ready = sum(child.ready for child in children)
        return f"starting: {ready} of {len(children)} processes are ready"
    if state == "stopping":
        left = sum(child.pid > 0 for child in children)
        return f"stopping: {left} of {len(children)} processes still run"
    parts = [_count(described.workers, "worker")]
    parts.append(f"listening on {described.listen}" if described.listen else "not listening")
    if described.api:
        parts.append(f"HTTP on {described.api}")
    all_of = Counter(child.role for child in children)
    missing = Counter(child.role for child in children if not child.ready)
    lacks = [
        f"{count} of {_count(all_of[role], role)} restarting" for role, count in missing.items()
    ]
    return "; ".join((", ".join(parts), *lacks))


def _count(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"
