"""Scripted nodes, and one way to call a client from a thread or from an event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import kamacache
from tests.client.fakes import FakeNode, Values, introduce
from tests.cluster_nodes import make_cluster

__all__ = ["make_cluster"]

MakeNodes = Callable[..., list[FakeNode]]


@pytest.fixture
def make_nodes() -> Iterator[MakeNodes]:
    """Return ``make_nodes(count)``: members of one cluster, with the same values."""
    made: list[FakeNode] = []

    def make(count: int, *others: str) -> list[FakeNode]:
        values: Values = {}
        nodes = [FakeNode(values) for _ in range(count)]
        introduce(nodes, *others)
        made.extend(nodes)
        return nodes

    yield make
    for node in made:
        node.stop()


class Caller:
    """Calls a client's methods: as they are, or their async forms in a loop."""

    def __init__(self, runner: asyncio.Runner | None) -> None:
        self._runner = runner
        self.clients: list[kamacache.Client] = []

    def client(self, *seeds: str, timeout: float = 10.0, **access: Any) -> kamacache.Client:
        """Return a client that is closed with the test."""
        made = kamacache.Client(seeds, timeout=timeout, **access)
        self.clients.append(made)
        return made

    def __call__(self, target: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        """Return what a method of a client or a remote group returns."""
        if self._runner is None:
            return getattr(target, method)(*args, **kwargs)
        return self._runner.run(getattr(target, f"a{method}")(*args, **kwargs))

    def timed(self, target: Any, method: str, *args: Any, **kwargs: Any) -> tuple[Any, float]:
        """Return the result and the seconds it took; an error counts as one."""
        start_s = time.monotonic()
        try:
            result = self(target, method, *args, **kwargs)
        except kamacache.KamaCacheError as error:
            result = error
        return result, time.monotonic() - start_s

    def idle(self, wait_s: float = 0.01) -> None:
        """Let the loop run, where there is one: its questions are answered meanwhile."""
        if self._runner is not None:
            self._runner.run(asyncio.sleep(wait_s))

    def await_usable(self, client: kamacache.Client, *nodes: FakeNode) -> None:
        """Call until every one of these nodes has answered the client."""
        end_s = time.monotonic() + 10
        wanted = {node.address for node in nodes}
        i = 0
        while True:
            view = client._nodes.view
            known = {a for a, node in view.nodes.items() if node.usable}
            if wanted <= known and client._nodes.joined:
                break
            assert time.monotonic() < end_s, (wanted, known)
            i += 1
            self(client, "get", "scores", f"warm{i}", None)
            self.idle()
        for node in nodes:
            node.forget()

    def close(self) -> None:
        """Close all clients."""
        for client in self.clients:
            if self._runner is None:
                client.close()
            else:
                self._runner.run(client.aclose())


@pytest.fixture(params=["sync", "async"])
def caller(request: pytest.FixtureRequest) -> Iterator[Caller]:
    """Return how to call: every behaviour must be the same both ways."""
    if request.param == "sync":
        made = Caller(None)
        yield made
        made.close()
    else:
        with asyncio.Runner() as runner:
            made = Caller(runner)
            yield made
            made.close()
