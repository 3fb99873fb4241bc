"""When a role is forked again, and when the node gives up."""

from __future__ import annotations

import os

import pytest

from kamacache.limits import BOOT_FAILURES_MAX, RESTART_BACKOFF_FIRST_S, RESTART_BACKOFF_MAX_S
from kamacache.node.children import Child, backoff_s, make_children, may_start
from kamacache.rundir.context import FAILURE_CHARS_MAX, Role, RoleContext


def forked(child: Child, said: bytes = b"") -> None:
    """Give the child a process that has said something."""
    read, write = os.pipe()
    os.set_blocking(read, False)
    os.write(write, said)
    os.close(write)
    child.forked(12345, read, 60.0)
    assert child.hear()
    os.close(read)
    child.words_fd = -1


def test_death_at_work_is_no_failure_and_restarts_at_once() -> None:
    child = Child(role="worker", index=0)
    for _ in range(10 * BOOT_FAILURES_MAX):
        forked(child, b"ready\n")
        assert child.ready
        child.died(-9, 100.0)
        assert child.start_at_s == 100.0
    assert not child.given_up(node_was_ready=False)


def test_deaths_before_ready_wait_longer_and_end_the_node() -> None:
    child = Child(role="worker", index=0)
    for failures in range(1, BOOT_FAILURES_MAX + 1):
        assert not child.given_up(node_was_ready=False)
        forked(child)
        child.died(1, 100.0)
        assert child.start_at_s == 100.0 + backoff_s(failures)
    assert child.given_up(node_was_ready=True)
    assert child.exit_code == 3


def test_one_success_forgets_the_failures() -> None:
    child = Child(role="worker", index=0)
    for _ in range(3):
        for _ in range(BOOT_FAILURES_MAX - 1):
            forked(child)
            child.died(1, 0.0)
        forked(child, b"ready\n")
        child.died(1, 0.0)
    assert not child.given_up(node_was_ready=False)


@pytest.mark.parametrize("role", ["agent", "http"])
def test_node_that_has_been_ready_goes_on_without_agent_and_http(role: Role) -> None:
    child = Child(role=role, index=0)
    for _ in range(2 * BOOT_FAILURES_MAX):
        forked(child, b"failed 78 the extra is gone\n")
        child.died(78, 100.0)
        assert not child.given_up(node_was_ready=True)
        assert child.start_at_s > 100.0
    assert child.given_up(node_was_ready=False)


def test_setting_that_cannot_work_is_not_tried_again() -> None:
    child = Child(role="agent", index=0)
    forked(child, b"failed 78 no such source\n")
    child.died(78, 0.0)
    assert child.given_up(node_was_ready=False)
    assert child.exit_code == 78
    back = Child(role="front", index=0)
    forked(back, b"ready\n")
    back.died(-9, 0.0)
    forked(back, b"failed 78 odd\n")
    back.died(78, 0.0)
    assert not back.given_up(node_was_ready=True)  # it worked before


def test_workers_come_first() -> None:
    made = make_children(2, 1, agent=True, http=True)
    assert [child.name for child in made] == [
        "worker 0",
        "worker 1",
        "front 0",
        "agent 0",
        "http 0",
    ]
    assert [child.name for child in make_children(1, 0, agent=False, http=False)] == ["worker 0"]


def test_agent_starts_when_all_others_are_ready_and_once_more_at_any_time() -> None:
    made = make_children(1, 1, agent=True, http=True)
    worker, front, agent, http = made
    assert [may_start(child, made) for child in made] == [True, True, False, True]
    for child in (worker, front, http):
        assert not may_start(agent, made)
        forked(child, b"ready\n")
        assert not may_start(child, made)
    assert may_start(agent, made)
    http.died(-9, 0.0)
    assert may_start(agent, made)  # it was ready, and will be back
    forked(agent, b"ready\n")
    agent.died(-9, 0.0)
    worker.died(-9, 0.0)
    assert may_start(agent, made)


def test_http_waits_and_the_agent_does_not_until_a_warm_start_is_settled() -> None:
    made = make_children(1, 1, agent=True, http=True)
    worker, front, agent, http = made

    def startable() -> list[bool]:
        return [may_start(child, made, settled=False) for child in made]

    assert startable() == [True, True, False, False]
    forked(worker, b"")  # not ready before it has asked the nodes that the agent finds
    forked(front, b"ready\n")
    assert startable() == [False, False, True, False]
    forked(agent, b"ready\n")
    forked(worker, b"ready\n")
    assert not may_start(http, made, settled=False)
    assert may_start(http, made)


def test_back_off_is_bounded() -> None:
    assert backoff_s(1) == RESTART_BACKOFF_FIRST_S
    assert backoff_s(1000) == RESTART_BACKOFF_MAX_S


@pytest.mark.parametrize(
    ("said", "status", "code"),
    [
        (b"failed 4 no such module\n", 4, 4),
        (b"failed 3 the lock is held\n", 3, 3),
        (b"failed 1 odd code\n", 1, 3),
        (b"", 4, 4),
        (b"", 78, 78),
        (b"", -11, 3),
        (b"rea", 0, 3),
    ],
)
def test_exit_code_of_the_node_follows_what_the_role_said(
    said: bytes, status: int, code: int
) -> None:
    child = Child(role="worker", index=0)
    forked(child, said)
    child.died(status, 0.0)
    assert child.exit_code == code
    assert child.failure is not None


def test_reason_with_lines_survives_the_way() -> None:
    read, write = os.pipe()
    os.set_blocking(read, False)
    told = RoleContext.__new__(RoleContext)
    object.__setattr__(told, "words_fd", write)
    told.report_failed(4, "é" * 5000 + "\nTraceback:\n  line \\n 2")
    child = Child(role="worker", index=0)
    child.forked(1, read, 1.0)
    assert not child.hear()
    os.close(read)
    os.close(write)
    assert child.failure is not None
    code, message = child.failure
    assert code == 4
    assert message.endswith("é\nTraceback:\n  line \\n 2")
    assert len(message) == FAILURE_CHARS_MAX
