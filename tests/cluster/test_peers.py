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
