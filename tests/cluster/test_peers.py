"""Where a key goes, and who had it before: `kamacache.cluster.peers`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from kamacache.cluster.membership import Member, Membership
from kamacache.cluster.owed import OwedFile
from kamacache.cluster.peers import RINGS_BEFORE_MAX, Link, Peers


class Known:
    """A link that is up."""

    usable = up = settled = True
    pending_invalidations = 0

    def __init__(self, address: str) -> None:
        self.address = address

    def start(self) -> None: ...


def test_a_list_of_peers_that_flaps_is_remembered_within_bounds(tmp_path: Path) -> None:
    now_s = 0.0
    peers = Peers(
        lambda address, former: cast(Link, Known(address)),
        lambda: now_s,
        close=lambda link: None,
        owed=OwedFile(tmp_path / "owed"),
    )
    for number in range(1, 40):
        now_s += 0.1
        names = ("a:1", "b:1") if number % 2 else ("a:1", "b:1", "c:1")
        members = tuple(Member(name) for name in names)
        peers.update(Membership(number=number, own="a:1", members=members))
    rings: list[Any] = peers._rings_before
    assert len(rings) == RINGS_BEFORE_MAX
    assert rings[0][1].addresses == ("a:1", "b:1", "c:1")  # the last before the present one


def test_many_keys_go_where_each_of_them_goes(tmp_path: Path) -> None:
    links: dict[str, Known] = {}

    def make(address: str, former: Link | None) -> Link:
        links[address] = Known(address)
        return cast(Link, links[address])

    peers = Peers(make, lambda: 0.0, close=lambda link: None, owed=OwedFile(tmp_path / "owed"))
    members = tuple(Member(name) for name in ("a:1", "b:1", "c:1"))
    peers.update(Membership(number=1, own="a:1", members=members))
    keys = [b"key-%d" % number for number in range(200)]
    whole = peers.routes(keys)
    assert whole == [peers.route(key) for key in keys]
    assert {link and link.address for link in whole} == {None, "b:1", "c:1"}
    links["b:1"].usable = False
    without = peers.routes(keys)
    assert without == [peers.route(key) for key in keys]
    assert {link and link.address for link in without} == {None, "c:1"}
    links["b:1"].settled = False  # its first try is waited for
    assert peers.routes(keys) == whole


def test_a_link_is_made_knowing_all_members(tmp_path: Path) -> None:
    # Else a worker that was forked again would free slots of its meters that members have.
    seen: list[set[str]] = []

    def make_link(address: str, former: Link | None) -> Link:
        seen.append(peers.addresses)
        return cast(Link, Known(address))

    peers = Peers(make_link, lambda: 0.0, close=lambda link: None, owed=OwedFile(tmp_path / "owed"))
    members = tuple(Member(name) for name in ("a:1", "b:1", "c:1"))
    peers.update(Membership(number=1, own="a:1", members=members))
    assert len(seen) == 2
    assert all({"b:1", "c:1"} <= addresses for addresses in seen)
