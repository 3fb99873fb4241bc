"""Tokens at the front: which method wants what, and what is told to whom."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from kamacache.cluster.status import from_rpc
from kamacache.errors import AccessDeniedError, GroupNotFoundError
from kamacache.front.server import FrontServer
from kamacache.front.settings import FrontSettings
from kamacache.limits import ACCESS_REFUSED_WAIT_S
from kamacache.rundir.live import LiveSettings, SecurityFiles
from kamacache.security.access import Access
from kamacache.v1 import kamacache_pb2 as pb
from kamacache.v1.kamacache_pb2_grpc import CacheStub
from tests.front.engines import ShardEngine
from tests.raw_http2 import HEADERS, call, connected

READ, WRITE, OPS, ALL = (f"{name}-secret-0123456789" for name in ("read", "write", "ops", "all"))
TOKENS = f"""
[[token]]
name = "reader"
secret = "{READ}"
read = ["scores"]

[[token]]
name = "writer"
secret = "{WRITE}"
write = ["scores"]

[[token]]
name = "ops"
secret = "{OPS}"
stats = true

[[token]]
name = "all"
secret = "{ALL}"
read = ["*"]
write = ["*"]
"""
UNKNOWN, BEYOND = grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED
OK = grpc.StatusCode.OK


def requests(group: str) -> dict[str, Any]:
    return {
        "Get": pb.GetRequest(group=group, key=b"k"),
        "Set": pb.SetRequest(group=group, key=b"k", value=b"v"),
        "Delete": pb.DeleteRequest(group=group, key=b"k"),
        "BatchGet": pb.BatchGetRequest(group=group, keys=[b"k"]),
        "BatchSet": pb.BatchSetRequest(group=group, keys=[b"k"], values=[b"v"]),
        "BatchDelete": pb.BatchDeleteRequest(group=group, keys=[b"k"]),
        "Stats": pb.StatsRequest(group=group),
        "Members": pb.MembersRequest(),
    }


class Guarded:
    """A front with two groups that wants tokens, and a channel to it."""

    def __init__(self, path: Path, channel: grpc.aio.Channel, access: Access, port: int) -> None:
        self.path, self.access, self.port = path, access, port
        self.stub = CacheStub(channel)

    async def ask(self, method: str, secret: str | None, group: str = "scores") -> Any:
        """Return the reply, or the error as a client gets it with the status beside it."""
        metadata = () if secret is None else (("authorization", f"Bearer {secret}"),)
        try:
            return OK, await getattr(self.stub, method)(requests(group)[method], metadata=metadata)
        except grpc.aio.AioRpcError as error:
            return error.code(), from_rpc(error, "front")

    def reload(self) -> None:
        self.access.apply(LiveSettings(security=SecurityFiles(tokens=str(self.path))))


@asynccontextmanager
async def guarding(path: Path) -> AsyncIterator[Guarded]:
    engines = {name: ShardEngine(name) for name in ("scores", "pages")}
    access = Access()
    settings = FrontSettings(listen="127.0.0.1:0")
    server = FrontServer(engines, settings, access=access)
    port = await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            guarded = Guarded(path, channel, access, port)
            guarded.reload()
            yield guarded
    finally:
        await server.stop()
        for engine in engines.values():
            engine.writer.close()


@pytest.fixture
async def front(tmp_path: Path) -> AsyncIterator[Guarded]:
    path = tmp_path / "tokens.toml"
    path.touch(mode=0o600)
    path.write_text(TOKENS)
    async with guarding(path) as found:
        yield found


async def test_each_method_wants_its_scope(front: Guarded) -> None:
    wanted = {
        "Get": (OK, BEYOND, BEYOND),
        "BatchGet": (OK, BEYOND, BEYOND),
        "Set": (BEYOND, OK, BEYOND),
        "Delete": (BEYOND, OK, BEYOND),
        "BatchSet": (BEYOND, OK, BEYOND),
        "BatchDelete": (BEYOND, OK, BEYOND),
        "Stats": (OK, BEYOND, OK),
        "Members": (OK, OK, OK),
    }
    assert set(wanted) == {
        method.name for method in pb.DESCRIPTOR.services_by_name["Cache"].methods
    }
    for method, codes in wanted.items():
        found = [(await front.ask(method, secret))[0] for secret in (READ, WRITE, OPS)]
        assert tuple(found) == codes, method
        assert (await front.ask(method, ALL))[0] is OK


async def test_no_method_answers_who_has_no_token_that_is_known(front: Guarded) -> None:
    methods = [*requests("scores")]
    for secret in (None, "guess-0123456789-0123"):
        asked = [
            front.ask(method, secret, group) for method in methods for group in ("scores", "x")
        ]
        for code, error in await asyncio.gather(*asked):
            assert code is UNKNOWN
            assert isinstance(error, AccessDeniedError)
            assert error.token is None
            assert "scores" not in str(error)


async def test_two_tokens_in_one_call_are_none(front: Guarded) -> None:
    for secrets in ((READ, OPS), (OPS, READ)):
        metadata = [("authorization", f"Bearer {secret}") for secret in secrets]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await front.stub.Get(pb.GetRequest(group="scores", key=b"k"), metadata=metadata)
        assert caught.value.code() is UNKNOWN


async def test_metadata_that_is_no_text_is_no_token(front: Guarded) -> None:
    for value in (b"\xff\xfe", b"\xc3\xbc" * 10, b"Bearer \xff", b"Basic \xed\xa0\x80", b""):
        async with connected(front.port) as client:
            client.begin()
            client.send(call("/kamacache.v1.Cache/Get", 1, (b"authorization", value)))
            _, _, _, headers = await client.until(HEADERS)
            assert b"grpc-status" in headers
            assert b"16" in headers, value
    assert (await front.ask("Get", READ))[0] is OK


async def test_a_group_beyond_the_scope_is_refused_like_one_that_is_not_there(
    front: Guarded,
) -> None:
    for method in requests("scores"):
        if method == "Members":
            continue
        secret = READ if method in ("Get", "BatchGet", "Stats") else WRITE
        code, error = await front.ask(method, secret, "pages")
        none = await front.ask(method, secret, "nopes")
        assert (code, none[0]) == (BEYOND, BEYOND), method
        assert str(error).replace("pages", "") == str(none[1]).replace("nopes", "")
        assert "scores" not in str(error)


async def test_an_error_names_only_the_groups_that_the_token_may_know(front: Guarded) -> None:
    code, error = await front.ask("Get", ALL, "nopes")
    assert code is grpc.StatusCode.NOT_FOUND
    assert isinstance(error, GroupNotFoundError)
    assert error.known == ["pages", "scores"]
    front.path.write_text(TOKENS.replace('read = ["scores"]', 'read = ["scores", "nopes"]'))
    front.reload()
    _, error = await front.ask("Get", READ, "nopes")
    assert isinstance(error, GroupNotFoundError)
    assert error.known == ["scores"]
    assert "pages" not in str(error)


async def test_stats_of_all_groups_tell_of_those_that_may_be_read(front: Guarded) -> None:
    for secret, names in ((READ, ["scores"]), (WRITE, []), (OPS, ["pages", "scores"])):
        code, reply = await front.ask("Stats", secret, "")
        assert code is OK
        assert [group.name for group in reply.groups] == names


async def test_a_token_that_a_reload_removed_ends_with_the_next_call_on_the_connection(
    front: Guarded,
) -> None:
    assert (await front.ask("Get", READ))[0] is OK
    front.path.write_text(TOKENS.replace(READ, "new-secret-0123456789"))
    front.reload()
    assert (await front.ask("Get", READ))[0] is UNKNOWN
    assert (await front.ask("Get", "new-secret-0123456789"))[0] is OK
    assert (await front.ask("Get", ALL))[0] is OK


async def test_who_guesses_is_answered_late_and_counted_and_holds_up_nobody(
    front: Guarded,
) -> None:
    start_s = time.monotonic()
    guesses = [asyncio.ensure_future(front.ask("Get", f"guess-{n:020}")) for n in range(20)]
    assert (await front.ask("Get", READ))[0] is OK
    assert not any(guess.done() for guess in guesses)
    assert {code for code, _ in await asyncio.gather(*guesses)} == {UNKNOWN}
    assert time.monotonic() - start_s >= ACCESS_REFUSED_WAIT_S
    assert front.access.unknown == 20


async def test_health_and_reflection_need_no_token(front: Guarded) -> None:
    from grpc_health.v1 import health_pb2, health_pb2_grpc
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    async with grpc.aio.insecure_channel(f"127.0.0.1:{front.port}") as channel:
        reply = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert reply.status == health_pb2.HealthCheckResponse.SERVING
        asking = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo()
        await asking.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        assert (await asking.read()).list_services_response.service
        await asking.done_writing()


async def test_who_has_no_token_is_refused_before_the_request_is_read(front: Guarded) -> None:
    async with connected(front.port) as client:
        client.begin()
        client.send(call("/kamacache.v1.Cache/Set"))  # and no request, ever
        _, _, stream, headers = await client.until(HEADERS)
        assert stream == 1
        assert b"grpc-status" in headers
        assert b"16" in headers
