"""What a front is told: where it listens, and the bounds on what callers may ask of it.

*Process*: made by the supervisor (or a test), used by the front.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from kamacache.errors import ConfigError
from kamacache.limits import (
    BATCH_KEYS_MAX,
    DRAIN_TIMEOUT_S,
    FRONT_CONNECTIONS_MAX,
    FRONT_IDLE_S,
    METADATA_BYTES_MAX,
    REQUEST_ARRIVES_S,
    TLS_HANDSHAKE_S,
    VALUE_BYTES_CEILING,
)

MESSAGE_BYTES_MAX: Final = VALUE_BYTES_CEILING + (64 << 10)
"""Of a request, and of the values in a reply: the largest value fits, with its key, and so does a
batch of 4,096 values of 4 KiB. gRPC's default is 4 MiB, which is also what clients accept."""

REPLY_BYTES_A_KEY: Final = 32
"""What a batch reply holds for each key beside the value: tags, lengths, TTL, version."""

CALLS_MAX: Final = 1_000
"""In flight in one front; more are refused with RESOURCE_EXHAUSTED. In the worst case each holds
a message, so this and `MESSAGE_BYTES_MAX` bound what callers can make a front remember."""

WATCHERS_MAX: Final = 64
"""Open health watches of one front: each is a call in flight for as long as it likes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontSettings:
    """One front's settings; all fronts of a node have the same."""

    listen: str
    message_bytes_max: int = MESSAGE_BYTES_MAX
    calls_max: int = CALLS_MAX
    batch_keys_max: int = BATCH_KEYS_MAX
    watchers_max: int = WATCHERS_MAX
    drain_timeout_s: float = DRAIN_TIMEOUT_S
    keepalive_ms: int = 60_000
    """A connection that is silent for so long is asked for a sign of life."""
    keepalive_timeout_ms: int = 20_000
    idle_ms: int = FRONT_IDLE_S * 1_000
    """A connection without a call for so long is closed; its channel opens another."""
    request_s: float = REQUEST_ARRIVES_S
    """For a call's request to arrive, once the call has begun."""
    connections_max: int = FRONT_CONNECTIONS_MAX
    """More are closed as soon as they are accepted."""
    ping_every_ms_min: int = 10_000
    """Callers that ping oftener are sent away (ENHANCE_YOUR_CALM)."""
    handshake_s: float = TLS_HANDSHAKE_S
    """For a connection to be one of TLS, where there is TLS, and of HTTP/2."""

    def __post_init__(self) -> None:
        host, colon, port = self.listen.rpartition(":")
        if not (colon and host and port.isascii() and port.isdigit() and int(port) < 65_536):
            raise ConfigError(
                f"listen is {self.listen!r}; write HOST:PORT, such as 127.0.0.1:8001 or [::1]:8001",
                setting="listen",
                value=self.listen,
            )
        for setting in ("message_bytes_max", "calls_max", "batch_keys_max", "watchers_max"):
            if getattr(self, setting) < 1:
                raise ConfigError(
                    f"{setting} is {getattr(self, setting)}; it must be above 0", setting=setting
                )

    def server_options(self) -> list[tuple[str, Any]]:
        """Return the options of the gRPC server.

        All are bounds: no argument that was tried makes it faster (docs/grpc-settings.md).
        """
        return [
            ("grpc.so_reuseport", 1),  # all fronts of the node bind one port
            ("grpc.max_receive_message_length", self.message_bytes_max),
            # Above what the servicer allows: its own refusal tells the caller what to do.
            (
                "grpc.max_send_message_length",
                self.message_bytes_max + REPLY_BYTES_A_KEY * self.batch_keys_max,
            ),
            ("grpc.max_concurrent_streams", self.calls_max),
            ("grpc.max_allowed_incoming_connections", self.connections_max),
            # Above the first, gRPC refuses some calls, and above the second all.
            ("grpc.max_metadata_size", METADATA_BYTES_MAX // 2),
            ("grpc.absolute_max_metadata_size", METADATA_BYTES_MAX),
            ("grpc.max_connection_idle_ms", self.idle_ms),
            ("grpc.keepalive_time_ms", self.keepalive_ms),
            ("grpc.keepalive_timeout_ms", self.keepalive_timeout_ms),
            # Without it grpcio 1.85 gives the answer a minute, whatever the option above says.
            ("grpc.http2.ping_timeout_ms", self.keepalive_timeout_ms),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.server_handshake_timeout_ms", int(self.handshake_s * 1000)),
            ("grpc.http2.min_recv_ping_interval_without_data_ms", self.ping_every_ms_min),
        ]
