"""No fork in the middle of a call: `kamacache.client.forks`."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

from kamacache.client.forks import ForkGate
from kamacache.limits import CLIENT_FORK_WAIT_S

SOON_S = 5.0


def test_a_fork_waits_for_the_call_that_is_under_way() -> None:
    gate = ForkGate()
    inside, over = threading.Event(), threading.Event()

    def call() -> None:
        with gate:
            inside.set()
            over.wait(SOON_S)

    with ThreadPoolExecutor(2) as threads:
        calling = threads.submit(call)
        assert inside.wait(SOON_S)
        forking = threads.submit(gate.before_fork)
        time.sleep(0.05)
        assert not forking.done()
        over.set()
        forking.result(SOON_S)
        calling.result(SOON_S)
    assert not gate.crossed


def test_a_call_waits_until_the_fork_is_over() -> None:
    gate = ForkGate()
    gate.before_fork()
    began = threading.Event()

    def call() -> None:
        with gate:
            began.set()

    with ThreadPoolExecutor(1) as threads:
        calling = threads.submit(call)
        assert not began.wait(0.05)
        gate.after_in_parent()
        calling.result(SOON_S)
    assert began.is_set()


def test_a_fork_waits_for_a_bounded_time_and_the_child_knows() -> None:
    gate = ForkGate()
    gate.enter_beside()
    began_s = time.monotonic()
    gate.before_fork()
    assert CLIENT_FORK_WAIT_S <= time.monotonic() - began_s < CLIENT_FORK_WAIT_S + SOON_S
    assert gate.crossed  # as the child's copy has it
    gate.after_in_parent()
    assert not gate.crossed
    gate.leave()


def test_the_child_begins_with_nobody_inside() -> None:
    gate = ForkGate()
    gate.enter_beside()
    gate.before_fork()
    gate.after_in_child()
    assert gate.crossed
    gate.before_fork()  # does not wait for the parent's
    assert not gate.crossed
    gate.after_in_parent()
