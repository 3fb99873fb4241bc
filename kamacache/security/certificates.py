"""The certificates that one role serves and dials with: those of the last reload that was good.

*Process*: front, http, and the workers of a clustered node; in the loop's thread, and read from
gRPC's.
"""

from __future__ import annotations

import logging

from kamacache.errors import ConfigError
from kamacache.rundir.live import LiveSettings, SecurityFiles
from kamacache.security import tls
from kamacache.security.tls import Material

log = logging.getLogger("kamacache.security")


class Certificates:
    """What the role's handshakes use; `material` is replaced whole, and ends no connection."""

    def __init__(self, files: SecurityFiles) -> None:
        """Read the files; raises `ConfigError`."""
        self._files = files
        self.material: Material | None = tls.load(files)

    @property
    def expires_unix_s(self) -> int:
        """When the certificate in force expires; 0: there is none."""
        return 0 if self.material is None else self.material.expires_unix_s

    def reload(self, live: LiveSettings) -> None:
        """Take the files as they are now; what is bad leaves the old in force, and is logged."""
        files = live.security
        why_not = tls.why_restart(self._files, files)
        if why_not is not None:
            log.error("a reload of certificates is refused", extra={"reason": why_not})
            return
        if not files.tls_cert:
            return
        try:
            material = tls.proven(files)
        except ConfigError as error:
            log.error("a reload of certificates is refused", extra={"reason": str(error)})
            return
        self._files = files
        if material != self.material:
            self.material = material
            log.info("new handshakes use the certificates as they are now")
