"""Who waits for several keys on behalf of callers that know nothing of each other.

*Process*: worker, in the loop's thread. What is settled in one turn of the loop is answered
together; a key that takes long holds up none of the others.
"""

from __future__ import annotations

from collections.abc import Sequence

from kamacache.config import GroupSpec
from kamacache.errors import KamaCacheError, to_fields
from kamacache.wire.messages import Answers, Gets, KeyFailure
from kamacache.wire.parts import in_frames
from kamacache.worker.flights import Flight, Outcome
from kamacache.worker.replies import Holder, meta
from kamacache.worker.waiters import Asker, Deadlines, Wait


class EachWaiter(Wait):
    """Answers a `Gets`, each key when it is there."""

    __slots__ = ("_keys", "_places", "_settled", "pending")

    def __init__(
        self,
        request: Gets,
        asker: Asker,
        spec: GroupSpec,
        deadlines: Deadlines,
        shard: Holder,
        keys: Sequence[bytes],
    ) -> None:
        """``keys`` are those that are not answered yet, each once."""
        super().__init__(request, asker, spec, deadlines, shard)
        self._keys = request.keys
        self._places: dict[bytes, list[int]] | None = None
        self._settled: list[tuple[bytes, Outcome]] = []  # in this turn of the loop
        self.pending: dict[bytes, Flight | None] = dict.fromkeys(keys)  # None: not known, a batch's

    def settle(self, flight: Flight, outcome: Outcome) -> None:
        """Answer it, with what else is settled in this turn of the loop."""
        self.settle_key(flight.key, outcome)

    def settle_key(self, key: bytes, outcome: Outcome) -> None:
        """Do so for a key of a `kamacache.worker.batches.Batch`."""
        if key not in self.pending:
            return  # answered for want of time
        del self.pending[key]
        if not self._settled:
            self._deadlines.loop.call_soon(self._answer_settled)
        self._settled.append((key, outcome))

    def settle_all(self, keys: Sequence[bytes], values: list[bytes | None]) -> None:
        """Do so for all keys of one; where they are the whole request they pass as they are."""
        if keys is not self._keys:
            for key, value in zip(keys, values, strict=True):
                self.settle_key(key, value)
        elif self.pending:
            self.pending = {}
            self._answer(Answers(self._id, values))

    def late(self) -> None:
        """Answer what is settled, and say of the rest that the time is over."""
        self._answer_settled()
        if self.pending:
            super().late()

    def leave(self) -> None:
        """Be gone."""
        super().leave()
        pending, self.pending = self.pending, {}
        for flight in pending.values():
            if flight is not None:
                flight.leave(self)

    def _answer_settled(self) -> None:
        settled, self._settled = self._settled, []
        if not settled:
            return  # at the deadline, which came first in this turn
        if self._places is None:
            self._places = places_of(self._keys)
        self._answer(each(self._id, settled, self._places, self._for_peer))

    def _answer(self, reply: Answers) -> None:
        if not self.pending:
            self._deadlines.waits.pop(self, None)
            self._asker.waiters.pop(self, None)
        for part in in_frames(reply):
            self._asker.answer(part)


def places_of(keys: Sequence[bytes]) -> dict[bytes, list[int]]:
    """Return the indexes of each key."""
    places: dict[bytes, list[int]] = {}
    for index, key in enumerate(keys):
        places.setdefault(key, []).append(index)
    return places


def each(
    request_id: int,
    settled: Sequence[tuple[bytes, Outcome]],
    places: dict[bytes, list[int]],
    for_peer: Holder | None,
) -> Answers:
    """Return what is known of some keys; a peer is told time to live and version, too."""
    reply = Answers(request_id, [], [], [], [], [])
    for key, outcome in settled:
        if isinstance(outcome, KamaCacheError):
            fields = to_fields(outcome)
            reply.errors += [KeyFailure(index, *fields) for index in places[key]]
            continue
        for index in places[key]:
            reply.values.append(outcome)
            reply.at.append(index)
            if for_peer is not None:
                ttl_ms, version = meta(key, outcome, for_peer)
                reply.ttls.append(ttl_ms)
                reply.versions.append(version)
    return reply
