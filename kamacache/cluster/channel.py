"""The channel of a link: plaintext, or TLS with this node's certificates.

*Process*: worker of a clustered node, in the loop's thread.
"""

from __future__ import annotations

from typing import Any, Final

import grpc

from kamacache.limits import FRAME_BYTES_MAX
from kamacache.security.certificates import Certificates
from kamacache.security.tls import Material

CHANNEL_OPTIONS: Final[list[tuple[str, Any]]] = [
    # Each try has a channel of its own, so that when to dial again is ours to say: gRPC waits
    # from 1 s to 2 min.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),  # else gRPC keeps copies of what it sent
    ("grpc.enable_http_proxy", 0),
    ("grpc.service_config_disable_resolution", 1),
    ("grpc.max_receive_message_length", FRAME_BYTES_MAX + (64 << 10)),
]


class Dialler:
    """Makes each try's channel, with the certificates of the last reload.

    With TLS the peer's certificate must come from a CA of ``--tls-ca`` and be for the host of the
    peer's address; this node's own is shown, which a peer with ``--tls-client-ca`` demands.
    """

    def __init__(self, certificates: Certificates | None) -> None:
        """None: plaintext."""
        self._certificates: Final = certificates
        self._given: Material | None = None
        self._credentials: grpc.ChannelCredentials | None = None

    @property
    def tls(self) -> bool:
        """Whether links are over TLS."""
        return self._certificates is not None and self._certificates.material is not None

    def __call__(self, address: str) -> grpc.aio.Channel:
        """Return a new channel."""
        material = None if self._certificates is None else self._certificates.material
        if material is None:
            return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        if material is not self._given or self._credentials is None:
            self._credentials = grpc.ssl_channel_credentials(
                # Not None, which would be the web's roots: with no bytes gRPC trusts nobody.
                root_certificates=material.ca or b"",
                private_key=material.key,
                certificate_chain=material.cert,
            )
            self._given = material
        return grpc.aio.secure_channel(address, self._credentials, options=CHANNEL_OPTIONS)


PLAIN: Final = Dialler(None)
