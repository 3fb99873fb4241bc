"""Discovery through a real etcd: joining, dying, leaving, and an etcd that fails."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from kamacache.cluster.discovery import etcd as module
from kamacache.cluster.discovery.etcd_client import Entry, EtcdClient
from kamacache.cluster.discovery.retry import Backoff, Report, SourceError
from tests.cluster.discovery.conftest import Follow, until
from tests.cluster.discovery.servers import EtcdServer, free_port
from tests.node_process import ROOT

A, B, C = "10.0.0.1:8001", "10.0.0.2:8001", "10.0.0.3:8001"
TTL_S = 2
LONG_S = 60  # where no lease may end meanwhile, however busy the machine is

# A node that does nothing but register, in a process that can be killed.
MEMBER = """
import asyncio, sys
from kamacache.cluster.discovery import open_discovery
from kamacache.cluster.membership import Member
source = open_discovery(sys.argv[1], Member(sys.argv[2]))
asyncio.run(source.run(lambda members: None))
"""


def url(*servers: str, ttl_s: int = TTL_S) -> str:
    return f"etcd://{','.join(servers)}/kamacache/test?ttl={ttl_s}"


@pytest_asyncio.fixture
async def client(etcd: EtcdServer) -> AsyncIterator[EtcdClient]:
    """Somebody else who talks to the etcd."""
    client = EtcdClient(etcd.address)
    yield client
    await client.close()


async def entry(client: EtcdClient, address: str) -> Entry | None:
    _, entries = await client.list(f"/kamacache/test/{address}/"[:-1])
    return next(iter(entries), None)


async def test_members_see_each_other_with_weights(etcd: EtcdServer, follow: Follow) -> None:
    a = follow(url(etcd.address), A)
    await a.sees(A)
    b = follow(url(etcd.address), f"{B}=3")
    await a.sees(A, f"{B}=3")
    await b.sees(A, f"{B}=3")
    assert all(list(m) == sorted(m) for m in a.lists)


async def test_a_node_that_leaves_is_gone_at_once(etcd: EtcdServer, follow: Follow) -> None:
    where = url(etcd.address, ttl_s=LONG_S)
    a, b = follow(where, A), follow(where, B)
    await a.sees(A, B)
    await b.sees(A, B)
    await b.stop()
    await b.source.leave()
    await a.sees(A)
    await b.source.leave()  # once is enough, twice is no error


async def test_a_node_that_left_does_not_register_again(
    etcd: EtcdServer, follow: Follow, client: EtcdClient
) -> None:
    a, b = follow(url(etcd.address), A), follow(url(etcd.address), B)
    await a.sees(A, B)
    await b.sees(A, B)
    await b.source.leave()  # and it still runs
    await a.sees(A)
    etcd.restart()
    await follow(url(etcd.address), C).sees(A, C)
    await b.sees(A, C)
    assert await entry(client, B) is None


async def test_a_killed_node_is_gone_when_its_lease_ends(etcd: EtcdServer, follow: Follow) -> None:
    a = follow(url(etcd.address), A)
    killed = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", MEMBER, url(etcd.address), B),
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        await a.sees(A, B)
    finally:
        killed.kill()
        await killed.wait()
    await a.sees(A)
    assert not a.task.done()


async def test_a_node_of_the_same_name_takes_over_from_its_last_life(
    etcd: EtcdServer, follow: Follow, client: EtcdClient
) -> None:
    lease = await client.grant(TTL_S)
    await client.put(f"/kamacache/test/{A}", b'{"address":"%s","weight":9}' % A.encode(), lease)
    watcher = follow(url(etcd.address), B)
    await watcher.sees(f"{A}=9", B)
    a = follow(url(etcd.address), A)
    await watcher.sees(A, B)
    await client.revoke(lease)  # as when it ends: the key is on another lease by now
    await follow(url(etcd.address), C).sees(A, B, C)
    await a.sees(A, B, C)


async def test_a_revoked_lease_is_taken_again(
    etcd: EtcdServer, follow: Follow, client: EtcdClient
) -> None:
    where = url(etcd.address, ttl_s=LONG_S)  # seen by the watch, long before a keep-alive
    a, b = follow(where, A), follow(where, B)
    await a.sees(A, B)
    await b.sees(A, B)
    before = await entry(client, B)
    assert before is not None
    await client.revoke(before.lease)
    async with asyncio.timeout(10):
        after = None
        while after is None or after.lease == before.lease:
            await asyncio.sleep(0.02)
            after = await entry(client, B)
    await a.sees(A, B)


async def test_a_lease_that_expired_is_taken_again(
    etcd: EtcdServer, follow: Follow, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = follow(url(etcd.address, ttl_s=LONG_S), A)
    await a.sees(A)
    b = follow(url(etcd.address), B)
    assert isinstance(b.source, module.EtcdDiscovery)
    keep = b.source._keep_lease
    leases: list[int] = []

    async def not_the_first(client: EtcdClient, lease: int) -> None:
        leases.append(lease)
        if len(leases) == 1:
            await asyncio.Event().wait()
        await keep(client, lease)

    monkeypatch.setattr(b.source, "_keep_lease", not_the_first)
    await a.sees(A, B)
    await until(lambda: len(leases) > 1)
    assert leases[1] != leases[0]
    await a.sees(A, B)


async def test_a_key_that_was_deleted_by_hand_is_written_again(
    etcd: EtcdServer, follow: Follow, client: EtcdClient
) -> None:
    a = follow(url(etcd.address), A)
    await a.sees(A)
    # A new lease takes the key over and ends: the key goes, the node's lease stays.
    lease = await client.grant(TTL_S)
    await client.put(f"/kamacache/test/{A}", b'{"address":"%s"}' % A.encode(), lease)
    await client.revoke(lease)
    await until(lambda: [] in [list(found) for found in a.lists])
    await a.sees(A)


async def test_an_etcd_that_restarts_with_its_data_changes_nothing(
    etcd: EtcdServer, follow: Follow
) -> None:
    where = url(etcd.address, ttl_s=LONG_S)
    a, b = follow(where, A), follow(where, B)
    await a.sees(A, B)
    await b.sees(A, B)
    lists = len(a.lists)
    etcd.restart()
    await follow(where, C).sees(A, B, C)
    await a.sees(A, B, C)
    assert all({A, B} <= {m.address for m in found} for found in a.lists[lists:])


async def test_an_etcd_that_lost_its_data_is_filled_again_and_nobody_goes_meanwhile(
    etcd: EtcdServer, follow: Follow
) -> None:
    where = url(etcd.address, ttl_s=LONG_S)
    a, b = follow(where, A), follow(where, B)
    await a.sees(A, B)
    await b.sees(A, B)
    lists = len(a.lists)
    etcd.restart(forget=True)
    await follow(where, C).sees(A, B, C)
    await a.sees(A, B, C)
    await b.sees(A, B, C)
    assert all({A, B} <= {m.address for m in found} for found in a.lists[lists:])


async def test_a_node_that_died_with_the_etcd_goes_a_while_later(
    etcd: EtcdServer, follow: Follow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "GRACE_LEAST_S", 2)
    a, b = follow(url(etcd.address), A), follow(url(etcd.address), B)
    await a.sees(A, B)
    await b.sees(A, B)
    etcd.stop()
    await b.stop()
    etcd.restart(forget=True)
    assert a.addresses == [A, B]
    await a.sees(A)


async def test_an_etcd_that_is_down_leaves_the_list_as_it_is_and_few_lines(
    etcd: EtcdServer,
    follow: Follow,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "Backoff", lambda longest_s: Backoff(0.01, 0.02))
    failures: list[str] = []
    failed = Report.failed

    def count(self: Report, why: str) -> None:
        failures.append(why)
        failed(self, why)

    monkeypatch.setattr(Report, "failed", count)
    a = follow(url(etcd.address), A)
    await a.sees(A)
    etcd.stop()
    lists = len(a.lists)
    await until(lambda: len(failures) > 20)
    assert len(a.lists) == lists
    lines = [r for r in caplog.records if r.name == "kamacache.discovery"]
    assert 1 <= len(lines) <= 5  # one for each reason, not one for each try


async def test_a_node_that_starts_before_its_etcd_joins_later(
    etcd: EtcdServer, follow: Follow
) -> None:
    etcd.stop()
    a = follow(url(etcd.address), A)
    await asyncio.sleep(0.3)
    assert not a.lists
    assert etcd.start()
    await a.sees(A)


async def test_the_next_server_is_asked_when_one_does_not_answer(
    etcd: EtcdServer, follow: Follow
) -> None:
    nobody = f"127.0.0.1:{free_port()}"
    a = follow(url(nobody, etcd.address), A)
    b = follow(url(etcd.address, nobody), B)
    await a.sees(A, B)
    await b.sees(A, B)
    await a.stop()
    await a.source.leave()
    await b.sees(B)


async def test_a_server_that_accepts_and_says_nothing_is_passed_over(
    etcd: EtcdServer, follow: Follow
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # the kernel accepts, nobody reads
        port = silent.getsockname()[1]
        await follow(url(f"127.0.0.1:{port}", etcd.address), A).sees(A)


async def test_an_etcd_that_stands_still_leaves_the_list_and_is_left_in_time(
    etcd: EtcdServer,
    follow: Follow,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "GRACE_LEAST_S", 2)
    a, b = follow(url(etcd.address), A), follow(url(etcd.address), B)
    await a.sees(A, B)
    await b.sees(A, B)
    etcd.signal(signal.SIGSTOP)
    try:
        await until(lambda: "no answer" in str([vars(r) for r in caplog.records]))
        begun = time.monotonic()
        await b.stop()
        with pytest.raises(SourceError):
            await b.source.leave()
        assert time.monotonic() - begun < 6
        assert a.addresses == [A, B]
    finally:
        etcd.signal(signal.SIGCONT)
    await a.sees(A)


async def test_members_of_an_etcd_cluster_may_die_and_the_rest_may_lose_its_majority(
    three_etcds: list[EtcdServer], follow: Follow, caplog: pytest.LogCaptureFixture
) -> None:
    one, two, three = three_etcds
    everywhere = url(one.address, two.address, three.address)
    a, b = follow(everywhere, A), follow(everywhere, B)
    await a.sees(A, B)
    await b.sees(A, B)
    one.stop()
    c = follow(everywhere, C)
    await a.sees(A, B, C)
    await b.sees(A, B, C)
    await c.sees(A, B, C)
    two.stop()
    caplog.clear()
    await until(lambda: [r for r in caplog.records if three.address in str(vars(r))])
    await c.stop()
    assert a.addresses == b.addresses == [A, B, C]
    assert one.start(wait=False)
    await a.sees(A, B, within_s=30)
    await b.sees(A, B, within_s=30)


async def test_leaving_an_etcd_that_is_down_ends_in_time(etcd: EtcdServer, follow: Follow) -> None:
    a = follow(url(etcd.address), A)
    await a.sees(A)
    await a.stop()
    etcd.stop()
    begun = time.monotonic()
    with pytest.raises(SourceError):
        await a.source.leave()
    assert time.monotonic() - begun < 6


async def test_a_login_is_done_anew_for_each_session(
    etcd: EtcdServer, follow: Follow, client: EtcdClient, caplog: pytest.LogCaptureFixture
) -> None:
    from aetcd import rpc

    auth = rpc.AuthStub(client._channel)
    await auth.UserAdd(rpc.AuthUserAddRequest(name="root", password="p&w+1"), timeout=5)
    await auth.RoleAdd(rpc.AuthRoleAddRequest(name="root"), timeout=5)
    await auth.UserGrantRole(rpc.AuthUserGrantRoleRequest(user="root", role="root"), timeout=5)
    await auth.AuthEnable(rpc.AuthEnableRequest(), timeout=5)
    where = url(etcd.address, ttl_s=LONG_S)
    a = follow(f"{where}&username=root&password=p%26w+1", A)
    await a.sees(A)
    etcd.restart()  # forgets all tokens
    b = follow(f"{where}&username=root&password=p%26w+1", B)
    await a.sees(A, B)
    await b.sees(A, B)
    await b.stop()
    await b.source.leave()
    await a.sees(A)
    stranger = follow(f"{where}&username=root&password=hush", C)
    await until(lambda: "authentication failed" in str([vars(r) for r in caplog.records]))
    assert not stranger.lists
    assert "hush" not in str([vars(r) for r in caplog.records])


async def test_keys_that_are_not_members_are_passed_over(
    etcd: EtcdServer, follow: Follow, client: EtcdClient
) -> None:
    lease = await client.grant(60)
    for key, value in {
        "garbage": b"\xff",
        B: b'{"address":"10.9.9.9:1"}',
        "10.0.0.9:80": b'{"address":"10.0.0.9:80","weight":1000}',
        "deeper/10.0.0.9:80": b"{}",
    }.items():
        await client.put(f"/kamacache/test/{key}", value, lease)
    await client.put("/kamacache/testing/10.0.0.8:1", b'{"address":"10.0.0.8:1"}', lease)
    a = follow(url(etcd.address), A)
    await a.sees(A)
    await client.put(f"/kamacache/test/{C}", b'{"address":"%s","weight":2}' % C.encode(), lease)
    await a.sees(A, f"{C}=2")


async def test_a_compacted_watch_lists_again(etcd: EtcdServer, client: EtcdClient) -> None:
    from aetcd import rpc

    lease = await client.grant(60)
    for _ in range(3):
        await client.put("/kamacache/test/x", b"x", lease)
    revision, _ = await client.list("/kamacache/test/")
    await client._keys.Compact(rpc.CompactionRequest(revision=revision), timeout=5)
    with pytest.raises(SourceError, match="compacted at revision"):
        await asyncio.wait_for(client.watch("/kamacache/test/", 1, lambda changed: None), 10)
