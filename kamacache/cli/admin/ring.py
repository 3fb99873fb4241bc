"""``kamacache ring``: which node a key belongs to, why, and where a get of it goes now."""

from __future__ import annotations

import base64
import binascii
import os
from typing import Final

import click
import msgspec

from kamacache.cli.admin.asking import ask_all, ask_members, links_of, mapped, membership_of
from kamacache.cli.admin.output import BAD, GOOD, UNKNOWN, Cell, Column, share, table
from kamacache.cli.client import as_text, place_of, say, where_options
from kamacache.cluster.membership import Membership
from kamacache.cluster.ring import Ring
from kamacache.errors import NodeUnavailableError
from kamacache.hashing import shard_hash, worker_of
from kamacache.limits import KEY_BYTES_MAX
from kamacache.local.mapping import NodeMapping
from kamacache.store.entries import Entry

PROBE_S: Final = 2.0  # for each node to answer, where it is asked over gRPC
OWN: Final = "this node"


class RingNode(msgspec.Struct, kw_only=True):
    """A node, in the order in which it is asked for the key."""

    address: str
    weight: int
    share: float  # of all keys
    own: bool  # the node that was asked
    usable: bool | None  # None: not known
    state: str  # of the link to it: usable, draining, returning, down, connecting; or of its answer


class Explained(msgspec.Struct, kw_only=True):
    """Everything about one key; fields are documented in docs/command.md."""

    hash: str
    point: str
    owner: str
    goes_to: str
    why: str
    own: str
    membership: int
    nodes: list[RingNode]
    group: str | None = None
    worker: int | None = None
    workers: int | None = None
    shard_hash: str | None = None
    held: str | None = None  # value, not found, or absent; None: not looked at


@click.command("ring")
@click.argument("key")
@click.option("--hex", "as_hex", is_flag=True, help="KEY is written in hex digits.")
@click.option("--base64", "as_base64", is_flag=True, help="KEY is written in base64.")
@where_options
def command(
    key: str,
    as_hex: bool,
    as_base64: bool,
    group: str | None,
    run_dir: str | None,
    address: str | None,
    timeout: float,
    as_json: bool,
) -> None:
    """Say which node and worker KEY belongs to, why, and where a get goes now.

    The ring is the same for all groups; with --group it is told whether the key is in this node's
    memory. The worker is told for the node of the run directory alone: every node has a secret
    seed of its own for it.
    """
    data = _key_of(key, as_hex, as_base64)
    run_dir, address = place_of(run_dir, address)
    if address is None:
        with mapped(str(run_dir)) as mapping:
            found = _explain_here(mapping, data, group)
    else:
        found = _explain_remote(address, data, group, timeout)
    if as_json:
        say({**as_text("key", data), **msgspec.to_builtins(found)})
    else:
        click.echo("\n".join(_lines(data, found)))


def _key_of(text: str, as_hex: bool, as_base64: bool) -> bytes:
    if as_hex and as_base64:
        raise click.UsageError("give --hex or --base64, not both")
    try:
        if as_hex:
            data = bytes.fromhex(text)
        elif as_base64:
            data = base64.b64decode(text, validate=True)
        else:
            data = os.fsencode(text)
    except (ValueError, binascii.Error) as error:
        how = "pairs of hex digits" if as_hex else "base64"
        raise click.UsageError(f"key {text!r}: this is not {how} ({error})") from error
    if not 1 <= len(data) <= KEY_BYTES_MAX:
        raise click.UsageError(f"the key has {len(data)} bytes; 1 to {KEY_BYTES_MAX} are allowed")
    return data


def _explain_here(mapping: NodeMapping, key: bytes, group: str | None) -> Explained:
    about = mapping.description
    digest = shard_hash(key, about.hash_seed)
    worker = worker_of(digest, about.workers)
    membership = membership_of(mapping)
    states = {link.address: link.state for link in links_of(mapping).get(worker, [])}
    found = _explained(membership, key, states, own_state="usable")
    found.worker, found.workers = worker, about.workers
    found.shard_hash = f"{digest:#018x}"
    if group is not None:
        found.group = group
        entry = mapping.entry_lookup(group)(key)
        found.held = (
            "absent" if entry is None else "value" if isinstance(entry, Entry) else "not found"
        )
    return found


def _explain_remote(address: str, key: bytes, group: str | None, timeout_s: float) -> Explained:
    told = ask_members(address, timeout_s)
    if not told.members:
        raise NodeUnavailableError(f"the node at {address} has no name and is of no cluster")
    membership = Membership(number=told.number, own=told.own, members=told.members)
    others = membership.others
    answers = ask_all(others, min(PROBE_S, timeout_s))
    states = {
        other: "down" if isinstance(answer, Exception) else "usable"
        for other, answer in answers.items()
    }
    found = _explained(membership, key, states, own_state="usable")
    found.group = group
    return found


def _explained(
    membership: Membership, key: bytes, states: dict[str, str], own_state: str
) -> Explained:
    weights = {member.address: member.weight for member in membership.members}
    if not weights:  # a node without a name, alone
        weights = {membership.own: 1}
    ring = Ring(membership.members) if membership.members else None
    order = list(ring.owners(key)) if ring is not None else [membership.own]
    shares = ring.shares() if ring is not None else {membership.own: 1.0}
    digest, point = ring.place(key) if ring is not None else (0, 0)
    nodes = []
    for address in order:
        own = address == membership.own
        state = own_state if own else states.get(address, "unknown")
        nodes.append(
            RingNode(
                address=address,
                weight=weights[address],
                share=round(shares[address], 6),
                own=own,
                usable=None if state == "unknown" else state == "usable",
                state=state,
            )
        )
    # A link whose first try has not ended is waited for, as a worker does.
    taker = next((node for node in nodes if node.usable or node.state == "connecting"), None)
    goes_to = taker.address if taker is not None else order[0]
    return Explained(
        hash=f"{digest:#018x}",
        point=f"{point:#018x}",
        owner=order[0],
        goes_to=goes_to,
        why=_why(nodes, goes_to),
        own=membership.own,
        membership=membership.number,
        nodes=nodes,
    )


def _why(nodes: list[RingNode], goes_to: str) -> str:
    owner = nodes[0]
    if len(nodes) == 1:
        return "the node is alone"
    if goes_to == owner.address:
        return "it owns the key" if owner.usable else f"it owns the key; its state is {owner.state}"
    skipped = [f"{n.address} ({n.state})" for n in nodes if n.address != goes_to][:8]
    before = skipped[: [n.address for n in nodes].index(goes_to)]
    return f"it stands in: {', '.join(before)} cannot be asked now"


def _lines(key: bytes, found: Explained) -> list[str]:
    lines = [f"key       {key!r}, {len(key)} bytes"]
    if len(found.nodes) > 1:
        lines += [
            f"hash      {found.hash} on the ring; the next point is {found.point}",
            f"owner     {found.owner}{_own(found.owner, found)}",
        ]
    lines.append(f"goes to   {found.goes_to}{_own(found.goes_to, found)}: {found.why}")
    if found.worker is None:
        lines.append("worker    not known: each node hashes keys to its workers with a secret seed")
    else:
        which = f"worker    {found.worker} of {found.workers}, shard hash {found.shard_hash}"
        lines.append(which if len(found.nodes) == 1 else f"{which}; of this node alone")
    if found.held is not None:
        lines.append(f"memory    group {found.group!r} here: {found.held}")
    if len(found.nodes) == 1:
        return lines
    columns = [
        *(Column("order"), Column("node", right=False), Column("state", right=False)),
        *(Column("share", optional=1), Column("weight", optional=2), Column("", right=False)),
    ]
    rows: list[list[str | Cell]] = []
    for number, node in enumerate(found.nodes, 1):
        colour = GOOD if node.usable else BAD if node.usable is False else None
        rows.append(
            [
                *(str(number), node.address, Cell(node.state or UNKNOWN, colour)),
                *(share(node.share), str(node.weight), OWN if node.own else ""),
            ]
        )
    return [*lines, "", *table(columns, rows)]


def _own(address: str, found: Explained) -> str:
    return f" ({OWN})" if address == found.own and len(found.nodes) > 1 else ""
