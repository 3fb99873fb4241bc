"""grpc.health.v1 for a server with one state: SERVING until it drains, NOT_SERVING from then on.

*Process*: front. grpcio's own servicer keeps a Watch open for ever, so that a draining server with
one watcher would always wait for its whole deadline; here a drain tells the watchers and ends them.
"""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class HealthServicer(health_pb2_grpc.HealthServicer):
    """Answers for the server as a whole ("") and for the services named."""

    def __init__(self, services: tuple[str, ...], *, watchers_max: int) -> None:
        self._services = frozenset(("", *services))
        self._draining = asyncio.Event()
        self.settling = False  # not yet serving
        self._watchers = 0
        self._watchers_max = watchers_max

    def drain(self) -> None:
        """Answer NOT_SERVING from now on; end the watches."""
        self._draining.set()

    def _reply(self) -> health_pb2.HealthCheckResponse:
        status = NOT_SERVING if self.settling or self._draining.is_set() else SERVING
        return health_pb2.HealthCheckResponse(status=status)

    async def Check(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, context: Any
    ) -> health_pb2.HealthCheckResponse:
        """Return the state now."""
        if request.service not in self._services:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such service")
        return self._reply()

    async def List(  # noqa: N802
        self, request: health_pb2.HealthListRequest, context: Any
    ) -> health_pb2.HealthListResponse:
        """Return the state of every service."""
        reply = health_pb2.HealthListResponse()
        for service in self._services:
            reply.statuses[service].CopyFrom(self._reply())
        return reply

    async def Watch(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, context: Any
    ) -> None:
        """Send the state, and once more when it changes."""
        if self._watchers >= self._watchers_max:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many health watches")
        self._watchers += 1
        try:
            if request.service not in self._services:
                await context.write(health_pb2.HealthCheckResponse(status=SERVICE_UNKNOWN))
                await self._draining.wait()
                return
            if not self._draining.is_set():
                await context.write(self._reply())
                await self._draining.wait()
            await context.write(self._reply())
        finally:
            self._watchers -= 1
