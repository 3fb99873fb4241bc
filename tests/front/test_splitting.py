"""`kamacache.front.splitting`: every key to its worker once, answers in the order of the keys."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from kamacache.errors import NodeUnavailableError
from kamacache.front.splitting import (
    PER_VALUE_BYTES,
    REPLY_BYTES_MAX,
    Split,
    joined_counts,
    joined_values,
    whole_values,
)
from kamacache.hashing import shard_hash, worker_of
from kamacache.store import NEGATIVE
from kamacache.wire.messages import (
    FROM_PEER,
    DeleteMany,
    Done,
    Failure,
    Flush,
    GetMany,
    Invalidate,
    KeyFailure,
    Reply,
    SetMany,
    Value,
    Values,
)

SEED = 11
WORKERS = 3
SPLIT = Split(SEED, WORKERS)
KEYS = st.lists(st.binary(min_size=1, max_size=4), max_size=30)


def worker(key: bytes) -> int:
    return worker_of(shard_hash(key, SEED), WORKERS)


def common(**more: object) -> dict[str, Any]:
    marks = {"flags": FROM_PEER, "sent": 77, "until_ms": 88}
    return {"group": "g", "budget_ms": 5, "depth": 2, **marks, **more}


@given(KEYS)
def test_writes_go_to_their_workers_in_order(keys: list[bytes]) -> None:
    items = [(key, b"v%d" % number) for number, key in enumerate(keys)]
    for request, name, given_items in (
        (DeleteMany(**common(keys=keys)), "keys", keys),
        (SetMany(**common(items=items, ttl_ms=9)), "items", items),
        (Invalidate(**common(items=[(k, 1) for k in keys])), "items", [(k, 1) for k in keys]),
    ):
        parts = SPLIT.parts(request)
        by_worker: dict[int, list[object]] = {}
        for item in given_items:
            key = item if isinstance(item, bytes) else item[0]
            by_worker.setdefault(worker(key), []).append(item)
        assert {shard: getattr(part, name) for shard, part in parts} == by_worker
        for _, part in parts:
            assert type(part) is type(request)
            assert (part.group, part.budget_ms, part.depth) == ("g", 5, 2)
            assert (part.flags, part.sent, part.until_ms) == (FROM_PEER, 77, 88)
            assert getattr(part, "ttl_ms", 9) == 9


def test_a_flush_goes_to_every_worker() -> None:
    parts = SPLIT.flushes(Flush(group="g", version=5))
    assert [shard for shard, _ in parts] == [0, 1, 2]
    assert {part.version for _, part in parts if isinstance(part, Flush)} == {5}


def test_counts_are_summed_and_the_latest_version_told() -> None:
    request = DeleteMany(keys=[], id=4)
    assert joined_counts(request, [Done(1, 2, 30), Done(2, 3, 20)]) == Done(4, 5, 30)
    assert joined_counts(request, []) == Done(4, 0, 0)
    failed = joined_counts(request, [Done(1, 2), NodeUnavailableError("gone", shard=1)])
    assert isinstance(failed, Failure)
    assert (failed.id, failed.kind) == (4, "NodeUnavailableError")


@given(
    st.lists(st.sampled_from([b"%d" % n for n in range(12)]), min_size=1, max_size=30),
    st.sets(st.sampled_from([b"%d" % n for n in range(12)])),
    st.lists(st.integers(1, 12), min_size=WORKERS, max_size=WORKERS),
)
def test_values_are_joined_up_to_the_first_key_that_was_not_answered(
    keys: list[bytes], in_memory: set[bytes], answered: list[int]
) -> None:
    request = GetMany(group="g", keys=keys, id=8)
    found = {k: (b"m" + k, 0, 1) for k in keys if k in in_memory}
    missing = [k for k in dict.fromkeys(keys) if k not in found]
    parts = SPLIT.gets(request, missing)
    replies: list[Reply] = []
    known = set(found)
    for shard, part in parts:  # each worker answers some of its keys, one at least
        told = part.keys[: answered[shard]]
        known |= set(told)
        errors = [KeyFailure(i, "LoadError", "x", {}) for i, k in enumerate(told) if k == b"3"]
        values = [None if k in (b"3", b"4") else b"w" + k for k in told]
        replies.append(Values(0, values, errors, [5] * len(told), [6] * len(told)))
    whole = joined_values(request, found, [part for _, part in parts], replies)
    assert isinstance(whole, Values)
    assert whole.id == 8
    expected = 0
    while expected < len(keys) and keys[expected] in known:
        expected += 1
    assert expected
    assert len(whole.values) == len(whole.ttls) == len(whole.versions) == expected
    for index, key in enumerate(keys[:expected]):
        if key in found:
            seen = (b"m" + key, 0, 1)
        else:
            seen = (None if key in (b"3", b"4") else b"w" + key, 5, 6)  # type: ignore[assignment]
        failed = [f for f in whole.errors if f.index == index]
        if key == b"3" and key not in found:
            assert len(failed) == 1
        else:
            assert not failed
            assert (whole.values[index], whole.ttls[index], whole.versions[index]) == seen


def test_values_that_do_not_fit_into_a_frame_are_left_out_but_never_the_first() -> None:
    half = bytes(REPLY_BYTES_MAX // 2)
    found = dict.fromkeys((b"1", b"2", b"3"), (half, 0, 1))
    whole = joined_values(GetMany(keys=[b"1", b"2", b"3"], group="g"), found, [], [])
    assert isinstance(whole, Values)
    assert len(whole.values) == 1
    found = {b"1": (half + half, 0, 1)}
    whole = joined_values(GetMany(keys=[b"1"], group="g"), found, [], [])
    assert isinstance(whole, Values)
    assert len(whole.values) == 1


def test_a_worker_that_fails_fails_its_own_keys_alone() -> None:
    request = GetMany(group="g", keys=[b"1", b"2"], id=3)
    parts = [GetMany(keys=[b"2"])]
    gone = NodeUnavailableError("gone", shard=0)
    whole = joined_values(request, {b"1": (b"v", 9, 1)}, parts, [gone])
    assert isinstance(whole, Values)
    assert whole.values == [b"v", None]
    assert [(f.index, f.kind) for f in whole.errors] == [(1, "NodeUnavailableError")]
    all_failed = joined_values(request, {}, [GetMany(keys=[b"1", b"2"])], [gone])
    assert isinstance(all_failed, Failure)
    assert all_failed.id == 3


def test_one_value_that_answers_for_a_batch_is_that_of_its_first_key() -> None:
    request = GetMany(group="g", keys=[b"1", b"2"])
    whole = joined_values(request, {}, [GetMany(keys=[b"1", b"2"])], [Value(0, b"large", 3, 4)])
    assert whole == Values(0, [b"large"], [], [3], [4])


def test_what_memory_had_whole_is_the_reply_unless_it_is_too_long() -> None:
    request = GetMany(group="g", keys=[b"1", b"2", b"1"], id=3)
    whole = whole_values(request, [b"a", b"", b"a"], [5, 0, 5], [7, 8, 7])
    assert whole == Values(3, [b"a", b"", b"a"], [], [5, 0, 5], [7, 8, 7])
    for answer in (None, NEGATIVE):
        assert whole_values(request, [b"a", answer, b"a"], [0] * 3, [0] * 3) is None
    half = bytes(REPLY_BYTES_MAX // 2 - PER_VALUE_BYTES)
    two = GetMany(group="g", keys=[b"1", b"2"])
    assert whole_values(two, [half, half], [0, 0], [1, 1]) is not None
    assert whole_values(two, [half, half + b"..."], [0, 0], [1, 1]) is None
