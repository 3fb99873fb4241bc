"""`kamacache.local.reading`: sums over the workers that never go down, of however many peers."""

from __future__ import annotations

from kamacache.limits import PEER_METERS_MAX
from kamacache.local.reading import peers_of
from kamacache.local.snapshot import MemberInfo, MembershipInfo
from kamacache.rundir.meters import OTHER_PEERS, PEER, WORKER, PeerRegion, Region, WorkerMeters

CALLS = PEER.at("requests")
OWN = "10.1.0.1:8001"
NAMES = [f"10.0.0.{number:03}:8001" for number in range(PEER_METERS_MAX + 6)]


def worker() -> WorkerMeters:
    slots = [PeerRegion() for _ in range(PEER_METERS_MAX + 1)]
    return WorkerMeters(Region(WORKER), [], slots)


def membership(*names: str) -> MembershipInfo:
    members = [MemberInfo(address=name, weight=1, share=0.0) for name in (OWN, *names)]
    return MembershipInfo(number=1, own=OWN, members=members)


def calls(workers: list[WorkerMeters], *names: str) -> dict[str, int]:
    return {peer.address: peer.calls for peer in peers_of(workers, [], membership(*names))}


def test_a_peer_that_one_worker_counts_among_the_others_goes_over_to_them_whole() -> None:
    workers, first = [worker(), worker()], NAMES[:PEER_METERS_MAX]
    for meters, names in zip(workers, (first, first[::-1]), strict=True):  # as it met them
        for name in names:
            meters.peer(name, first).words[CALLS] += 5
    before = calls(workers, *first)
    assert before == dict.fromkeys(first, 10)
    # Half of them have left, and each worker needs a slot: they do not free the same.
    members = [*first[::2], "new:1"]
    workers[0].peer("new:1", members).words[CALLS] += 1
    between = calls(workers, *members)
    workers[1].peer("new:1", members).words[CALLS] += 1
    after = calls(workers, *members)
    assert (between["new:1"], after["new:1"]) == (1, 2)
    assert (between[OTHER_PEERS], after[OTHER_PEERS]) == (10, 20)
    assert len(after) == PEER_METERS_MAX
    assert {after[name] for name in first if name in after} == {10}


def test_what_the_others_have_counted_stays_when_a_node_leaves() -> None:
    workers = [worker(), worker()]
    for meters in workers:
        for name in NAMES:
            meters.peer(name, NAMES).words[CALLS] += 1
    before = calls(workers, *NAMES)
    assert before[OTHER_PEERS] == 12
    assert len(before) == PEER_METERS_MAX + 1
    after = calls(workers, *NAMES[1:])
    assert after == before
