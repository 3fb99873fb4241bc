"""Getters and keys: what a getter is given, and what becomes of what it does."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kamacache.codecs import encoder, resolve
from kamacache.errors import ConfigError, KeyNotFoundError, KeyTooLongError, LoadError
from kamacache.getters import Getter, is_async_callable, key_bytes, key_for_getter, keys_bytes
from kamacache.limits import KEY_BYTES_MAX


def getter(
    one: Callable[[Any], Any] | None = None,
    many: Callable[[Any], Any] | None = None,
    codec: str = "bytes",
) -> Getter:
    return Getter("g", one, many, encoder(resolve(codec)))


def raising(error: BaseException) -> Callable[[Any], Any]:
    def load(key: Any) -> Any:
        raise error

    return load


@pytest.mark.parametrize("key", ["a", "é" * 512, b"\xff", b"x" * KEY_BYTES_MAX, "€"])
def test_keys_within_the_limits_become_their_bytes(key: str | bytes) -> None:
    assert key_bytes(key) == (key.encode() if isinstance(key, str) else key)


@pytest.mark.parametrize("key", ["", b"", "x" * 1025, "é" * 513, b"x" * 1025])
def test_keys_outside_the_limits_say_so(key: str | bytes) -> None:
    with pytest.raises(KeyTooLongError) as caught:
        key_bytes(key)
    assert caught.value.limit_bytes == KEY_BYTES_MAX
    assert caught.value.key_bytes == len(key if isinstance(key, bytes) else key.encode())


@pytest.mark.parametrize("key", [5, None, bytearray(b"x"), ["x"], 1.5])
def test_keys_of_other_types_are_a_type_error_naming_the_type(key: Any) -> None:
    with pytest.raises(TypeError, match=type(key).__name__):
        key_bytes(key)


def test_a_lone_surrogate_is_a_clear_value_error() -> None:
    with pytest.raises(ValueError, match="lone surrogate at index 1"):
        key_bytes("a\udc80")


@given(st.binary(min_size=1, max_size=40))
def test_a_getter_is_given_str_exactly_where_the_bytes_are_utf8(data: bytes) -> None:
    given_key = key_for_getter(data)
    try:
        assert given_key == data.decode()
    except UnicodeDecodeError:
        assert given_key == data
    assert key_bytes(given_key) == data


class Shout(bytes):
    """A key that the store must not meet: its hash is not that of its bytes."""

    def __hash__(self) -> int:
        return 7


@pytest.mark.parametrize(
    "keys",
    [[], ["a", "b"], [b"a", b"b"], ["a", b"b"], [Shout(b"a"), b"b"], ["x" * KEY_BYTES_MAX]],
)
def test_the_bytes_of_several_keys_are_those_of_each(keys: list[Any]) -> None:
    assert keys_bytes(keys) == [key_bytes(key) for key in keys]
    assert {type(data) for data in keys_bytes(keys)} <= {bytes}


@pytest.mark.parametrize("wrong", ["", b"", "x" * (KEY_BYTES_MAX + 1), "a\udc80", 5])
@pytest.mark.parametrize("other", ["a", b"a"])
def test_one_wrong_key_among_several_is_the_error_it_is_alone(wrong: Any, other: Any) -> None:
    with pytest.raises((TypeError, ValueError)) as alone:
        key_bytes(wrong)
    with pytest.raises(type(alone.value)) as caught:
        keys_bytes([other, wrong])
    assert str(caught.value) == str(alone.value)


def test_a_getter_gets_the_key_and_its_value_is_encoded() -> None:
    assert getter(lambda key: {"key": key}, codec="json").load(b"Tom") == b'{"key":"Tom"}'


@pytest.mark.parametrize("error", [KeyError("x"), KeyNotFoundError("nested", group="h", key=b"k")])
def test_key_error_means_not_found(error: Exception) -> None:
    assert getter(raising(error)).load(b"k") is None


@pytest.mark.parametrize(
    "error", [ValueError("boom"), StopIteration("boom"), IndexError("boom"), TimeoutError("boom")]
)
def test_other_errors_come_out_as_load_error_with_their_cause(error: Exception) -> None:
    with pytest.raises(LoadError, match=f"{type(error).__name__}: boom") as caught:
        getter(raising(error)).load(b"k")
    assert caught.value.cause_type == type(error).__name__
    assert caught.value.__cause__ is error
    assert (caught.value.group, caught.value.key) == ("g", b"k")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3)])
def test_what_ends_a_program_passes_through(error: BaseException) -> None:
    with pytest.raises(type(error)):
        getter(raising(error)).load(b"k")


def test_a_nested_load_error_keeps_the_type_that_began_it() -> None:
    with pytest.raises(LoadError) as caught:
        getter(raising(LoadError("deep", cause_type="cycle"))).load(b"k")
    assert caught.value.cause_type == "cycle"


def test_none_is_a_value_for_json_and_an_error_for_bytes() -> None:
    assert getter(lambda key: None, codec="json").load(b"k") == b"null"
    with pytest.raises(LoadError, match="raise KeyError"):
        getter(lambda key: None).load(b"k")


def test_a_value_that_cannot_be_encoded_is_a_load_error() -> None:
    with pytest.raises(LoadError, match="cannot be kept") as caught:
        getter(lambda key: object(), codec="msgpack").load(b"k")
    assert caught.value.cause_type == "TypeError"


def test_a_plain_function_that_returns_a_coroutine_is_told_to_be_async() -> None:
    async def load(key: str) -> bytes:
        return b""

    with pytest.raises(LoadError, match="async def"):
        getter(lambda key: load(key)).load(b"k")


async def test_async_getters_are_awaited_with_the_same_rules() -> None:
    async def load(key: str) -> bytes:
        if key == "none":
            raise KeyError(key)
        if key == "bad":
            raise ValueError("boom")
        return key.encode()

    made = getter(load)
    assert made.is_async
    assert await made.aload(b"Tom") == b"Tom"
    assert await made.aload(b"none") is None
    with pytest.raises(LoadError, match="boom"):
        await made.aload(b"bad")


class AsyncObject:
    async def __call__(self, key: str) -> bytes:
        return b"x"

    async def method(self, key: str) -> bytes:
        return b"x"


def test_async_is_seen_through_objects_methods_and_partials() -> None:
    async def function(key: str) -> bytes:
        return b"x"

    for one in (function, AsyncObject(), AsyncObject().method, functools.partial(function)):
        assert is_async_callable(one)
        assert is_async_callable(functools.partial(one))
    for other in (len, raising(KeyError()), functools.partial(print, 1), AsyncObject):
        assert not is_async_callable(other)


def test_getter_and_getter_many_of_different_kinds_are_refused() -> None:
    async def load(key: str) -> bytes:
        return b"x"

    with pytest.raises(ConfigError, match="both"):
        getter(load, lambda keys: {})


def test_a_getter_that_cannot_be_called_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot be called"):
        getter("select 1")  # type: ignore[arg-type]


def test_getter_many_gives_all_and_leaves_out_what_does_not_exist() -> None:
    asked: list[list[Any]] = []

    def load(keys: list[Any]) -> dict[Any, bytes]:
        asked.append(keys)
        return {"a": b"1", b"\xff": b"2", "unasked": b"3"}

    made = getter(many=load)
    assert made.load_many([b"a", b"b", b"\xff"]) == {b"a": b"1", b"b": None, b"\xff": b"2"}
    assert asked == [["a", "b", b"\xff"]]
    assert made.present
    assert made.load(b"a") == b"1"
    assert made.load(b"zz") is None


@pytest.mark.parametrize("found", [None, [b"1"], b"1", "text"])
def test_getter_many_must_return_a_dict(found: Any) -> None:
    with pytest.raises(LoadError, match="dict"):
        getter(many=lambda keys: found).load_many([b"a"])


def test_a_key_error_from_getter_many_is_no_answer() -> None:
    with pytest.raises(LoadError, match="KeyError"):
        getter(many=raising(KeyError("a"))).load_many([b"a"])
