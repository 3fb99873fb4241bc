"""Group: the public contract, in single-instance mode, which every other mode must equal."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import weakref
from typing import Any

import pytest

import kamacache
from kamacache import (
    ConfigError,
    DeadlineExceededError,
    Group,
    KeyNotFoundError,
    KeyTooLongError,
    LoadError,
    ValueTooLargeError,
)
from kamacache.local import engine as engines

SCORES = {"Tom": b"630", "Jack": b"589", "Sam": b"567"}


class Database:
    """A getter that notes what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def __call__(self, key: Any) -> bytes:
        self.asked.append(key)
        return SCORES[key]


@pytest.fixture
def database() -> Database:
    return Database()


@pytest.fixture
def scores(database: Database) -> Group:
    return Group("scores", cache_bytes="64KiB", getter=database)


def test_a_value_is_loaded_once_and_then_served(scores: Group, database: Database) -> None:
    assert [scores.get("Tom") for _ in range(3)] == [b"630"] * 3
    assert database.asked == ["Tom"]


def test_the_two_kilobytes_of_the_first_example_are_enough() -> None:
    tiny = Group("scores", cache_bytes=2 << 10, getter=SCORES.__getitem__)
    assert {key: tiny.get(key) for key in SCORES} == SCORES


def test_str_and_bytes_are_one_key_and_the_getter_is_given_str(
    scores: Group, database: Database
) -> None:
    assert scores.get(b"Tom") == scores.get("Tom") == b"630"
    assert database.asked == ["Tom"]


def test_a_key_that_is_not_utf8_reaches_the_getter_as_bytes() -> None:
    echo = Group("echo", getter=lambda key: repr(key).encode())
    assert echo.get(b"\xff\x00") == b"b'\\xff\\x00'"


def test_an_unknown_key_raises_key_error_or_gives_the_default(scores: Group) -> None:
    with pytest.raises(KeyNotFoundError) as caught:
        scores.get("nobody")
    assert isinstance(caught.value, KeyError)
    assert (caught.value.group, caught.value.key) == ("scores", b"nobody")
    assert scores.get("nobody", default=None) is None
    assert scores.get("nobody", 5) == 5


def test_default_does_not_hide_a_failing_getter() -> None:
    failing = Group("failing", getter=lambda key: 1 / 0)
    with pytest.raises(LoadError, match="ZeroDivisionError") as caught:
        failing.get("k", default=None)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_an_error_is_not_kept(database: Database) -> None:
    answers: list[Any] = [ValueError("down"), b"up"]

    def load(key: str) -> bytes:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        assert isinstance(answer, bytes)
        return answer

    flaky = Group("flaky", getter=load)
    with pytest.raises(LoadError):
        flaky.get("k")
    assert flaky.get("k") == b"up"


def test_not_found_is_kept_only_for_negative_ttl(database: Database) -> None:
    without = Group("without", getter=database)
    kept = Group("kept", getter=database, negative_ttl=60)
    for group in (without, kept):
        for _ in range(3):
            assert group.get("nobody", default=None) is None
    assert len(database.asked) == 3 + 1
    assert kept.stats()["negative_hits"] == 2
    with pytest.raises(KeyNotFoundError):
        kept.get("nobody")
    assert kept.delete("nobody") is False
    kept.set("nobody", b"somebody")
    assert kept.get("nobody") == b"somebody"


def test_set_replaces_and_delete_tells_whether_it_was_there(
    scores: Group, database: Database
) -> None:
    scores.set("Tom", b"1")
    assert scores.get("Tom") == b"1"
    assert scores.delete("Tom") is True
    assert scores.delete("Tom") is False
    assert scores.get("Tom") == b"630"
    assert database.asked == ["Tom"]


def test_empty_value_is_a_value() -> None:
    group = Group("empty")
    group.set("k", b"")
    assert group.get("k") == b""
    assert "k" in group
    assert group.delete("k") is True


def test_a_group_without_a_getter_knows_what_was_set() -> None:
    plain = Group("plain")
    assert plain.get("k", default=None) is None
    plain.set("k", b"v")
    assert plain.get("k") == b"v"
    assert plain.get_many(["k", "other"]) == {"k": b"v"}


def test_many_keys_come_back_under_the_names_they_were_asked_by(
    scores: Group, database: Database
) -> None:
    scores.set("Tom", b"1")
    asked: list[str | bytes] = ["Tom", b"Tom", "Jack", b"Jack", "nobody", "Jack"]
    got = scores.get_many(asked)
    assert got == {"Tom": b"1", b"Tom": b"1", "Jack": b"589", b"Jack": b"589"}
    assert sorted(database.asked) == ["Jack", "nobody"]


@pytest.mark.parametrize(("codec", "value"), [("bytes", b"v"), ("json", ["v"])])
@pytest.mark.parametrize("near_cache_items", [0, 100])
def test_keys_that_are_all_in_memory_come_back_decoded_and_are_counted_once(
    codec: str, value: Any, near_cache_items: int
) -> None:
    group = Group("all", codec=codec, near_cache_items=near_cache_items)
    keys = [f"k{number}" for number in range(50)]
    group.set_many(dict.fromkeys(keys, value))
    for _ in range(3):
        assert group.get_many(iter(keys + keys)) == dict.fromkeys(keys, value)
    stats = group.stats()
    assert (stats["near_hits"], stats["memory_hits"]) in ((100, 50), (0, 150))
    assert group.get_many([]) == {}


@pytest.mark.parametrize("codec", ["bytes", "json"])
def test_default_and_timeout_are_taken_by_name_and_by_place(codec: str) -> None:
    group = Group("args", codec=codec, getter=lambda key: {}[key])
    assert group.get("nobody", None, 5) is group.get("nobody", default=None, timeout=5) is None
    with pytest.raises(KeyNotFoundError):
        group.get("nobody", timeout=5)
    with pytest.raises(ConfigError, match="timeout"):
        group.get("nobody", None, -1)


def test_many_keys_are_loaded_by_one_call_of_getter_many() -> None:
    calls: list[list[str]] = []

    def load_many(keys: list[str]) -> dict[str, bytes]:
        calls.append(keys)
        return {key: SCORES[key] for key in keys if key in SCORES}

    group = Group("many", getter_many=load_many, negative_ttl=60)
    group.get_many(["Tom"])
    assert group.get_many([*SCORES, "nobody"]) == SCORES
    assert group.get_many([*SCORES, "nobody"]) == SCORES
    assert calls == [["Tom"], ["Jack", "Sam", "nobody"]]


def test_one_failing_key_does_not_lose_the_others() -> None:
    asked: list[str] = []

    def load(key: str) -> bytes:
        asked.append(key)
        if key.startswith("bad"):
            raise ValueError(key)
        return key.encode()

    group = Group("partly", getter=load)
    with pytest.raises(LoadError, match="2 of 4 keys") as caught:
        group.get_many(["a", "bad1", "bad2", "b"])
    assert isinstance(caught.value.__cause__, ValueError)
    assert caught.value.key == b"bad1"
    assert group.get_many(["a", "b"]) == {"a": b"a", "b": b"b"}
    assert asked == ["a", "bad1", "bad2", "b"]


def test_set_many_and_delete_many() -> None:
    group = Group("several")
    items: dict[str | bytes, bytes] = {"a": b"1", b"b": b"2"}
    group.set_many(items, ttl=60)
    assert group.get_many(["a", "b"]) == {"a": b"1", "b": b"2"}
    dropped: list[str | bytes] = ["a", b"a", "b", "c"]
    assert group.delete_many(dropped) == 2
    assert group.get_many(["a", "b"]) == {}
    group.set_many({})
    assert group.delete_many([]) == 0
    assert group.get_many([]) == {}


def test_set_many_keeps_nothing_where_one_value_cannot_be_kept() -> None:
    group = Group("all_or_none", cache_bytes="64KiB")
    with pytest.raises(TypeError):
        group.set_many({"a": b"1", "b": "text"})
    with pytest.raises(ValueTooLargeError):
        group.set_many({"a": b"1", "b": b"x" * (1 << 20)})
    assert group.get_many(["a", "b"]) == {}


def test_a_set_value_above_the_limit_raises_and_the_old_one_stands() -> None:
    group = Group("limits", cache_bytes="64KiB")
    group.set("k", b"old")
    with pytest.raises(ValueTooLargeError) as caught:
        group.set("k", b"x" * (1 << 20))
    assert caught.value.value_bytes == 1 << 20
    assert group.get("k") == b"old"


def test_a_loaded_value_above_the_limit_is_returned_but_not_kept() -> None:
    big = b"x" * (1 << 20)
    group = Group("big", cache_bytes="64KiB", getter=lambda key: big)
    assert group.get("k") == big
    assert group.get("k") == big
    assert group.stats()["loads_not_kept"] == 2


@pytest.mark.parametrize("codec", ["json", "msgpack", "pickle"])
def test_codecs_carry_values_both_ways(codec: str) -> None:
    group = Group("coded", codec=codec, getter=lambda key: {"key": key, "none": None})
    assert group.get("a") == {"key": "a", "none": None}
    assert group.get("a") == {"key": "a", "none": None}
    group.set("b", None)
    assert group.get("b", default="absent") is None
    assert group.get_many(["a", "b"]) == {"a": {"key": "a", "none": None}, "b": None}


def test_bytes_of_another_codec_are_an_error_that_says_so() -> None:
    class Liar:
        def encode(self, value: Any) -> bytes:
            return b"\xff"

        def decode(self, data: bytes) -> str:
            return data.decode()

    group = Group("liar", codec=Liar())
    group.set("k", "x")
    for _ in range(2):
        with pytest.raises(LoadError, match="another codec"):
            group.get("k")
    with pytest.raises(LoadError, match="another codec"):
        group.get_many(["k"])


def test_it_looks_like_a_dict(scores: Group, database: Database) -> None:
    assert "Tom" not in scores
    assert database.asked == []
    assert scores["Tom"] == b"630"
    assert "Tom" in scores
    scores["Tom"] = b"1"
    assert scores["Tom"] == b"1"
    del scores["Tom"]
    with pytest.raises(KeyError):
        del scores["Tom"]
    with pytest.raises(KeyError):
        scores["nobody"]
    with pytest.raises(TypeError):
        list(scores)  # type: ignore[call-overload]
    with pytest.raises(TypeError):
        assert 5 not in scores


@pytest.mark.parametrize("near_cache_items", [0, 16])
@pytest.mark.parametrize("key", [5, None, ["x"], 1.5])
def test_a_key_of_a_wrong_type_is_a_type_error_naming_it(key: Any, near_cache_items: int) -> None:
    group = Group("typed", near_cache_items=near_cache_items, getter=lambda key: b"x")
    for _ in range(2):
        with pytest.raises(TypeError, match=type(key).__name__):
            group.get(key)
    for call in (group.delete, lambda key: group.set(key, b""), lambda key: group.get_many([key])):
        with pytest.raises(TypeError):
            call(key)


@pytest.mark.parametrize("key", ["", b"", "x" * 1025, b"x" * 1025])
def test_a_key_of_a_wrong_length_is_refused_everywhere(key: Any) -> None:
    group = Group("lengths", getter=lambda key: b"x")
    for call in (
        group.get,
        group.delete,
        lambda key: group.set(key, b""),
        lambda key: group.get_many(["fine", key]),
        lambda key: group.set_many({key: b""}),
        lambda key: group.delete_many([key]),
    ):
        with pytest.raises(KeyTooLongError):
            call(key)


def test_a_lone_surrogate_is_a_value_error() -> None:
    group = Group("surrogates", getter=lambda key: b"x")
    for _ in range(2):
        with pytest.raises(ValueError, match="surrogate"):
            group.get("\udc80")


def test_one_key_where_several_are_asked_for_is_refused(scores: Group) -> None:
    for call in (scores.get_many, scores.delete_many):
        with pytest.raises(TypeError, match="several"):
            call("Tom")
    with pytest.raises(TypeError, match="dict"):
        scores.set_many([("a", b"1")])  # type: ignore[arg-type]


@pytest.mark.parametrize("timeout", [0, -1, "1", True, float("nan")])
def test_a_timeout_must_be_above_zero(scores: Group, timeout: Any) -> None:
    with pytest.raises(ConfigError):
        scores.get("Jack", timeout=timeout)


def test_the_decorator_makes_a_group_that_is_called_like_the_function() -> None:
    asked: list[str] = []

    @kamacache.group("scores", cache_bytes="64KiB", ttl=60)
    def scores(key: str) -> bytes:
        """Return a score."""
        asked.append(key)
        return SCORES[key]

    assert isinstance(scores, Group)
    assert (scores.__name__, scores.__doc__, scores.name) == ("scores", "Return a score.", "scores")
    assert scores("Tom") == scores.get("Tom") == b"630"
    assert asked == ["Tom"]
    assert scores.__wrapped__("Tom") == b"630"
    assert asked == ["Tom", "Tom"]


async def test_a_decorated_coroutine_function_is_awaited() -> None:
    @kamacache.group("rows", codec="json")
    async def rows(key: str) -> dict[str, str]:
        return {"key": key}

    assert await rows("a") == {"key": "a"}
    assert await rows.aget("a") == {"key": "a"}


def test_the_decorator_without_a_name_says_what_is_missing() -> None:
    with pytest.raises(TypeError, match="name"):
        kamacache.group(lambda key: b"")  # type: ignore[arg-type]
    with pytest.raises(ConfigError):
        kamacache.group("g", getter=len)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("name", "a b"),
        ("name", ""),
        ("cache_bytes", 0),
        ("cache_bytes", "64 apples"),
        ("ttl", 0),
        ("ttl", "60"),
        ("negative_ttl", -1),
        ("negative_ttl", None),
        ("codec", "yaml"),
        ("eviction", "random"),
        ("near_cache_items", -1),
        ("near_cache_items", 1.5),
        ("near_cache_bytes", 0),
        ("mirror_ttl", -1),
        ("mirror_share", 2),
        ("mirror_share", "1/8"),
        ("load_timeout", 0),
        ("load_timeout", 1e9),
        ("load_threads", 0),
        ("load_threads", "16"),
        ("item_bytes_mean", 1),
        ("fallback", "none"),
        ("getter", 5),
        ("getter_many", 5),
        ("on_worker_start", 5),
        ("on_worker_stop", 5),
    ],
)
def test_a_setting_that_cannot_work_is_a_config_error_that_names_it(
    setting: str, value: Any
) -> None:
    settings = {"name": "g", setting: value}
    with pytest.raises(ConfigError) as caught:
        Group(**settings)
    assert caught.value.setting == setting


def test_groups_of_one_name_are_independent_without_a_node() -> None:
    one, other = Group("same"), Group("same")
    one.set("k", b"1")
    assert other.get("k", default=None) is None


def test_a_dropped_group_and_its_memory_go_away() -> None:
    group = Group("dropped", getter=lambda key: b"x")
    group.get("k")
    reference = weakref.ref(group)
    engine = weakref.ref(group._started())
    del group
    gc.collect()
    assert reference() is None
    assert engine() is None


async def test_the_async_forms_are_the_same_group(scores: Group, database: Database) -> None:
    assert await scores.aget("Tom") == b"630"
    assert scores.get("Tom") == b"630"
    assert await scores.aget("nobody", default=None) is None
    with pytest.raises(KeyNotFoundError):
        await scores.aget("nobody")
    await scores.aset("Tom", b"1", ttl=60)
    await scores.aset_many({"a": b"2"})
    assert await scores.aget_many(["Tom", "a", "Jack"]) == {
        "Tom": b"1",
        "a": b"2",
        "Jack": b"589",
    }
    assert await scores.adelete("Tom") is True
    assert await scores.adelete_many(["a", "b"]) == 1
    assert (await scores.astats())["sets"] == 2
    with pytest.raises(TypeError):
        await scores.aget(5)  # type: ignore[arg-type]
    assert database.asked == ["Tom", "nobody", "nobody", "Jack"]


def test_stats_count_where_answers_came_from(scores: Group) -> None:
    for _ in range(4):
        scores.get("Tom")
    scores.get("nobody", default=None)
    stats = scores.stats()
    assert stats["gets"] == 5
    assert stats["hits"] == stats["near_hits"] + stats["memory_hits"] == 3
    assert (stats["misses"], stats["loads"], stats["items"]) == (2, 2, 1)


def test_all_groups_follow_the_process_from_one_engine_factory_to_another(
    scores: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "_chosen", False)
    monkeypatch.setattr(engines, "_factory", None)
    elsewhere = Group("elsewhere")
    elsewhere.set("Tom", b"from the node")
    scores.set("Tom", b"from the process")
    node = elsewhere._started()
    engines.use_factory(lambda user: node)
    try:
        later = Group("later")
        assert scores.get("Tom") == later.get("Tom") == b"from the node"
    finally:
        engines.use_factory(None)
    assert scores.get("Tom") == b"630"  # nothing old: the memory of before is gone


def test_a_timeout_ends_the_wait_and_the_load_goes_on(wait_until: Any) -> None:
    go = threading.Event()

    def load(key: str) -> bytes:
        assert go.wait(10)
        return b"late"

    group = Group("slow", getter=load)
    with pytest.raises(DeadlineExceededError):
        group.get("k", timeout=0.02)
    go.set()
    wait_until(lambda: "k" in group)
    assert group.get("k", timeout=5) == b"late"
    assert group.stats()["loads"] == 1


def test_making_a_group_loads_neither_asyncio_nor_grpc() -> None:
    program = (
        "import sys, kamacache; g = kamacache.Group('g', getter=lambda k: b'x');"
        "print(sorted({'asyncio', 'grpc'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    assert done.stdout.strip() == "[]"


def test_a_deadline_error_says_which_time_was_over() -> None:
    hold = threading.Event()
    group = Group("late", getter=lambda key: hold.wait(10), load_timeout=9)
    try:
        for timeout, told in ((0.05, 0.05),):
            with pytest.raises(DeadlineExceededError) as caught:
                group.get("k", timeout=timeout)
            assert (caught.value.timeout_s, caught.value.group) == (told, "late")
            with pytest.raises(DeadlineExceededError) as caught:
                group.get_many(["a", "b"], timeout=timeout)
            assert caught.value.timeout_s == told
    finally:
        hold.set()


def test_calling_a_group_and_its_stats_take_a_timeout() -> None:
    group = Group("called", getter=lambda key: SCORES[key])
    assert group("Tom", timeout=5) == b"630"
    assert group("nobody", None) is None
    assert group.stats(timeout=5)["loads"] == 2
