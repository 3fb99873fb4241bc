"""The ring: balance, movement, order of the nodes; held against arithmetic and uhashring."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Sequence

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from uhashring import HashRing

from kamacache.cluster.membership import Member
from kamacache.cluster.ring import Ring
from kamacache.errors import ConfigError
from kamacache.limits import VIRTUAL_NODES

KEYS = [f"user:{i}".encode() for i in range(100_000)]
CIRCLE = 1 << 64


def ring_of(addresses: Iterable[str], weight: int = 1) -> Ring:
    return Ring(Member(address, weight) for address in addresses)


def names(pattern: str, count: int) -> list[str]:
    return [pattern.format(i) for i in range(count)]


def max_over_mean(owners: Iterable[str], nodes: int) -> float:
    counts = Counter(owners)
    return max(counts.values()) * nodes / sum(counts.values())


def walk(members: Sequence[Member], key: bytes) -> list[str]:
    """Return what `owners` must give: all points by their distance from the key, the naive way."""
    at = xxhash.xxh3_64(key, seed=0x6B616D61).intdigest()
    distances = [
        ((xxhash.xxh3_64(f"{m.address}#{i}".encode()).intdigest() - at - 1) % CIRCLE, m.address)
        for m in members
        for i in range(VIRTUAL_NODES * m.weight)
    ]
    return list(dict.fromkeys(address for _, address in sorted(distances)))


@pytest.mark.parametrize(
    "members",
    [
        [Member("a:1")],
        [Member("10.0.0.1:8001"), Member("10.0.0.2:8001")],
        [Member(f"10.0.0.{i}:8001", 1 + i % 3) for i in range(5)],
        [Member("[fd00::1]:8001"), Member("cache-1.internal:8001", 4), Member("ü:1")],
    ],
)
def test_owners_are_those_that_plain_arithmetic_finds(members: list[Member]) -> None:
    ring = Ring(members)
    for key in (b"", b"Tom", b"\xff\x00", b"10.0.0.1:8001#0", b"x" * 1024):
        expected = walk(members, key)
        assert list(ring.owners(key)) == expected
        assert ring.owner(key) == expected[0]
        assert sorted(expected) == list(ring.addresses)


def test_owners_of_many_keys_are_those_of_each() -> None:
    ring = Ring([Member("a:1"), Member("b:1", 2), Member("c:1")])
    keys = [b"%d" % number for number in range(500)]
    assert ring.owners_of(keys) == [ring.owner(key) for key in keys]


def test_no_key_is_left_out_where_the_circle_ends() -> None:
    ring = ring_of(names("n{}:1", 3))
    points = sorted(
        xxhash.xxh3_64_intdigest(f"n{n}:1#{i}".encode())
        for n in range(3)
        for i in range(VIRTUAL_NODES)
    )
    hashes = {key: xxhash.xxh3_64_intdigest(key, 0x6B616D61) for key in KEYS}
    first = [key for key in KEYS if hashes[key] < points[0]]
    last = [key for key in KEYS if hashes[key] >= points[-1]]
    assert first
    assert last
    assert len({ring.owner(key) for key in first + last}) == 1
    assert all(sorted(ring.owners(key)) == list(ring.addresses) for key in first + last)


# A set of names decides where the points lie, so a bound on the balance must hold for many.
NAMES = [
    "10.0.0.{}:8001",
    "192.168.17.{}:9000",
    "cache-{}.internal:8001",
    "kamacache-{}.kamacache.prod.svc.cluster.local:8001",
    "[fd00::{}]:8001",
    "127.0.0.1:800{}",
    "a{}:1",
]


def test_of_ten_equal_nodes_none_has_more_than_1_10_of_the_mean() -> None:
    draw = random.Random(7)
    patterns = set(NAMES)
    while len(patterns) < 60:
        patterns.add(draw.choice(NAMES).replace("{}", f"{draw.randrange(1, 25)}{{}}"))
    worst = {p: max_over_mean(map(ring_of(names(p, 10)).owner, KEYS), 10) for p in patterns}
    assert max(worst.values()) <= 1.10, max(worst.items(), key=lambda item: item[1])


def test_keys_of_other_kinds_are_spread_as_well() -> None:
    ring = ring_of(names("10.0.0.{}:8001", 10))
    draw = random.Random(7)
    for keys in (
        [i.to_bytes(8, "little") for i in range(100_000)],
        [draw.randbytes(16) for _ in range(100_000)],
        [f"10.0.0.{i % 10}:8001#{i}".encode() for i in range(100_000)],
    ):
        assert max_over_mean(map(ring.owner, keys), 10) <= 1.10


def test_balance_is_no_worse_than_that_of_uhashring_with_as_many_points() -> None:
    addresses = names("10.0.0.{}:8001", 10)
    other = HashRing(
        nodes=addresses,
        vnodes=VIRTUAL_NODES,
        replicas=1,
        hash_fn=lambda key: xxhash.xxh3_64_intdigest(str(key).encode(), seed=1),
    )
    theirs = max_over_mean((other.get_node(key.decode()) for key in KEYS), 10)
    assert theirs < 1.15  # it is a ring of the same kind
    assert max_over_mean(map(ring_of(addresses).owner, KEYS), 10) < theirs + 0.05


def test_removing_one_of_ten_nodes_moves_its_keys_and_no_others() -> None:
    addresses = names("10.0.0.{}:8001", 10)
    before, after = ring_of(addresses), ring_of(addresses[:-1])
    gone = addresses[-1]
    moved = 0
    heirs: Counter[str] = Counter()
    for key in KEYS:
        owner = before.owner(key)
        if owner == gone:
            moved += 1
            heirs[after.owner(key)] += 1
            if moved <= 100:  # the next on the ring is the heir
                assert list(before.owners(key))[1] == after.owner(key)
        else:
            assert after.owner(key) == owner
    assert moved <= 0.11 * len(KEYS)
    assert max(heirs.values()) < 1.35 * moved / 9  # spread over all, not given to one


def test_adding_a_node_takes_an_eleventh_and_moves_nothing_between_the_others() -> None:
    addresses = names("10.0.0.{}:8001", 10)
    before, after = ring_of(addresses), ring_of([*addresses, "10.0.0.10:8001"])
    taken = 0
    for key in KEYS:
        owner = after.owner(key)
        if owner == "10.0.0.10:8001":
            taken += 1
        else:
            assert before.owner(key) == owner
    assert 0.9 < taken * 11 / len(KEYS) < 1.1


def test_a_node_has_keys_by_its_weight_and_a_greater_weight_only_takes() -> None:
    light = Ring([Member("a:1"), Member("b:1"), Member("c:1", 2)])
    heavy = Ring([Member("a:1"), Member("b:1"), Member("c:1", 4)])
    counts = Counter(map(light.owner, KEYS))
    assert counts["c:1"] / counts["a:1"] == pytest.approx(2, rel=0.1)
    assert counts["b:1"] / counts["a:1"] == pytest.approx(1, rel=0.1)
    for key in KEYS[:20_000]:
        if heavy.owner(key) != light.owner(key):
            assert heavy.owner(key) == "c:1"


@settings(deadline=None, max_examples=20)
@given(
    st.lists(
        st.tuples(st.from_regex(r"[a-z]{1,3}:[1-9]", fullmatch=True), st.integers(1, 2)),
        min_size=1,
        max_size=4,
        unique_by=lambda item: item[0],
    ),
    st.binary(min_size=1, max_size=40),
)
def test_order_of_the_members_does_not_matter(items: list[tuple[str, int]], key: bytes) -> None:
    members = [Member(*item) for item in items]
    rings = [Ring(order) for order in itertools.islice(itertools.permutations(members), 3)]
    assert len({tuple(ring.owners(key)) for ring in rings}) == 1
    assert all(ring == rings[0] and hash(ring) == hash(rings[0]) for ring in rings)
    assert list(rings[0].owners(key)) == walk(members, key)


def test_rings_are_equal_where_addresses_and_weights_are() -> None:
    assert ring_of(["a:1", "b:1"]) == ring_of(["b:1", "a:1"])
    assert ring_of(["a:1"]) != ring_of(["a:1"], weight=2)
    assert ring_of(["a:1"]) != ring_of(["b:1"])
    assert ring_of(["a:1"]) != "a:1"
    assert len(ring_of(["a:1", "b:1"])) == 2


def test_where_known_keys_lie_never_changes() -> None:
    # Another answer is another ring: nodes of two versions would disagree about every key.
    ring = ring_of(names("10.0.0.{}:8001", 10))
    owners = [ring.owner(key) for key in (b"Tom", b"Jack", b"Sam", b"\x00\xff", KEYS[0])]
    assert [int(owner.split(".")[3].split(":")[0]) for owner in owners] == [0, 9, 3, 9, 2]


@pytest.mark.parametrize("members", [[], [Member("a:1"), Member("a:1", 2)]])
def test_a_ring_needs_members_each_once(members: list[Member]) -> None:
    with pytest.raises(ConfigError, match="each once"):
        Ring(members)


def test_importing_the_ring_does_not_load_grpc() -> None:
    program = "import kamacache.cluster.ring, sys; sys.exit('grpc' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=30)


def test_the_quick_start_says_who_owns_what() -> None:
    ring = Ring([Member(f"127.0.0.1:{port}") for port in (8001, 8002, 8003)])
    owners = {key: ring.owner(key.encode())[-4:] for key in ("Tom", "Jack", "Sam", "Peter")}
    assert owners == {"Tom": "8002", "Jack": "8001", "Sam": "8003", "Peter": "8001"}


def test_the_place_of_a_key_is_its_hash_and_the_point_of_its_owner() -> None:
    ring = Ring([Member("a:1"), Member("b:1")])
    for key in (b"key-%d" % number for number in range(50)):
        digest, point = ring.place(key)
        assert 0 <= digest < 1 << 64
        assert point in ring._points
        assert ring._owners[ring._points.index(point)] == ring.owner(key)


def test_shares_are_those_that_keys_see_and_sum_to_one() -> None:
    ring = Ring([Member("a:1", 2), Member("b:1"), Member("c:1")])
    shares = ring.shares()
    assert sum(shares.values()) == pytest.approx(1.0)
    seen = Counter(ring.owners_of(KEYS))
    for address, share in shares.items():
        assert share == pytest.approx(seen[address] / len(KEYS), rel=0.05)
    assert Ring([Member("a:1")]).shares() == {"a:1": 1.0}
