"""What the environment tells grpc; said before grpc is imported, by whoever imports it.

*Process*: front, worker of a clustered node, gRPC clients. Imports no grpc.
"""

from __future__ import annotations

import os
from typing import Final

GRPC_ENVIRONMENT: Final = {
    "GRPC_EXPERIMENTS": "-event_engine_client,-event_engine_listener",
    "GRPC_VERBOSITY": "ERROR",
}
"""Set before grpc is imported, unless the user has set them.

The event engine off takes an eighth off the latency of a grpc.aio call and off the server's CPU
time; docs/grpc-settings.md has the measurements, of this and of what was not chosen.
"""


def set_grpc_environment() -> None:
    """Set `GRPC_ENVIRONMENT`. Call before grpc is imported; what the user set stays."""
    for name, value in GRPC_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
