"""A cluster of nodes that know each other by certificates: traffic, rotation, and who stays out."""

from __future__ import annotations

import itertools
import signal
import ssl
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Self

import pytest

import kamacache
from kamacache.rundir.live import SecurityFiles
from kamacache.rundir.roster import read_roster
from tests.cluster_nodes import Cluster, ClusterNode
from tests.pki import Pki, changed, flags, serial_at, serial_of

WaitUntil = Callable[..., None]
MakeCluster = Callable[..., Cluster]


def host(node: ClusterNode) -> str:
    return node.address.rpartition(":")[0]


def file_of(node: ClusterNode) -> str:
    return f"node{node.number}"


def reloads(node: ClusterNode) -> int:
    assert node.process is not None
    return read_roster(node.process.description().sockets_dir).reloads


def hang_up(cluster: Cluster, wait_until: WaitUntil) -> None:
    """Have all nodes reload, and wait until they have."""
    before = {node: reloads(node) for node in cluster.nodes}
    for node in cluster.nodes:
        assert node.process is not None
        node.process.process.send_signal(signal.SIGHUP)
    wait_until(lambda: all(reloads(node) > before[node] for node in cluster.nodes))


class Traffic:
    """Threads that read and write at every node, and over gRPC, until they are told to end."""

    def __init__(self, cluster: Cluster, client: kamacache.Client) -> None:
        self._end = threading.Event()
        self.failures: list[str] = []
        self.calls = 0
        users = [node.group() for node in cluster.nodes]
        self._threads = [
            threading.Thread(target=self._attached, args=(f"a{i}", users, i)) for i in range(3)
        ]
        self._threads.append(threading.Thread(target=self._remote, args=(client,)))

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join(30)

    def _count(self, call: Callable[[], object], expected: object = None) -> None:
        try:
            found = call()
            if expected is not None and found != expected:
                self.failures.append(f"{found!r} is not {expected!r}")
        except kamacache.KamaCacheError as error:
            self.failures.append(f"{type(error).__name__}: {error}")
        self.calls += 1

    def _attached(self, name: str, users: list[object], first: int) -> None:
        mine: object = users[first]
        for number in itertools.count():
            if self._end.is_set():
                return
            key = f"{name}-{number}"
            self._count(lambda key=key: mine.set(key, key))  # type: ignore[attr-defined, misc]
            self._count(lambda key=key: mine.get(key), key)  # type: ignore[attr-defined, misc]
            self._end.wait(0.002)

    def _remote(self, client: kamacache.Client) -> None:
        for number in itertools.count():
            if self._end.is_set():
                return
            key = f"r-{number}"
            self._count(lambda key=key: client.set("scores", key, key.encode()))  # type: ignore[misc]
            self._count(lambda key=key: client.get("scores", key), key.encode())  # type: ignore[misc]
            self._end.wait(0.002)


@pytest.fixture
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(tmp_path_factory.mktemp("pki"))


def secured(cluster: Cluster, pki: Pki) -> Cluster:
    for node in cluster.nodes:
        node.arguments += tuple(flags(pki.mutual(host(node), file=file_of(node))))
    return cluster


def end_front(node: ClusterNode) -> None:
    """Kill its front: links and clients have to shake hands anew."""
    assert node.process is not None
    front = node.process.role("front 0")
    assert front is not None
    front.kill()
    front.wait(10)


def test_nodes_read_and_write_over_tls_and_rotate_all_under_traffic(
    make_cluster: MakeCluster, pki: Pki, wait_until: WaitUntil, tmp_path: Path
) -> None:
    cluster = secured(make_cluster(3, workers=1), pki)
    cluster.start()
    for number, node in enumerate(cluster.nodes):
        for owner in cluster.nodes:
            key = cluster.key_of(owner, f"k{number}")
            node.group().set(key, "1")
            assert all(other.group().get(key) == "1" for other in cluster.nodes)

    fresh = Pki(tmp_path)
    bundle = Path(pki.ca_path)
    old_ca, new_ca = pki.ca.cert_pem.bytes(), fresh.ca.cert_pem.bytes()
    files: dict[ClusterNode, SecurityFiles] = {}

    def trust(ca: bytes) -> None:
        new = bundle.with_suffix(".new")
        new.write_bytes(ca)
        new.replace(bundle)
        hang_up(cluster, wait_until)

    def renew() -> None:
        for node in cluster.nodes:
            files[node] = pki.mutual(host(node), file=file_of(node))
        hang_up(cluster, wait_until)

    def all_show_theirs(context: ssl.SSLContext) -> bool:
        return all(
            serial_at(node.address, context, "h2") == serial_of(files[node])
            for node in cluster.nodes
        )

    own = pki.issue("client", file="client")
    with kamacache.Client(
        [cluster.nodes[0].address],
        tls_ca=pki.ca_path,
        tls_cert=own.tls_cert,
        tls_key=own.tls_key,
    ) as client:
        with Traffic(cluster, client) as traffic:
            renew()
            context = pki.client_context(own)
            wait_until(lambda: all_show_theirs(context))
            # Another CA: first both are trusted, then it alone signs, then it alone is trusted.
            trust(old_ca + new_ca)
            pki.ca = fresh.ca
            renew()
            trust(new_ca)
            context = fresh.client_context(files[cluster.nodes[0]])
            wait_until(lambda: all_show_theirs(context))
            before = traffic.calls
            wait_until(lambda: traffic.calls > before + 50)
        assert not traffic.failures, traffic.failures[:5]
        assert len(client.addresses) == 3
    for node in cluster.nodes:
        end_front(node)
    cluster.await_linked()
    for owner in cluster.nodes:
        key = cluster.key_of(owner, "after")
        cluster.nodes[0].group().set(key, "2")
        assert [node.group().get(key) for node in cluster.nodes] == ["2"] * 3
    for node in cluster.nodes:
        node.stop()


@pytest.mark.soak  # `tests/cluster/test_channel.py` shows each refusal in a second
def test_nodes_that_the_others_must_not_trust_stay_out_and_it_is_told_why(
    make_cluster: MakeCluster, pki: Pki, wait_until: WaitUntil, tmp_path: Path
) -> None:
    cluster = make_cluster(4, workers=1)
    first, second, foreign, plain = cluster.nodes
    plain_arguments = {node: node.arguments for node in cluster.nodes}
    secured(cluster, pki)
    plain.arguments = plain_arguments[plain]
    # It trusts the others, and is signed by somebody else.
    strange = changed(
        Pki(tmp_path).mutual(host(foreign)), tls_ca=pki.ca_path, tls_client_ca=pki.ca_path
    )
    foreign.arguments = (*plain_arguments[foreign], *flags(strange))
    cluster.start(linked=False)
    cluster.await_links({0: 1, 1: 1, 2: 0, 3: 0})
    for node in (first, second):
        wait_until(lambda node=node: "none of those that are trusted" in node.log)
        wait_until(lambda node=node: "does not speak TLS" in node.log)
        assert node.log.count("none of those that are trusted") == 1  # by its one worker
    wait_until(lambda: "it ended the TLS handshake" in foreign.log)
    wait_until(lambda: "if it speaks TLS, tls_ca is needed" in plain.log)
    key = cluster.key_of(foreign)
    first.group().set(key, "1")
    assert second.group().get(key) == "1"

    # With a certificate of the cluster's it is one of them, without a restart of the others.
    foreign.stop()
    foreign.arguments = (*plain_arguments[foreign], *flags(pki.mutual(host(foreign), file="late")))
    foreign.start()
    cluster.await_links({0: 2, 1: 2, 2: 2, 3: 0})
    for node in (first, second, foreign, plain):
        node.stop()
