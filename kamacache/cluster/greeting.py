"""How two nodes' link begins: the asking end says who it is, and checks who answers.

*Process*: worker. No grpc: `kamacache.cluster.link` carries it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Final

from kamacache.cluster.proving import Proving, RefusedError, Trust
from kamacache.repeated import RepeatedLog
from kamacache.wire.messages import PEER_FORMAT, Hello, Welcome

__all__ = ["Greeting", "LinkEnd", "RefusedError"]

log = RepeatedLog(logging.getLogger("kamacache.cluster"))


@dataclass(frozen=True, slots=True)
class LinkEnd:
    """This end of the links: the node's name on the ring, the id of its life, the worker."""

    node: str
    node_id: str
    worker: int
    trust: Trust = field(default_factory=Trust)


class Greeting:
    """What is said and checked first on each stream to one address."""

    __slots__ = ("_address", "_end", "proving")

    def __init__(self, address: str, end: LinkEnd) -> None:
        self._address: Final = address
        self._end: Final = end
        self.proving = Proving(end.trust)  # of the last stream

    def begin(self, sent: int) -> Hello:
        """Return the first word of a new stream."""
        self.proving = Proving(self._end.trust)
        return self.proving.begin(self.hello(sent))

    def hello(self, sent: int = 0) -> Hello:
        """Return what to say, at this version of the clock."""
        end = self._end
        return Hello(
            format=PEER_FORMAT,
            node=end.node,
            node_id=end.node_id,
            worker=end.worker,
            peer=self._address,
            sent=sent,
        )

    def check(self, welcome: Welcome) -> None:
        """Raise `RefusedError` where the one who answers is no peer; log where names differ."""
        self.proving.check(welcome)
        if welcome.node_id == self._end.node_id:
            raise RefusedError(
                f"{self._address} is this node itself: give it --advertise with the name that the "
                "other nodes have for it"
            )
        if welcome.format != PEER_FORMAT:
            raise RefusedError(
                f"the node speaks format {welcome.format} and this one {PEER_FORMAT}: "
                "use one version of kamacache on all nodes"
            )
        if welcome.node != self._address:
            log.warning(
                "a peer calls itself otherwise than this node calls it, so that the two disagree "
                "on who owns what: give it --advertise with the name that is in --peers",
                about=self._address,
                peer=self._address,
                own_name=welcome.node,
            )
