"""Nodes that a test scripts: real gRPC servers of the Cache service, in threads of this process."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import grpc
from google.protobuf.message_factory import GetMessageClass

from kamacache.cluster.status import to_status
from kamacache.errors import KamaCacheError
from kamacache.v1 import kamacache_pb2 as pb

SERVICE = pb.DESCRIPTOR.services_by_name["Cache"]
Values = dict[bytes, bytes]
Script = Callable[[Any, grpc.ServicerContext], Any]


class FakeNode:
    """Answers from a dict, which nodes may share; ``on`` replaces what it does for a method.

    A script returns a message, or None for the usual answer; it may raise a `KamaCacheError`.
    """

    def __init__(
        self,
        values: Values | None = None,
        *,
        port: int = 0,
        credentials: grpc.ServerCredentials | None = None,
    ) -> None:
        self._credentials = credentials
        self.values: Values = {} if values is None else values
        self.members: list[tuple[str, int]] | None = None  # None: itself alone
        self.number = 1
        self.on: dict[str, Script] = {}
        self.asked: list[tuple[str, tuple[bytes, ...]]] = []
        self._lock = threading.Lock()
        self._server: grpc.Server | None = None
        self.port = port
        self.start()

    @property
    def address(self) -> str:
        """Where it listens, and its name on the ring."""
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        """Listen; again at the same port after a stop."""
        handlers = {
            method.name: grpc.unary_unary_rpc_method_handler(
                self._handler(method.name),
                request_deserializer=GetMessageClass(method.input_type).FromString,
                response_serializer=GetMessageClass(method.output_type).SerializeToString,
            )
            for method in SERVICE.methods
        }
        options = [("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", 17 << 20)]
        self._pool = ThreadPoolExecutor(64)
        self._server = grpc.server(self._pool, options=options)
        generic = grpc.method_handlers_generic_handler(SERVICE.full_name, handlers)
        self._server.add_generic_rpc_handlers((generic,))
        if self._credentials is None:
            self.port = self._server.add_insecure_port(self.address)
        else:
            self.port = self._server.add_secure_port(self.address, self._credentials)
        assert self.port
        self._server.start()

    def stop(self) -> None:
        """End at once, as a killed node does: calls fail, connections are refused."""
        if self._server is not None:
            self._server.stop(None).wait(5)
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._server = None

    def keys(self, method: str) -> list[bytes]:
        """Return the keys that it was asked for by a method, in order."""
        with self._lock:
            return [key for name, keys in self.asked if name == method for key in keys]

    def count(self, method: str) -> int:
        """Return how many calls of a method came."""
        with self._lock:
            return sum(name == method for name, _ in self.asked)

    def forget(self) -> None:
        """Forget what came."""
        with self._lock:
            self.asked.clear()

    def _handler(self, name: str) -> Script:
        def answer(request: Any, context: grpc.ServicerContext) -> Any:
            key = getattr(request, "key", None)
            keys = (key,) if key is not None else tuple(getattr(request, "keys", ()))
            with self._lock:
                self.asked.append((name, keys))
            script = self.on.get(name)
            try:
                reply = None if script is None else script(request, context)
            except KamaCacheError as error:
                code, details, trailer = to_status(error)
                context.set_trailing_metadata(trailer)
                context.abort(code, details)
            return getattr(self, f"_{name}")(request) if reply is None else reply

        return answer

    def _Get(self, request: pb.GetRequest) -> pb.GetResponse:
        value = self.values.get(request.key)
        return pb.GetResponse() if value is None else pb.GetResponse(found=True, value=value)

    def _Set(self, request: pb.SetRequest) -> pb.SetResponse:
        self.values[request.key] = request.value
        return pb.SetResponse()

    def _Delete(self, request: pb.DeleteRequest) -> pb.DeleteResponse:
        return pb.DeleteResponse(found=self.values.pop(request.key, None) is not None)

    def _BatchGet(self, request: pb.BatchGetRequest) -> pb.BatchGetResponse:
        values = [self.values.get(key) for key in request.keys]
        missing = [i for i, value in enumerate(values) if value is None]
        return pb.BatchGetResponse(values=[value or b"" for value in values], missing=missing)

    def _BatchSet(self, request: pb.BatchSetRequest) -> pb.BatchSetResponse:
        self.values.update(zip(request.keys, request.values, strict=True))
        return pb.BatchSetResponse()

    def _BatchDelete(self, request: pb.BatchDeleteRequest) -> pb.BatchDeleteResponse:
        found = [self.values.pop(key, None) for key in request.keys]
        return pb.BatchDeleteResponse(deleted=sum(value is not None for value in found))

    def _Stats(self, request: pb.StatsRequest) -> pb.StatsResponse:
        reply = pb.StatsResponse()
        reply.groups.add(name=request.group, values={"items": len(self.values), "nodes_seen": 1})
        return reply

    def _Members(self, request: pb.MembersRequest) -> pb.MembersResponse:
        reply = pb.MembersResponse(own=self.address, number=self.number)
        for address, weight in self.members or [(self.address, 1)]:
            reply.members.add(address=address, weight=weight)
        return reply


class Nowhere:
    """An address where connections are taken and nothing is ever said: a host behind a firewall."""

    def __init__(self, port: int = 0) -> None:
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("127.0.0.1", port))
        self._socket.listen(64)
        self.address = f"127.0.0.1:{self._socket.getsockname()[1]}"

    def close(self) -> None:
        """Refuse from now on."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def introduce(nodes: Iterable[FakeNode], *others: str) -> None:
    """Tell all nodes of each other, and of addresses that are none of them."""
    nodes = list(nodes)
    for node in nodes:
        node.members = sorted([(n.address, 1) for n in nodes] + [(other, 1) for other in others])
