"""`kamacache.wire.parts`: what was left out is asked for as the whole was, and joined in order."""

from __future__ import annotations

from kamacache.wire.messages import FROM_PEER, Done, Get, GetMany, KeyFailure, Value, Values
from kamacache.wire.parts import append, rest_of

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
