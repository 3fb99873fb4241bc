"""Where a key goes: the ring as this worker sees it now, with the links that are down left out.

*Process*: worker, in the loop's thread. *Owns*: the links to the other nodes::

    key ── ring ──► owner ── its link usable? ── yes ──► that link
                                    └─ no ──► the next distinct node clockwise ... or this node

*Invariants*: the node itself is on the ring and always usable, so a key always goes somewhere;
nobody waits for a node whose link is down. What this worker believes of its peers is its own
finding: nothing adjusts the ring, so two nodes that can reach the same peers agree.

*Hand-off*: for `HANDOFF_S` after this node began, a link came up, or the membership changed, a key
that this node owns may still lie elsewhere: `holder_before` names where.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Final, Protocol

from kamacache.clock import boottime_ms
from kamacache.cluster.farewell import Farewell
from kamacache.cluster.membership import Member, Membership
from kamacache.cluster.owed import OwedFile
from kamacache.cluster.ring import Ring
from kamacache.limits import (
    HANDOFF_S,
    NODES_LEFT_MAX,
    PEERS_DEPARTED_MAX,
    RECENT_ITEMS_MAX,
    WARM_MARGIN_MS,
)
from kamacache.wire.messages import Reply, Request

RINGS_BEFORE_MAX: Final = 4  # a ring takes 0.1 MB a node; a list of peers may flap

# Whether a node that was away has been told all that was written meanwhile; the least of what all
# workers say holds.
TOLD_NEVER: Final = 0  # something may be lost
TOLD_NOT_YET: Final = 1
TOLD_ALL: Final = 2
TOLD_WATCHED: Final = 3  # and this node saw all the while who came and went

Outcome = Reply | Exception
Done = Callable[[Outcome], None]


class Link(Protocol):
    """What the peers need of a `kamacache.cluster.link.PeerLink`."""

    @property
    def address(self) -> str: ...
    @property
    def usable(self) -> bool: ...
    @property
    def up(self) -> bool: ...
    @property
    def settled(self) -> bool: ...
    @property
    def life(self) -> str: ...
    @property
    def pending_invalidations(self) -> int: ...
    def start(self) -> None: ...
    async def close(self) -> None: ...
    async def wait_settled(self) -> None: ...
    def retry_now(self) -> None: ...
    def send(self, request: Request, done: Done, deadline_s: float) -> None: ...
    def invalidate(self, group: str, items: Sequence[tuple[bytes, int]]) -> None: ...
    def flush(self) -> None: ...
    def flush_whole(self, group: str) -> None: ...
    def stats(self) -> dict[str, int]: ...


class Peers:
    """The other nodes, and which of them a key goes to."""

    def __init__(
        self,
        make_link: Callable[[str, Link | None], Link],
        clock_s: Callable[[], float],
        *,
        close: Callable[[Link], None],
        owed: OwedFile,
        handoff_s: float = HANDOFF_S,
        farewell: Farewell | None = None,
        clock_ms: Callable[[], int] = boottime_ms,
    ) -> None:
        """``make_link`` is given the address, and the link there was to it before.

        ``close`` is given the link to a node that left; it sees to its end. ``owed`` is what a
        former worker left, and outlives this one; ``farewell`` is what it said at its end, None
        where it did not end in order.
        """
        self._make_link: Final = make_link
        self._clock_s: Final = clock_s
        self._close: Final = close
        self._owed: Final = owed
        self._handoff_s: Final = handoff_s
        self._ring = Ring([Member("")])
        self._links: dict[str, Link | None] = {"": None}
        self._wanted: set[str] = set()
        self._clock_ms: Final = clock_ms
        self._began_ms: Final = clock_ms()
        # From when on all that was written is told to a node, or is still in its link's queue.
        self._since_ms: dict[str, int] = {}
        self._since_before: Final = {} if farewell is None else farewell.since_ms
        # Whose memory that is told to: a node of that name may run elsewhere, or begin anew.
        self._lives: Final = {} if farewell is None else dict(farewell.lives)
        self._left_ms: dict[str, int] = {} if farewell is None else dict(farewell.left_ms)
        # Who said hello and is no member: it may come and go between two looks at the source.
        self._strangers_ms: dict[str, int] = {}
        # Links to nodes that left. Should one come back with its memory, it must drop what was
        # written meanwhile: so these links still collect it.
        self._departed: dict[str, Link] = {}
        # Of the last minute, for nodes that this one has not heard of yet: they may hold already
        # what a write of this node has made old.
        self._recent: deque[tuple[float, str, Sequence[tuple[bytes, int]]]] = deque()
        self._recent_items = 0
        self._forgot_s = float("-inf")  # when the last of those was written that had to give way
        self._up: dict[str, bool] = {}
        self._handoff_until_s = clock_s() + handoff_s  # this node has just begun
        self._rings_before: list[tuple[float, Ring]] = []  # (until when it matters, ring)
        self.sweep_at_s: float | None = None  # when what this node does not own may go
        self.number = -1
        self.own = ""

    @property
    def links(self) -> list[Link]:
        """The links to the other nodes."""
        return [link for link in self._links.values() if link is not None]

    @property
    def addresses(self) -> set[str]:
        """The other members, linked to or about to be, and nodes that left and may be told yet."""
        return {*self._wanted, *self._links, *self._departed}

    def update(self, membership: Membership) -> None:
        """Take a new membership: link to those who came, leave those who went."""
        first = self.number < 0
        self.number = membership.number
        self.own = membership.own
        ring = Ring(membership.members)
        if not first and ring != self._ring:
            self._changed()
            now_s = self._clock_s()
            self._rings_before = [old for old in self._rings_before if old[0] > now_s]
            self._rings_before.insert(0, (now_s + self._handoff_s, self._ring))
            del self._rings_before[RINGS_BEFORE_MAX:]
        self._ring = ring
        wanted = self._wanted = set(membership.others)
        for address in [a for a, link in self._links.items() if a not in wanted]:
            link = self._links.pop(address)
            self._up.pop(address, None)
            if link is not None:
                self._close(link)
                self._departed[address] = link
                self._note_left(address)
        self._links[membership.own] = None
        for address in sorted(wanted - self._links.keys()):
            former = self._departed.pop(address, None)
            link = self._links[address] = self._make_link(address, former)
            if former is None:
                self._tell_recent(link)
                self._note_begun(address, first=first)
            link.start()
        for address in [*self._departed][:-PEERS_DEPARTED_MAX]:
            del self._departed[address]
            self._since_ms.pop(address, None)
            self._lives.pop(address, None)

    def _note_begun(self, address: str, *, first: bool) -> None:
        """Take note of how far back this worker knows what a node is to be told."""
        if first:  # what a worker before this one collected is in the file of what is owed
            since_ms = self._since_before.get(address, self._began_ms)
        else:
            since_ms = max(self._began_ms, self._clock_ms() - int(self._handoff_s * 1000))
        self._since_ms[address] = since_ms

    def _note_left(self, address: str) -> None:
        self._left_ms.pop(address, None)
        self._left_ms[address] = self._clock_ms()
        for oldest in [*self._left_ms][:-NODES_LEFT_MAX]:
            del self._left_ms[oldest]

    def recall(self) -> None:
        """Take over what a former worker of this place could not tell; once, after `update`."""
        flush = self._owed.to_flush
        for link in self.links:
            if flush is None or link.address in flush:
                link.flush()
        for entry in self._owed.entries():
            for address in entry.addresses:
                owed_to = self._links.get(address)
                if owed_to is not None:
                    owed_to.invalidate(entry.group, entry.items)

    def settle_owed(self) -> None:
        """Forget what is owed to nodes that have been told; for the worker to call now and then."""
        self._owed.settle(
            {link.address for link in self.links if not link.up or link.pending_invalidations}
        )

    def told(self, address: str, away_ms: int, members: Collection[str], life: str) -> int:
        """Tell whether a node that was away knows all that this worker wrote meanwhile.

        ``members`` are those that it asks, itself included: a node that it does not ask must not
        have been one of ours since it left. ``life`` is the id of its memory: what another one of
        its name was told, it does not know.
        """
        since_ms = self._clock_ms() - away_ms - WARM_MARGIN_MS
        if any(left > since_ms and who not in members for who, left in self._left_ms.items()):
            return TOLD_NEVER
        link = self._links.get(address)
        if link is None:  # it is no member yet
            return TOLD_NOT_YET
        if self._since_ms[address] > since_ms:
            return TOLD_NEVER
        strangers = [a for a, seen_ms in self._strangers_ms.items() if seen_ms > since_ms]
        others = [a for a in (*self._links, *strangers) if a and a not in members]
        if others or not link.up or link.life != life or link.pending_invalidations:
            return TOLD_NOT_YET
        return TOLD_WATCHED if self._began_ms <= since_ms else TOLD_ALL

    def farewell(self) -> Farewell:
        """Return what a successor must know; what is not told is owed from now on."""
        known = {**self._departed, **{link.address: link for link in self.links}}
        behind = [address for address, link in known.items() if link.pending_invalidations]
        self._owed.add_flush(behind)
        current = {link.address for link in self.links}
        return Farewell(
            unheard=behind,
            since_ms={a: since for a, since in self._since_ms.items() if a in current},
            left_ms=self._left_ms,
            lives={a: life for a, life in self._lives.items() if a in current},
        )

    def link_changed(self, link: Link) -> None:
        """Take note that a link came up or went down; for the links to call."""
        if self._links.get(link.address) is not link:
            return
        usable = link.usable
        if usable != self._up.get(link.address, False):
            self._up[link.address] = usable
            self._changed()
            if usable:
                # It, or we, were away: the next on the ring may have stood in meanwhile.
                self._handoff_until_s = self._clock_s() + self._handoff_s

    def greeted(self, link: Link) -> None:
        """Take note of whose memory is told from now on; for the links to call.

        What another one was told, this one may not know.
        """
        if self._links.get(link.address) is not link:
            return
        before = self._lives.get(link.address)
        self._lives[link.address] = link.life
        if before is not None and before != link.life:
            self._since_ms[link.address] = self._clock_ms()

    def _changed(self) -> None:
        self.sweep_at_s = self._clock_s() + self._handoff_s

    def seen(self, address: str) -> None:
        """Take note that a node said hello to ours: it is there, and had lost us or just begun."""
        link = self._links.get(address)
        if link is not None:
            link.retry_now()
            # If it had lost us while we saw nothing of it, others stood in for this node.
            self._handoff_until_s = self._clock_s() + self._handoff_s
        elif address != self.own:
            self._strangers_ms.pop(address, None)
            self._strangers_ms[address] = self._clock_ms()
            for oldest in [*self._strangers_ms][:-NODES_LEFT_MAX]:
                del self._strangers_ms[oldest]

    def route(self, key: bytes) -> Link | None:
        """Return the link to the key's owner, or to who stands in for it; None: this node."""
        link = self._links[self._ring.owner(key)]
        if link is None or link.usable or not link.settled:
            return link
        for address in self._ring.owners(key):
            link = self._links[address]
            if link is None or link.usable or not link.settled:
                return link
        return None

    def routes(self, keys: Sequence[bytes]) -> list[Link | None]:
        """Return `route` of each key, in their order."""
        owners = self._ring.owners_of(keys)
        links = self._links
        for address in set(owners):
            link = links[address]
            if link is not None and not link.usable and link.settled:
                return [self.route(key) for key in keys]
        return [links[address] for address in owners]

    def owns(self, key: bytes) -> bool:
        """Tell whether the key goes to this node now."""
        return self.route(key) is None

    def stands_in(self, key: bytes) -> bool:
        """Tell whether the ring names another node, which is down, for a key that goes here."""
        return self._links[self._ring.owner(key)] is not None

    def holder_before(self, key: bytes) -> Link | None:
        """Return the link to who may hold a key of this node's from before; None: nobody.

        Nobody either where our own invalidations are still on the way to that node: what it holds
        may be what they drop.
        """
        now_s = self._clock_s()
        link = self._links[self._ring.owner(key)]
        if link is not None:  # we stand in for a node that drains, and is still there
            return link if link.up and not link.pending_invalidations else None
        candidates: list[str] = []
        for until_s, ring in self._rings_before:
            if now_s < until_s:
                candidates.append(ring.owner(key))
        if now_s < self._handoff_until_s:
            candidates += [a for a in self._ring.owners(key) if a != self.own][:1]
        for address in candidates:
            link = self._links.get(address)
            if link is not None and link.up and not link.pending_invalidations:
                return link
        return None

    def invalidate(self, group: str, items: Sequence[tuple[bytes, int]]) -> None:
        """Have every other node drop records older than these versions."""
        away = []
        for link in self._links.values():
            if link is not None:
                link.invalidate(group, items)
                if not link.up:
                    away.append(link.address)
        if away:
            self._owed.add(away, group, items)
        for link in self._departed.values():
            link.invalidate(group, items)
        recent, now_s = self._recent, self._clock_s()
        recent.append((now_s, group, items))
        self._recent_items += len(items)
        while recent and (
            self._recent_items > RECENT_ITEMS_MAX or now_s - recent[0][0] > self._handoff_s
        ):
            self._forgot_s, _, old = recent.popleft()
            self._recent_items -= len(old)

    def owe_flush(self, link: Link, group: str) -> None:
        """Have a node that could not be told now flush a group ("": all) when it is back."""
        link.flush_whole(group)
        self._owed.add_flush([link.address])

    def flush_absent(self, group: str) -> None:
        """Have nodes flush that left, or that this one does not know yet, should they come."""
        for link in self._departed.values():
            link.flush_whole(group)
        self._forgot_s = self._clock_s()

    def invalidate_skipped(self, group: str, key: bytes, version: int, taker: Link) -> None:
        """Have those drop the key who are before ``taker`` on the ring, and could not take a write.

        Who took it tells them, too; but it may be gone, or later than this node, when they return.
        """
        if self._links[self._ring.owner(key)] is taker:
            return
        for address in self._ring.owners(key):
            link = self._links[address]
            if link is None or link is taker:
                return
            link.invalidate(group, [(key, version)])
            self._owed.add([link.address], group, [(key, version)])

    def _tell_recent(self, link: Link) -> None:
        """Have a node that is new to this one drop what this one wrote before it knew of it."""
        since_s = self._clock_s() - self._handoff_s
        if self._forgot_s >= since_s:
            self._owed.add_flush([link.address])
            link.flush()
            return
        recent = [entry for entry in self._recent if entry[0] >= since_s]
        if recent:
            self._owed.add_flush([link.address])  # for a successor, which will not know the keys
        for _, group, items in recent:
            link.invalidate(group, items)

    def stats(self) -> dict[str, int]:
        """Return how many peers there are, how many can be asked, and the sums of their links."""
        links = self.links
        sums = _sum(link.stats() for link in links)
        return {
            "peers": len(links),
            "peers_up": sum([link.usable for link in links]),
            **{f"peer_{name}": count for name, count in sums.items()},
        }


def _sum(parts: Iterable[dict[str, int]]) -> dict[str, int]:
    sums: dict[str, int] = {}
    for part in parts:
        for name, count in part.items():
            sums[name] = sums.get(name, 0) + count
    return sums
