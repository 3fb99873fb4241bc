"""``kamacache peers``: the nodes of the cluster, and how this node's workers are linked to them."""

from __future__ import annotations

from collections import Counter
from typing import Final

import click
import msgspec

from kamacache.cli.admin.asking import (
    Told,
    as_node,
    ask_all,
    ask_members,
    links_of,
    mapped,
    membership_of,
)
from kamacache.cli.admin.output import (
    BAD,
    GOOD,
    WARNING,
    Cell,
    Column,
    count,
    duration,
    share,
    table,
)
from kamacache.cli.client import place_of, place_options, say
from kamacache.cluster.membership import Membership
from kamacache.cluster.ring import Ring
from kamacache.errors import KamaCacheError
from kamacache.local.observing import observe
from kamacache.wire.messages import LinkNow

ASKED_S: Final = 2.0  # for each node to answer over gRPC
OTHERS_MAX: Final = 64  # nodes that are asked for their version


class WorkerLink(msgspec.Struct, kw_only=True):
    """One worker's link to a node."""

    worker: int
    state: str  # usable, draining, returning, down, connecting
    failures: int  # in a row; more than 0: the breaker is open
    in_flight: int
    invalidations_pending: int
    invalidation_lag_ms: int


class PeerFigures(msgspec.Struct, kw_only=True):
    """A node of the cluster. Counters are of this node's workers, since its start."""

    address: str
    own: bool
    weight: int
    share: float
    state: str  # the workers' if they agree, else "mixed"; over gRPC: answers, or does not answer
    version: str | None = None  # None: not known
    links: list[WorkerLink] = []
    calls: int | None = None
    failed: int | None = None  # lost, late, refused, or answered with an error
    p50_ms: float | None = None
    p99_ms: float | None = None
    invalidations_sent: int | None = None
    invalidations_pending: int | None = None
    invalidation_lag_s: float | None = None
    error: str | None = None  # why it did not answer over gRPC


@click.command("peers")
@place_options
def command(run_dir: str | None, address: str | None, timeout: float, as_json: bool) -> None:
    """Print the nodes of the cluster, and each worker's link to them.

    Versions are asked of each node over gRPC. With --address links are not known: each node is
    asked whether it answers this host.
    """
    run_dir, address = place_of(run_dir, address)
    if address is None:
        membership, peers = _here(str(run_dir), timeout)
    else:
        membership, peers = _remote(address, timeout)
    if as_json:
        told = {"own": membership.own, "membership": membership.number}
        say({**told, "peers": msgspec.to_builtins(peers)})
        return
    click.echo("\n".join(_lines(peers)))


def _here(run_dir: str, timeout_s: float) -> tuple[Membership, list[PeerFigures]]:
    with mapped(run_dir) as mapping:
        membership = membership_of(mapping)
        links = links_of(mapping)
        as_node(mapping.description)
        workers = mapping.description.workers
        listens = mapping.description.listen is not None
    peers = _members(membership)
    infos = {info.address: info for info in observe(run_dir).peers}
    asked = [peer.address for peer in peers if listens or not peer.own][:OTHERS_MAX]
    answers = ask_all(asked, min(ASKED_S, timeout_s))
    for peer in peers:
        answer = answers.get(peer.address)
        if isinstance(answer, Told):
            peer.version = answer.version or None
        elif answer is not None:
            peer.error = str(answer)
        if peer.own:
            peer.state = OWN_STATE
            continue
        peer.links = _links_to(peer.address, links)
        states = {link.state for link in peer.links}
        peer.state = states.pop() if len(states) == 1 else "mixed" if states else "unknown"
        if len(peer.links) < workers and peer.state != "unknown":
            peer.state = "mixed"
        info = infos.get(peer.address)
        if info is not None:
            peer.calls = info.calls
            peer.failed = info.lost + info.late + info.refused + info.failures
            p50_s, p99_s = info.seconds.quantile_s(0.5), info.seconds.quantile_s(0.99)
            peer.p50_ms = None if p50_s is None else round(p50_s * 1000, 4)
            peer.p99_ms = None if p99_s is None else round(p99_s * 1000, 4)
            peer.invalidations_sent = info.invalidations_sent
            peer.invalidations_pending = info.invalidations_pending
            peer.invalidation_lag_s = info.invalidation_lag_s
    return membership, peers


OWN_STATE: Final = "this node"


def _remote(address: str, timeout_s: float) -> tuple[Membership, list[PeerFigures]]:
    told = ask_members(address, timeout_s)
    membership = Membership(number=told.number, own=told.own, members=told.members)
    peers = _members(membership)
    others = [peer.address for peer in peers if not peer.own][:OTHERS_MAX]
    answers: dict[str, Told | KamaCacheError] = ask_all(others, min(ASKED_S, timeout_s))
    for peer in peers:
        answer = told if peer.own else answers.get(peer.address)
        if isinstance(answer, Told):
            peer.state, peer.version = "answers", answer.version or None
        elif answer is not None:
            peer.state, peer.error = "does not answer", str(answer)
    return membership, peers


def _members(membership: Membership) -> list[PeerFigures]:
    shares = Ring(membership.members).shares() if membership.members else {}
    return [
        PeerFigures(
            address=member.address,
            own=member.address == membership.own,
            weight=member.weight,
            share=round(shares[member.address], 6),
            state="unknown",
        )
        for member in membership.members
    ]


def _links_to(address: str, links: dict[int, list[LinkNow]]) -> list[WorkerLink]:
    return [
        WorkerLink(
            worker=worker,
            state=link.state,
            failures=link.failures,
            in_flight=link.in_flight,
            invalidations_pending=link.pending,
            invalidation_lag_ms=link.lag_ms,
        )
        for worker, of_worker in sorted(links.items())
        for link in of_worker
        if link.address == address
    ]


def _lines(peers: list[PeerFigures]) -> list[str]:
    if not peers:
        return ["the node has no name and is of no cluster"]
    columns = [
        *(Column("node", right=False), Column("state", right=False)),
        *(Column("weight", optional=5), Column("share"), Column("version", optional=4)),
        *(Column("calls", optional=3), Column("failed", optional=3)),
        *(Column("p50", optional=6), Column("p99", optional=2)),
        *(Column("pending", optional=1), Column("lag", optional=1)),
    ]
    rows: list[list[str | Cell]] = [
        [
            *(peer.address, Cell(peer.state, _colour(peer))),
            *(str(peer.weight), share(peer.share), peer.version or "-"),
            *(count(peer.calls), count(peer.failed)),
            duration(None if peer.p50_ms is None else peer.p50_ms / 1000),
            duration(None if peer.p99_ms is None else peer.p99_ms / 1000),
            *(count(peer.invalidations_pending), duration(peer.invalidation_lag_s)),
        ]
        for peer in peers
    ]
    lines = table(columns, rows)
    for peer in peers:
        states = Counter(link.state for link in peer.links)
        if len(states) > 1 or any(link.failures for link in peer.links):
            lines += ["", f"links to {peer.address}", *_link_lines(peer.links)]
    return lines


def _link_lines(links: list[WorkerLink]) -> list[str]:
    columns = [
        *(Column("worker"), Column("state", right=False), Column("failures")),
        *(Column("in flight"), Column("pending"), Column("lag")),
    ]
    return table(
        columns,
        [
            [
                *(str(link.worker), link.state, str(link.failures), count(link.in_flight)),
                count(link.invalidations_pending),
                duration(link.invalidation_lag_ms / 1000),
            ]
            for link in links
        ],
    )


def _colour(peer: PeerFigures) -> str | None:
    if peer.own:
        return None
    if peer.state in ("usable", "answers"):
        return GOOD
    return BAD if peer.state in ("down", "does not answer") else WARNING
