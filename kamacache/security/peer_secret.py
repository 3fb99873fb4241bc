"""How two nodes show each other that they know one secret, without saying it.

*Process*: worker (the asking end of a link), front (the answering end), and those of
`kamacache.security.check`. Pure functions of bytes; `kamacache.cluster.proving` and
`kamacache.front.proving` carry them::

    asker                                                  answerer
      ── Hello    names, worker, asker's nonce ──────────►
      ◄───────────────────────── Challenge    its nonce ──
      ── Proof    HMAC(line, "asks", all of that) ───────►   any of its lines? else UNAUTHENTICATED
      ◄── Welcome HMAC(line, "answers", all of that) ─────   checked before anything is believed

*Why it holds.* Replay: each end mixes in 32 random bytes of its own, so what was heard once fits
no other stream. Reflection: the two proofs carry different labels, and the names say who asked
whom, so that no end's proof can be handed back to it, nor to a third node. Relay: an answerer takes
no proof that was meant for another name than its own. Guessing: only an end that dials gives a
proof to a stranger, and only at an address of its own list; a line of 16 random characters cannot
be found from it by trial.

*Why it does not hold.* Who can change packets on their way waits until the proofs are done and goes
on in a node's place: the frames that follow carry none. That is what TLS is for.

*Rotation*: an asker proves with its first line, an answerer takes every line. A link that stands is
proven again (`RENEWS`) when the asker's first line has changed.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Self

from kamacache.errors import ConfigError
from kamacache.limits import PEER_SECRET_LINES_MAX, SECRET_CHARS_MIN
from kamacache.rundir.live import SecurityFiles
from kamacache.security.files import read_bounded
from kamacache.security.proven import LastProven

NONCE_BYTES: Final = 32
ASKS: Final = b"kamacache peer link 1, who asks"
ANSWERS: Final = b"kamacache peer link 1, who answers"
RENEWS: Final = b"kamacache peer link 1, who asks, again"
RENEWED: Final = b"kamacache peer link 1, who answers, again"


class PeerSecrets:
    """The lines of a file, as keys; the first is what this node proves with."""

    __slots__ = ("_keys",)

    def __init__(self, lines: Iterable[str]) -> None:
        # Hashed, so that the keys are of one length, and none of them is a line.
        self._keys = tuple(hashlib.sha256(line.encode()).digest() for line in lines)

    @classmethod
    def load(cls, path: str) -> Self:
        """Read a file; raises `ConfigError`, which tells no secret."""
        data = read_bounded("peer_secret", path, secret=True)
        try:
            lines = [line.strip() for line in data.decode("utf-8").splitlines()]
        except UnicodeDecodeError:
            raise _bad(path, "it is not UTF-8") from None
        lines = [line for line in lines if line]
        if not 1 <= len(lines) <= PEER_SECRET_LINES_MAX:
            raise _bad(
                path,
                f"it has {len(lines)} lines; write the secret into the first, and up to "
                f"{PEER_SECRET_LINES_MAX - 1} others that are taken, too, while it changes",
            )
        for number, line in enumerate(lines, 1):
            if len(line) < SECRET_CHARS_MIN:
                raise _bad(
                    path,
                    f"line {number} has fewer than {SECRET_CHARS_MIN} characters; make one with: "
                    "openssl rand -hex 32",
                )
        return cls(lines)

    @classmethod
    def of_key(cls, key: bytes) -> Self:
        """Return the one line that this is the key of."""
        made = cls(())
        made._keys = (key,)
        return made

    @property
    def own(self) -> bytes:
        """The key that this node proves with."""
        return self._keys[0]

    def has(self, key: bytes | None) -> bool:
        """Tell whether a key is still one of these."""
        return key in self._keys

    def proven(self, meeting: Meeting, label: bytes, proof: bytes) -> bytes | None:
        """Return the key that a proof was made with, None where it is none of these."""
        found = None
        for key in self._keys:
            if hmac.compare_digest(meeting.proof(key, label), proof):
                found = key  # and on to the last
        return found

    def __repr__(self) -> str:
        return f"<PeerSecrets, {len(self._keys)} lines>"


@dataclass(frozen=True, slots=True)
class Meeting:
    """What both ends of one stream know of it, when they prove that they know the secret."""

    asker: str  # its name on the ring
    asker_id: str  # of its node's life
    worker: int
    answerer: str  # the name under which it was asked, which must be its own
    asker_nonce: bytes
    answerer_nonce: bytes

    def proof(self, key: bytes, label: bytes) -> bytes:
        """Return what only who has the key can make; ``label`` says for what."""
        texts = (self.asker, self.asker_id, str(self.worker), self.answerer)
        parts = (label, *(text.encode() for text in texts), self.asker_nonce, self.answerer_nonce)
        said = hmac.new(key, digestmod=hashlib.sha256)
        for part in parts:  # with its length before it, so that no two meetings read the same
            said.update(len(part).to_bytes(4, "big") + part)
        return said.digest()


def nonce() -> bytes:
    """Return random bytes that were never used before."""
    return os.urandom(NONCE_BYTES)


_proven: Final = LastProven(
    "the peers' secret cannot be used; that of the last check stays in force",
    lambda files: files.peer_secret,
    lambda files: PeerSecrets.load(str(files.peer_secret)),
)


def check(files: SecurityFiles) -> None:
    """Raise `ConfigError` unless the file of the peers' secret can be used."""
    if files.peer_secret:
        _proven.check(files)


def load(files: SecurityFiles) -> PeerSecrets | None:
    """Return the secrets, None where the nodes do without. For the roles; see `LastProven.load`."""
    return _proven.load(files) if files.peer_secret else None


def _bad(path: str, what: str) -> ConfigError:
    return ConfigError(f"peer_secret: {path}: {what}", setting="peer_secret", value=path)
