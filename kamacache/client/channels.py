"""The client's channels: one for each node that was asked, for threads or for one event loop.

*Process*: the application's. *Invariant*: a channel belongs to one process (a fork's child makes
its own) and, of grpc.aio's, to one event loop; one that is no longer asked is kept until the calls
on it have had their time.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from typing import Any, Final

import grpc

from kamacache.client.access import Access
from kamacache.client.nodes import Node, Nodes
from kamacache.cluster.membership import Member, check_address
from kamacache.errors import ConfigError, KamaCacheError
from kamacache.limits import (
    BATCH_KEYS_MAX,
    CLIENT_PROBE_S,
    CLIENT_RETIRE_S,
    MEMBERS_MAX,
    VALUE_BYTES_CEILING,
    WEIGHT_MAX,
)
from kamacache.v1 import kamacache_pb2 as pb
from kamacache.v1 import kamacache_pb2_grpc as stubs

_OPTIONS: Final = (
    # The largest reply of a node: its values, and 32 bytes for each key of a batch.
    ("grpc.max_receive_message_length", VALUE_BYTES_CEILING + (64 << 10) + 32 * BATCH_KEYS_MAX),
    ("grpc.enable_http_proxy", 0),  # a cache is not reached through a web proxy
    ("grpc.use_local_subchannel_pool", 1),  # a new channel is a new connection
    # When to dial again is the breaker's decision (`nodes`); gRPC waits up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", int(CLIENT_PROBE_S * 1000)),  # how long one attempt may take
    ("grpc.max_reconnect_backoff_ms", 500),
)


class Channels:
    """A stub for each node asked."""

    def __init__(self, nodes: Nodes, access: Access) -> None:
        self.nodes: Final = nodes
        self.access: Final = access
        self.lock = threading.Lock()
        self.closed = False
        # By address: the connection and the certificates that it is for, the stub, the channel.
        self._stubs: dict[str, tuple[int, int, stubs.CacheStub, Any]] = {}
        self._retired: deque[tuple[float, Any]] = deque()
        self._view = nodes.view.number

    def connect(self, address: str) -> Any:
        """Return a new channel."""
        raise NotImplementedError

    def end(self, channel: Any) -> None:
        """Close one whose calls have had their time."""
        raise NotImplementedError

    def stub(self, node: Node) -> stubs.CacheStub:
        """Return the node's stub, with a new connection where the old one is given up.

        Raises `NodeUnavailableError` where this client must not call the node.
        """
        known, generation = self._stubs.get(node.address), self.access.generation
        if known is not None and known[0] == node.connection and known[1] == generation:
            return known[2]
        with self.lock:
            if self.closed:
                raise KamaCacheError("this client is closed")
            known = self._stubs.get(node.address)
            if known is not None and known[0] == node.connection and known[1] == generation:
                return known[2]
            channel = self.connect(node.address)
            made = stubs.CacheStub(channel)
            self._stubs[node.address] = (node.connection, generation, made, channel)
            if known is not None:
                self._retire(known[3])
            return made

    def tidy(self) -> None:
        """Retire the channels to nodes that left, and close what was retired long ago.

        Also sees whether the certificates are still those that new channels would have.
        """
        self.access.look()
        view = self.nodes.view
        if self._view == view.number and not self._retired:
            return
        with self.lock:
            self._view = view.number
            for address in [address for address in self._stubs if address not in view.nodes]:
                self._retire(self._stubs.pop(address)[3])
            while self._retired and self._retired[0][0] <= time.monotonic():
                self.end(self._retired.popleft()[1])

    def _retire(self, channel: Any) -> None:
        self._retired.append((time.monotonic() + CLIENT_RETIRE_S, channel))

    def take_all(self) -> list[Any]:
        """Make an end: return all channels, and make no new ones."""
        with self.lock:
            self.closed = True
            channels = [known[3] for known in self._stubs.values()]
            channels += [channel for _, channel in self._retired]
            self._stubs.clear()
            self._retired.clear()
        return channels


class ThreadChannels(Channels):
    """Of all threads."""

    def connect(self, address: str) -> grpc.Channel:
        channel: grpc.Channel = self.access.channel(grpc, address, _OPTIONS)
        return channel

    def end(self, channel: grpc.Channel) -> None:
        channel.close()


class LoopChannels(Channels):
    """Of one event loop."""

    def __init__(self, nodes: Nodes, access: Access, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(nodes, access)
        self._loop = loop
        self._closing: set[asyncio.Task[None]] = set()

    def connect(self, address: str) -> grpc.aio.Channel:
        channel: grpc.aio.Channel = self.access.channel(grpc.aio, address, _OPTIONS)
        return channel

    def end(self, channel: grpc.aio.Channel) -> None:
        task = self._loop.create_task(channel.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)


def believed(reply: pb.MembersResponse) -> tuple[list[Member], int]:
    """Return the members that a node knows, none where they cannot be right, and their number."""
    members = [Member(m.address, m.weight) for m in reply.members[: MEMBERS_MAX + 1]]
    addresses = {member.address for member in members}
    fine = len(addresses) == len(members) <= MEMBERS_MAX and all(map(_is_sane, members))
    return members if fine else [], reply.number


def _is_sane(member: Member) -> bool:
    try:
        return check_address(member.address, "members") == Member(member.address) and (
            1 <= member.weight <= WEIGHT_MAX
        )
    except ConfigError:
        return False
