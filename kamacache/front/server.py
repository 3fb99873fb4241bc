"""A front's gRPC server: made, bound, drained.

*Process*: front, on its loop. *Owns*: the listening socket and the calls in flight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import grpc
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection

from kamacache.cluster.membership import Membership
from kamacache.errors import NodeUnavailableError
from kamacache.front.engine import Engine
from kamacache.front.health import HealthServicer
from kamacache.front.metering import FrontMeter
from kamacache.front.open_services import open_services
from kamacache.front.peers import PeersServicer
from kamacache.front.servicer import ALONE, SERVICE, CacheServicer
from kamacache.front.settings import FrontSettings
from kamacache.limits import PEER_STREAMS_MAX
from kamacache.rundir.meters import Region
from kamacache.security.access import Access

HEALTH_NAME: Final = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name


class FrontServer:
    """One grpc.aio server over the node's groups. Make it on the loop that will run it."""

    def __init__(
        self,
        engines: Mapping[str, Engine],
        settings: FrontSettings,
        membership: Callable[[], Membership] = lambda: ALONE,
        peers: PeersServicer | None = None,
        credentials: grpc.ServerCredentials | None = None,
        access: Access | None = None,
        *,
        meters: Region | None = None,
    ) -> None:
        """``peers`` answers other nodes; None: this node is of no cluster.

        ``credentials`` of TLS; None: plaintext. ``access``: who may; None: everybody.
        ``meters`` count the calls, and outlive the process; None: as in a test.
        """
        self._settings = settings
        self._credentials = credentials
        self._peers = peers
        self.port = 0  # until it is bound
        self._health = HealthServicer((SERVICE.full_name,), watchers_max=settings.watchers_max)
        self._server = grpc.aio.server(
            options=settings.server_options(),
            # A peer's link is a call for as long as it stands.
            maximum_concurrent_rpcs=settings.calls_max + (PEER_STREAMS_MAX if peers else 0),
        )
        self._cache = CacheServicer(engines, settings, membership, access)
        meter = FrontMeter(meters)
        handlers = meter.counted(self._cache.handlers())
        # Both, as the generated code does: callers of a method that was registered are passed on
        # without a search, and others may still spell its name.
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(SERVICE.full_name, handlers),)
        )
        self._server.add_registered_method_handlers(SERVICE.full_name, handlers)
        if peers is not None:
            peers.on_streams = meter.peer_streams
            self._server.add_generic_rpc_handlers((peers.handler(),))
        names = (SERVICE.full_name, HEALTH_NAME, reflection.SERVICE_NAME)
        others = open_services(self._health, names, self._cache.admission)
        self._server.add_generic_rpc_handlers(tuple(others))

    async def start(self) -> int:
        """Bind and serve; return the port. Raises `NodeUnavailableError` where it cannot bind."""
        listen = self._settings.listen
        try:
            if self._credentials is None:
                port = self._server.add_insecure_port(listen)
            else:
                port = self._server.add_secure_port(listen, self._credentials)
        except RuntimeError as error:
            raise NodeUnavailableError(f"cannot listen on {listen}: {error}") from error
        if port == 0:  # what older grpcio says instead of raising
            raise NodeUnavailableError(f"cannot listen on {listen}")
        await self._server.start()
        self.port = port
        return port

    def settle(self, *, settling: bool) -> None:
        """Refuse calls of clients, or serve them; peers are answered as far as they need."""
        self._health.settling = self._cache.settling = settling
        if self._peers is not None and not settling:
            self._peers.settled()

    async def drain(self) -> None:
        """Turn NOT_SERVING, refuse new calls, let those in flight finish within the deadline."""
        self._health.drain()
        if self._peers is not None:
            self._peers.drain()
        await self._server.stop(self._settings.drain_timeout_s)

    async def stop(self) -> None:
        """End all calls now."""
        self._health.drain()
        await self._server.stop(None)
        self._cache.admission.close()
