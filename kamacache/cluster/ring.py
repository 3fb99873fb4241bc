"""The ring: which node owns a key, and who comes next; the same on every node and every client.

*Process*: workers, fronts and remote clients. Consistent hashing with virtual nodes (Karger et al.,
STOC 1997): a node of weight w is `VIRTUAL_NODES` * w points on a circle of 64 bits, and a key
belongs to the first point after its hash::

    point = xxh3_64(address + "#" + number)          key = xxh3_64(key, _KEY_SEED)

    0 ──── b ──── a ────── c ──── b ───── a ──── 2^64
                     ▲ key: c, then b, then a        (the end is followed by the start)

*Invariants*: the ring depends on nothing but addresses and weights, so whoever knows the same
members has the same ring; it never changes; removing a node moves that node's keys and no others.
Nothing tunes it by what one node has seen: rings that differ would send a key two ways.

The seed keeps keys off the points: without it, a key that is spelled like a point would always lie
on it. With 2,048 points the share of one of 10 equal nodes has a standard deviation of 2.2 %, so
the largest stays below 1.10 of the mean; the tests measure it over many sets of names.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import Final

from xxhash import xxh3_64_intdigest

from kamacache.cluster.membership import Member
from kamacache.errors import ConfigError
from kamacache.limits import VIRTUAL_NODES

_KEY_SEED: Final = 0x6B616D61  # part of the ring's format: all nodes and clients must agree


class Ring:
    """Members on the circle; immutable, for any thread.

    A lookup is one hash and one binary search, 0.5 us of 10 nodes, 1.2 us of 100 (CPython 3.11)::

        python -m timeit -s "from kamacache.cluster.ring import Ring" \\
            -s "from kamacache.cluster.membership import Member" \\
            -s "ring = Ring(Member(f'10.0.0.{i}:8001') for i in range(10))" \\
            -s "keys = [f'user:{i}'.encode() for i in range(100_000)]" \\
            "for key in keys: ring.owner(key)"

    Making one takes 0.02 s for 10 nodes, 0.2 s for 100, most of it for sorting.
    """

    __slots__ = ("_owners", "_points", "_weights", "addresses")

    def __init__(self, members: Iterable[Member]) -> None:
        """Place the members, in whatever order; raises `ConfigError` for none, or one twice."""
        listed = list(members)
        self._weights: Final = {member.address: member.weight for member in listed}
        if not listed or len(self._weights) < len(listed):
            raise ConfigError(
                f"a ring needs one member or more, each once; it was given {len(listed)}, of "
                f"{len(self._weights)} addresses",
                setting="members",
            )
        self.addresses: Final = tuple(sorted(self._weights))
        owner_of: dict[int, str] = {}
        for address in reversed(self.addresses):  # of equal points the first address's holds
            name = address.encode() + b"#"
            count = VIRTUAL_NODES * self._weights[address]
            owner_of.update(
                dict.fromkeys([xxh3_64_intdigest(name + b"%d" % i) for i in range(count)], address)
            )
        points = sorted(owner_of)
        owners = list(map(owner_of.__getitem__, points))
        owners.append(owners[0])  # after the last point comes the first
        self._owners: Final = owners
        # Made anew in their order, they lie side by side in memory: a fifth off a lookup.
        self._points: Final = array("Q", points).tolist()

    def owner(self, key: bytes) -> str:
        """Return the address of the node that owns a key."""
        return self._owners[bisect_right(self._points, xxh3_64_intdigest(key, _KEY_SEED))]

    def place(self, key: bytes) -> tuple[int, int]:
        """Return a key's hash, and the point behind it, whose node owns the key; to explain."""
        digest, points = xxh3_64_intdigest(key, _KEY_SEED), self._points
        return digest, points[bisect_right(points, digest) % len(points)]

    def owners_of(self, keys: Iterable[bytes]) -> list[str]:
        """Return the address of the owner of each key, in their order."""
        owners, points = self._owners, self._points
        return [owners[bisect_right(points, xxh3_64_intdigest(key, _KEY_SEED))] for key in keys]

    def owners(self, key: bytes) -> Iterator[str]:
        """Yield the owner, then the next distinct nodes clockwise, each once."""
        owners = self._owners
        start = bisect_right(self._points, xxh3_64_intdigest(key, _KEY_SEED))
        yield owners[start]
        left = len(self.addresses) - 1
        if not left:
            return
        seen = {owners[start]}
        for i in range(start + 1, start + len(self._points)):
            address = owners[i % len(self._points)]
            if address not in seen:
                yield address
                seen.add(address)
                left -= 1
                if not left:
                    return

    def shares(self) -> dict[str, float]:
        """Return the share of all keys that each node owns, by its address."""
        points, shares = self._points, dict.fromkeys(self.addresses, 0)
        for before, point, owner in zip(points, points[1:], self._owners[1:], strict=False):
            shares[owner] += point - before
        shares[self._owners[0]] += points[0] + (1 << 64) - points[-1]
        return {address: share / (1 << 64) for address, share in shares.items()}

    def __len__(self) -> int:
        """How many nodes there are."""
        return len(self.addresses)

    def __eq__(self, other: object) -> bool:
        """Whether every key goes the same way by the other ring."""
        return self._weights == other._weights if isinstance(other, Ring) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.addresses)

    def __repr__(self) -> str:
        return f"<Ring of {len(self)}: {', '.join(self.addresses[:8])}{' ...' * (len(self) > 8)}>"
