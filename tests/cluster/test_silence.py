"""`kamacache.cluster.silence`: a silent peer is asked, then given up; our pauses do not count."""

from __future__ import annotations

from kamacache.cluster.silence import Silence, Verdict
from kamacache.limits import PEER_LOOK_EVERY_S, PEER_PING_EVERY_S, PEER_SILENCE_S


def looks(silence: Silence, start_s: float, seconds: float) -> list[Verdict]:
    """Look as often as a link does, for so long."""
    count = round(seconds / PEER_LOOK_EVERY_S)
    return [silence.look(start_s + turn * PEER_LOOK_EVERY_S) for turn in range(1, count + 1)]


def test_a_silent_peer_is_pinged_once_and_then_given_up() -> None:
    silence = Silence(0.0)
    found = looks(silence, 0.0, PEER_SILENCE_S + 3 * PEER_LOOK_EVERY_S)
    assert found.count(Verdict.PING) == 1
    asked, dead = found.index(Verdict.PING), found.index(Verdict.DEAD)
    assert abs((asked + 1) * PEER_LOOK_EVERY_S - PEER_PING_EVERY_S) <= 2 * PEER_LOOK_EVERY_S
    assert abs((dead + 1) * PEER_LOOK_EVERY_S - PEER_SILENCE_S) <= 2 * PEER_LOOK_EVERY_S


def test_one_that_is_heard_is_never_pinged() -> None:
    silence = Silence(0.0)
    for turn in range(200):
        silence.heard = True
        assert silence.look(turn * PEER_LOOK_EVERY_S) is Verdict.FINE


def test_an_answer_to_a_ping_begins_the_silence_anew() -> None:
    silence = Silence(0.0)
    now_s = 0.0
    for _ in range(20):
        found = looks(silence, now_s, PEER_SILENCE_S / 2)
        now_s += PEER_SILENCE_S / 2
        assert found.count(Verdict.PING) == 1
        assert Verdict.DEAD not in found
        silence.heard = True


def test_time_in_which_this_process_stood_still_is_no_silence_of_the_peer() -> None:
    silence = Silence(0.0)
    silence.look(0.05)
    assert silence.look(3_600.0) is Verdict.FINE
    silence.heard = True  # what had come meanwhile is read then
    assert silence.look(3_600.05) is Verdict.FINE
