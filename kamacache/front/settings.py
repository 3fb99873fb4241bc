"""What a front is told: where it listens, and the bounds on what callers may ask of it.

*Process*: made by the supervisor (or a test), used by the front.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Final

from kamacache.errors import ConfigError
from kamacache.limits import BATCH_KEYS_MAX, DRAIN_TIMEOUT_S, VALUE_BYTES_CEILING

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

GRPC_ENVIRONMENT: Final = {
    "GRPC_EXPERIMENTS": "-event_engine_client,-event_engine_listener",
    "GRPC_VERBOSITY": "ERROR",
}
"""Set before grpc is imported, unless the user has set them.

The event engine off, grpcio 1.85.1, CPython 3.11, 2 cores, `scripts/bench/front_settings.py
--rounds 31`, microseconds of an empty grpc.aio handler (latency of one caller, of 16 together,
server CPU a call), ratio to the first line:

    asyncio, defaults           598 (1.00)   319 (1.00)   358 (1.00)
    asyncio, engine off         560 (0.94)   307 (0.96)   325 (0.91)
    asyncio, engine off, poll   558 (0.93)   335 (1.05)   333 (0.93)
    uvloop, defaults            555 (0.93)   319 (1.00)   325 (0.91)
    uvloop, engine off          510 (0.85)   306 (0.96)   275 (0.77)   <- this
    uvloop, engine off, poll    528 (0.88)   319 (1.00)   292 (0.81)
"""


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
    ping_every_ms_min: int = 10_000
    """Callers that ping oftener are sent away (ENHANCE_YOUR_CALM)."""

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
        """Return the options of the gRPC server."""
        return [
            ("grpc.so_reuseport", 1),  # all fronts of the node bind one port
            ("grpc.max_receive_message_length", self.message_bytes_max),
            # Above what the servicer allows: its own refusal tells the caller what to do.
            (
                "grpc.max_send_message_length",
                self.message_bytes_max + REPLY_BYTES_A_KEY * self.batch_keys_max,
            ),
            ("grpc.max_concurrent_streams", self.calls_max),
            ("grpc.keepalive_time_ms", self.keepalive_ms),
            ("grpc.keepalive_timeout_ms", self.keepalive_timeout_ms),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_recv_ping_interval_without_data_ms", self.ping_every_ms_min),
        ]


def set_grpc_environment() -> None:
    """Set `GRPC_ENVIRONMENT`. Call before grpc is imported; what the user set stays."""
    for name, value in GRPC_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
