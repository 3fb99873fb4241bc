"""What the processes of a node count, in shared memory: it outlives them, and needs no message.

*Process*: each worker, each front and the HTTP role write their own words, anyone may read them.
One file of u64 words, in regions::

    header            magic, format, workers, groups, peers, fronts
    worker 0..W-1     WORKER | GROUP of group 0..G-1 | PEER of slot 0..P-1
    front 0..M-1      FRONT
    http              HTTP

*Invariants*: a region has one writer at a time, the process that has the place: the supervisor
reaps it before it forks the next, which counts on from where it stood. So a counter never goes down
while the node lives, and what was counted before a SIGKILL is there after it. Words are stored
whole (aligned, cast "Q"); the words of a histogram are stored one after the other, so a reader may
be one ahead in the one and not in the other.

*Why not the counters file* (`kamacache.rundir.counters`): there processes come and go by the
hundred, and claim slots; here each place is known when the node starts.
"""

from __future__ import annotations

import mmap
import os
from bisect import bisect_left
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Final

from kamacache.errors import NodeUnavailableError
from kamacache.limits import CALL_SECONDS_BUCKETS, LOAD_SECONDS_BUCKETS, PEER_METERS_MAX

METERS_MAGIC: Final = int.from_bytes(b"KamaMetr", "little")
METERS_FORMAT: Final = 2
OTHER_PEERS: Final = "other"  # what was counted of nodes without a slot of their own
GRPC_METHODS: Final = (
    *("Get", "Set", "Delete", "BatchGet", "BatchSet", "BatchDelete", "Stats", "Members"),
)
GRPC_CODES: Final = (
    *("OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND"),
    *("ALREADY_EXISTS", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION"),
    *("ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"),
    "UNAUTHENTICATED",
)  # by their numbers
HTTP_HANDLERS: Final = ("api", "metrics", "page", "status", "healthz", "readyz", "other")
HTTP_METHODS: Final = ("GET", "HEAD", "PUT", "DELETE", "other")
HTTP_CODES: Final = (
    *("200", "204", "304", "400", "401", "403", "404", "405", "413", "500"),
    *("501", "502", "503", "504", "other"),
)
_ADDRESS_WORDS: Final = 34  # a length and 264 bytes; a host name has 255 at most
_HEADER_WORDS: Final = 16
_ROUND_WORDS: Final = 8  # regions begin on cache lines of their own


@dataclass(frozen=True, slots=True)
class Kind:
    """What one kind of region holds: words by name, then histograms, which share their bounds."""

    names: tuple[str, ...]
    bounds_s: tuple[float, ...] = ()
    histograms: int = 0
    before: int = 0  # words ahead of the named ones
    _places: dict[str, int] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        self._places.update({name: at for at, name in enumerate(self.names, self.before)})

    def at(self, name: str) -> int:
        """Return the word of a name."""
        return self._places[name]

    def histogram_at(self, number: int) -> int:
        """Return the first word of a histogram: the sum in microseconds, then the buckets."""
        return self.before + len(self.names) + number * (len(self.bounds_s) + 2)

    @property
    def words(self) -> int:
        """How many words a region has."""
        return -(-self.histogram_at(self.histograms) // _ROUND_WORDS) * _ROUND_WORDS


WORKER: Final = Kind(
    (
        *("connections_refused", "getters_replaced", "writes_sent", "writes_rerouted"),
        *("writes_not_owned", "writes_late", "invalidations_taken", "flushes_taken"),
    )
)
GROUP: Final = Kind(
    (
        *("loads", "load_errors", "load_timeouts", "loads_joined", "loads_refused"),
        *("loads_detached", "loads_not_kept", "load_queue_us", "worker_hits", "fetches"),
        *("fetches_joined", "fetches_detached", "fetch_errors", "fetches_rerouted"),
        *("mirrors_kept", "peeks", "peek_hits", "loads_standing_in", "loads_not_owned"),
    ),
    LOAD_SECONDS_BUCKETS,
    histograms=1,
)
PEER: Final = Kind(
    (
        *("requests", "lost", "late", "overloaded", "failures", "connects"),
        *("invalidations_sent", "invalidation_keys_sent", "flushes_sent"),
    ),
    CALL_SECONDS_BUCKETS,
    histograms=1,
    before=_ADDRESS_WORDS,
)
FRONT: Final = Kind(
    (
        *("in_flight", "peer_streams"),  # of now, 0 when the process begins
        "certificate_expires_unix_s",  # of now; 0: no TLS
        *(f"{method} {code}" for method in GRPC_METHODS for code in GRPC_CODES),
    ),
    CALL_SECONDS_BUCKETS,
    histograms=len(GRPC_METHODS),
)
HTTP: Final = Kind(
    (
        *("in_flight", "connections", "certificate_expires_unix_s"),  # of now
        *(f"{h} {m} {c}" for h in HTTP_HANDLERS for m in HTTP_METHODS for c in HTTP_CODES),
    ),
    CALL_SECONDS_BUCKETS,
    histograms=len(HTTP_HANDLERS),
)


class Region:
    """One place's words. Its writer adds to ``words[kind.at(name)]`` itself: that is the cost."""

    __slots__ = ("kind", "words")

    def __init__(self, kind: Kind, words: memoryview[int] | None = None) -> None:
        """Without words: in this process's own memory, for tests and for parts of a node."""
        self.kind: Final = kind
        self.words: Final = (
            memoryview(bytearray(kind.words * 8)).cast("Q") if words is None else words
        )

    def observe(self, seconds: float, number: int = 0) -> None:
        """Count a time in a histogram."""
        kind, words = self.kind, self.words
        at = kind.histogram_at(number)
        words[at] += int(seconds * 1e6)
        words[at + 1 + bisect_left(kind.bounds_s, seconds)] += 1

    def counts(self) -> dict[str, int]:
        """Return the words by name."""
        first = self.kind.before
        values = self.words[first : first + len(self.kind.names)].tolist()
        return dict(zip(self.kind.names, values, strict=True))

    def histogram(self, number: int = 0) -> tuple[float, list[int]]:
        """Return the sum in seconds, and the count of each bucket."""
        at = self.kind.histogram_at(number)
        buckets = self.words[at + 1 : at + 2 + len(self.kind.bounds_s)].tolist()
        return self.words[at] / 1e6, buckets


class PeerRegion(Region):
    """What one worker counts of one other node."""

    __slots__ = ()

    def __init__(self, words: memoryview[int] | None = None) -> None:
        super().__init__(PEER, words)

    @property
    def address(self) -> str:
        """Whose it is; "": nobody's."""
        length = self.words[0]
        return self.words[1:_ADDRESS_WORDS].tobytes()[:length].decode(errors="replace")

    def name(self, address: str) -> None:
        """Begin to count of a node, from 0."""
        data = address.encode()[: (_ADDRESS_WORDS - 1) * 8]
        self.words[0] = 0  # nobody's, for a reader, until the name is whole
        for at in range(_ADDRESS_WORDS, len(self.words)):
            self.words[at] = 0
        for at in range(1, _ADDRESS_WORDS):
            self.words[at] = int.from_bytes(data[at * 8 - 8 : at * 8], "little")
        self.words[0] = len(data)

    def add(self, other: Region) -> None:
        """Add what another region has counted."""
        for at in range(_ADDRESS_WORDS, len(self.words)):
            self.words[at] += other.words[at]


class WorkerMeters:
    """The regions of one worker, as it writes them."""

    def __init__(self, own: Region, groups: list[Region], peers: list[PeerRegion]) -> None:
        self.own: Final = own
        self.groups: Final = groups
        self.peers: Final = peers  # the last one is of those that have none of their own

    def peer(self, address: str, in_use: Collection[str]) -> PeerRegion:
        """Return where to count of a node; ``in_use`` are the others that are counted now.

        Where all slots are taken, one of a node that left is freed, and what it counted goes to
        the others'. Without any it is theirs to begin with.
        """
        *slots, others = self.peers or [PeerRegion()]
        by_address = {slot.address: slot for slot in reversed(slots)}
        found = by_address.get(address) or by_address.get("")
        if found is None:
            left = next((by_address[a] for a in by_address if a not in in_use), None)
            if left is None:
                return others
            others.add(left)
            found = left
        if found.address != address:
            found.name(address)
        return found


@dataclass(frozen=True, slots=True)
class MeterSizes:
    """How many places of each kind a node has."""

    workers: int
    groups: int
    peers: int  # slots a worker; 0: of no cluster
    fronts: int

    @classmethod
    def of(cls, *, workers: int, groups: int, fronts: int, clustered: bool) -> MeterSizes:
        """Return the sizes of a node's file."""
        return cls(workers, groups, PEER_METERS_MAX + 1 if clustered else 0, fronts)

    @property
    def worker_words(self) -> int:
        """Words of one worker."""
        return WORKER.words + self.groups * GROUP.words + self.peers * PEER.words

    @property
    def bytes(self) -> int:
        """The size of the file."""
        words = _HEADER_WORDS + self.workers * self.worker_words
        return 8 * (words + self.fronts * FRONT.words + HTTP.words)


def meters_path(shm_dir: str) -> str:
    """Return where a node's file lies."""
    return f"{shm_dir}/meters"


def create_meters(shm_dir: str, sizes: MeterSizes, *, mode: int = 0o600) -> None:
    """Make and reserve the file, in place of one that is there; raises OSError.

    For the supervisor, before the first role starts.
    """
    path = meters_path(shm_dir)
    fresh = f"{path}.new"
    fd = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    try:
        os.fchmod(fd, mode)
        os.posix_fallocate(fd, 0, sizes.bytes)
        with mmap.mmap(fd, sizes.bytes) as mapped, memoryview(mapped).cast("Q") as words:
            words[2:6] = memoryview(
                b"".join(
                    count.to_bytes(8, "little")
                    for count in (sizes.workers, sizes.groups, sizes.peers, sizes.fronts)
                )
            ).cast("Q")
            words[1] = METERS_FORMAT
            words[0] = METERS_MAGIC
    finally:
        os.close(fd)
    os.replace(fresh, path)


class Meters:
    """This process's mapping of the file; read-only but for the roles, each in its own place."""

    def __init__(self, shm_dir: str, *, writable: bool = False) -> None:
        """Raises `NodeUnavailableError` where the file is gone, foreign or cut short."""
        path = meters_path(shm_dir)
        try:
            fd = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
            try:
                size = os.fstat(fd).st_size
                access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
                self._map = mmap.mmap(fd, size, access=access)
            finally:
                os.close(fd)
        except (OSError, ValueError) as error:
            raise NodeUnavailableError(
                f"the node's meters {path} cannot be opened: {error}"
            ) from error
        self._words = words = memoryview(self._map).cast("Q")
        if len(words) < _HEADER_WORDS or words[0] != METERS_MAGIC or words[1] != METERS_FORMAT:
            raise NodeUnavailableError(f"{path} is not a file of meters of this version")
        self.sizes: Final = MeterSizes(*words[2:6])
        if self.sizes.bytes > size:
            raise NodeUnavailableError(f"{path} is cut short")

    def worker(self, index: int) -> WorkerMeters:
        """Return the regions of a worker."""
        sizes = self.sizes
        at = _HEADER_WORDS + index * sizes.worker_words
        own = Region(WORKER, self._words[at : at + WORKER.words])
        at += WORKER.words
        groups, peers = [], []
        for _ in range(sizes.groups):
            groups.append(Region(GROUP, self._words[at : at + GROUP.words]))
            at += GROUP.words
        for _ in range(sizes.peers):
            peers.append(PeerRegion(self._words[at : at + PEER.words]))
            at += PEER.words
        return WorkerMeters(own, groups, peers)

    def front(self, index: int) -> Region:
        """Return the region of a front."""
        sizes = self.sizes
        at = _HEADER_WORDS + sizes.workers * sizes.worker_words + index * FRONT.words
        return Region(FRONT, self._words[at : at + FRONT.words])

    @property
    def http(self) -> Region:
        """The region of the HTTP role."""
        at = self.sizes.bytes // 8 - HTTP.words
        return Region(HTTP, self._words[at : at + HTTP.words])
