"""The requests and replies that cross a worker's Unix socket.

*Process*: all. Each message is a msgspec array ``[tag, id, ...]``; the id is the asker's and comes
back in the reply, so replies may overtake each other. New fields go to the end of a message, with
a default: a receiver ignores what it does not know and fills in what the sender did not.

Requests, all answered once::

    Get        -> Value              Set, SetMany, Delete, DeleteMany, Ping -> Done
    GetMany    -> Values             Stats                                  -> StatsReply
    Flush      -> Done               FlushPeers                             -> PeersFlushed
    any        -> Failure            (an error of `kamacache.errors`, by name and fields)

Only `Gets` is answered in as many `Answers` as it takes, each key when it is there; a `Failure` is
then the answer of all keys that have none::

    Gets       -> Answers ...

The same messages travel between nodes, over the peer links (`kamacache.cluster.link`): a worker
asks another node's front, which answers or passes them on to its workers. Requests from there
carry `FROM_PEER`, and their replies tell time to live and version. Between nodes only::

    Hello      -> Welcome            the first on every link
    Hello -> Challenge, Proof -> Welcome    where the nodes know each other by a secret
    Proof      -> Proven             when that secret has changed
    Told       -> Done               was all told that was written while the asker was away?
    Invalidate, Flush -> Done        drop what is older; answered when it is gone
    a get with PEEK -> Absent        nothing is held, and nothing was loaded
               -> Draining           said unasked, id 0: ask another node from now on
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import msgspec

from kamacache.calls import ChainLink

FROM_PEER: Final = 1  # came over a peer link: is never forwarded again
PEEK: Final = 2  # a get that asks for what is held, and loads nothing


class Request(msgspec.Struct, array_like=True, kw_only=True, gc=False):
    """What every request carries.

    ``budget_ms`` is the time the asker still waits (0: none left), ``depth`` and ``chain`` are
    those of `kamacache.calls`, ``flags`` are `FROM_PEER` and `PEEK`. Of a peer's request, ``sent``
    is the version that its hybrid clock stood at, and ``until_ms`` the CLOCK_BOOTTIME of the
    *receiver's* host at which the peer gives the request up; both are 0 from an application.
    """

    id: int = 0
    group: str = ""
    budget_ms: int = 0
    depth: int = 0
    chain: tuple[ChainLink, ...] = ()
    flags: int = 0
    sent: int = 0
    until_ms: int = 0


class Get(Request, tag=1, kw_only=True, gc=False):
    """Ask for one key."""

    key: bytes


class GetMany(Request, tag=2, kw_only=True, gc=False):
    """Ask for keys of one worker, at most `BATCH_KEYS_MAX`."""

    keys: list[bytes]


class Set(Request, tag=3, kw_only=True, gc=False):
    """Store a value; ``ttl_ms`` None is the group's default."""

    key: bytes
    value: bytes
    ttl_ms: int | None = None


class SetMany(Request, tag=4, kw_only=True, gc=False):
    """Store values of one worker, in order, at most `BATCH_KEYS_MAX`."""

    items: list[tuple[bytes, bytes]]
    ttl_ms: int | None = None


class Delete(Request, tag=5, kw_only=True, gc=False):
    """Remove one key; answered with the count of those that were there."""

    key: bytes


class DeleteMany(Request, tag=6, kw_only=True, gc=False):
    """Remove keys of one worker; answered with the count of those that were there."""

    keys: list[bytes]


class Stats(Request, tag=7, kw_only=True, gc=False):
    """Ask for the group's numbers in this worker; group "": for the worker's own, of now."""


class Ping(Request, tag=8, kw_only=True, gc=False):
    """Ask whether the worker's loop turns; needs no group."""


class Invalidate(Request, tag=9, kw_only=True, gc=False):
    """Drop each key's record, owned or mirror, where it is of a lower version than is named.

    At most `BATCH_KEYS_MAX`; answered with the count of those dropped.
    """

    items: list[tuple[bytes, int]]


class Flush(Request, tag=10, kw_only=True, gc=False):
    """Drop all of the group's records of lower versions than this one; group "": of all groups.

    Answered when the last is gone, with the version below which all are. ``whole``: what is there
    when it comes goes too, whatever its version.
    """

    version: int
    whole: bool = False


class PeerSeen(Request, tag=11, kw_only=True, gc=False):
    """A front tells its node's workers that a peer said hello: links to it may try at once."""

    peer: str


class Hello(Request, tag=12, kw_only=True, gc=False):
    """The first request on a peer link: who asks, and whom it believes to ask."""

    format: int  # PEER_FORMAT
    node: str  # the asker's name on the ring
    node_id: str  # of this life of the asker's node
    worker: int
    peer: str  # the name under which the asker knows the node that it dialled
    nonce: bytes = b""  # where it knows the peers' secret, and wants a `Challenge`


class Gets(Request, tag=13, kw_only=True, gc=False):
    """Ask for keys of one worker, at most `BATCH_KEYS_MAX`, none of which waits for another.

    What callers that know nothing of each other ask for at once.
    """

    keys: list[bytes]


class Told(Request, tag=14, kw_only=True, gc=False):
    """A node that was away asks another whether it has been told all that was written meanwhile.

    Answered with a count: see `kamacache.cluster.peers`.
    """

    peer: str  # who asks
    away_ms: int
    members: list[str]  # of the cluster as far as who asks knows, itself included
    life: str = ""  # whose memory is asked about: the id in the asker's `Hello`


class FlushPeers(Request, tag=15, kw_only=True, gc=False):
    """Have every other node flush the group; version 0: whole, as of its own clock."""

    version: int = 0


class Proof(Request, tag=20, kw_only=True, gc=False):
    """The answer to a `Challenge`: that the asker of the link knows the peers' secret.

    Behind a `Welcome`: that it knows the secret of now, which has changed.
    """

    proof: bytes


class Value(msgspec.Struct, array_like=True, tag=1, gc=False):
    """The value; None: the key is not found, and the worker's word is final.

    To peers only: ``ttl_ms`` left to live (0: does not expire) and ``version`` (0: the value is
    not kept here, and must not be kept there).
    """

    id: int
    value: bytes | None
    ttl_ms: int = 0
    version: int = 0


class KeyFailure(msgspec.Struct, array_like=True, gc=False):
    """The error of one key of a `GetMany`, by its index among the keys."""

    index: int
    kind: str
    message: str
    fields: dict[str, Any]


class Values(msgspec.Struct, array_like=True, tag=2, gc=False):
    """The values in the order of the keys, None for one that is not found or failed.

    When not all fit into a frame the worker answers the first of them, one at least; the
    asker's link asks again for the rest (`kamacache.local.link`).
    To peers only: ``ttls`` and ``versions`` as in `Value`, one for each of the values.
    """

    id: int
    values: list[bytes | None]
    errors: list[KeyFailure] = []
    ttls: list[int] = []
    versions: list[int] = []


class Done(msgspec.Struct, array_like=True, tag=3, gc=False):
    """How many keys were stored, or were there to be deleted, or were dropped.

    ``version`` is that of the write, the last one's of several; 0: not told.
    """

    id: int
    count: int
    version: int = 0


class LinkNow(msgspec.Struct, array_like=True, gc=False):
    """How one worker's link to another node stands."""

    address: str
    state: str  # usable, draining, returning, down, connecting
    failures: int  # in a row
    in_flight: int
    pending: int  # keys and flushes that the node is still to be told of
    lag_ms: int  # age of the oldest of them


class StatsReply(msgspec.Struct, array_like=True, tag=4, gc=False):
    """Counters and sizes by name.

    Of the worker as a whole (`Stats` of group ""): ``groups`` has, for each of the node's groups in
    their order, keys that are being loaded, loads that wait for a thread, keys being fetched.
    """

    id: int
    stats: dict[str, int]
    groups: list[list[int]] = []
    links: list[LinkNow] = []


class Failure(msgspec.Struct, array_like=True, tag=5, gc=False):
    """An error, as `kamacache.errors.to_fields` writes it. Id 0: the request had none."""

    id: int
    kind: str
    message: str
    fields: dict[str, Any]


class Absent(msgspec.Struct, array_like=True, tag=6, gc=False):
    """The answer to a get with `PEEK` of a key that is not held."""

    id: int


class Answers(msgspec.Struct, array_like=True, tag=9, gc=False):
    """What is known of the keys of a `Gets` that were not answered before, one key at least.

    ``at`` are the indexes of ``values`` among the keys; empty: the values are those of all keys, in
    their order. A key that failed is among ``errors`` alone. To peers only: ``ttls`` and
    ``versions`` as in `Value`, one for each of the values.
    """

    id: int
    values: list[bytes | None] = []
    at: list[int] = []
    errors: list[KeyFailure] = []
    ttls: list[int] = []
    versions: list[int] = []


class NodeFlushed(msgspec.Struct, array_like=True, gc=False):
    """Whether another node has flushed; else why not yet."""

    address: str
    reached: bool
    reason: str = ""


class PeersFlushed(msgspec.Struct, array_like=True, tag=15, gc=False):
    """The answer to `FlushPeers`: the latest version that any node told, and each node."""

    id: int
    version: int = 0
    nodes: list[NodeFlushed] = []


class Welcome(msgspec.Struct, array_like=True, tag=7, gc=False):
    """The answer to `Hello`: who answers."""

    id: int
    format: int
    node: str  # the answering node's own name on the ring
    node_id: str
    draining: bool
    clock_ms: int = 0  # CLOCK_BOOTTIME of the answering node's host
    proof: bytes = b""  # that it knows the peers' secret, where the asker proved it


class Challenge(msgspec.Struct, array_like=True, tag=20, gc=False):
    """The answer to a `Hello` where nodes must know the peers' secret: `Proof` comes next."""

    id: int
    nonce: bytes


class Proven(msgspec.Struct, array_like=True, tag=21, gc=False):
    """The answer to a `Proof` of the secret of now: that this end knows it, too."""

    id: int
    proof: bytes


class Draining(msgspec.Struct, array_like=True, tag=8, gc=False):
    """Said unasked to every peer link of a node that begins to stop; the id is 0."""

    id: int


AnyRequest = (
    Get
    | GetMany
    | Set
    | SetMany
    | Delete
    | DeleteMany
    | Stats
    | Ping
    | Invalidate
    | Flush
    | PeerSeen
    | Hello
    | Gets
    | Told
    | FlushPeers
    | Proof
)
Reply = (
    Value
    | Values
    | Done
    | StatsReply
    | Failure
    | Absent
    | Welcome
    | Draining
    | Answers
    | PeersFlushed
    | Challenge
    | Proven
)
Body = bytes | bytearray | memoryview

PEER_FORMAT: Final = 2  # of all that travels over peer links; nodes of two formats do not link

PAYLOAD_SLACK_BYTES: Final = 4_096  # what a frame holds beside values and keys, with room

encoder: Final = msgspec.msgpack.Encoder()
encode: Final = encoder.encode
decode_request: Final[Callable[[Body], AnyRequest]] = msgspec.msgpack.Decoder(AnyRequest).decode
decode_reply: Final[Callable[[Body], Reply]] = msgspec.msgpack.Decoder(Reply).decode
decode_any: Final = msgspec.msgpack.Decoder().decode
DecodeError: Final = msgspec.DecodeError  # ValidationError is one, too


def salvage_id(body: Body) -> int:
    """Return the id of a request that could not be decoded, 0 where there is none."""
    try:
        parts = decode_any(body)
    except DecodeError:
        return 0
    if isinstance(parts, list) and len(parts) > 1 and isinstance(parts[1], int):
        return parts[1]
    return 0
