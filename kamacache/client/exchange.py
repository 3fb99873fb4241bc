"""One call of the user's: split by owner, sent side by side, moved on from nodes that are lost.

*Process*: the application's; one thread or task at a time. No I/O: a driver
(`kamacache.client.transport`) sends what `to_send` yields, and says what came of it::

    keys ── ring ──► parts ──► sent ──► ended ──► result
                       ▲         │
                       └─ moved ─┘  the node is lost: the part's keys, split again by who is next

A part that is silent for a while has its node asked for a sign of life, beside the call, which goes
on: a node that answers is slow, and is waited for; one that does not is lost. So a long load loses
no node, and a dead node costs one bounded wait.

*Invariants*: a key is under way at one node at a time; not found is an answer; what a node answers
as an error is final, since the others would forward the key to the same owner. A write is sent to
another node only where the first link failed or fell silent: it may then be applied twice, and is
the same write. Every part ends by the call's deadline.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Final

import grpc

from kamacache.client.nodes import NEVER_S, Node, Nodes
from kamacache.client.operations import Operation
from kamacache.errors import DeadlineExceededError, KamaCacheError, NodeUnavailableError
from kamacache.limits import (
    BATCH_BYTES_SOFT,
    BATCH_KEYS_MAX,
    CLIENT_PARTS_MAX,
    CLIENT_PATIENCE_S,
    CLIENT_PATIENCE_S_MIN,
    CLIENT_PROBE_S,
    CLIENT_TRIES_MAX,
    REPLY_GRACE_S,
)

_LINK_FAILED: Final = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.CANCELLED,  # not by us: the channel was closed under the call
        grpc.StatusCode.UNIMPLEMENTED,  # what listens there is no node
    }
)
_TOO_LARGE: Final = frozenset({grpc.StatusCode.OUT_OF_RANGE, grpc.StatusCode.RESOURCE_EXHAUSTED})


class Part:
    """Some keys of the call, on their way to one node."""

    __slots__ = (
        "call",
        "keys",
        "look_at_s",
        "looked_s",
        "node",
        "sent_s",
        "silent",
        "tried",
        "verdict_s",
    )

    def __init__(
        self, node: Node, keys: Sequence[bytes], tried: tuple[Node, ...], *, silent: bool = False
    ) -> None:
        self.node: Final = node
        self.keys: Final = keys
        self.tried: Final = tried  # before this node
        self.silent: Final = silent  # sent before, and not answered in the time of `patience_s`
        self.call: Any = None  # of gRPC
        self.sent_s = NEVER_S
        self.looked_s = NEVER_S  # heard since then: the node lives
        self.look_at_s = NEVER_S  # when to look next
        self.verdict_s: float | None = None  # asked for a sign of life: until then


class Exchange:
    """The parts of one call."""

    def __init__(
        self,
        operation: Operation,
        nodes: Nodes,
        deadline_s: float,
        timeout_s: float,
        *,
        everywhere: bool = False,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """``everywhere``: one part for each member, which no other node can answer."""
        self.operation: Final = operation
        self.deadline_s: Final = deadline_s
        self._nodes: Final = nodes
        self._timeout_s: Final = timeout_s
        self._everywhere: Final = everywhere
        self._clock_s: Final = clock_s
        self._waiting: deque[Part] = deque()
        self.under_way: set[Part] = set()
        self._error: KamaCacheError | None = None
        if everywhere:
            view = nodes.view
            self._waiting.extend(Part(view.nodes[m.address], (), ()) for m in view.members)
        else:
            self._split(operation.keys(), (), None)

    # -- for the driver -------------------------------------------------------------------------

    def to_send(self) -> Iterator[Part]:
        """Yield the parts to be sent now; each counts as under way."""
        while self._waiting and len(self.under_way) < CLIENT_PARTS_MAX:
            part = self._waiting.popleft()
            now_s = self._clock_s()
            if now_s >= self.deadline_s:
                self._fail(self._too_late())
                continue
            part.sent_s = now_s
            if part.silent:
                self._await_verdict(part, now_s)
            else:
                part.looked_s = now_s
                part.look_at_s = now_s + self.patience_s(now_s)
            self.under_way.add(part)
            yield part

    def patience_s(self, now_s: float) -> float:
        """Return how long a node may be silent before it is asked for a sign of life."""
        left_s = self.deadline_s - now_s
        return max(CLIENT_PATIENCE_S_MIN, min(CLIENT_PATIENCE_S, left_s / 4))

    @property
    def wake_s(self) -> float:
        """When to call `overdue` next; infinite where nothing is under way."""
        return min([part.look_at_s for part in self.under_way], default=float("inf"))

    def answered(self, part: Part, reply: Any) -> None:
        """Take a reply."""
        if part in self.under_way:
            self.under_way.remove(part)
            self._nodes.answered(part.node)
            self.operation.take(part.keys, reply)

    def unanswered(self, part: Part) -> None:
        """Have a part sent again, to a node of which nothing was heard in `patience_s`."""
        self.under_way.remove(part)
        self._nodes.want_probe(part.node)
        again = Part(part.node, part.keys, part.tried, silent=True)
        again.looked_s = part.sent_s  # the sign may come before the part is sent
        self._waiting.append(again)

    def failed(self, part: Part, code: Any, error: KamaCacheError) -> None:
        """Take a failure: move the part on, cut it in two, or end with the error."""
        if part not in self.under_way:
            return  # given up before
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            self.under_way.remove(part)
            if part.node.heard_s < part.sent_s:
                self._nodes.want_probe(part.node)  # the next call should know better
            self._fail(self._too_late())
        elif code in _LINK_FAILED:
            if not isinstance(error, NodeUnavailableError):
                error = NodeUnavailableError(str(error))
            # A worker that cannot be reached is not the node: the others of its keys are fine.
            if error.shard is None:
                self._nodes.lost(part.node, part.sent_s, str(error))
            self._move(part, error)
        else:
            self.under_way.remove(part)
            self._nodes.answered(part.node)
            if code in _TOO_LARGE and type(error) is KamaCacheError and len(part.keys) > 1:
                half = len(part.keys) // 2
                for keys in (part.keys[:half], part.keys[half:]):
                    self._waiting.append(Part(part.node, keys, part.tried))
            else:
                self._fail(error)

    def overdue(self) -> list[Part]:
        """Look after the silent parts; return those given up, whose calls are to be cancelled."""
        now_s = self._clock_s()
        return [p for p in list(self.under_way) if now_s >= p.look_at_s and self._give_up(p, now_s)]

    def check(self) -> None:
        """Raise the first error there was, once nothing is under way any more."""
        if self._error is not None:
            raise self._error

    # -- the parts ------------------------------------------------------------------------------

    def _give_up(self, part: Part, now_s: float) -> bool:
        node = part.node
        if now_s >= self.deadline_s + REPLY_GRACE_S:  # gRPC should have said so itself
            self.failed(part, grpc.StatusCode.DEADLINE_EXCEEDED, self._too_late())
            return True
        if node.lost_s >= part.sent_s and node.heard_s < node.lost_s:
            self._move(part, _silent(node))
            return True
        if node.heard_s > part.looked_s:
            part.looked_s, part.verdict_s = node.heard_s, None
        elif part.verdict_s is None:
            self._nodes.want_probe(node)
            self._await_verdict(part, now_s)
        elif now_s >= part.verdict_s:
            if node.probe_until_s <= now_s:
                self._nodes.lost(node, part.sent_s, str(_silent(node)), silent=True)
            self._move(part, _silent(node))
            return True
        if part.verdict_s is None:
            part.look_at_s = now_s + self.patience_s(now_s)
        if now_s < self.deadline_s:
            part.look_at_s = min(part.look_at_s, self.deadline_s + REPLY_GRACE_S)
        return False

    def _await_verdict(self, part: Part, now_s: float) -> None:
        # A quarter of the time left for the sign: then there is some for another node.
        wait_s = min(CLIENT_PROBE_S, max(0.0, self.deadline_s - now_s) / 4)
        part.look_at_s = part.verdict_s = now_s + wait_s

    def _move(self, part: Part, error: KamaCacheError) -> None:
        self.under_way.remove(part)
        if self._everywhere:
            self._fail(error)
        else:
            self._split(part.keys, (*part.tried, part.node), error)

    def _split(
        self, keys: Collection[bytes] | Any, tried: tuple[Node, ...], error: KamaCacheError | None
    ) -> None:
        """Add parts for these keys by who is to be asked now, none larger than a message may be."""
        shares: dict[Node, list[bytes]] = {}
        route = self._nodes.route
        for key in keys:
            node = route(key, tried) if len(tried) < CLIENT_TRIES_MAX else None
            if node is None:
                self._fail(error or self._nobody())
                continue
            share = shares.get(node)
            if share is None:
                shares[node] = [key]
            else:
                share.append(key)
        # In turns, so that no node's messages wait for those of another.
        turns = itertools.zip_longest(*(self._cut(n, share, tried) for n, share in shares.items()))
        self._waiting.extend(part for turn in turns for part in turn if part is not None)

    def _cut(self, node: Node, keys: list[bytes], tried: tuple[Node, ...]) -> Iterator[Part]:
        start = held_bytes = 0
        for i, key in enumerate(keys):
            size_bytes = self.operation.size_bytes(key)
            if i - start == BATCH_KEYS_MAX or (
                i > start and held_bytes + size_bytes > BATCH_BYTES_SOFT
            ):
                yield Part(node, keys[start:i], tried)
                start, held_bytes = i, 0
            held_bytes += size_bytes
        yield Part(node, keys[start:], tried)

    # -- errors ---------------------------------------------------------------------------------

    def _fail(self, error: KamaCacheError) -> None:
        if self._error is None:
            self._error = error

    def _too_late(self) -> DeadlineExceededError:
        return DeadlineExceededError(
            f"group {self.operation.group!r}: no answer within {self._timeout_s:g} s",
            timeout_s=self._timeout_s,
            group=self.operation.group,
        )

    def _nobody(self) -> NodeUnavailableError:
        nodes = self._nodes.view.nodes
        known = ", ".join(sorted(nodes)[:8]) + " and more" * (len(nodes) > 8)
        last = max(nodes.values(), key=lambda node: node.lost_s)
        return NodeUnavailableError(f"no node can be reached now, of {known}; the last: {last.why}")


def _silent(node: Node) -> NodeUnavailableError:
    return NodeUnavailableError(f"the node at {node.address} gives no sign of life")
