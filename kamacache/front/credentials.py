"""A front's TLS: which certificate a handshake uses, and whether clients need one.

*Process*: front; gRPC asks in threads of its own, before each handshake.
"""

from __future__ import annotations

import grpc

from kamacache.security.certificates import Certificates
from kamacache.security.tls import Material


def server_credentials(certificates: Certificates) -> grpc.ServerCredentials | None:
    """Return what the front's port is opened with; None: plaintext.

    A reload changes the certificates of handshakes to come. That clients need one does not change.
    """
    first = given = certificates.material
    if first is None:
        return None

    def changed() -> grpc.ServerCertificateConfiguration | None:
        # gRPC keeps what it was given last. Handshakes run side by side: one of them gets the new
        # configuration, and until gRPC has it another may still use the old.
        nonlocal given
        material = certificates.material
        if material is None or material is given:
            return None
        given = material
        return _configuration(material)

    return grpc.dynamic_ssl_server_credentials(
        _configuration(first),
        changed,  # type: ignore[arg-type] # None is what gRPC documents for no change
        require_client_authentication=first.client_ca is not None,
    )


def _configuration(material: Material) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration(
        [(material.key, material.cert)], root_certificates=material.client_ca
    )
