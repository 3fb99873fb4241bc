"""`kamacache.http.query`: every byte of a key, and what a query must not say."""

from __future__ import annotations

import math
import time
from urllib.parse import quote_from_bytes

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kamacache.errors import ConfigError, KeyTooLongError
from kamacache.http.query import PARAMETERS, deadline_of, key_of, read_query, ttl_ms_of
from kamacache.limits import CALL_TIMEOUT_MAX_S

GET = PARAMETERS["GET"]
PUT = PARAMETERS["PUT"]


@given(st.binary(min_size=1, max_size=1024))
def test_a_key_of_any_bytes_arrives_as_it_is(key: bytes) -> None:
    query = f"group=scores&key={quote_from_bytes(key, safe='')}".encode()
    assert read_query(query, GET) == {"group": b"scores", "key": key}


@pytest.mark.parametrize(
    ("query", "key"),
    [
        (b"key=Tom", b"Tom"),
        (b"key=a+b", b"a b"),
        (b"key=a%2Bb", b"a+b"),
        (b"key=a%26b%3Dc", b"a&b=c"),
        (b"key=a=b", b"a=b"),
        (b"key=a;b", b"a;b"),
        (b"key=%zz%", b"%zz%"),
        (b"key=\xc3\xa4", b"\xc3\xa4"),
        (b"key=%00%ff", b"\x00\xff"),
        (b"&key=Tom&", b"Tom"),
    ],
)
def test_keys_are_read_like_this(query: bytes, key: bytes) -> None:
    assert key_of(read_query(query, GET)) == key


@pytest.mark.parametrize(
    ("query", "said"),
    [
        (b"", "has no key"),
        (b"group=scores", "has no key"),
        (b"key", "1 to 1024"),
        (b"key=", "1 to 1024"),
        (b"key=" + b"k" * 1025, "has 1025 bytes"),
        (b"key=a&key=b", "key twice"),
        (b"key=a&ttl=3", "'ttl'"),
        (b"key=a&other=1", "takes group, key, timeout"),
        (b"&".join([b"key=a"] * 17), "more than 16 parameters"),
    ],
)
def test_a_query_that_says_too_little_or_too_much_is_refused(query: bytes, said: str) -> None:
    with pytest.raises((ConfigError, KeyTooLongError), match=said):
        key_of(read_query(query, GET))


def test_ttl_is_in_seconds() -> None:
    assert ttl_ms_of(read_query(b"key=a&ttl=1.5", PUT)) == 1500
    assert ttl_ms_of(read_query(b"key=a", PUT)) is None
    for bad in (b"0", b"-1", b"nan", b"inf", b"soon", b""):
        with pytest.raises(ConfigError, match="ttl is"):
            ttl_ms_of({"ttl": bad})


def test_a_timeout_is_a_deadline_and_bounded() -> None:
    assert deadline_of({}) is None
    now_s = time.monotonic()
    deadline_s = deadline_of({"timeout": b"2"})
    assert deadline_s is not None
    assert 2 <= deadline_s - now_s < 60
    longest_s = deadline_of({"timeout": b"inf"})
    assert longest_s is not None
    assert math.isclose(longest_s - time.monotonic(), CALL_TIMEOUT_MAX_S, abs_tol=60)
    for bad in (b"0", b"-1", b"nan", b"x"):
        with pytest.raises(ConfigError, match="timeout is"):
            deadline_of({"timeout": bad})
