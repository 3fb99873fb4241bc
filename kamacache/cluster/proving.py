"""The peers' secret on a link: what each end keeps of it, and what the asking end does with it.

*Process*: worker (`Proving`), front (`kamacache.front.proving`); both keep a `Trust`. Why it holds,
and what it does not do: `kamacache.security.peer_secret`. No grpc.
"""

from __future__ import annotations

from typing import Final

from kamacache.rundir.live import LiveSettings
from kamacache.security import peer_secret
from kamacache.security.peer_secret import ANSWERS, ASKS, RENEWED, RENEWS, Meeting, PeerSecrets
from kamacache.wire.messages import Challenge, Hello, Proof, Proven, Welcome


class RefusedError(Exception):
    """The node at the address cannot be linked to, and waiting does not mend it."""


class Trust:
    """The peers' secret of one process, as of the last reload."""

    __slots__ = ("secrets",)

    def __init__(self, secrets: PeerSecrets | None = None) -> None:
        self.secrets = secrets  # None: nodes link without a proof

    def apply(self, live: LiveSettings) -> None:
        """Take the secret of a reload; raises `ConfigError`, and the one in force stays."""
        self.secrets = peer_secret.load(live.security)


def meeting_of(hello: Hello, answerer_nonce: bytes) -> Meeting:
    """Return what both ends know of the stream that begins with a hello."""
    return Meeting(
        asker=hello.node,
        asker_id=hello.node_id,
        worker=hello.worker,
        answerer=hello.peer,
        asker_nonce=hello.nonce,
        answerer_nonce=answerer_nonce,
    )


class Proving:
    """The asking end's part in one stream."""

    __slots__ = ("_hello", "_meeting", "_trust", "key")

    def __init__(self, trust: Trust) -> None:
        self._trust: Final = trust
        self._hello: Hello | None = None
        self._meeting: Meeting | None = None
        self.key: bytes | None = None  # that this stream was proven with; None: with none

    def begin(self, hello: Hello) -> Hello:
        """Return the first word of the stream: with a secret it asks for a challenge."""
        secrets = self._trust.secrets
        if secrets is not None:
            self.key = secrets.own
            hello.nonce = peer_secret.nonce()
        self._hello = hello
        return hello

    def prove(self, challenge: Challenge) -> Proof:
        """Return the answer to a challenge; raises `RefusedError`."""
        hello, key = self._hello, self.key
        if hello is None or key is None or self._meeting is not None:
            raise RefusedError("it wants a proof where none was offered")
        if len(challenge.nonce) != peer_secret.NONCE_BYTES:
            raise RefusedError("its challenge is none")
        self._meeting = meeting_of(hello, challenge.nonce)
        return Proof(proof=self._meeting.proof(key, ASKS))

    def check(self, welcome: Welcome) -> None:
        """Raise `RefusedError` unless who answers has proven itself, too, if that is wanted."""
        if self.key is None:
            return
        if self._meeting is None:
            raise RefusedError(
                "it has no peer secret, and this node has one: give all nodes one --peer-secret"
            )
        if not self._proven(welcome.proof, ANSWERS):
            raise RefusedError("it did not prove that it knows the peers' secret")

    # -- after a reload ---------------------------------------------------------------------

    @property
    def stale(self) -> bool:
        """Whether this node proves with another line now."""
        secrets = self._trust.secrets
        return secrets is not None and secrets.own != self.key

    @property
    def revoked(self) -> bool:
        """Whether what this stream was proven with is no longer among the lines."""
        secrets = self._trust.secrets
        return secrets is not None and not secrets.has(self.key)

    def renew(self) -> Proof | None:
        """Return a new proof for the stream that stands; None where it never had one."""
        secrets = self._trust.secrets
        if self._meeting is None or secrets is None:
            return None
        return Proof(proof=self._meeting.proof(secrets.own, RENEWS))

    def renewed(self, answer: Proven) -> None:
        """Take the answer to a new proof; nothing changes where it is not right."""
        secrets = self._trust.secrets
        if self._meeting is None or secrets is None:
            return
        key = secrets.proven(self._meeting, RENEWED, answer.proof)
        if key is not None:
            self.key = key

    def _proven(self, proof: bytes, label: bytes) -> bool:
        key, meeting = self.key, self._meeting
        return (
            key is not None
            and meeting is not None
            and PeerSecrets.of_key(key).proven(meeting, label, proof) is not None
        )
