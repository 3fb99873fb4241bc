"""Whole nodes for tests of clusters: real processes on 127.0.0.1, 127.0.0.2, ..., and their ends.

A node is killed, made to hang, let go on and started again with all its processes at once, as a
host is. All nodes of a `Cluster` run `tests.cluster_app` over one database in the cluster's
folder. Ports are below those that the kernel hands out, so that a node that is down finds its own
again. The fixtures are those of every folder whose conftest names them.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import psutil
import pytest

from kamacache.cluster.membership import Member
from kamacache.cluster.ring import Ring
from kamacache.errors import GroupNotFoundError, KamaCacheError, NodeUnavailableError
from kamacache.local.attach import Attachment
from kamacache.local.attached import AttachedEngine
from kamacache.store.reader import NEGATIVE
from tests.cluster_app import NODE, PLACE, Database
from tests.cluster_driver import Driver, started
from tests.node_process import NodeProcess, is_alive

CALL_S = 10.0
LINKED_S = 15.0
PORTS = range(11_000, 32_000)


class NodeGroup:
    """One node's group, used from the test's own process; errors are raised, nothing falls back."""

    def __init__(self, engine: AttachedEngine) -> None:
        self._engine = engine

    def get(self, key: str, timeout_s: float = CALL_S) -> str | None:
        """Return the value as text, None: not found."""
        found = self._engine.lookup(key)
        if found is NEGATIVE:
            return None
        if not isinstance(found, bytes):
            found = self._engine.get(key.encode(), time.monotonic() + timeout_s)
        return None if found is None else found.decode()

    def get_many(self, keys: Sequence[str], timeout_s: float = CALL_S) -> dict[str, str]:
        """Return the values of those found; asks the workers for all."""
        asked = [key.encode() for key in keys]
        found = self._engine.get_many(asked, time.monotonic() + timeout_s)
        return {key.decode(): value.decode() for key, value in found.items()}

    def set(self, key: str, value: str, timeout_s: float = CALL_S, ttl_s: float = 0) -> None:
        """Keep a value."""
        ttl_ms = int(ttl_s * 1000) or None
        self._engine.set(key.encode(), value.encode(), ttl_ms, time.monotonic() + timeout_s)

    def set_many(self, items: Mapping[str, str], timeout_s: float = CALL_S) -> None:
        """Keep several."""
        data = {key.encode(): value.encode() for key, value in items.items()}
        self._engine.set_many(data, None, time.monotonic() + timeout_s)

    def delete(self, key: str, timeout_s: float = CALL_S) -> bool:
        """Drop a key; was it there?"""
        return self._engine.delete(key.encode(), time.monotonic() + timeout_s)

    def delete_many(self, keys: Sequence[str], timeout_s: float = CALL_S) -> int:
        """Drop several; how many were there?"""
        return self._engine.delete_many(
            [key.encode() for key in keys], time.monotonic() + timeout_s
        )

    def in_memory(self, key: str) -> bool:
        """Tell whether this node holds the key, owned or as a mirror."""
        return self._engine.lookup_entry(key.encode()) is not None

    def reachable(self) -> bool:
        """Tell whether this process has found the node, as it looks for it now and then."""
        try:
            return bool(self.stats())
        except NodeUnavailableError:
            return False

    def stats(self) -> dict[str, Any]:
        """Return the group's numbers at this node."""
        return self._engine.stats(time.monotonic() + CALL_S)


class ClusterNode:
    """One node and all its processes, in one life after another."""

    def __init__(self, address: str, place: Path, shm: Path, number: int) -> None:
        self.address = address
        self.number = number
        self.place = place
        self.run_dir = place / f"n{number}"
        self.list_path = place / f"members{number}.toml"
        self._shm = shm / f"n{number}"
        self._shm.mkdir()
        self.arguments: tuple[str, ...] = ()
        self.prefix: tuple[str, ...] = ()
        self.workers = 2
        self.process: NodeProcess | None = None
        self.hung = False
        self._past_logs = ""
        self._attachments: list[Attachment] = []
        self._groups: dict[str, NodeGroup] = {}
        self._drivers = 0

    # -- its lives --------------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        """Whether it was started and not ended since."""
        return self.process is not None

    def start(self, *, wait: bool = True) -> None:
        """Start it, for the first time or again."""
        assert self.process is None, f"{self.address} runs already"
        self.process = NodeProcess(
            self.run_dir,
            *("--workers", str(self.workers), "--shm-dir", str(self._shm), *self.arguments),
            environment={PLACE: str(self.place), NODE: self.address},
            prefix=self.prefix,
        )
        if wait:
            self.await_ready()

    def await_ready(self, deadline_s: float = 30.0) -> None:
        """Wait for its ready line."""
        assert self.process is not None
        self.process.await_ready(deadline_s)
        end_s = time.monotonic() + deadline_s
        while not all(group.reachable() for group in self._groups.values()):
            assert time.monotonic() < end_s, f"{self.address} is ready and serves nobody"
            time.sleep(0.02)

    def stop(self, *, deadline_s: float = 20.0) -> None:
        """Let it drain and end; fails unless it ends well."""
        assert self.process is not None
        code = self.process.stop(deadline_s=deadline_s)
        self._over()
        assert code == 0, self.log

    def terminate(self) -> None:
        """Tell it to drain; `await_end` follows."""
        assert self.process is not None
        self.process.process.terminate()

    def await_end(self, deadline_s: float = 20.0) -> None:
        """Wait for the end of a drain."""
        assert self.process is not None
        code = self.process.await_end(deadline_s)
        self._over()
        assert code == 0, self.log

    def kill(self) -> None:
        """End all its processes with SIGKILL, as one."""
        assert self.process is not None
        pids = self.pids()
        _signal(pids[:1], signal.SIGSTOP)  # the supervisor, or it would start others
        _signal([*pids[1:], *self.pids()[1:]], signal.SIGKILL)
        _signal(pids[:1], signal.SIGKILL)
        self._over()
        end_s = time.monotonic() + 10
        while any(_runs(pid) for pid in pids):
            assert time.monotonic() < end_s, f"{self.address} does not end"
            time.sleep(0.002)

    def hang(self) -> None:
        """Stop all its processes: connections stay, nothing answers."""
        self.hung = True
        _signal(self.pids(), signal.SIGSTOP)

    def go_on(self) -> None:
        """Let a node that hangs go on."""
        if self.hung:
            _signal(reversed(self.pids()), signal.SIGCONT)
            self.hung = False

    def _over(self) -> None:
        assert self.process is not None
        self._past_logs += self.process.log
        self.process.__exit__()
        self.process = None
        self.hung = False

    def pids(self) -> list[int]:
        """Return its processes, the supervisor first."""
        if self.process is None:
            return []
        return [self.process.pid, *(child.pid for child in self.process.children())]

    @property
    def log(self) -> str:
        """What it wrote in all its lives."""
        return self._past_logs + (self.process.log if self.process else "")

    def close(self) -> None:
        """End it whatever it does, and leave nothing behind."""
        for attachment in self._attachments:
            attachment.close()
        if self.process is not None:
            self.go_on()
            self.kill()
        shutil.rmtree(self._shm, ignore_errors=True)

    # -- its users --------------------------------------------------------------------------------

    def group(self, name: str = "scores") -> NodeGroup:
        """Return a group of it, for the test's own process."""
        found = self._groups.get(name)
        if found is None:
            attachment = Attachment(self.run_dir)
            self._attachments.append(attachment)
            found = self._groups[name] = NodeGroup(AttachedEngine(attachment, name))
        return found

    def driver(self) -> Driver:
        """Return a new process attached to it; `tests.cluster_driver.started` waits for it."""
        self._drivers += 1
        return Driver(self.run_dir, self.address, self.place, f"node{self.number}-{self._drivers}")

    # -- its links --------------------------------------------------------------------------------

    def links(self) -> tuple[int, int] | None:
        """Return how many links to peers its workers have and how many are up; None: not all say.

        Fails with a node that knows nothing of peers.
        """
        try:
            stats = self.group().stats()
        except GroupNotFoundError:
            raise
        except KamaCacheError:
            return None
        if stats["workers_answered"] < stats["workers"]:
            return None
        assert "peers" in stats, "the workers of this version have no peers"
        return stats["peers"], stats["peers_up"]

    def __repr__(self) -> str:
        return f"<node {self.address}>"


class Cluster:
    """Some nodes that share a list of peers; a context manager that ends them all.

    ``workers`` each. ``peers``: by a node's number, the numbers of those that it is told of; all,
    where nothing else is said. ``listed``: each watches a file instead, see `list_members`.
    """

    def __init__(
        self,
        place: Path,
        shm: Path,
        count: int = 3,
        *,
        workers: int = 2,
        hosts: Sequence[str] = (),
        peers: Mapping[int, Sequence[int]] | None = None,
        listed: bool = False,
        arguments: Sequence[str] = (),
    ) -> None:
        self.place = place
        self.database = Database(place)
        hosts = hosts or [f"127.0.0.{number + 1}" for number in range(count)]
        addresses = [f"{host}:{port}" for host, port in zip(hosts, _ports(count), strict=True)]
        self.nodes = [
            ClusterNode(address, place, shm, number) for number, address in enumerate(addresses)
        ]
        self.ring = Ring(Member(address) for address in addresses)
        for node in self.nodes:
            known = range(count) if peers is None else peers.get(node.number, range(count))
            node.workers = workers
            node.arguments = (
                *("--listen", node.address, "--app", "tests.cluster_app:groups"),
                *(
                    ("--discover", f"file:{node.list_path}")
                    if listed
                    else ("--peers", ",".join(addresses[other] for other in known))
                ),
                *arguments,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for node in self.nodes:
            node.close()
        for node in self.nodes:
            print(f"--- {node}\n{node.log[-4_000:]}")  # noqa: T201 -- shown where a test fails

    # -- nodes ------------------------------------------------------------------------------------

    def start(self, *numbers: int, linked: bool = True) -> None:
        """Start these nodes, or all, side by side, and wait until they are linked."""
        chosen = [self.nodes[number] for number in numbers] if numbers else self.nodes
        for node in chosen:
            node.start(wait=False)
        for node in chosen:
            node.await_ready()
        if linked:
            self.await_linked()

    @property
    def running(self) -> list[ClusterNode]:
        """The nodes that are not down and do not hang."""
        return [node for node in self.nodes if node.alive and not node.hung]

    def await_linked(self, nodes: Sequence[ClusterNode] = (), deadline_s: float = LINKED_S) -> None:
        """Wait until every one of these, or of the running, is linked with all that run."""
        waiting = list(nodes or self.running)
        if len(self.nodes) == 1:
            return
        others = len(self.running) - 1
        end_s = time.monotonic() + deadline_s
        seen: dict[str, tuple[int, int] | None] = {}
        while waiting:
            for node in list(waiting):
                links = seen[node.address] = node.links()
                if links is not None and links[1] == others * node.workers:
                    waiting.remove(node)
            assert time.monotonic() < end_s, f"not linked within {deadline_s} s: {seen}"
            time.sleep(0.02)

    def await_links(self, expected: Mapping[int, int], deadline_s: float = LINKED_S) -> None:
        """Wait until each of these nodes, by number, has so many links up."""
        end_s = time.monotonic() + deadline_s
        while True:
            links = {number: self.nodes[number].links() for number in expected}
            if {number: found and found[1] for number, found in links.items()} == expected:
                return
            assert time.monotonic() < end_s, f"not {expected} within {deadline_s} s: {links}"
            time.sleep(0.02)

    def await_unlinked(self, node: ClusterNode, deadline_s: float = 5.0) -> None:
        """Wait until every node that runs has seen that this one is gone."""
        self.await_linked([other for other in self.running if other is not node], deadline_s)

    def list_members(self, *numbers: int, to: Sequence[int] = ()) -> None:
        """Tell nodes ``to``, or all, that these are the members, by the files that they watch."""
        addresses = ", ".join(f'"{self.nodes[number].address}"' for number in numbers)
        for node in self.nodes:
            if not to or node.number in to:
                new = node.list_path.with_suffix(".new")
                new.write_text(f"members = [{addresses}]\n")
                new.replace(node.list_path)

    # -- keys -------------------------------------------------------------------------------------

    def owner(self, key: str) -> ClusterNode:
        """Return the node that owns a key while all are there."""
        return self.at(self.ring.owner(key.encode()))

    def at(self, address: str) -> ClusterNode:
        """Return a node by its address."""
        return next(node for node in self.nodes if node.address == address)

    def others(self, *nodes: ClusterNode) -> list[ClusterNode]:
        """Return the nodes but for these."""
        return [node for node in self.nodes if node not in nodes]

    def key_of(self, owner: ClusterNode, prefix: str = "key") -> str:
        """Return a key with this prefix that the node owns; always the same one."""
        return next(self.keys_of(owner, prefix))

    def keys_of(self, owner: ClusterNode, prefix: str = "key") -> Iterator[str]:
        """Return one key after another that the node owns."""
        number = 0
        while True:
            key = f"{prefix}-{number}"
            if self.ring.owner(key.encode()) == owner.address:
                yield key
            number += 1

    def load_count(self, key: str) -> int:
        """Return how often the nodes loaded a key."""
        return len(self.database.loads(key))

    # -- users ------------------------------------------------------------------------------------

    def drivers(
        self, each: int = 1, nodes: Sequence[ClusterNode] = ()
    ) -> contextlib.AbstractContextManager[list[Driver]]:
        """Start so many attached processes at each of these nodes, or of all."""
        chosen = nodes or self.nodes
        return started([node.driver() for _ in range(each) for node in chosen])


def _ports(count: int) -> list[int]:
    """Return ports that are free on every loopback address at this moment."""
    draw = random.Random(f"{os.getpid()} {time.monotonic_ns()}")
    found: list[int] = []
    while len(found) < count:
        port = draw.choice(PORTS)
        with socket.socket() as trial:
            try:
                trial.bind(("0.0.0.0", port))
            except OSError:
                continue
        if port not in found:
            found.append(port)
    return found


def _signal(pids: Sequence[int] | Iterator[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _runs(pid: int) -> bool:
    try:
        return is_alive(psutil.Process(pid))
    except psutil.NoSuchProcess:
        return False


MakeCluster = Callable[..., Cluster]


@contextlib.contextmanager
def clusters(shm_root: Path, folder: Path) -> Iterator[MakeCluster]:
    """Return a function that makes clusters, each in a folder of its own; all end here."""
    shm = shm_root / folder.name
    shm.mkdir()
    with contextlib.ExitStack() as stack:

        def make(count: int = 3, **settings: Any) -> Cluster:
            place = folder / f"c{len(list(folder.iterdir()))}"
            place.mkdir()
            shm_of = shm / place.name
            shm_of.mkdir()
            return stack.enter_context(Cluster(place, shm_of, count, **settings))

        yield make
    shutil.rmtree(shm, ignore_errors=True)


@contextlib.contextmanager
def shared_cluster(shm_root: Path, count: int = 3, **settings: Any) -> Iterator[Cluster]:
    """Start nodes that several tests of a file use, linked."""
    folder = Path(tempfile.mkdtemp(prefix="kc-", dir="/tmp"))
    try:
        with clusters(shm_root, folder) as make:
            cluster = make(count, **settings)
            cluster.start()
            yield cluster
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def make_cluster(short_dir: Path, shm_root: Path, environment: None) -> Iterator[MakeCluster]:
    """Return a function that makes clusters for one test."""
    with clusters(shm_root, short_dir) as make:
        yield make
