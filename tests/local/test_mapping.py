"""One life of a node as a process maps it."""

from __future__ import annotations

import os
from typing import Any

import msgspec
import pytest

from kamacache.errors import GroupNotFoundError, NodeUnavailableError
from kamacache.local.mapping import NodeMapping
from kamacache.rundir.description import NodeDescription
from tests.attached_estate import Estate
from tests.node_process import NodeProcess

pytestmark = pytest.mark.integration

Shared = tuple[Estate, NodeProcess]


@pytest.fixture
def about(shared: Shared) -> NodeDescription:
    return shared[1].description()


def changed(about: NodeDescription, **fields: Any) -> NodeDescription:
    return msgspec.structs.replace(about, **fields)


def test_node_of_another_boot_is_not_mapped(about: NodeDescription) -> None:
    with pytest.raises(NodeUnavailableError, match="before the last boot"):
        NodeMapping(changed(about, boot_id="another"))


def test_node_whose_files_are_gone_is_not_mapped(about: NodeDescription) -> None:
    with pytest.raises(NodeUnavailableError, match="/nowhere/control"):
        NodeMapping(changed(about, shm_dir="/nowhere"))


def test_group_is_found_with_the_nodes_settings_or_named_with_the_others(
    about: NodeDescription,
) -> None:
    mapping = NodeMapping(about)
    assert mapping.serving
    assert mapping.spec("fifo").eviction == "s3fifo"
    with pytest.raises(GroupNotFoundError, match="it has alevel0, alevel1"):
        mapping.spec("nope")
    mapping.close()


def test_shards_are_mapped_once_and_data_cannot_be_written(about: NodeDescription) -> None:
    mapping = NodeMapping(about)
    arenas = mapping.arenas("scores")
    assert mapping.arenas("scores") is arenas
    assert len(arenas) == about.workers
    with pytest.raises(TypeError):
        arenas[0].data[0] = 1
    with pytest.raises(TypeError):
        arenas[0].index[0] = 1
    mapping.close()


def test_who_has_nothing_to_count_takes_no_slot(about: NodeDescription) -> None:
    mapping = NodeMapping(about)
    claimed = mapping.counters()._claimed
    before = set(claimed)
    mapping.count("alevel0", (0, 0, 0))
    assert claimed == before
    mapping.count("alevel0", (0, 1))
    assert len(claimed) == len(before) + 1
    mapping.close()


def test_two_mappings_count_into_one_slot_and_a_fork_into_its_own(
    about: NodeDescription,
) -> None:
    one, two = NodeMapping(about), NodeMapping(about)
    before = one.totals("plain")["near_hits"]
    one.count("plain", (0, 3))
    claimed = len(one.counters()._claimed)
    two.count("plain", (0, 4))
    assert two.counters() is one.counters()
    assert len(one.counters()._claimed) == claimed
    pid = os.fork()
    if not pid:
        try:
            two.count("plain", (0, 5))
            os._exit(len(two.counters()._claimed))
        finally:
            os._exit(99)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
    assert one.totals("plain")["near_hits"] - before == 12
