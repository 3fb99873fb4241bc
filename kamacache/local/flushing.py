"""Drops all records of a group, on this node and on every other one.

*Process*: the ``kamacache`` command, attached to a node; `kamacache.worker.flushing` has the
rounds, and what they guarantee.
"""

from __future__ import annotations

import time

import msgspec

from kamacache.errors import KamaCacheError, NodeUnavailableError
from kamacache.local.link import call_all
from kamacache.local.mapping import NodeMapping
from kamacache.wire.messages import Done, Flush, FlushPeers, NodeFlushed, PeersFlushed


class Flushed(msgspec.Struct, kw_only=True):
    """What became of a flush."""

    dropped: int  # records on this node
    nodes: list[NodeFlushed] = []  # the others; one that was not reached drops them when it is back


def flush(mapping: NodeMapping, group: str, timeout_s: float, *, everywhere: bool) -> Flushed:
    """Drop all records of a group ("": of all groups); blocks.

    On return no process of this node finds an older value, nor one of a node that was reached.
    Raises `KamaCacheError` where a worker of this node did not answer: some records may be left.
    """
    deadline_s = time.monotonic() + timeout_s
    everywhere = everywhere and mapping.description.clustered
    dropped, version = _flush_here(mapping, group, 0, deadline_s)
    if not everywhere:
        return Flushed(dropped=dropped)
    first = _flush_peers(mapping, group, 0, deadline_s)
    version = max(version, first.version)
    _flush_here(mapping, group, version, deadline_s)
    again = {node.address: node for node in _flush_peers(mapping, group, version, deadline_s).nodes}
    nodes = [again.get(node.address, node) if node.reached else node for node in first.nodes]
    return Flushed(dropped=dropped, nodes=nodes)


def _flush_here(
    mapping: NodeMapping, group: str, version: int, deadline_s: float
) -> tuple[int, int]:
    """Return how many records were dropped, and the version below which all are."""
    replies = call_all(
        [
            (links, Flush(group=group, version=version, whole=not version))
            for links in mapping.links
        ],
        deadline_s,
    )
    dropped = 0
    for reply in replies:
        if isinstance(reply, KamaCacheError):
            raise reply
        if isinstance(reply, Done):
            dropped += reply.count
            version = max(version, reply.version)
    return dropped, version


def _flush_peers(mapping: NodeMapping, group: str, version: int, deadline_s: float) -> PeersFlushed:
    """Have one worker tell the other nodes; the next one where it does not answer."""
    error: KamaCacheError = NodeUnavailableError("the node has no worker")
    for links in mapping.links:
        try:
            reply = links.call(FlushPeers(group=group, version=version), deadline_s)
        except NodeUnavailableError as unavailable:
            error = unavailable
            continue
        assert isinstance(reply, PeersFlushed)
        return reply
    raise error
