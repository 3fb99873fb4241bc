"""Every target is asked the same way and answers alike, against real servers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from scripts.loadtest.targets.base import SessionOptions, Target, TargetError, error_class
from scripts.loadtest.targets.specs import make_target
from tests.scripts.loadtest.servers import loadtest_node, memcached_server, redis_server

pytestmark = pytest.mark.integration

NODES = ["local", "grpc", "http"]
SCHEMES = [*NODES, "redis", "memcached"]
MakeTarget = Callable[[str], Target]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MakeTarget]:
    """Return ``make(scheme)``: a target that is there; servers start when first asked for."""
    import shutil
    import tempfile

    folder = Path(tempfile.mkdtemp(prefix="kc-", dir="/tmp"))  # a socket's path is short
    specs: dict[str, str] = {}
    made: list[Target] = []
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)

        def one(scheme: str) -> Target:
            if scheme not in specs:
                if scheme == "redis":
                    specs[scheme] = stack.enter_context(redis_server(folder))[0]
                elif scheme == "memcached":
                    specs[scheme] = stack.enter_context(memcached_server(folder))[0]
                else:
                    specs.update(stack.enter_context(loadtest_node(folder))[0])
            made.append(make_target(specs[scheme]))
            return made[-1]

        yield one
        for target in made:
            target.close()


def options(group: str = "plain", timeout_s: float = 10.0, concurrency: int = 4) -> SessionOptions:
    return SessionOptions(group=group, concurrency=concurrency, timeout_s=timeout_s)


class Asker:
    """Asks a session, whether it blocks or is awaited."""

    def __init__(self, target: Target, runner: asyncio.Runner | None) -> None:
        self._runner = runner
        self.session: Any = (
            target.open(options()) if runner is None else runner.run(target.open_async(options()))
        )

    def __call__(self, method: str, *args: object) -> Any:
        asked = getattr(self.session, method)
        if self._runner is None:
            return asked(*args)

        async def run() -> Any:
            return await asked(*args)

        return self._runner.run(run())

    def get(self, key: bytes) -> Any:
        """Return the value or None, as an operator sees it."""
        try:
            return self("get", key)
        except self.session.not_found:
            return None


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("way", ["blocking", "loop"])
def test_a_session_keeps_what_it_is_given(make: MakeTarget, scheme: str, way: str) -> None:
    target = make(scheme)
    if way == "loop" and target.concurrent == "threads":
        with pytest.raises(NotImplementedError):
            asyncio.run(target.open_async(options()))
        return
    with ExitStack() as stack:
        runner = stack.enter_context(asyncio.Runner()) if way == "loop" else None
        ask = Asker(target, runner)
        key = f"{scheme}-{way}:".encode()
        a, b, c = (key + name for name in (b"a", b"b", b"c"))
        assert ask.get(a) is None
        ask("set", a, b"value\r\n\x00\xff", None)
        assert ask.get(a) == b"value\r\n\x00\xff"
        ask("set", b, b"", 60.0)
        assert ask.get(b) == b""
        assert list(ask("get_many", [a, b, c])) == [c]
        assert list(ask("get_many", [a, b])) == []
        ask("delete", a)
        ask("delete", a)
        assert ask.get(a) is None
        ask("set_many", {a: b"1", c: b"3"}, 60.0)
        assert list(ask("get_many", [a, b, c])) == []
        ask("delete_many", [a, b])
        assert list(ask("get_many", [a, b, c])) == [a, b]
        assert (ask("memory_hits") is not None) == (scheme == "local")
        ask("close")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_target_says_what_it_is(make: MakeTarget, scheme: str) -> None:
    target = make(scheme)
    target.check(options())
    assert any(digit in target.client for digit in "0123456789")
    assert target.server
    assert not target.loads_misses()
    roles = [found.role for found in target.processes()]
    if scheme in NODES:
        assert {"worker 0", "worker 1", "supervisor"} <= set(roles)
    else:
        assert roles == ["redis-server" if scheme == "redis" else "memcached"]


@pytest.mark.parametrize("scheme", NODES)
@pytest.mark.parametrize("group", ["load", "load-async"])
def test_a_group_with_a_getter_is_seen_to_load(make: MakeTarget, scheme: str, group: str) -> None:
    target = make(scheme)
    target.check(options(group))
    assert target.loads_misses()


def test_loads_are_counted_over_grpc(make: MakeTarget) -> None:
    target = make("grpc")
    target.check(options("load"))
    before = target.counters()
    session = target.open(options("load"))
    for name in (b"one", b"two", b"one"):
        session.get(b"counted:" + name)
    after = target.counters()
    session.close()
    assert before is not None
    assert after is not None
    assert after.missed - before.missed == 2


def test_memory_counts_the_hits_of_this_process(make: MakeTarget) -> None:
    session = make("local").open(options())
    before = session.memory_hits()
    session.set(b"counted", b"v", None)
    for _ in range(5):
        session.get(b"counted")
    after = session.memory_hits()
    session.close()
    assert before is not None
    assert after is not None
    assert 4 <= after - before <= 5


@pytest.mark.parametrize("scheme", NODES)
def test_a_group_that_is_not_there_is_a_sentence(make: MakeTarget, scheme: str) -> None:
    with pytest.raises(TargetError, match="no group 'nowhere'"):
        make(scheme).check(options("nowhere"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("local:/nowhere/at/all", "no node runs at"),
        ("grpc:127.0.0.1:1", "no node answers"),
        ("http:127.0.0.1:1", "start the node with --api"),
        ("redis:/no/such.sock", "no redis-server answers"),
        ("redis:127.0.0.1:1", "no redis-server answers"),
        ("memcached:/no/such.sock", "no memcached answers"),
    ],
)
def test_an_unreachable_target_is_a_sentence(text: str, says: str) -> None:
    target = make_target(text)
    with pytest.raises(TargetError, match=says) as raised:
        target.check(options())
    assert str(raised.value).startswith(text)
    target.close()
    with pytest.raises(TargetError):
        target.open(options(timeout_s=2.0))


def test_one_server_taken_for_another_is_a_sentence(make: MakeTarget) -> None:
    redis, memcached = make("redis").name, make("memcached").name
    for wrong in (
        memcached.replace("memcached:", "redis:", 1),
        redis.replace("redis:", "memcached:", 1),
        make("grpc").name.replace("grpc:", "http:"),
        make("http").name.replace("http:", "grpc:"),
    ):
        target = make_target(wrong)
        with pytest.raises(TargetError):
            target.check(options())
        target.close()


def test_http_errors_have_the_names_of_the_node(make: MakeTarget) -> None:
    session = make("http").open(options("plain"))
    with pytest.raises(Exception, match="413") as raised:
        session.set(b"large", b"x" * (4 << 20), None)
    assert error_class(raised.value) == "ValueTooLargeError"
    session.close()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_value_that_is_too_large_is_an_error(make: MakeTarget, scheme: str) -> None:
    if scheme == "redis":
        pytest.skip("redis takes 512 MiB")
    session = make(scheme).open(options("plain"))
    with pytest.raises(Exception) as raised:  # noqa: PT011
        session.set(b"large", b"x" * (4 << 20), None)
    assert error_class(raised.value) in {
        "ValueTooLargeError", "MemcacheServerError", "NotStoredError"
    }  # fmt: skip
    session.close()
