"""Health and reflection: the services that need no token, and so have bounds of their own.

*Process*: front, on its loop. A call that anybody may make must not take the place of one that not
everybody may: requests must arrive in time here, too (`kamacache.front.admission`), health watches
have a bound (`kamacache.front.health`), and streams of reflection have one, and an end.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Final

import grpc
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from kamacache.front.admission import Admission, NoRequestError
from kamacache.front.health import HealthServicer
from kamacache.limits import REFLECTION_S, REFLECTIONS_MAX

Handlers = Mapping[str, Any]


class Reflection(reflection.aio.ReflectionServicer):
    """What the server's services are, for so many at once, and so long each."""

    def __init__(
        self, names: Sequence[str], *, streams_max: int = REFLECTIONS_MAX, s: float = REFLECTION_S
    ) -> None:
        super().__init__(names)
        self._streams_max: Final = streams_max
        self._s: Final = s
        self._streams = 0

    async def ServerReflectionInfo(  # noqa: N802
        self, request_iterator: Any, context: Any
    ) -> AsyncIterator[Any]:
        """Answer one stream of questions."""
        if self._streams >= self._streams_max:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many ask for reflection")
        self._streams += 1
        try:
            await context.send_initial_metadata(())  # see `PeersServicer.link`
            async with asyncio.timeout(self._s):
                async for reply in super().ServerReflectionInfo(request_iterator, context):
                    yield reply
        except TimeoutError:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "reflection takes too long")
        finally:
            self._streams -= 1


class _Collected:
    """Stands where generated code wants a server; keeps the handlers of one service."""

    def __init__(self) -> None:
        self.name = ""
        self.handlers: Handlers = {}

    def add_generic_rpc_handlers(self, handlers: object) -> None:
        """Take what `add_registered_method_handlers` brings as well."""

    def add_registered_method_handlers(self, name: str, handlers: Handlers) -> None:
        self.name, self.handlers = name, handlers


def open_services(
    health: HealthServicer, names: Sequence[str], admission: Admission
) -> list[grpc.GenericRpcHandler]:
    """Return both services; ``names`` are those that reflection tells of."""
    healthy, reflecting = _Collected(), _Collected()
    health_pb2_grpc.add_HealthServicer_to_server(health, healthy)
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(Reflection(names), reflecting)
    timely = {name: _timely(handler, admission) for name, handler in healthy.handlers.items()}
    return [
        grpc.method_handlers_generic_handler(healthy.name, timely),
        grpc.method_handlers_generic_handler(reflecting.name, dict(reflecting.handlers)),
    ]


def _timely(handler: Any, admission: Admission) -> Any:
    """Return a method of one request as one that reads it here."""
    answering = handler.unary_unary or handler.unary_stream

    async def answer(_requests: object, context: Any) -> Any:
        try:
            request = await admission.read(context, handler.request_deserializer)
        except NoRequestError as error:
            return await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        return await answering(request, context)

    if handler.unary_stream is None:
        return grpc.stream_unary_rpc_method_handler(
            answer, response_serializer=handler.response_serializer
        )
    return grpc.stream_stream_rpc_method_handler(
        answer, response_serializer=handler.response_serializer
    )
