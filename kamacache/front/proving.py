"""Which links of other nodes are let in, where the nodes of a cluster know each other by a secret.

*Process*: front, on its loop. A link says three things before it is served: `Hello`, then `Proof`
in answer to a `Challenge`, each alone in one short message. `kamacache.security.peer_secret` has
the drawing, and says why it holds.

*Invariants*: until a link is proven nothing of it is acted on, and nothing is told but a random
number; it has `PEER_PROOF_S` for it, and so many at once are at it: one more, and the oldest ends.
So a node, which answers within a round trip, gets in among however many that never do. A proof that
was meant for another node, or came from this one, is none.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import grpc

from kamacache.cluster.proving import Trust, meeting_of
from kamacache.cluster.stream import FrameSplitter, pack
from kamacache.limits import PEER_PROOF_S, PEER_UNPROVEN_MAX, PEER_WORD_BYTES_MAX
from kamacache.security import peer_secret
from kamacache.security.peer_secret import ANSWERS, ASKS, RENEWED, RENEWS, Meeting, PeerSecrets
from kamacache.wire.frames import FrameError, frame
from kamacache.wire.messages import Challenge, DecodeError, Hello, Proof, Proven, decode_request

Word = TypeVar("Word", Hello, Proof)
NAME_CHARS_MAX: Final = 64  # of what a link calls itself, in the log


class UnprovenError(Exception):
    """A link is refused: for the log, and in words for the node at its other end."""

    def __init__(
        self,
        message: str,
        told: str,
        peer: str = "",
        code: grpc.StatusCode = grpc.StatusCode.UNAUTHENTICATED,
    ) -> None:
        super().__init__(message)
        self.told: Final = told
        self.peer: Final = peer[:NAME_CHARS_MAX]
        self.code: Final = code  # `kamacache.cluster.link` knows which waiting mends


def unwanted(hello: Hello) -> UnprovenError:
    """Return the error of a link that wants a proof where this node has no secret."""
    return UnprovenError(
        "a link of a node with a peer secret was refused: this node has none",
        "it has no peer secret, and this node has one: give all nodes one --peer-secret",
        hello.node,
    )


@dataclass(slots=True)
class Admitted:
    """A link that was let in."""

    hello: Hello
    meeting: Meeting
    key: bytes  # of the line that it was proven with

    @property
    def answer(self) -> bytes:
        """What proves this end to the other."""
        return self.meeting.proof(self.key, ANSWERS)

    def renew(self, request: Proof, secrets: PeerSecrets | None) -> Proven | None:
        """Take a proof of the secret of now; None where it is none."""
        key = None if secrets is None else secrets.proven(self.meeting, RENEWS, request.proof)
        if key is None:
            return None
        self.key = key
        return Proven(request.id, self.meeting.proof(key, RENEWED))


class Porter:
    """Lets links in."""

    def __init__(
        self,
        trust: Trust,
        name: str,
        *,
        proof_s: float = PEER_PROOF_S,
        unproven_max: int = PEER_UNPROVEN_MAX,
    ) -> None:
        """``name`` is this node's own on the ring."""
        self.trust: Final = trust
        self._name: Final = name
        self._proof_s: Final = proof_s
        self._unproven_max: Final = unproven_max
        # The times of links that are at it now, the oldest first.
        self._unproven: Final[dict[asyncio.Timeout, None]] = {}
        self.refused = 0

    async def admit(self, context: Any, is_own: Callable[[Hello], bool]) -> Admitted:
        """Return a link that is proven. Raises `UnprovenError`, and nothing was told.

        ``is_own`` tells whether it is this node itself that says hello.
        """
        crowded_out = False
        try:
            async with asyncio.timeout(self._proof_s) as limit:
                if len(self._unproven) >= self._unproven_max:
                    self._end_oldest()
                self._unproven[limit] = None
                try:
                    return await self._prove(context, is_own)
                finally:
                    crowded_out = limit not in self._unproven
                    self._unproven.pop(limit, None)
        except TimeoutError:
            self.refused += 1
            if crowded_out:
                raise UnprovenError(
                    "links that are not proven are too many; the oldest end",
                    "too many links wait to be proven; try again",
                    code=grpc.StatusCode.RESOURCE_EXHAUSTED,
                ) from None
            raise UnprovenError(
                "a link did not prove in time that it is a node's",
                "the proof came too late",
                code=grpc.StatusCode.DEADLINE_EXCEEDED,
            ) from None
        except UnprovenError:
            self.refused += 1
            raise

    @property
    def unproven(self) -> int:
        """How many links are at it now."""
        return len(self._unproven)

    def _end_oldest(self) -> None:
        oldest = next(iter(self._unproven))
        del self._unproven[oldest]
        if not oldest.expired():  # its task may not have run since
            oldest.reschedule(asyncio.get_running_loop().time())

    async def _prove(self, context: Any, is_own: Callable[[Hello], bool]) -> Admitted:
        secrets = self.trust.secrets
        hello = await _word(context, Hello)
        if not hello.nonce:
            raise UnprovenError(
                "a link of a node without the peers' secret was refused",
                "it wants the peers' secret, and this node has none: give all nodes one "
                "--peer-secret",
                hello.node,
            )
        if len(hello.nonce) != peer_secret.NONCE_BYTES or secrets is None:
            raise _garbage(hello.node)
        challenge = Challenge(hello.id, peer_secret.nonce())
        meeting = meeting_of(hello, challenge.nonce)
        said = frame(challenge)
        await context.write(pack([said], len(said)))
        proof = await _word(context, Proof)
        key = secrets.proven(meeting, ASKS, proof.proof)
        if key is None:
            raise UnprovenError(
                "a link of a node with another peer secret was refused",
                "it has another peer secret than this node: give all nodes the same",
                hello.node,
            )
        if is_own(hello):  # or who hands us back what we proved elsewhere
            raise UnprovenError(
                "this node has linked to itself",
                "it is this node itself: give it --advertise with the name that the other nodes "
                "have for it",
                hello.node,
                grpc.StatusCode.FAILED_PRECONDITION,
            )
        if hello.peer != self._name:
            raise UnprovenError(
                "a link that was meant for a node of another name was refused",
                f"it calls itself {self._name}, and a proof is good for one name: give it "
                "--advertise with the name that is in --peers",
                hello.node,
                grpc.StatusCode.FAILED_PRECONDITION,
            )
        return Admitted(hello, meeting, key)


async def _word(context: Any, kind: type[Word]) -> Word:
    """Return the one thing that a message says."""
    message = await context.read()
    if message is grpc.aio.EOF or len(message) > PEER_WORD_BYTES_MAX:
        raise _garbage()
    frames = FrameSplitter()
    try:
        said = [decode_request(body) for body in frames.bodies(message)]
    except (FrameError, DecodeError):
        raise _garbage() from None
    if len(said) != 1 or frames.held_bytes or not isinstance(said[0], kind):
        raise _garbage()
    return said[0]


def _garbage(peer: str = "") -> UnprovenError:
    return UnprovenError(
        "a link that is no node's was refused", "what was said is not how a link begins", peer
    )
