"""The nodes as one client knows them: the ring, who answers, who is left alone for a while.

*Process*: the application's; any thread, any loop. No I/O: it says whom to ask, and is told what
came of it. A node's life here::

    untested ── answers ──► usable ── link failed ──► lost ── probe answers ──► usable
        keys go to others,            keys go to others; a probe in the
        a probe goes out              background after each back-off

*Invariants*: nobody waits for a node that is known to be lost while another is usable; the time a
getter takes loses no node (see `kamacache.client.exchange`); any node may be asked for any key,
since nodes forward to the owner: who is asked decides the number of hops, never the answer.
The seeds are never forgotten: where no member can be reached at its advertised address, they serve.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Final, NamedTuple

from kamacache.cluster.membership import Member
from kamacache.cluster.ring import Ring
from kamacache.limits import (
    CLIENT_JOIN_NODES,
    CLIENT_JOIN_S,
    CLIENT_PROBE_S,
    CLIENT_REFRESH_EVERY_S,
    CLIENT_REFRESH_EVERY_S_MIN,
    CLIENT_RETRY_FIRST_S,
    CLIENT_RETRY_MAX_S,
)

NEVER_S: Final = float("-inf")


class Node:
    """What is known of one node; changed by `Nodes`."""

    __slots__ = (
        "address",
        "connection",
        "failures",
        "heard_s",
        "lost_s",
        "probe_until_s",
        "retry_at_s",
        "silent",
        "usable",
        "why",
    )

    def __init__(self, address: str) -> None:
        self.address: Final = address
        self.usable = False
        self.heard_s = NEVER_S  # when an answer came last
        self.lost_s = NEVER_S  # when it was lost last
        self.failures = 0  # losses since it last answered a call
        self.silent = False  # how it was lost last: no answer at all, or a refusal
        self.why = "not asked yet"  # it was lost last
        self.retry_at_s = NEVER_S  # lost: left alone until then
        self.probe_until_s = NEVER_S  # a probe is under way, at most until then
        self.connection = 0  # counts up where the old connection is to be given up


class Question(NamedTuple):
    """A node asked for the members."""

    node: Node
    sent_s: float
    purpose: str  # "join": the first list; "refresh": a newer one; "probe": a sign of life


class View(NamedTuple):
    """The members at one time; replaced as a whole."""

    number: int  # counts the changes this client has seen
    ring: Ring
    members: tuple[Member, ...]
    nodes: dict[str, Node]  # the members, and the seeds


class Nodes:
    """The members and the seeds."""

    def __init__(
        self,
        seeds: Sequence[Member],
        clock_s: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        """Take the seeds for the members until a node has said who is one."""
        self._clock_s: Final = clock_s
        self._jitter: Final = jitter
        self._lock = threading.Lock()
        self.seeds: Final = tuple(seed.address for seed in seeds)
        members = tuple(sorted(seeds))
        nodes = {address: Node(address) for address in self.seeds}
        self.view = View(0, Ring(members), members, nodes)
        self._due: deque[Node] = deque()  # to be probed, by whoever looks first
        self.joined = False  # a node has said who the members are
        self._join_until_s: float | None = None  # None: nobody has asked yet
        self._asked = 0  # seeds that have not answered the first question
        self._waiters: list[Callable[[], object]] = []
        self._refresh_at_s = NEVER_S
        self._refresh_until_s = NEVER_S  # one is under way, at most until then

    def after_fork(self) -> None:
        """Forget what another thread, or the parent's connections, were about to tell."""
        self._lock = threading.Lock()
        self._waiters = []
        if not self.joined:
            self._join_until_s = None
        self._refresh_until_s = NEVER_S
        self._due.clear()
        for node in self.view.nodes.values():
            node.probe_until_s = NEVER_S

    # -- whom to ask ----------------------------------------------------------------------------

    def route(self, key: bytes, tried: Collection[Node] = ()) -> Node | None:
        """Return the node to ask for a key; None where there is none to be tried now."""
        view = self.view
        node = view.nodes[view.ring.owner(key)]
        if node.usable and node not in tried:
            return node
        return self._route_around(view, key, tried)

    def _route_around(self, view: View, key: bytes, tried: Collection[Node]) -> Node | None:
        """Return the next usable node clockwise, or a usable seed, or one that may be back."""
        now_s = self._clock_s()
        passed: list[Node] = []
        for node in self._candidates(view, key):
            if node in tried:
                continue
            if node.usable:
                for other in passed:
                    self.want_probe(other)
                return node
            if now_s >= node.retry_at_s:
                passed.append(node)
        for node in passed:  # nobody is known to answer
            if not node.failures:
                return node
            if node.silent:
                self.want_probe(node)  # not this call: it would wait where others have waited
                continue
            with self._lock:
                if now_s >= node.retry_at_s:  # it refused; this call alone sees if it is back
                    node.retry_at_s = now_s + CLIENT_PROBE_S
                    return node
        return None

    def _candidates(self, view: View, key: bytes) -> Iterator[Node]:
        for address in view.ring.owners(key):
            yield view.nodes[address]
        for address in self.seeds:
            if address not in view.ring.addresses:
                yield view.nodes[address]

    def want_probe(self, node: Node) -> None:
        """Have a node probed, unless that is under way or it is left alone."""
        now_s = self._clock_s()
        if now_s < node.probe_until_s or now_s < node.retry_at_s:
            return
        with self._lock:
            if now_s < node.probe_until_s:
                return
            node.probe_until_s = now_s + CLIENT_PROBE_S
        self._due.append(node)

    def refresher(self) -> Question | None:
        """Return whom to ask for the members where it is time for that; one at a time."""
        now_s = self._clock_s()
        if now_s < self._refresh_at_s or now_s < self._refresh_until_s:
            return None
        nodes = self.view.nodes
        # A member knows better than a seed, which may have left the cluster long ago.
        members = [nodes[m.address] for m in self.view.members]
        usable = [n for n in members if n.usable] or [n for n in nodes.values() if n.usable]
        with self._lock:
            if now_s < self._refresh_until_s:
                return None
            if not usable:
                self._refresh_at_s = now_s + CLIENT_REFRESH_EVERY_S_MIN
                return None
            self._refresh_until_s = now_s + CLIENT_PROBE_S
            self._refresh_at_s = now_s + CLIENT_REFRESH_EVERY_S * (0.75 + self._jitter() / 2)
        return Question(usable[int(self._jitter() * len(usable)) % len(usable)], now_s, "refresh")

    def probes(self) -> Iterator[Question]:
        """Yield, once, the nodes that are to be asked for a sign of life."""
        while self._due:
            with contextlib.suppress(IndexError):  # another thread took it
                yield Question(self._due.popleft(), self._clock_s(), "probe")

    # -- the first list of members --------------------------------------------------------------

    def must_join(self) -> bool:
        """Tell whether a call should wait for the first list of members."""
        if self.joined:
            return False
        until_s = self._join_until_s
        return until_s is None or self._clock_s() < until_s

    def join(self, wake: Callable[[], object]) -> list[Question]:
        """Have ``wake`` called when the list is there or nobody is left who could send it.

        Returns whom to ask, for the first caller; the others wait for the same answers.
        """
        with self._lock:
            if not self.joined and (self._join_until_s is None or self._asked):
                self._waiters.append(wake)
                if self._join_until_s is not None:
                    return []
                now_s = self._clock_s()
                self._join_until_s = now_s + CLIENT_JOIN_S
                order = sorted(self.view.nodes.values(), key=lambda _: self._jitter())
                asked = order[:CLIENT_JOIN_NODES]
                self._asked = len(asked)
                for node in asked:
                    node.probe_until_s = now_s + CLIENT_PROBE_S
                self._refresh_at_s = now_s + CLIENT_REFRESH_EVERY_S * (0.75 + self._jitter() / 2)
                return [Question(node, now_s, "join") for node in asked]
        wake()
        return []

    # -- what came of it ------------------------------------------------------------------------

    def answered(self, node: Node) -> None:
        """Take note of an answer to a call."""
        node.heard_s = self._clock_s()
        if node.failures or not node.usable:
            with self._lock:
                node.failures = 0
                node.usable = True

    def lost(self, node: Node, sent_s: float, why: str, *, silent: bool = False) -> None:
        """Take note that a call sent at ``sent_s`` failed by its link; many do at once.

        ``silent``: nothing was heard, so the connection may be dead without knowing it.
        """
        with self._lock:
            self._lost(node, sent_s, why, silent)

    def _lost(self, node: Node, sent_s: float, why: str, silent: bool) -> None:
        if node.lost_s >= sent_s:
            return  # the same failure, seen by another call
        now_s = self._clock_s()
        node.usable = False
        node.lost_s = now_s
        node.failures += 1
        node.silent = silent
        node.why = why
        node.connection += silent
        wait_s = min(CLIENT_RETRY_MAX_S, CLIENT_RETRY_FIRST_S * 2 ** min(node.failures - 1, 16))
        node.retry_at_s = now_s + wait_s * (1 + self._jitter()) / 2
        self._refresh_at_s = min(self._refresh_at_s, now_s + CLIENT_REFRESH_EVERY_S_MIN)

    def no_members(self, question: Question, why: str, *, silent: bool) -> None:
        """Take note that a question was not answered."""
        with self._lock:
            self._lost(question.node, question.sent_s, why, silent)
            woken = self._ended(question)
        for wake in woken:
            wake()

    def members(self, question: Question, members: Iterable[Member], number: int) -> None:
        """Take the answer to a question; ``members`` are those that the node knows, itself too.

        They become the client's where they were asked for, or where it has none yet. A node that
        answers nothing else, since it drains, keeps its failures: it is left alone ever longer.
        """
        node = question.node
        listed = tuple(sorted(members))
        view = self._view_of(listed, number) if question.purpose != "probe" else None
        with self._lock:
            if node.lost_s < question.sent_s:
                node.heard_s = self._clock_s()
                node.usable = True
            if view is not None and (question.purpose == "refresh" or not self.joined):
                self.view = view
                self.joined = True
            woken = self._ended(question)
        for wake in woken:
            wake()

    def _ended(self, question: Question) -> list[Callable[[], object]]:
        question.node.probe_until_s = NEVER_S
        if question.purpose == "refresh":
            self._refresh_until_s = NEVER_S
        self._asked -= question.purpose == "join"
        if not self.joined and self._asked > 0:
            return []
        woken, self._waiters = self._waiters, []
        return woken

    def _view_of(self, members: tuple[Member, ...], number: int) -> View | None:
        """Return the view with other members, outside the lock: a large ring takes its time."""
        view = self.view
        if not members:
            return None
        if members == view.members:
            return view
        # A node that has just begun knows only itself (number 0): not news where others answer.
        known = [view.nodes[m.address] for m in view.members]
        if self.joined and not number and len(members) == 1 and sum(n.usable for n in known) > 1:
            return None
        addresses = (*(m.address for m in members), *self.seeds)
        nodes = {address: view.nodes.get(address) or Node(address) for address in addresses}
        return View(view.number + 1, Ring(members), members, nodes)
