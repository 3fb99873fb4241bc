"""A CA for tests, and files of what it signs, put in place as a tool for certificates does it."""

from __future__ import annotations

import datetime
import os
import socket
import ssl
from pathlib import Path

import trustme
from cryptography import x509

from kamacache.rundir.live import LiveSettings, SecurityFiles

NOW = datetime.datetime.now(datetime.UTC)


class Pki:
    """A CA, and the files of the certificates that it signed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ca = trustme.CA()
        self.ca_path = str(folder / "ca.pem")
        self.ca.cert_pem.write_to_path(self.ca_path)

    def issue(
        self,
        *names: str,
        file: str = "node",
        days: float = 365,
        begun_days: float = 1,
        key_type: trustme.KeyType = trustme.KeyType.ECDSA,
    ) -> SecurityFiles:
        """Return the paths of a new certificate and its key, which replace those of that name."""
        made = self.ca.issue_cert(
            *(names or ("127.0.0.1",)),
            not_before=NOW - datetime.timedelta(days=begun_days),
            not_after=NOW + datetime.timedelta(days=days),
            key_type=key_type,
        )
        cert, key = self.folder / f"{file}.pem", self.folder / f"{file}.key"
        for path, data in (
            (cert, b"".join(pem.bytes() for pem in made.cert_chain_pems)),
            (key, made.private_key_pem.bytes()),
        ):
            fresh = path.with_suffix(".new")
            fresh.write_bytes(data)
            fresh.chmod(0o600)
            fresh.replace(path)
        return SecurityFiles(tls_cert=str(cert), tls_key=str(key))

    def mutual(self, *names: str, file: str = "node", days: float = 365) -> SecurityFiles:
        """Return such paths, with the CA for peers and for clients, too."""
        return changed(
            self.issue(*names, file=file, days=days),
            tls_ca=self.ca_path,
            tls_client_ca=self.ca_path,
        )

    def client_context(self, own: SecurityFiles | None = None) -> ssl.SSLContext:
        """Return a context that trusts this CA, and shows a certificate of ``own``."""
        context = ssl.create_default_context(cafile=self.ca_path)
        if own is not None and own.tls_cert:
            context.load_cert_chain(own.tls_cert, own.tls_key)
        return context


def changed(files: SecurityFiles, **names: str | None) -> SecurityFiles:
    """Return the files with other paths."""
    known = {name: getattr(files, name) for name in SecurityFiles.__struct_fields__}
    return SecurityFiles(**{**known, **names})


def flags(files: SecurityFiles) -> list[str]:
    """Return the files as flags of ``kamacache-node``."""
    found = []
    for name in SecurityFiles.__struct_fields__:
        if path := getattr(files, name):
            found += ["--" + name.replace("_", "-"), path]
    return found


def live(files: SecurityFiles, number: int = 1) -> LiveSettings:
    """Return what a reload says of the files."""
    return LiveSettings(number=number, security=files)


def serial_of(files: SecurityFiles) -> int:
    """Return the serial number of the certificate that lies there."""
    return x509.load_pem_x509_certificate(Path(str(files.tls_cert)).read_bytes()).serial_number


def expiry_of(files: SecurityFiles) -> int:
    """Return when the certificate that lies there expires, in Unix time."""
    found = x509.load_pem_x509_certificate(Path(str(files.tls_cert)).read_bytes())
    return int(found.not_valid_after_utc.timestamp())


def serial_at(address: str, context: ssl.SSLContext, *alpn: str) -> int:
    """Return the serial number of the certificate that a new handshake shows."""
    host, _, port = address.rpartition(":")
    if alpn:
        context.set_alpn_protocols(alpn)
    with (
        socket.create_connection((host, int(port)), 5) as raw,
        context.wrap_socket(raw, server_hostname=host) as secure,
    ):
        der = secure.getpeercert(binary_form=True)
    assert der
    return x509.load_der_x509_certificate(der).serial_number


def spoil(files: SecurityFiles) -> None:
    """Make the certificate's file one that nobody can use."""
    path = Path(str(files.tls_cert))
    fresh = path.with_suffix(".new")
    fresh.write_text("-----BEGIN CERTIFICATE-----\nnot finished")
    os.replace(fresh, path)
