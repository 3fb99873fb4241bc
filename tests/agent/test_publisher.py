"""What becomes of the lists of a source: numbers, and what changes nothing."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kamacache.agent.publisher import Publisher
from kamacache.cluster.membership import (
    Member,
    MembershipReader,
    make_membership,
    membership_path,
    write_membership,
)
from kamacache.errors import NodeUnavailableError
from kamacache.limits import DISCOVERY_WRITE_AGAIN_S
from kamacache.rundir.control import MEMBERSHIP, SERVE_UNTIL, ControlWriter
from kamacache.rundir.description import NodeDescription
from tests.agent.conftest import OWN, members


class Later:
    """``call_later`` by hand."""

    def __init__(self) -> None:
        self.waiting: list[tuple[float, Callable[[], object]]] = []

    def __call__(self, delay_s: float, call: Callable[[], object]) -> asyncio.TimerHandle:
        entry = (delay_s, call)
        self.waiting.append(entry)
        later = self

        class Handle:
            def cancel(self) -> None:
                if entry in later.waiting:
                    later.waiting.remove(entry)

        return Handle()  # type: ignore[return-value]

    def run(self) -> None:
        calls, self.waiting = self.waiting, []
        for _, call in calls:
            call()


@pytest.fixture
def later() -> Later:
    return Later()


@pytest.fixture
def publisher(about: NodeDescription, later: Later) -> Iterator[Publisher]:
    found = Publisher(about, OWN, later)
    yield found
    found.close()


@pytest.fixture
def reader(about: NodeDescription) -> Iterator[MembershipReader]:
    found = MembershipReader(about)
    yield found
    found.close()


def test_list_becomes_the_next_number_and_every_reader_sees_it(
    publisher: Publisher, reader: MembershipReader
) -> None:
    assert reader.current().number == 1
    assert publisher.publish(members(3, 1, 2))
    assert reader.changed()
    found = reader.current()
    assert (found.number, found.own) == (2, OWN.address)
    assert found.members == tuple(members(1, 2, 3))
    assert publisher.standing == found


def test_equal_list_is_not_published_again(publisher: Publisher, reader: MembershipReader) -> None:
    assert publisher.publish(members(1, 2))
    assert reader.current().number == 2
    assert publisher.publish(members(2, 1))
    assert publisher.publish(members(2))  # the node itself is added
    assert not reader.changed()


def test_node_itself_is_always_a_member(publisher: Publisher) -> None:
    assert publisher.publish(members(2))
    assert publisher.standing.members == tuple(members(1, 2))
    assert publisher.publish([])
    assert publisher.standing.members == (OWN,)


def test_weight_that_the_source_gives_this_node_is_everyones(publisher: Publisher) -> None:
    assert publisher.publish([Member(OWN.address, 7)])
    assert publisher.standing.members == (Member(OWN.address, 7),)


@pytest.mark.parametrize(
    "wrong",
    [
        [*members(1, 2), Member("10.0.0.2:8001", 3)],
        [*members(1, 2), Member("10.0.0.2:08001")],
        [Member("nowhere")],
        [Member("0.0.0.0:1")],
        [Member("10.0.0.3:1", 0)],
        [Member(f"a:{n}") for n in range(1, 1100)],
    ],
    ids=["twice", "twice in two spellings", "malformed", "wildcard", "weight", "too many"],
)
def test_list_that_cannot_be_a_cluster_leaves_the_last_one_and_is_logged_once(
    publisher: Publisher,
    reader: MembershipReader,
    caplog: pytest.LogCaptureFixture,
    wrong: list[Member],
) -> None:
    publisher.publish(members(1, 5))
    stands = reader.current()
    for _ in range(3):
        assert not publisher.publish(wrong)
    assert not reader.changed()
    assert publisher.standing == stands
    assert [r.levelname for r in caplog.records].count("ERROR") == 1
    assert publisher.publish(members(1))
    assert reader.current().number == stands.number + 1
    publisher.publish(wrong)  # it was right meanwhile: this is news again
    assert [r.levelname for r in caplog.records].count("ERROR") == 2


def test_successor_counts_on(about: NodeDescription, later: Later) -> None:
    for number in (2, 3, 4):
        publisher = Publisher(about, OWN, later)
        assert publisher.standing.number == number - 1
        assert publisher.publish(members(1, number + 5))
        assert publisher.standing.number == number
        publisher.close()


def test_successor_does_not_publish_what_stands(
    about: NodeDescription, publisher: Publisher, later: Later
) -> None:
    publisher.publish(members(1, 2))
    second = Publisher(about, OWN, later)
    assert second.publish(members(1, 2))
    assert second.standing.number == 2
    second.close()


def test_death_between_file_and_number_is_made_good(
    about: NodeDescription, reader: MembershipReader, later: Later
) -> None:
    control = ControlWriter.open(about.control_path)
    assert reader.current().number == 1
    write_membership(about, make_membership(2, OWN.address, members(1, 9)), control.words)
    control.words[MEMBERSHIP] = 1  # as if the agent had died just before
    publisher = Publisher(about, OWN, later)
    assert control.words[MEMBERSHIP] == 2
    assert reader.current().members == tuple(members(1, 9))
    publisher.publish(members(1))
    assert reader.current().number == 3
    publisher.close()
    control.close()


def test_unreadable_file_is_written_anew_under_the_next_number(
    about: NodeDescription, reader: MembershipReader, later: Later
) -> None:
    Path(membership_path(about)).write_text("{")
    publisher = Publisher(about, OWN, later)
    assert publisher.publish(members(1))
    assert reader.current().number == 2
    publisher.close()


def test_write_that_fails_is_tried_again_until_it_stands(
    about: NodeDescription,
    publisher: Publisher,
    reader: MembershipReader,
    later: Later,
    caplog: pytest.LogCaptureFixture,
) -> None:
    Path(f"{membership_path(about)}.new").mkdir()  # the temporary file's name is taken
    assert not publisher.publish(members(1, 2))
    assert [delay_s for delay_s, _ in later.waiting] == [DISCOVERY_WRITE_AGAIN_S]
    later.run()
    assert len(later.waiting) == 1
    assert [r.levelname for r in caplog.records].count("ERROR") == 1
    Path(f"{membership_path(about)}.new").rmdir()
    later.run()
    assert not later.waiting
    assert reader.current().members == tuple(members(1, 2))


def test_newer_list_replaces_one_that_waits_to_be_written(
    about: NodeDescription, publisher: Publisher, later: Later
) -> None:
    Path(f"{membership_path(about)}.new").mkdir()
    publisher.publish(members(1, 2))
    Path(f"{membership_path(about)}.new").rmdir()
    assert publisher.publish(members(1, 3))
    assert not later.waiting
    assert publisher.standing.members == tuple(members(1, 3))


def test_nothing_but_the_number_is_written(about: NodeDescription, publisher: Publisher) -> None:
    control = ControlWriter.open(about.control_path)
    control.words[SERVE_UNTIL] = 4711
    before = list(control.words)
    publisher.publish(members(1, 2))
    before[MEMBERSHIP] = 2
    assert list(control.words) == before
    control.close()


def test_change_is_told_with_who_came_and_who_is_gone(
    publisher: Publisher, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        publisher.publish(members(1, *range(20, 40)))
        publisher.publish(members(1, *range(21, 41)))
    first, second = (record.__dict__ for record in caplog.records)
    assert first["came"].endswith("and 12 more")
    assert (second["came"], second["gone"]) == ("10.0.0.40:8001", "10.0.0.20:8001")


def test_node_that_is_gone_is_unavailable(about: NodeDescription, later: Later) -> None:
    Path(about.control_path).unlink()
    with pytest.raises(NodeUnavailableError):
        Publisher(about, OWN, later)
