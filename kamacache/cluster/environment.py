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


def set_grpc_environment() -> None:
    """Set `GRPC_ENVIRONMENT`. Call before grpc is imported; what the user set stays."""
    for name, value in GRPC_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
