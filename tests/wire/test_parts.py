"""`kamacache.wire.parts`: what was left out is asked for as the whole was, and joined in order."""

from __future__ import annotations

import pytest

from kamacache.wire import parts
from kamacache.wire.messages import (
    FROM_PEER,
    Answers,
    Done,
    Get,
    GetMany,
    KeyFailure,
    Value,
    Values,
)
from kamacache.wire.parts import answered, append, in_frames, rest_of

WHOLE = GetMany(group="g", depth=2, flags=FROM_PEER, keys=[b"1", b"2", b"3"])


def test_the_rest_is_asked_for_as_the_whole_was() -> None:
    rest = rest_of(WHOLE, Values(1, [b"a"]))
    assert rest is not None
    assert (rest.group, rest.depth, rest.flags, rest.keys) == ("g", 2, FROM_PEER, [b"2", b"3"])


def test_a_whole_answer_and_one_to_another_request_leave_no_rest() -> None:
    assert rest_of(WHOLE, Values(1, [b"a", None, b"c"])) is None
    assert rest_of(WHOLE, Done(1, 1)) is None
    assert rest_of(Get(key=b"k"), Values(1, [])) is None


def test_errors_keep_their_keys_and_peers_their_versions() -> None:
    whole = Values(1, [b"a"], [], [5], [6])
    append(whole, Values(2, [None, b"c"], [KeyFailure(0, "LoadError", "x", {})], [7, 8], [9, 10]))
    append(whole, Value(3, b"d", 11, 12))
    assert whole.values == [b"a", None, b"c", b"d"]
    assert [failed.index for failed in whole.errors] == [1]
    assert (whole.ttls, whole.versions) == ([5, 7, 8, 11], [6, 9, 10, 12])


def test_what_tells_no_versions_tells_none_when_it_is_joined() -> None:
    whole = Values(1, [b"a"])
    append(whole, Value(2, b"b"))
    assert (whole.values, whole.ttls, whole.versions) == ([b"a", b"b"], [], [])


def test_answers_say_which_keys_they_are_of() -> None:
    failed = KeyFailure(7, "LoadError", "x", {})
    assert list(answered(Answers(1, [b"a", None]))) == [0, 1]
    assert list(answered(Answers(1, [b"a", None], [4, 2], [failed]))) == [4, 2, 7]
    assert list(answered(Answers(1, errors=[failed]))) == [7]


def test_answers_that_fit_into_a_frame_stay_as_they_are() -> None:
    reply = Answers(1, [b"a", None, b"c"], [], [], [1, 2, 3], [4, 5, 6])
    assert [*in_frames(reply)] == [reply]


def test_answers_larger_than_a_frame_are_cut_and_lose_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(parts, "ANSWERS_BYTES_MAX", 40_000)
    values = [bytes(9_000), None, bytes(25_000), bytes(60_000), b"", bytes(30_000)]
    errors = [KeyFailure(6 + index, "LoadError", "x", {}) for index in range(5)]
    for at in ([], [9, 8, 7, 5, 4, 3]):
        reply = Answers(1, values, at, errors, [1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12])
        found, failed = {}, []
        for part in in_frames(reply):
            assert part.id == 1
            assert sum(len(value or b"") for value in part.values) < 40_000
            for index, *rest in zip(part.at, part.values, part.ttls, part.versions, strict=True):
                found[index] = rest
            failed += part.errors
        places = at or range(6)
        assert found == {
            index: [value, 1 + place, 7 + place]
            for place, (index, value) in enumerate(zip(places, values, strict=True))
            if place != 3
        }
        assert [(e.index, e.kind) for e in failed] == [
            *((6 + index, "LoadError") for index in range(5)),
            (places[3], "ValueTooLargeError"),
        ]
