"""Codecs: what each takes, refuses and gives back."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kamacache.codecs import decoder, encoder, resolve
from kamacache.errors import ConfigError


@pytest.mark.parametrize("value", [b"", b"abc", bytearray(b"abc"), memoryview(b"abc")])
def test_codec_bytes_takes_what_holds_bytes_and_gives_bytes(value: Any) -> None:
    encoded = encoder(resolve("bytes"))(value)
    assert type(encoded) is bytes
    assert encoded == bytes(value)


def test_codec_bytes_copies_a_view_that_is_not_contiguous() -> None:
    assert encoder(resolve("bytes"))(memoryview(b"abcdef")[::2]) == b"ace"


@pytest.mark.parametrize(
    ("value", "hint"), [("text", "codec='str'"), (None, "raise KeyError"), (5, "codec='json'")]
)
def test_codec_bytes_refuses_other_types_and_says_what_to_do(value: Any, hint: str) -> None:
    with pytest.raises(TypeError, match=type(value).__name__) as caught:
        encoder(resolve("bytes"))(value)
    assert hint in str(caught.value)


def test_codec_bytes_needs_no_decoding_on_a_hit() -> None:
    assert decoder(resolve("bytes")) is None


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_codec_str_gives_text_back(text: str) -> None:
    codec = resolve("str")
    assert codec.decode(encoder(codec)(text)) == text


def test_codec_str_refuses_bytes() -> None:
    with pytest.raises(TypeError, match="bytes"):
        resolve("str").encode(b"abc")


_PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text("abcé€", max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab"), inner, max_size=3),
)


@pytest.mark.parametrize("name", ["json", "msgpack", "pickle"])
@given(value=_PLAIN)
def test_codecs_for_objects_give_plain_values_back(name: str, value: Any) -> None:
    codec = resolve(name)
    assert codec.decode(encoder(codec)(value)) == value


@pytest.mark.parametrize("name", ["json", "msgpack"])
def test_codecs_for_data_refuse_what_they_cannot_write(name: str) -> None:
    with pytest.raises(TypeError):
        encoder(resolve(name))(object())


@pytest.mark.parametrize("codec", ["yaml", "", json, pickle, object(), None, 5])
def test_what_is_no_codec_is_a_config_error(codec: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(codec)
    assert caught.value.setting == "codec"


def test_a_class_is_no_codec_its_instance_is() -> None:
    class Upper:
        def encode(self, value: str) -> bytes:
            return value.upper().encode()

        def decode(self, data: bytes) -> str:
            return data.decode()

    with pytest.raises(ConfigError):
        resolve(Upper)  # type: ignore[arg-type]
    codec = resolve(Upper())
    assert encoder(codec)("abc") == b"ABC"


def test_a_users_codec_must_give_bytes() -> None:
    class Wrong:
        def encode(self, value: Any) -> Any:
            return value

        def decode(self, data: bytes) -> bytes:
            return data

    encode = encoder(Wrong())
    assert encode(bytearray(b"x")) == b"x"
    with pytest.raises(TypeError, match=r"Wrong\.encode returned str"):
        encode("text")
