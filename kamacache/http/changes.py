"""What happened to a node of late: processes that died, peers that went and came, members, state.

*Process*: http, on its loop; seen by comparing a snapshot with the one before. What is counted (a
role's restarts) is never missed; a peer that was down only between two snapshots is not seen.
*Owns*: a bounded list, told with the last first.
"""

from __future__ import annotations

from collections import deque
from typing import Literal

import msgspec

from kamacache.limits import STATUS_CHANGES_MAX
from kamacache.local.snapshot import NodeSnapshot, RoleInfo

Level = Literal["bad", "warn", "good", "info"]


class Change(msgspec.Struct, frozen=True):
    """One thing that happened."""

    unix_ms: int
    level: Level
    text: str


class Changes:
    """What happened, as snapshots come."""

    def __init__(self) -> None:
        self._told: deque[Change] = deque(maxlen=STATUS_CHANGES_MAX)
        self._state = ""
        self._roles: dict[tuple[str, int], RoleInfo] = {}
        self._silent: set[int] = set()
        self._peers: dict[str, str] = {}
        self._members: set[str] = set()
        self._seen = False

    def told(self) -> list[Change]:
        """Return what happened, the last first."""
        return list(reversed(self._told))

    def note(self, snapshot: NodeSnapshot, state: str, peers: dict[str, str]) -> None:
        """Take the next snapshot; ``state`` of the node and of its ``peers``, as they are shown."""
        now_ms = int(snapshot.node.unix_s * 1000)
        roles = {(role.role, role.index): role for role in snapshot.roles}
        silent = {
            worker.index
            for worker in snapshot.workers
            if not worker.answered and roles.get(("worker", worker.index), _NOBODY).ready
        }
        members = {m.address for m in snapshot.membership.members} if snapshot.membership else set()
        if self._seen:
            self._note_state(state, now_ms)
            self._note_roles(roles, snapshot, now_ms)
            self._note_silent(silent, now_ms)
            self._note_members(members, now_ms)
            self._note_peers(peers, now_ms)
        self._state, self._roles, self._silent = state, roles, silent
        self._members, self._peers, self._seen = members, dict(peers), True

    def _tell(self, unix_ms: int, level: Level, text: str) -> None:
        self._told.append(Change(unix_ms, level, text))

    def _note_state(self, state: str, now_ms: int) -> None:
        if state != self._state:
            level: Level = "good" if state == "ready" else "warn"
            self._tell(now_ms, level, f"the node is {state}")

    def _note_roles(
        self, roles: dict[tuple[str, int], RoleInfo], snapshot: NodeSnapshot, now_ms: int
    ) -> None:
        for place, role in roles.items():
            before = self._roles.get(place)
            if before is None:
                continue
            name = f"{role.role} {role.index}"
            began_ms = max(0, now_ms - max(0, snapshot.node.boottime_ms - role.started_ms))
            died = role.restarts - before.restarts
            if died > 0:
                times = "" if died == 1 else f" {died} times"
                died_ms = began_ms if role.ready else now_ms  # at the latest
                self._tell(died_ms, "bad", f"{name} died{times}; it was pid {before.pid}")
            if role.ready and (died > 0 or not before.ready or role.pid != before.pid):
                self._tell(began_ms, "good", f"{name} runs again as pid {role.pid}")

    def _note_silent(self, silent: set[int], now_ms: int) -> None:
        for index in sorted(silent - self._silent):
            self._tell(now_ms, "warn", f"worker {index} does not answer")

    def _note_members(self, members: set[str], now_ms: int) -> None:
        for verb, changed in (
            ("joined", members - self._members),
            ("left", self._members - members),
        ):
            named = ", ".join(sorted(changed)[:4])
            more = f" and {len(changed) - 4} more" if len(changed) > 4 else ""
            if changed:
                self._tell(now_ms, "info", f"{named}{more} {verb} the ring")

    def _note_peers(self, peers: dict[str, str], now_ms: int) -> None:
        for address, state in peers.items():
            before = self._peers.get(address)
            if before is None or state == before:
                continue
            if state == "usable":
                self._tell(now_ms, "good", f"peer {address} is usable")
            elif state in ("down", "draining", "partly down"):
                self._tell(
                    now_ms, "bad" if state == "down" else "warn", f"peer {address} is {state}"
                )


_NOBODY = RoleInfo(role="", index=0, pid=0, ready=False, restarts=0, started_ms=0)
