"""What gRPC says of a TLS handshake that failed, in words that tell what to do about it.

*Process*: worker, and gRPC clients. No grpc: it is their texts that are read here, those of grpcio
1.85 (`tests/client/test_access.py` has them happen).
"""

from __future__ import annotations

from typing import Final, NamedTuple


class Trouble(NamedTuple):
    """Why there is no connection."""

    what: str
    certain: bool  # else the other end may just have died


# In a connection's first moments; later the same words mean that it broke.
_CONNECTING: Final = "failed to connect to all addresses"
_STRANGE: Final = (
    "its certificate comes from none of those that are trusted here: give the certificate of its "
    "CA as tls_ca"
)
_OTHER_NAME: Final = (
    "its certificate is not for the name or address under which it was called: make one with that "
    "in its subjectAltName, or call it by a name that it has"
)
_EXPIRED: Final = "its certificate has expired: put a new one in its place there, and reload"
_EARLY: Final = "its certificate is not valid yet: look at the clocks of both hosts"
_PLAIN: Final = "it does not speak TLS: leave tls_ca away here, or start it with TLS"
_REFUSED: Final = "its certificate is refused"
_BY_TEXT: Final = {
    "certificate has expired": _EXPIRED,
    "certificate is not yet valid": _EARLY,
    "unable to get local issuer certificate": _STRANGE,
    "self signed certificate": _STRANGE,
    "CERTIFICATE_VERIFY_FAILED": _REFUSED,
    "Hostname Verification Check failed": _OTHER_NAME,
    "WRONG_VERSION_NUMBER": _PLAIN,
}
_SECURE_END: Final = "Secure read failed"  # what follows varies, by when the other end closed
_CLOSED: Final = (_SECURE_END, "Socket closed", "Connection reset by peer", "Broken pipe")
_SECURE_CLOSED: Final = (
    "it ended the TLS handshake: it may demand a client certificate (tls_cert and tls_key) of a CA "
    "that it trusts, or find ours expired"
)
_PLAIN_CLOSED: Final = "it closed the connection at once: if it speaks TLS, tls_ca is needed here"


def why_no_handshake(details: str, *, tls: bool) -> Trouble | None:
    """Return what was wrong with certificates, None where it was something else.

    ``tls``: whether this end speaks it.
    """
    if _CONNECTING not in details:
        return None
    for text, what in _BY_TEXT.items():
        if text in details:
            tail = f" ({_tail(details)})" if what is _REFUSED else ""
            return Trouble(what + tail, certain=True)
    if any(text in details for text in _CLOSED):
        secure = tls or _SECURE_END in details
        return Trouble(_SECURE_CLOSED if secure else _PLAIN_CLOSED, certain=False)
    return None


def _tail(details: str) -> str:
    return details.partition("CERTIFICATE_VERIFY_FAILED")[2].strip(": ").removesuffix(": OK")[:100]
