"""Lists of members as sources give them: each named once, published where they changed.

*Process*: agent.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

from kamacache.cluster.membership import Member
from kamacache.errors import ConfigError
from kamacache.limits import MEMBERS_MAX


def distinct(members: Iterable[Member]) -> tuple[Member, ...]:
    """Return the members sorted, each once. Raises `ConfigError`.

    A source may name a member twice; not with two weights, and not more than a cluster can have.
    """
    known: dict[str, Member] = {}
    for member in members:
        if known.setdefault(member.address, member) != member:
            raise ConfigError(
                f"{member.address} is named with two weights, {known[member.address].weight} and "
                f"{member.weight}",
                setting="discover",
                value=member.address,
            )
    if len(known) > MEMBERS_MAX:
        raise ConfigError(
            f"{len(known)} members are named; a cluster has at most {MEMBERS_MAX}",
            setting="discover",
            value=str(len(known)),
        )
    return tuple(sorted(known.values()))


def changes_only(publish: Callable[[Sequence[Member]], None]) -> Callable[[Sequence[Member]], None]:
    """Return a ``publish`` that passes on only what differs from the list before."""
    last: list[Sequence[Member] | None] = [None]

    def say(members: Sequence[Member]) -> None:
        if members != last[0]:
            publish(members)
            last[0] = members

    return say


class Roster:
    """Who is registered at a source that forgets: members vanish when their lease or beat ends.

    A registry that was restarted without its data is empty until everybody has registered again,
    and taking it at its word would move nearly all keys twice. So what vanished while nobody
    looked stays for ``grace_s``; what vanishes under our eyes goes at once.
    """

    def __init__(self, grace_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._grace_s = grace_s
        self._clock = clock
        self._listed: dict[str, Member] = {}
        self._kept: dict[str, tuple[Member, float]] = {}  # with the time at which it goes
        self._blind = False

    def interrupted(self) -> None:
        """Take note that changes may have been missed."""
        self._blind = True

    def listed(self, members: Iterable[Member]) -> None:
        """Take over a whole list. Raises `ConfigError` as `distinct`, and changes nothing then."""
        found = {member.address: member for member in distinct(members)}
        if self._blind:
            until_s = self._clock() + self._grace_s
            for address in self._listed.keys() - found.keys():
                self._kept[address] = (self._listed[address], until_s)
        for address in self._kept.keys() & found.keys():
            del self._kept[address]
        self._listed = found
        self._blind = False

    def came(self, member: Member) -> None:
        """Add or replace one member."""
        self._listed[member.address] = member
        self._kept.pop(member.address, None)

    def gone(self, address: str) -> None:
        """Drop one member, as the source says."""
        self._listed.pop(address, None)
        self._kept.pop(address, None)

    def members(self) -> tuple[Member, ...]:
        """Return the members of now, sorted."""
        now_s = self._clock()
        for address in [a for a, (_, until_s) in self._kept.items() if until_s <= now_s]:
            del self._kept[address]
        return tuple(sorted([*self._listed.values(), *(kept for kept, _ in self._kept.values())]))

    def changes_in_s(self) -> float | None:
        """Return when `members` changes by time alone, None where it does not."""
        if not self._kept:
            return None
        return max(0.0, min(until_s for _, until_s in self._kept.values()) - self._clock())
