"""A node's certificates: read, proven to work, made into contexts. No grpc here.

*Process*: supervisor, command and embedding program (`check`, `cautions`), the roles that serve or
dial with them (`load`).

A certificate is proven by a handshake of the node with itself, in memory: that the key is its key,
that it has begun and not expired, that it is one of a server, and for which names it stands.

*Invariants*: what is proven is what is used: the bytes are read once and given to OpenSSL as they
are. Nothing here logs or returns a part of a key. What the supervisor found good last is in the
memory that its roles are forked with (`load`): a file that was spoiled since then, and that a
reload has refused, does not keep a role from coming back.
"""

from __future__ import annotations

import contextlib
import os
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Final

from kamacache.errors import ConfigError
from kamacache.limits import TLS_EXPIRY_WARNING_DAYS
from kamacache.rundir.live import SecurityFiles
from kamacache.security.files import read_bounded
from kamacache.security.proven import LastProven

_DAY_S: Final = 86_400
_EXPIRED: Final = 10  # X509_V_ERR_... of OpenSSL, as the next ones
_NOT_BEGUN: Final = 9
_PURPOSE: Final = 26
# OIDs in DER. gRPC's TLS (BoringSSL) offers no signatures of these, and no handshake would succeed.
_REFUSED_KEYS: Final = {b"\x06\x03\x2b\x65\x70": "Ed25519", b"\x06\x03\x2b\x65\x71": "Ed448"}
_ALPN: Final = ["http/1.1"]


@dataclass(frozen=True, slots=True)
class Material:
    """The bytes of one node's files, PEM each; proven by `load`."""

    cert: bytes
    key: bytes = field(repr=False)
    ca: bytes | None  # which other nodes' certificates come from
    client_ca: bytes | None  # which clients' do, every one of them
    expires_unix_s: int = 0  # notAfter of the node's own; 0: it was not looked at


def check(files: SecurityFiles) -> None:
    """Raise `ConfigError` unless a node can serve and dial with these files."""
    _proven.check(files)


def proven(files: SecurityFiles) -> Material:
    """Return what the files hold; raises `ConfigError` as `check`."""
    material = _read(files)
    return replace(material, expires_unix_s=_prove(files, material))


def load(files: SecurityFiles) -> Material | None:
    """Return what the files hold, None for a node without a certificate. See `LastProven.load`."""
    return _proven.load(files) if files.tls_cert else None


def cautions(files: SecurityFiles) -> list[str]:
    """Return what will be wrong soon; raises `ConfigError` as `check`."""
    material = _read(files)
    found = _about(files.tls_cert, material)
    said = []
    left_days = (ssl.cert_time_to_seconds(found["notAfter"]) - time.time()) / _DAY_S
    if left_days < TLS_EXPIRY_WARNING_DAYS:
        said.append(
            f"{files.tls_cert}: the certificate expires in {max(0, int(left_days))} days, on "
            f"{found['notAfter']}; put a new one in its place and reload"
        )
    for path, data in ((files.tls_ca, material.ca), (files.tls_client_ca, material.client_ca)):
        expiring = [ca["notAfter"] for ca in _authorities(data) if _left_days(ca) < 0]
        if expiring:
            said.append(f"{path}: of its certificates {len(expiring)} have expired")
    return said


def check_peering(files: SecurityFiles, name: str) -> None:
    """Raise `ConfigError` unless other nodes can know this one, HOST:PORT, by its certificate."""
    host = name.rpartition(":")[0].strip("[]")
    material = _read(files)
    if material.ca is None:
        raise ConfigError(
            "the nodes of this cluster talk over TLS, and this one is not told whose certificates "
            "to trust in the others; give --tls-ca FILE",
            setting="tls_ca",
        )
    try:
        _about(files.tls_cert, material, host=host)
    except ssl.SSLCertVerificationError as error:
        raise ConfigError(
            f"{files.tls_cert}: the certificate is for {_names(_about(files.tls_cert, material))}, "
            f"and the other nodes call this one {host}, so that they would refuse it; make one "
            f"whose subjectAltName has {host}, or give --advertise with a name that it has",
            setting="tls_cert",
            value=files.tls_cert,
        ) from error
    if material.client_ca is not None:  # the others', too, and this node is their client
        prove_client(str(files.tls_cert), material.cert, material.key)


def why_restart(old: SecurityFiles, new: SecurityFiles) -> str | None:
    """Return why a running node cannot go over to these files, None where it can."""
    if bool(old.tls_cert) != bool(new.tls_cert):
        return (
            "TLS cannot be turned on or off while the node runs (tls_cert); restart it, and all "
            "nodes of the cluster with it"
        )
    if bool(old.tls_client_ca) != bool(new.tls_client_ca):
        return (
            "whether clients need a certificate cannot change while the node runs (tls_client_ca); "
            "restart it"
        )
    return None


def server_context(material: Material) -> ssl.SSLContext:
    """Return the context of a server that speaks HTTP/1.1 over TLS 1.2 or later."""
    context = _server(material.cert, material.key)
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(_ALPN)
    if material.client_ca is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        with _as_file(material.client_ca) as path:
            context.load_verify_locations(path)
    return context


# -- reading ------------------------------------------------------------------------------------


def _paths(files: SecurityFiles) -> tuple[str | None, ...]:
    return files.tls_cert, files.tls_key, files.tls_ca, files.tls_client_ca


_proven: Final = LastProven(
    "a certificate cannot be used; what it was at the last check stays in force", _paths, proven
)


def _read(files: SecurityFiles) -> Material:
    if not (files.tls_cert and files.tls_key):
        _refuse_half(files)
    assert files.tls_cert is not None
    assert files.tls_key is not None
    return Material(
        cert=read_bounded("tls_cert", files.tls_cert),
        key=read_bounded("tls_key", files.tls_key, secret=True),
        ca=read_bounded("tls_ca", files.tls_ca) if files.tls_ca else None,
        client_ca=read_bounded("tls_client_ca", files.tls_client_ca)
        if files.tls_client_ca
        else None,
    )


def _refuse_half(files: SecurityFiles) -> None:
    given = {name: getattr(files, name) for name in ("tls_cert", "tls_key")}
    for name, other in (("tls_cert", "tls_key"), ("tls_key", "tls_cert")):
        if given[name] and not given[other]:
            raise ConfigError(
                f"{name} is {given[name]}, and {other} is not set; a certificate and its key go "
                f"together: give --{other.replace('_', '-')}, too",
                setting=other,
            )
    name = "tls_client_ca" if files.tls_client_ca else "tls_ca"
    raise ConfigError(
        f"{name} is {getattr(files, name)}, and this node has no certificate of its own; give "
        "--tls-cert and --tls-key, too",
        setting=name,
        value=getattr(files, name),
    )


@contextlib.contextmanager
def _as_file(data: bytes) -> Iterator[str]:
    """Lend bytes as a file, which is all that the ssl module takes; it is in memory only."""
    fd = os.memfd_create("kamacache-tls", os.MFD_CLOEXEC)
    with os.fdopen(fd, "wb") as file:
        file.write(data)
        file.flush()
        yield f"/proc/self/fd/{fd}"


# -- proving ------------------------------------------------------------------------------------


def _prove(files: SecurityFiles, material: Material) -> int:
    """Return when the certificate expires; raises `ConfigError`."""
    found = _about(files.tls_cert, material)
    for setting, path, data in (
        ("tls_ca", files.tls_ca, material.ca),
        ("tls_client_ca", files.tls_client_ca, material.client_ca),
    ):
        if data is not None:
            prove_authorities(setting, str(path), data)
    return int(ssl.cert_time_to_seconds(found["notAfter"]))


def prove_authorities(setting: str, path: str, data: bytes) -> None:
    """Raise `ConfigError` unless these are certificates of CAs, and one has not expired."""
    try:
        authorities = _authorities(data)
    except ssl.SSLError as error:
        raise ConfigError(
            f"{setting}: {path} holds no certificate in PEM ({_words(error)}); it must have the "
            "certificates of those who signed, -----BEGIN CERTIFICATE----- each",
            setting=setting,
            value=path,
        ) from error
    if not authorities:
        raise ConfigError(
            f"{setting}: {path} holds no certificate of a CA (basicConstraints CA:TRUE); name "
            "the file with the certificate that signed the others",
            setting=setting,
            value=path,
        )
    if all(_left_days(ca) < 0 for ca in authorities):
        raise ConfigError(
            f"{setting}: {path}: all its certificates have expired, the last on "
            f"{max(authorities, key=_left_days)['notAfter']}; nothing they signed is valid",
            setting=setting,
            value=path,
        )


def _about(path: str | None, material: Material, *, host: str | None = None) -> dict[str, Any]:
    """Return what the certificate says, as `ssl.SSLSocket.getpeercert`.

    Raises `ConfigError`; with ``host`` also `ssl.SSLCertVerificationError` where it is not for it.
    """
    try:
        server = _server(material.cert, material.key)
    except (ssl.SSLError, ValueError) as error:
        raise _unusable(path, error) from error
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.hostname_checks_common_name = False  # as gRPC
    client.check_hostname = host is not None
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # who signed it is not asked here
    with _as_file(material.cert) as file:
        client.load_verify_locations(file)
    try:
        shaken = _shake_hands(server, client, host)
    except ssl.SSLCertVerificationError as error:
        if host is not None and error.verify_code not in (_EXPIRED, _NOT_BEGUN, _PURPOSE):
            raise
        raise _refused(path, error, "servers", "serverAuth") from error
    except ssl.SSLError as error:
        raise _unusable(path, error) from error
    der = shaken.getpeercert(binary_form=True) or b""
    for oid, name in _REFUSED_KEYS.items():
        if oid in der:
            raise ConfigError(
                f"tls_cert: {path} has an {name} key or signature, which gRPC does not speak; make "
                "one with an ECDSA (P-256) or RSA key",
                setting="tls_cert",
                value=path,
            )
    found: Any = shaken.getpeercert()
    return dict(found)


def prove_client(path: str, cert: bytes, key: bytes) -> None:
    """Raise `ConfigError` unless a server could take the certificate, where it knows its CA."""
    try:
        server, client = _server(cert, key), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        client.check_hostname = False
        client.verify_mode = ssl.CERT_NONE  # it is the other end that judges here
        server.verify_mode = ssl.CERT_REQUIRED
        server.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        with _as_file(cert) as cert_path, _as_file(key) as key_path:
            client.load_cert_chain(cert_path, key_path)
            server.load_verify_locations(cert_path)
        _shake_hands(server, client, None)
    except ssl.SSLCertVerificationError as error:
        raise _refused(path, error, "clients", "clientAuth") from error
    except (ssl.SSLError, ValueError) as error:
        raise _unusable(path, error) from error


def _shake_hands(server: ssl.SSLContext, client: ssl.SSLContext, host: str | None) -> ssl.SSLObject:
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    theirs = server.wrap_bio(to_server, to_client, server_side=True)
    ours = client.wrap_bio(to_client, to_server, server_hostname=host)
    waiting = [ours, theirs]
    while waiting:  # each turn hands the other what it waits for, or raises
        for end in list(waiting):
            with contextlib.suppress(ssl.SSLWantReadError):
                end.do_handshake()
                waiting.remove(end)
    return ours


def _server(cert: bytes, key: bytes) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    with _as_file(cert) as cert_path, _as_file(key) as key_path:
        context.load_cert_chain(cert_path, key_path, password=_no_password)
    return context


def _no_password() -> str:
    raise ValueError("the key is encrypted")  # else OpenSSL asks at the terminal


def _authorities(data: bytes | None) -> list[dict[str, Any]]:
    """Return the CAs' certificates, those that have expired, too."""
    if data is None:
        return []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    with _as_file(data) as path:
        context.load_verify_locations(path)
    return context.get_ca_certs()


def _left_days(certificate: dict[str, Any]) -> float:
    return (ssl.cert_time_to_seconds(certificate["notAfter"]) - time.time()) / _DAY_S


def _names(certificate: dict[str, Any]) -> str:
    return ", ".join(str(name) for _, name in certificate.get("subjectAltName", ())) or "no name"


# -- words --------------------------------------------------------------------------------------


def _words(error: Exception) -> str:
    reason = getattr(error, "reason", None)
    return str(reason).lower().replace("_", " ") if reason else str(error)


def _unusable(path: str | None, error: Exception) -> ConfigError:
    reason = getattr(error, "reason", None) or ""
    if isinstance(error, ValueError):
        what = "the key in --tls-key is encrypted, and a node cannot ask for its password; "
        what += "store it without (openssl pkey -in KEY -out NEW)"
    elif reason == "KEY_VALUES_MISMATCH":
        what = "the key in --tls-key is not the key of this certificate; give the two that were "
        what += "made together, the node's own certificate first in its file"
    elif "KEY_TOO_SMALL" in reason or "MD_TOO_WEAK" in reason:
        what = f"the certificate is too weak ({_words(error)}); make one with an ECDSA (P-256) key"
    else:
        what = f"certificate and key cannot be used ({_words(error)}); both must be PEM, the "
        what += "node's own certificate first in its file and the chain behind it"
    return ConfigError(f"tls_cert: {path}: {what}", setting="tls_cert", value=path)


def _refused(
    path: str | None, error: ssl.SSLCertVerificationError, whose: str, usage: str
) -> ConfigError:
    what = {
        _EXPIRED: "the certificate has expired; put a new one in its place",
        _NOT_BEGUN: "the certificate is not valid yet; look at this host's clock (date)",
        _PURPOSE: f"the certificate is not one for {whose}; make one whose extendedKeyUsage has "
        f"{usage}",
    }.get(error.verify_code, f"the certificate cannot be used: {error.verify_message}")
    return ConfigError(f"tls_cert: {path}: {what}", setting="tls_cert", value=path)
