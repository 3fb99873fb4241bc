"""A status says how a node does, and what of it does not run."""

from __future__ import annotations

from pathlib import Path

import pytest

from kamacache.node.children import make_children
from kamacache.node.notify import Notifier
from kamacache.node.telling import Teller, status
from kamacache.rundir.description import DESCRIPTION_FORMAT, NodeDescription
from kamacache.rundir.roster import State, read_roster
from tests.service_manager import ServiceManager

WELL = "2 workers, listening on h:1, HTTP on h:2"


def described(folder: Path, **more: str) -> NodeDescription:
    return NodeDescription(
        format=DESCRIPTION_FORMAT,
        epoch="0" * 16,
        pid=1,
        boot_id="",
        workers=2,
        hash_seed=0,
        shm_dir=str(folder),
        sockets_dir=str(folder),
        groups=[],
        listen=more.get("listen"),
        version="",
        name=None,
        clustered=False,
        api=more.get("api"),
    )


@pytest.mark.parametrize(
    ("state", "lost", "expected"),
    [
        ("starting", (0, 2), "starting: 3 of 5 processes are ready"),
        ("ready", (), WELL),
        (
            "ready",
            (1, 3, 4),
            WELL + "; 1 of 2 workers restarting; 1 of 2 fronts restarting; 1 of 1 http restarting",
        ),
        ("stopping", (0, 1), "stopping: 3 of 5 processes still run"),
    ],
)
def test_a_status_names_what_is_missing(
    tmp_path: Path, state: State, lost: tuple[int, ...], expected: str
) -> None:
    children = make_children(2, 2, agent=False, http=True)
    for number, child in enumerate(children):
        child.ready, child.pid = number not in lost, (number not in lost) * 100
    assert status(state, children, described(tmp_path, listen="h:1", api="h:2")) == expected


def test_a_node_of_workers_alone_says_that_it_does_not_listen(tmp_path: Path) -> None:
    assert status("ready", [], described(tmp_path)) == "2 workers, not listening"


def test_only_changes_are_told(tmp_path: Path) -> None:
    with ServiceManager(str(tmp_path / "notify")) as manager:
        notifier = Notifier(manager.address)
        teller = Teller(notifier, socket_gid=None)
        children = make_children(2, 0, agent=False, http=False)
        about = described(tmp_path)
        teller.tell("starting", children, about, 1.0)
        assert manager.heard() == [
            ["STATUS=starting: 0 of 2 processes are ready"],
            ["EXTEND_TIMEOUT_USEC=10000000"],
        ]
        for child in children:
            child.ready = True
        for _ in range(2):
            teller.tell("ready", children, about, 1.1)
        assert [message[:2] for message in manager.heard()] == [
            ["READY=1", "STATUS=2 workers, not listening"]
        ]
        assert teller.status == "2 workers, not listening"
        before = (tmp_path / "roster.json").stat().st_ino
        teller.tell("ready", children, about, 1.2)
        assert (tmp_path / "roster.json").stat().st_ino == before
        children[1].ready = False
        teller.tell("ready", children, about, 1.3)
        assert manager.heard() == [["STATUS=2 workers, not listening; 1 of 2 workers restarting"]]
        assert [role.ready for role in read_roster(tmp_path).roles] == [True, False]
        teller.tell("stopping", children, about, 1.4)
        assert manager.heard()[0] == ["STOPPING=1", "STATUS=stopping"]
        assert read_roster(tmp_path).state == "stopping"
        notifier.close()


def test_a_roster_that_cannot_be_written_is_logged_once(tmp_path: Path) -> None:
    teller = Teller(Notifier(), socket_gid=None)
    about = described(tmp_path / "gone")
    assert teller.tell("ready", [], about, 1.0) == float("inf")
    assert teller.tell("ready", [], about, 1.0) == float("inf")
