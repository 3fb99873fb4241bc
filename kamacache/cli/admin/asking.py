"""What the commands ask of a node beyond its snapshot: each worker's links, and gRPC's Members."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, NamedTuple

import click

from kamacache.cli.access import use_node_files
from kamacache.cli.client import RemoteTarget, target_of
from kamacache.cluster.membership import Member, Membership, MembershipReader
from kamacache.errors import KamaCacheError, NodeUnavailableError
from kamacache.limits import WORKER_ASKED_S
from kamacache.local.link import call_all
from kamacache.local.mapping import NodeMapping
from kamacache.rundir.description import NodeDescription, read_description
from kamacache.rundir.live import read_live
from kamacache.wire.messages import LinkNow, Stats, StatsReply

ASKED_AT_ONCE_MAX: Final = 16


class Told(NamedTuple):
    """What a node says of itself and its cluster over gRPC."""

    address: str  # by which it was asked
    own: str
    number: int
    members: tuple[Member, ...]
    version: str  # "": not told, by an older node
    ahead_s: float | None  # its wall clock before this host's; None: not told
    uncertain_s: float  # of that, either way
    took_s: float


@contextlib.contextmanager
def mapped(run_dir: str) -> Iterator[NodeMapping]:
    """Attach to the node of a run directory, which serves; raises `NodeUnavailableError`."""
    mapping = NodeMapping(read_description(run_dir))
    try:
        if not mapping.serving:
            raise NodeUnavailableError(f"the node at {run_dir} does not serve", run_dir=run_dir)
        yield mapping
    finally:
        mapping.close()


def links_of(mapping: NodeMapping) -> dict[int, list[LinkNow]]:
    """Return the links of each worker to other nodes; a worker that does not answer is left out."""
    calls = [(links, Stats()) for links in mapping.links]
    replies = call_all(calls, time.monotonic() + WORKER_ASKED_S)
    return {
        worker: reply.links for worker, reply in enumerate(replies) if isinstance(reply, StatsReply)
    }


def membership_of(mapping: NodeMapping) -> Membership:
    """Return the cluster as the node of a run directory knows it; empty where it is of none."""
    reader = MembershipReader(mapping.description)
    try:
        return reader.read()
    finally:
        reader.close()


def as_node(about: NodeDescription) -> None:
    """Ask other nodes with the certificates of the node of a run directory, if it has any.

    They are its user's alone to read; who is another has to say --tls-ca, as with --address.
    """
    with contextlib.suppress(NodeUnavailableError):
        use_node_files(read_live(about.sockets_dir).security)


def ask_members(address: str, timeout_s: float) -> Told:
    """Ask one node over gRPC. Raises `KamaCacheError`."""
    target = target_of(None, address, timeout_s)
    assert isinstance(target, RemoteTarget)
    target.members()  # the first call waits for the connection, which tells nothing of clocks
    began_s, began_unix_s = time.monotonic(), time.time()
    reply = target.members()
    took_s = time.monotonic() - began_s
    ahead_s = reply.unix_ms / 1000 - began_unix_s - took_s / 2 if reply.unix_ms else None
    return Told(
        address=address,
        own=reply.own,
        number=reply.number,
        members=tuple(Member(m.address, m.weight) for m in reply.members),
        version=reply.version,
        ahead_s=ahead_s,
        uncertain_s=took_s / 2 + 0.001,
        took_s=took_s,
    )


def ask_all(addresses: Sequence[str], timeout_s: float) -> dict[str, Told | KamaCacheError]:
    """Ask several nodes side by side; each has an outcome of its own."""

    def ask(address: str) -> Told | KamaCacheError:
        try:
            return ask_members(address, timeout_s)
        except KamaCacheError as error:
            return error

    if not addresses:
        return {}
    context = click.get_current_context(silent=True)

    def within(address: str) -> Told | KamaCacheError:
        if context is None:
            return ask(address)
        with context.scope(cleanup=False):  # a context is its thread's
            return ask(address)

    with ThreadPoolExecutor(min(len(addresses), ASKED_AT_ONCE_MAX)) as pool:
        return dict(zip(addresses, pool.map(within, addresses), strict=True))
