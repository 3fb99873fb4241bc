"""Real servers, and a follower that runs a source and keeps what it published."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path

import pytest
import pytest_asyncio

from kamacache.cluster.discovery import Discovery, open_discovery
from kamacache.cluster.membership import Member, check_address
from tests.cluster.discovery.servers import DnsServer, EtcdServer, program

OWN = Member("127.0.0.1:8001")


class Follower:
    """One source that is run, and its lists."""

    def __init__(self, url: str, own: str) -> None:
        self.own = check_address(own, "own")
        self.source: Discovery = open_discovery(url, self.own)
        self.lists: list[Sequence[Member]] = []
        self.task = asyncio.create_task(self.source.run(self.lists.append))

    @property
    def addresses(self) -> list[str]:
        """The last list; a node's weight is told where it is not 1."""
        if not self.lists:
            return []
        return [m.address if m.weight == 1 else f"{m.address}={m.weight}" for m in self.lists[-1]]

    async def sees(self, *addresses: str, within_s: float = 15.0) -> float:
        """Wait for a list, and return how long that took."""
        begun = time.monotonic()
        await until(
            lambda: self.addresses == sorted(addresses),
            within_s,
            lambda: f"wanted {sorted(addresses)}, lists {self.lists}",
        )
        return time.monotonic() - begun

    async def stop(self) -> None:
        """End the source as the agent does; it must let itself be cancelled."""
        self.task.cancel()
        done, _ = await asyncio.wait((self.task,), timeout=5)
        assert done, "the source does not let itself be cancelled"
        if not self.task.cancelled():
            self.task.result()


async def until(
    condition: Callable[[], object],
    within_s: float = 15.0,
    what: Callable[[], str] = lambda: "",
) -> None:
    """Wait for a condition, and fail when time is up."""
    end = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > end:
            pytest.fail(f"not within {within_s} s: {what()}")
        await asyncio.sleep(0.01)


Follow = Callable[..., Follower]


@pytest_asyncio.fixture
async def follow() -> AsyncIterator[Follow]:
    """Return ``follow(url, own="127.0.0.1:8001")``; all are stopped at the end."""
    followers: list[Follower] = []

    def begin(url: str, own: str = OWN.address) -> Follower:
        followers.append(Follower(url, own))
        return followers[-1]

    yield begin
    for follower in followers:
        await follower.stop()


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[EtcdServer]:
    """An etcd of its own for each test."""
    if program("etcd") is None:
        pytest.skip("no etcd here: apt-get install etcd-server")
    folder = tmp_path / "etcd"
    folder.mkdir()
    server = EtcdServer.begin(folder)
    yield server
    server.stop()


@pytest.fixture
def three_etcds(tmp_path: Path) -> Iterator[list[EtcdServer]]:
    """An etcd cluster of three."""
    if program("etcd") is None:
        pytest.skip("no etcd here: apt-get install etcd-server")
    servers = EtcdServer.begin_three(tmp_path)
    yield servers
    for server in servers:
        server.stop()


@pytest.fixture
def dnsmasq(tmp_path: Path) -> Iterator[DnsServer]:
    """A dnsmasq of its own for each test."""
    if program("dnsmasq") is None:
        pytest.skip("no dnsmasq here: apt-get install dnsmasq-base")
    folder = tmp_path / "dnsmasq"
    folder.mkdir()
    server = DnsServer(folder)
    yield server
    server.stop()
