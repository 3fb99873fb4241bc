"""What a remote client trusts and shows: read, proven, and read again where the files have changed.

*Process*: the application's, the ``kamacache`` command's; any thread. No grpc here.
"""

from __future__ import annotations

import logging
import os
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from kamacache.errors import ConfigError
from kamacache.security.files import read_bounded
from kamacache.security.tls import prove_authorities, prove_client

FilePath = str | os.PathLike[str]

_SYSTEM_ROOTS: Final = (  # where distributions have them in one file, as gRPC wants it
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
)

log = logging.getLogger("kamacache.security")


@dataclass(frozen=True, slots=True)
class ClientMaterial:
    """The bytes of a client's files, PEM each."""

    ca: bytes
    cert: bytes | None = None
    key: bytes | None = field(default=None, repr=False)


class ClientFiles:
    """The files that a client was given; `material` is what they held when they were last good."""

    def __init__(
        self, ca: FilePath | Literal[True], cert: FilePath | None, key: FilePath | None
    ) -> None:
        """Read them; raises `ConfigError`. ``ca`` True: the system's roots."""
        self._ca: Final = system_roots() if ca is True else os.path.abspath(ca)
        self._cert: Final = os.path.abspath(cert) if cert else None
        self._key: Final = os.path.abspath(key) if key else None
        if (self._cert is None) != (self._key is None):
            given, missing = ("tls_cert", "tls_key") if self._cert else ("tls_key", "tls_cert")
            raise ConfigError(
                f"{given} is given, and {missing} is not; a certificate and its key go together",
                setting=missing,
            )
        self._marks = self._look()
        self.material = self._read()

    def refresh(self) -> bool:
        """Read the files again where they have changed; tell whether `material` is new.

        What is bad leaves the old in force, and is logged once.
        """
        marks = self._look()
        if marks == self._marks:
            return False
        self._marks = marks
        try:
            material = self._read()
        except ConfigError as error:
            log.error("new certificates cannot be used", extra={"reason": str(error)})
            return False
        new = material != self.material
        self.material = material
        return new

    def _look(self) -> tuple[tuple[int, ...] | None, ...]:
        marks: list[tuple[int, ...] | None] = []
        for path in (self._ca, self._cert, self._key):
            try:
                about = None if path is None else os.stat(path)
            except OSError:
                about = None
            marks.append(about and (about.st_ino, about.st_mtime_ns, about.st_size))
        return tuple(marks)

    def _read(self) -> ClientMaterial:
        ca = read_bounded("tls_ca", self._ca)
        prove_authorities("tls_ca", self._ca, ca)
        if self._cert is None or self._key is None:
            return ClientMaterial(ca)
        cert = read_bounded("tls_cert", self._cert)
        key = read_bounded("tls_key", self._key, secret=True)
        prove_client(self._cert, cert, key)
        return ClientMaterial(ca, cert, key)


def system_roots() -> str:
    """Return the file with the roots that this system trusts; raises `ConfigError`."""
    found = ssl.get_default_verify_paths().cafile
    for path in (found, *_SYSTEM_ROOTS):
        if path and Path(path).is_file():
            return path
    raise ConfigError(
        "tls_ca is True, and this system has no file of root certificates where they are looked "
        "for; name one, or install ca-certificates",
        setting="tls_ca",
        value="True",
    )
