"""The service manager is told in sd_notify's words, and never waited for."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from kamacache.limits import (
    NOTIFY_AGAIN_S,
    NOTIFY_EXTEND_EVERY_S,
    NOTIFY_STATUS_CHARS_MAX,
    NOTIFY_WATCHDOG_S_MIN,
)
from kamacache.node.notify import Notifier
from tests.service_manager import ServiceManager

_STATUS_CHANGES = 300  # far more than a queue of datagrams holds


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ServiceManager]:
    where = tmp_path / "notify"
    manager = ServiceManager(str(where) if request.param == "path" else f"@{where}")
    yield manager
    manager.close()


@pytest.fixture
def notifier(manager: ServiceManager) -> Iterator[Notifier]:
    made = Notifier(manager.address, watchdog_s=10.0)
    yield made
    made.close()


def test_the_life_of_a_node_is_told_in_the_words_of_sd_notify(
    manager: ServiceManager, notifier: Notifier
) -> None:
    notifier.ready("8 workers")
    notifier.status("7 of 8 workers\nserve")
    notifier.reloading()
    notifier.reloaded()
    notifier.stopping()
    ready, status, reloading, reloaded, stopping = manager.heard()
    assert ready == ["READY=1", "STATUS=8 workers", f"MAINPID={os.getpid()}"]
    assert status == ["STATUS=7 of 8 workers serve"]
    assert reloading[0] == "RELOADING=1"
    name, _, when = reloading[1].partition("=")
    assert name == "MONOTONIC_USEC"
    assert int(when) > 0
    assert reloaded == ["READY=1"]
    assert stopping == ["STOPPING=1", "STATUS=stopping"]


def test_the_watchdog_is_fed_at_half_its_interval(
    manager: ServiceManager, notifier: Notifier
) -> None:
    assert notifier.watchdog(100.0) == 105.0
    assert notifier.watchdog(104.9) == 105.0
    assert manager.heard() == [["WATCHDOG=1"]]
    assert notifier.watchdog(105.0) == 110.0
    assert manager.heard() == [["WATCHDOG=1"]]


def test_more_time_is_asked_for_again_before_it_is_over(
    manager: ServiceManager, notifier: Notifier
) -> None:
    notifier.extend(100.0)
    notifier.extend(100.0 + NOTIFY_EXTEND_EVERY_S / 2)
    assert manager.heard() == [["EXTEND_TIMEOUT_USEC=10000000"]]
    notifier.extend(100.0 + NOTIFY_EXTEND_EVERY_S)
    assert len(manager.heard()) == 1


def test_no_interval_makes_the_loop_spin(manager: ServiceManager) -> None:
    notifier = Notifier(manager.address, watchdog_s=0.000_001)
    assert notifier.watchdog(100.0) == 100.0 + NOTIFY_WATCHDOG_S_MIN
    notifier.close()


def test_a_status_is_one_that_systemd_takes(manager: ServiceManager, notifier: Notifier) -> None:
    notifier.status("\udcff" + "\N{SNOWMAN}" * 10_000)
    [[told]] = manager.heard()
    assert told.startswith("STATUS=?\N{SNOWMAN}")
    assert 3_000 > len(told.encode()) > NOTIFY_STATUS_CHARS_MAX


def test_a_process_without_descriptors_left_starts_untold(manager: ServiceManager) -> None:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limit[1]))
    try:
        notifier = Notifier.from_environment({"NOTIFY_SOCKET": manager.address})
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    notifier.ready("nobody hears it")
    assert manager.heard() == []


def test_what_finds_no_room_is_sent_later_in_its_order(
    manager: ServiceManager, notifier: Notifier
) -> None:
    for count in range(_STATUS_CHANGES):
        notifier.status(f"before {count}")
    notifier.ready("ready")  # no room: waits
    notifier.watchdog(100.0)
    for count in range(_STATUS_CHANGES):
        notifier.status(f"after {count}")
    assert notifier.watchdog(101.0) == 101.0 + NOTIFY_AGAIN_S
    first = manager.heard()
    assert 0 < len(first) < _STATUS_CHANGES
    assert ["WATCHDOG=1"] not in first
    notifier.watchdog(101.1)
    assert manager.heard() == [
        ["READY=1", "STATUS=ready", f"MAINPID={os.getpid()}"],
        [f"STATUS=after {_STATUS_CHANGES - 1}"],
    ]
    assert notifier.watchdog(102.0) == 105.0


def test_a_manager_that_goes_and_comes_back_ends_nothing(tmp_path: Path) -> None:
    first = ServiceManager(str(tmp_path / "notify"))
    notifier = Notifier(first.address, watchdog_s=10.0)
    first.close()
    notifier.ready("nobody listens")
    os.unlink(first.address)
    notifier.status("nobody is there")
    second = ServiceManager(first.address)
    notifier.status("somebody is")
    assert second.heard() == [["STATUS=somebody is"]]
    second.close()
    notifier.close()
    notifier.status("said no more")


def test_the_environment_names_the_manager_and_the_watchdog(manager: ServiceManager) -> None:
    environment = {
        "NOTIFY_SOCKET": manager.address,
        "WATCHDOG_USEC": "4000000",
        "WATCHDOG_PID": str(os.getpid()),
        "HOME": "/",
    }
    notifier = Notifier.from_environment(environment)
    assert environment == {"HOME": "/"}  # no child speaks for the node
    assert notifier.watchdog(100.0) == 102.0
    assert manager.heard() == [["WATCHDOG=1"]]
    assert not os.get_inheritable(notifier.fds[0])
    notifier.close()


def test_a_watchdog_for_another_process_is_not_ours(manager: ServiceManager) -> None:
    others = {"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "4000000", "WATCHDOG_PID": "1"}
    notifier = Notifier.from_environment(others)
    assert notifier.watchdog(100.0) == float("inf")
    notifier.status("but the socket is")
    assert manager.heard() == [["STATUS=but the socket is"]]
    notifier.close()


def test_a_node_inside_a_program_does_not_speak_for_it(manager: ServiceManager) -> None:
    environment = {"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "4000000"}
    notifier = Notifier.from_environment(environment, embedded=True)
    notifier.ready("a part of the service")
    assert notifier.watchdog(100.0) == float("inf")
    assert (manager.heard(), environment, notifier.fds) == ([], {}, ())


@pytest.mark.parametrize("address", ["", "@", "relative", "vsock:2:1234"])
def test_without_an_address_that_can_be_used_nothing_is_said(address: str) -> None:
    notifier = Notifier.from_environment({"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "x"})
    notifier.ready("")
    notifier.extend(0.0)
    assert notifier.watchdog(0.0) == float("inf")
