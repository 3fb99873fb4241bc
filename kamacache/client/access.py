"""By what right a client calls, and how it knows the nodes: a token, and certificates.

*Process*: the application's; any thread. No grpc before a channel is made. *Invariant*: a token
leaves this host over TLS alone, unless the user has said that he wants it otherwise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from kamacache.cluster.membership import is_loopback
from kamacache.errors import ConfigError, NodeUnavailableError
from kamacache.security.client_tls import ClientFiles, ClientMaterial, FilePath

if TYPE_CHECKING:
    import grpc

TOKEN_CHARS_MAX: Final = 4_096


class Access:
    """One client's."""

    def __init__(
        self,
        tls_ca: FilePath | bool | None = None,
        tls_cert: FilePath | None = None,
        tls_key: FilePath | None = None,
        token: str | None = None,
        *,
        insecure: bool = False,
    ) -> None:
        """Read the files; raises `ConfigError`. ``tls_ca`` True: the roots of the system."""
        if not tls_ca and (tls_cert or tls_key):
            raise ConfigError(
                "a client certificate is given, and without TLS nobody asks for it; give tls_ca, "
                "too: the CA of the nodes' certificates, or True for the roots of this system",
                setting="tls_ca",
            )
        self._files = ClientFiles(tls_ca, tls_cert, tls_key) if tls_ca else None
        self._insecure: Final = insecure
        self.generation = 0  # counts up where new channels would have other certificates
        self._made: tuple[ClientMaterial, Any] | None = None
        self.metadata: tuple[tuple[str, str], ...] | None = None  # of every call
        if token is not None:
            self.metadata = (("authorization", f"Bearer {_checked(token)}"),)

    @property
    def tls(self) -> bool:
        """Whether nodes are called over TLS."""
        return self._files is not None

    def check_seed(self, address: str) -> None:
        """Raise `ConfigError` where this node must not be called so."""
        if not self._may_call(address):
            raise ConfigError(
                f"the token would travel to {address} in clear; give tls_ca, for TLS, or say "
                "insecure=True where the network is yours alone",
                setting="token",
            )

    def look(self) -> None:
        """See whether the files have changed, and read them again; a few stat(2)."""
        if self._files is not None and self._files.refresh():
            self.generation += 1

    def channel(self, make: Any, address: str, options: Any) -> Any:
        """Return a new channel of ``make``, which is grpc or grpc.aio.

        Raises `NodeUnavailableError` where the node is one that this client must not call.
        """
        if not self._may_call(address):
            raise NodeUnavailableError(
                f"{address}, of which a node of the cluster has told, is not on this host, and the "
                "token would travel there in clear; give tls_ca, or say insecure=True"
            )
        if self._files is None:
            return make.insecure_channel(address, options=options)
        return make.secure_channel(address, self._credentials(self._files), options=options)

    def _may_call(self, address: str) -> bool:
        return (
            self.metadata is None
            or self._files is not None
            or self._insecure
            or is_loopback(address)
        )

    def _credentials(self, files: ClientFiles) -> grpc.ChannelCredentials:
        made, material = self._made, files.material
        if made is None or made[0] is not material:
            import grpc

            credentials = grpc.ssl_channel_credentials(material.ca, material.key, material.cert)
            made = self._made = material, credentials
        found: grpc.ChannelCredentials = made[1]
        return found

    def after_fork(self) -> None:
        """Forget what was made of gRPC in the parent."""
        self._made = None


def _checked(token: object) -> str:
    good = isinstance(token, str) and 1 <= len(token) <= TOKEN_CHARS_MAX
    if not good or not all("!" <= char <= "~" for char in str(token)):
        raise ConfigError(  # without the token itself: it is a secret
            f"token is no text of 1 to {TOKEN_CHARS_MAX} printable ASCII characters without blanks",
            setting="token",
        )
    return str(token)
