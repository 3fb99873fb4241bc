"""Who is let in: tokens looked up, refusals counted, logged and slowed down.

*Process*: front and http, in the loop's thread; one `Access` each. *Owns*: the tokens in force.

*Invariants*: a token is looked up for each call, so that one that a reload has removed ends with
the next call, on a connection that stands as well. Nothing that a client presents is logged. A
refusal of an unknown token comes late (`ACCESS_REFUSED_WAIT_S`), as long as not too many wait
already; a known token never waits for those who guess.
"""

from __future__ import annotations

import asyncio
import binascii
import logging
from base64 import b64decode
from typing import Final

from kamacache.errors import AccessDeniedError
from kamacache.limits import ACCESS_REFUSED_WAIT_S, ACCESS_REFUSED_WAITING_MAX
from kamacache.repeated import RepeatedLog
from kamacache.rundir.live import LiveSettings
from kamacache.security import tokens
from kamacache.security.tokens import Token, Tokens

GUESSED: Final = "the token is not known to this node"
UNKNOWN: Final = "unknown"  # in the log: who presented no token that is known

log = logging.getLogger("kamacache.security")


class Access:
    """The tokens of one role, as of the last reload."""

    __slots__ = ("_log", "_waiting", "denied", "tokens", "unknown")

    def __init__(self, found: Tokens | None = None) -> None:
        self.tokens = found  # None: everybody may do everything
        self.unknown = 0  # calls that were refused for want of a token
        self.denied = 0  # those beyond the scopes of a known one
        self._log: Final = RepeatedLog(log)  # one line of many, for each token
        self._waiting = 0

    def apply(self, live: LiveSettings) -> None:
        """Take the tokens of a reload; raises `ConfigError`, and those in force stay."""
        self.tokens = tokens.load(live.security)

    def identify(self, header: str | bytes | None, client: str) -> Token | None:
        """Return who a client is, by its ``authorization``; None where there are no tokens.

        Raises `AccessDeniedError` where the header has no token, or an unknown one.
        """
        known = self.tokens
        if known is None:
            return None
        presented = _presented(header)
        if presented is None:
            self.unknown += 1
            self._note("a call without a token was refused", UNKNOWN, client)
            raise AccessDeniedError(
                "this node wants a token: send it as authorization: Bearer TOKEN"
            )
        token = known.find(presented)
        if token is None:
            self.unknown += 1
            self._note("a call with an unknown token was refused", UNKNOWN, client)
            raise AccessDeniedError(GUESSED)
        return token

    def permit(self, token: Token | None, group: str, client: str, *, write: bool) -> None:
        """Raise `AccessDeniedError` where a group is beyond a token's scopes.

        The same whether there is such a group or not.
        """
        if token is None or (token.may_write(group) if write else token.may_read(group)):
            return
        right = "write to" if write else "read from"
        raise self.refused(token, f"{right} group {group[:64]!r}", client, group=group[:64])

    def permit_stats(self, token: Token | None, what: str, client: str) -> None:
        """Raise `AccessDeniedError` where a token is not for numbers of the whole node."""
        if token is not None and not token.stats:
            raise self.refused(token, f"read {what}; it needs stats = true", client)

    def refused(
        self, token: Token, what: str, client: str, group: str | None = None
    ) -> AccessDeniedError:
        """Count, log and return the error of what a token may not do."""
        self.denied += 1
        self._note("a token was used beyond its scopes", token.name, client)
        return AccessDeniedError(
            f"the token {token.name!r} may not {what}", token=token.name, group=group
        )

    async def wait(self, error: AccessDeniedError) -> None:
        """Let who guesses tokens wait for the answer; not all of them, where they are many."""
        if error.message != GUESSED or self._waiting >= ACCESS_REFUSED_WAITING_MAX:
            return
        self._waiting += 1
        try:
            await asyncio.sleep(ACCESS_REFUSED_WAIT_S)
        finally:
            self._waiting -= 1

    def _note(self, message: str, name: str, client: str) -> None:
        self._log.warning(message, about=name, token=name, client=client)


def _presented(header: str | bytes | None) -> bytes | None:
    """Return the token of ``Bearer TOKEN``, or of ``Basic`` with the token as the password."""
    if header is None:
        return None
    text = header.encode("utf-8", "surrogateescape") if isinstance(header, str) else header
    scheme, _, rest = text.strip().partition(b" ")
    rest = rest.strip()
    if scheme.lower() == b"bearer":
        return rest or None
    if scheme.lower() == b"basic":
        try:
            return b64decode(rest, validate=True).partition(b":")[2] or None
        except binascii.Error:
            return None
    return None
