"""Errors of KamaCache as gRPC statuses, and back: translated here, once, on both sides.

*Process*: front, and gRPC clients. The status code says what a caller of any language should do;
the trailing metadata `ERROR_KEY` carries ``[class name, message, fields]`` in msgpack, so that a
Python client raises the class that a local caller would get.
"""

from __future__ import annotations

from typing import Any, Final

import grpc
import msgspec

from kamacache.cluster.handshake import why_no_handshake
from kamacache.errors import (
    AccessDeniedError,
    ConfigError,
    DeadlineExceededError,
    GroupNotFoundError,
    KamaCacheError,
    KeyNotFoundError,
    KeyTooLongError,
    LoadError,
    NodeUnavailableError,
    StorageError,
    ValueTooLargeError,
    from_fields,
    to_fields,
)

ERROR_KEY: Final = "kamacache-error-bin"

# gRPC refuses a call whose trailers are above 8 KiB, and percent-encodes the message.
MESSAGE_CHARS_MAX: Final = 500
FIELD_ITEMS_MAX: Final = 16
FIELD_LENGTH_MAX: Final = 1_024

CODES: Final[dict[type[KamaCacheError], grpc.StatusCode]] = {
    KeyNotFoundError: grpc.StatusCode.NOT_FOUND,
    GroupNotFoundError: grpc.StatusCode.NOT_FOUND,
    KeyTooLongError: grpc.StatusCode.INVALID_ARGUMENT,
    ConfigError: grpc.StatusCode.INVALID_ARGUMENT,
    ValueTooLargeError: grpc.StatusCode.OUT_OF_RANGE,
    # UNKNOWN is gRPC's code for what the application's own code raised; INTERNAL is our defect.
    LoadError: grpc.StatusCode.UNKNOWN,
    NodeUnavailableError: grpc.StatusCode.UNAVAILABLE,
    DeadlineExceededError: grpc.StatusCode.DEADLINE_EXCEEDED,
    AccessDeniedError: grpc.StatusCode.PERMISSION_DENIED,
    StorageError: grpc.StatusCode.INTERNAL,
}

_encode: Final = msgspec.msgpack.Encoder().encode
_decode: Final = msgspec.msgpack.Decoder(tuple[str, str, dict[str, Any]]).decode


class BatchRangeError(KamaCacheError):
    """A batch of more keys than the limit, or one whose reply would be too large."""


def to_status(error: KamaCacheError) -> tuple[grpc.StatusCode, str, tuple[tuple[str, bytes], ...]]:
    """Return ``(code, details, trailing metadata)``, each bounded."""
    if isinstance(error, BatchRangeError):
        code = grpc.StatusCode.OUT_OF_RANGE
    elif isinstance(error, AccessDeniedError) and error.token is None:
        code = grpc.StatusCode.UNAUTHENTICATED  # it is not known who asks
    else:
        code = CODES.get(type(error), grpc.StatusCode.INTERNAL)
    kind, message, fields = to_fields(error)
    message = message[:MESSAGE_CHARS_MAX]
    values = {name: _bounded(value) for name, value in fields.items()}
    return code, message, ((ERROR_KEY, _encode((kind, message, values))),)


def _bounded(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return list(value[:FIELD_ITEMS_MAX])
    if isinstance(value, str | bytes):
        return value[:FIELD_LENGTH_MAX]
    return value


def from_rpc(error: grpc.RpcError, target: str, *, tls: bool = False) -> KamaCacheError:
    """Return the error that a call failed with as KamaCache's own.

    Without our trailer (the server is none of ours, or gRPC itself refused the call) the status
    code decides the class. ``target`` names the server in the message; ``tls``: it
    was called over TLS.
    """
    for name, value in _part(error, "trailing_metadata") or ():
        if name == ERROR_KEY:
            try:
                return from_fields(*_decode(value))
            except (msgspec.MsgspecError, TypeError):
                break  # not ours after all; the code says enough
    code = _part(error, "code")
    details = _part(error, "details") or str(error)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceededError(f"{target} did not answer in time")
    if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
        return AccessDeniedError(f"{target} refused the call: {details}")
    if code is grpc.StatusCode.UNAVAILABLE:
        trouble = why_no_handshake(details, tls=tls)
        if trouble is not None:
            return NodeUnavailableError(f"no connection to the node at {target}: {trouble.what}")
        return NodeUnavailableError(f"no node answers at {target} ({details})")
    status = code.name if code is not None else "no status"
    return KamaCacheError(f"{target} answered {status}: {details}")


def _part(error: grpc.RpcError, name: str) -> Any:
    # An error of grpc.aio is no grpc.Call, though it has the same methods.
    method = getattr(error, name, None)
    return method() if callable(method) else None
