"""The remote client: a cluster's groups from anywhere, over gRPC, each key from its owner.

*Process*: the application's. Floors, upper first::

    group       what users hold: keys, codecs, defaults        client   the client, closing, forks
    operations  a call as messages, and its answer
    exchange    one call: split by owner, moved from nodes that are lost; no I/O, no clock
    transport   sending and waiting, once for threads and once for an event loop
    channels    connections                                    access   certificates, the token
    nodes       who there is, who answers, who is left alone; no I/O

*Invariant*: nothing here imports grpc before the first call, so a client may be made in a process
that forks afterwards.
"""

from __future__ import annotations

from kamacache.client.client import Client
from kamacache.client.group import RemoteGroup

__all__ = ["Client", "RemoteGroup"]
