"""From the lists of a source to the node's numbered membership.

*Process*: agent, the only writer from its start on. *Owns*: a writable map of the control words,
of which it writes the membership's number alone.

*Invariants*: numbers only go up, also over the agent's death; a list equal to the one that stands,
or one that cannot be a cluster, changes nothing; this node is always a member.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Final

from kamacache.cluster.membership import (
    Member,
    Membership,
    MembershipReader,
    check_address,
    make_membership,
    write_membership,
)
from kamacache.errors import ConfigError, NodeUnavailableError
from kamacache.limits import DISCOVERY_WRITE_AGAIN_S
from kamacache.rundir.control import MEMBERSHIP, ControlWriter
from kamacache.rundir.description import NodeDescription

NAMES_LOGGED_MAX: Final = 8

log = logging.getLogger("kamacache.agent")

CallLater = Callable[[float, Callable[[], object]], asyncio.TimerHandle]


class Publisher:
    """Publishes one node's memberships; for one loop."""

    def __init__(self, about: NodeDescription, own: Member, call_later: CallLater) -> None:
        """Take up what stands. Raises `NodeUnavailableError` where the node's files are gone."""
        self._about = about
        self._own = own
        self._call_later = call_later
        self._control = ControlWriter.open(about.control_path)
        self._standing = self._take_up()
        self._refused = ""  # why the list before could not be published
        self._again: asyncio.TimerHandle | None = None

    @property
    def standing(self) -> Membership:
        """The membership that the other roles find."""
        return self._standing

    def publish(self, members: Sequence[Member]) -> bool:
        """Make a source's list the membership; return whether it stands now.

        What cannot stand is logged, once for each reason. Where only the writing fails, it is
        tried again until another list comes.
        """
        if self._again is not None:
            self._again.cancel()
            self._again = None
        try:
            found = self._checked(members)
            if found.members != self._standing.members:
                write_membership(self._about, found, self._control.words)
                self._tell(found)
                self._standing = found
        except (ConfigError, OSError) as error:
            if not isinstance(error, ConfigError):
                again = tuple(members)
                self._again = self._call_later(DISCOVERY_WRITE_AGAIN_S, lambda: self.publish(again))
            if str(error) != self._refused:
                self._refused = str(error)
                log.error(
                    "a list of nodes cannot be published, the last one stays",
                    extra={"error": str(error), "number": self._standing.number},
                )
            return False
        self._refused = ""
        return True

    def close(self) -> None:
        """Write no more."""
        if self._again is not None:
            self._again.cancel()
        self._control.close()

    def _take_up(self) -> Membership:
        words = self._control.words
        reader = MembershipReader(self._about)
        try:
            found = reader.read()
        except NodeUnavailableError as error:
            log.error("the membership is written anew", extra={"error": str(error)})
            found = Membership(number=0, own=self._own.address, members=())
        finally:
            reader.close()
        if found.number > words[MEMBERSHIP] > 0:
            # An agent died between the file and the word: what it wrote stands from now on.
            words[MEMBERSHIP] = found.number
        number = max(found.number, words[MEMBERSHIP])
        return Membership(number=number, own=self._own.address, members=found.members)

    def _checked(self, members: Sequence[Member]) -> Membership:
        named = [
            Member(check_address(member.address, "discover").address, member.weight)
            for member in members
        ]
        if all(member.address != self._own.address for member in named):
            named.append(self._own)
        return make_membership(self._standing.number + 1, self._own.address, named)

    def _tell(self, found: Membership) -> None:
        before, now = set(self._standing.members), set(found.members)
        log.info(
            "the cluster has changed",
            extra={
                "number": found.number,
                "nodes": len(found.members),
                "came": _names(now - before),
                "gone": _names(before - now),
            },
        )


def _names(members: set[Member]) -> str:
    shown = " ".join(member.address for member in sorted(members)[:NAMES_LOGGED_MAX])
    more = len(members) - NAMES_LOGGED_MAX
    return f"{shown} and {more} more" if more > 0 else shown
