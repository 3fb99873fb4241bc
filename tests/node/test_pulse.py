"""Pings: a worker that answers lives, one that does not is hung after a bound."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from kamacache.limits import HUNG_WORKER_S
from kamacache.node.pulse import Pulse, Pulses
from kamacache.wire.frames import HEADER_BYTES, body_length, frame
from kamacache.wire.messages import Done, Ping, decode_request


@pytest.fixture
def listener(short_dir: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(short_dir / "worker-0.sock"))
        listening.listen()
        listening.settimeout(5)
        yield listening


def answer(link: socket.socket) -> None:
    """Be a worker for one request."""
    link.settimeout(5)
    body = link.recv(body_length(link.recv(HEADER_BYTES)))
    request = decode_request(body)
    assert isinstance(request, Ping)
    link.sendall(frame(Done(request.id, 0)))


def test_worker_that_answers_is_never_hung(listener: socket.socket) -> None:
    pulse = Pulse(listener.getsockname())
    assert pulse.beat(0.0)
    link, _ = listener.accept()
    with link:
        for beat in range(1, 10):
            answer(link)
            assert pulse.beat(beat * HUNG_WORKER_S)
    pulse.close()


def test_worker_that_never_answers_is_hung_after_the_bound(listener: socket.socket) -> None:
    pulse = Pulse(listener.getsockname())
    assert pulse.beat(0.0)
    assert pulse.beat(HUNG_WORKER_S - 1)
    assert not pulse.beat(HUNG_WORKER_S)
    pulse.close()


def test_answer_that_waits_unread_counts_however_late_we_look(listener: socket.socket) -> None:
    pulse = Pulse(listener.getsockname())
    assert pulse.beat(0.0)
    link, _ = listener.accept()
    with link:
        answer(link)
    assert pulse.beat(10 * HUNG_WORKER_S)  # the supervisor itself was stopped, say
    pulse.close()


def test_worker_that_accepts_no_connection_is_hung_after_the_bound(short_dir: Path) -> None:
    pulse = Pulse(str(short_dir / "nothing.sock"))
    assert pulse.beat(0.0)
    assert not pulse.beat(HUNG_WORKER_S)


def test_pulses_tell_who_is_hung_and_forget_who_is_gone(listener: socket.socket) -> None:
    pulses = Pulses()
    pulses.begin(3, listener.getsockname())
    assert pulses.hung(0.0) == []
    assert pulses.hung(HUNG_WORKER_S + 1) == [3]
    pulses.end(3)
    pulses.end(3)  # it died twice before it was ready
    assert pulses.hung(HUNG_WORKER_S + 2) == []
    pulses.begin(3, listener.getsockname())
    assert pulses.hung(HUNG_WORKER_S + 2) == []
    pulses.end_all()
    assert pulses.hung(3 * HUNG_WORKER_S) == []
