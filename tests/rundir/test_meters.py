"""`kamacache.rundir.meters`: words that outlive who writes them, and slots of peers."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from kamacache.errors import NodeUnavailableError
from kamacache.limits import LOAD_SECONDS_BUCKETS, PEER_METERS_MAX
from kamacache.rundir.meters import (
    FRONT,
    GROUP,
    HTTP,
    OTHER_PEERS,
    PEER,
    WORKER,
    Meters,
    MeterSizes,
    PeerRegion,
    Region,
    WorkerMeters,
    create_meters,
    meters_path,
)

SIZES = MeterSizes.of(workers=3, groups=2, fronts=2, clustered=True)
CALLS = PEER.at("requests")


@pytest.fixture
def folder(tmp_path: Path) -> str:
    create_meters(str(tmp_path), SIZES)
    return str(tmp_path)


def regions_of(meters: Meters) -> list[Region]:
    found: list[Region] = []
    for index in range(SIZES.workers):
        worker = meters.worker(index)
        found += [worker.own, *worker.groups, *worker.peers]
    return [*found, *map(meters.front, range(SIZES.fronts)), meters.http]


def test_no_two_regions_share_a_word(folder: str) -> None:
    regions = regions_of(Meters(folder, writable=True))
    for number, region in enumerate(regions, 1):
        for at in range(len(region.words)):
            region.words[at] = number
    for number, region in enumerate(regions, 1):
        assert set(region.words.tolist()) == {number}
    assert Meters(folder).sizes == SIZES  # nor with the header


@pytest.mark.parametrize("kind", [WORKER, GROUP, PEER, FRONT, HTTP])
def test_names_and_histograms_of_a_region_lie_apart(kind: object) -> None:
    assert isinstance(kind, type(GROUP))
    region = Region(kind)
    for place, name in enumerate(kind.names, 1):
        region.words[kind.at(name)] = place
    for number in range(kind.histograms):
        region.observe(0.003, number)
    assert list(region.counts().values()) == [*range(1, len(kind.names) + 1)]
    for number in range(kind.histograms):
        sum_s, buckets = region.histogram(number)
        assert (sum_s, sum(buckets), len(buckets)) == (0.003, 1, len(kind.bounds_s) + 1)


def test_a_time_is_counted_in_the_first_bucket_whose_bound_it_does_not_pass() -> None:
    region = Region(GROUP)
    for seconds in (0.0, LOAD_SECONDS_BUCKETS[0], LOAD_SECONDS_BUCKETS[0] * 1.01, 1e6):
        region.observe(seconds)
    _, buckets = region.histogram()
    assert buckets[:2] == [2, 1]
    assert buckets[-1] == 1


def test_what_a_killed_process_counted_is_there_for_the_next(folder: str) -> None:
    loads = GROUP.at("loads")
    for _ in range(3):
        pid = os.fork()
        if not pid:
            words = Meters(folder, writable=True).worker(1).groups[0].words
            for _ in range(1_000):
                words[loads] += 1
            os.kill(os.getpid(), signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert Meters(folder).worker(1).groups[0].counts()["loads"] == 3_000


def test_a_reader_cannot_write(folder: str) -> None:
    with pytest.raises(TypeError):
        Meters(folder).http.words[0] = 1


def test_a_file_that_is_none_of_ours_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NodeUnavailableError, match="cannot be opened"):
        Meters(str(tmp_path))
    path = Path(meters_path(str(tmp_path)))
    path.write_bytes(b"")
    with pytest.raises(NodeUnavailableError, match="cannot be opened"):
        Meters(str(tmp_path))
    path.write_bytes(bytes(4096))
    with pytest.raises(NodeUnavailableError, match="not a file of meters"):
        Meters(str(tmp_path))
    create_meters(str(tmp_path), SIZES)
    os.truncate(path, SIZES.bytes - 8)
    with pytest.raises(NodeUnavailableError, match="cut short"):
        Meters(str(tmp_path))


def test_a_peer_finds_its_slot_again(folder: str) -> None:
    first = Meters(folder, writable=True).worker(0)
    first.peer("a:1", ()).words[CALLS] += 5
    first.peer("b:1", ("a:1",)).words[CALLS] += 1
    again = Meters(folder, writable=True).worker(0)  # the worker's successor
    again.peer("a:1", ()).words[CALLS] += 2
    told = {slot.address: slot.counts()["requests"] for slot in again.peers if slot.address}
    assert told == {"a:1": 7, "b:1": 1}


def test_more_peers_than_slots_are_counted_together_and_slots_of_the_gone_are_freed() -> None:
    slots = [PeerRegion() for _ in range(PEER_METERS_MAX + 1)]
    worker = WorkerMeters(Region(WORKER), [], slots)
    names = [f"10.0.0.{number}:8001" for number in range(PEER_METERS_MAX)]
    for name in names:
        worker.peer(name, names).words[CALLS] += 1
    others = worker.peer("late:1", names)
    assert others is slots[-1]
    others.words[CALLS] += 10
    # One of them leaves: the next that comes has its slot, and what it counted is not lost.
    fresh = worker.peer("later:1", names[1:])
    assert fresh.address == "later:1"
    assert fresh.counts()["requests"] == 0
    assert others.counts()["requests"] == 11
    assert sum(slot.counts()["requests"] for slot in slots) == PEER_METERS_MAX + 10
    assert OTHER_PEERS not in {slot.address for slot in slots}


def test_a_file_is_made_anew_in_place_of_one_that_is_there(folder: str) -> None:
    old = Meters(folder, writable=True)
    old.http.words[HTTP.at("in_flight")] = 7
    create_meters(folder, SIZES)
    assert Meters(folder).http.counts()["in_flight"] == 0
    assert old.http.counts()["in_flight"] == 7  # whoever maps it, maps it
