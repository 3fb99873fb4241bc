"""`kamacache.cluster.status`: errors to statuses, and statuses to errors."""

from __future__ import annotations

import grpc
import pytest
from grpc.aio import AioRpcError, Metadata

from kamacache import errors
from kamacache.cluster.status import CODES, ERROR_KEY, BatchRangeError, from_rpc, to_status


@pytest.mark.parametrize("cls", CODES)
def test_every_class_comes_back_with_its_fields(cls: type[errors.KamaCacheError]) -> None:
    values = {name: b"\xff" if name == "key" else 7 for name in cls.fields}
    code, details, trailers = to_status(cls("what happened", **values))
    assert code is CODES[cls]
    back = from_rpc(AioRpcError(code, Metadata(), Metadata(*trailers), details), "here")
    assert type(back) is cls
    assert back.message == "what happened"
    assert {name: getattr(back, name) for name in cls.fields} == values


def test_every_error_has_a_code() -> None:
    kinds = {cls for cls in errors._BY_NAME.values() if cls is not errors.KamaCacheError}
    assert kinds - set(CODES) == set()


def test_what_is_sent_is_bounded() -> None:
    error = errors.GroupNotFoundError("m" * 9_000, group="g" * 9_000, known=["k" * 63] * 900)
    _, details, trailers = to_status(error)
    assert len(details) <= 500
    assert sum(len(value) for _, value in trailers) < 4_000


def test_a_batch_out_of_range_has_its_own_code() -> None:
    assert to_status(BatchRangeError("too many"))[0] is grpc.StatusCode.OUT_OF_RANGE


def test_who_is_not_known_and_who_may_not_are_told_apart() -> None:
    unknown, beyond = errors.AccessDeniedError("who"), errors.AccessDeniedError("no", token="web")
    assert to_status(unknown)[0] is grpc.StatusCode.UNAUTHENTICATED
    assert to_status(beyond)[0] is grpc.StatusCode.PERMISSION_DENIED


@pytest.mark.parametrize(
    ("code", "cls"),
    [
        (grpc.StatusCode.UNAVAILABLE, errors.NodeUnavailableError),
        (grpc.StatusCode.DEADLINE_EXCEEDED, errors.DeadlineExceededError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, errors.KamaCacheError),
        (grpc.StatusCode.UNAUTHENTICATED, errors.AccessDeniedError),
        (grpc.StatusCode.PERMISSION_DENIED, errors.AccessDeniedError),
    ],
)
@pytest.mark.parametrize("trailers", [Metadata(), Metadata((ERROR_KEY, b"\xc1 not msgpack"))])
def test_without_our_trailer_the_code_decides(
    code: grpc.StatusCode, cls: type[errors.KamaCacheError], trailers: Metadata
) -> None:
    back = from_rpc(AioRpcError(code, Metadata(), trailers, "details"), "10.0.0.1:8001")
    assert type(back) is cls
    assert "10.0.0.1:8001" in back.message
