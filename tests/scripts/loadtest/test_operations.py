"""What a request does to a session, and what it is counted as."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from scripts.loadtest.operations import (
    DELETE,
    READ,
    WRITE,
    AsyncOperator,
    Delay,
    Filling,
    Keys,
    Operator,
    parse_mix,
)
from scripts.loadtest.sizes import Values, parse_sizes


class Absent(Exception):
    """A key is not there."""


class DictSession:
    """A cache in a dict, whose ``get`` may raise for what is missing."""

    not_found: type[BaseException] = Absent

    def __init__(self, *, raises: bool = False) -> None:
        self.held: dict[bytes, bytes] = {}
        self.ttls: list[float | None] = []
        self._raises = raises

    def get(self, key: bytes, /) -> object:
        if key not in self.held and self._raises:
            raise Absent
        return self.held.get(key)

    def set(self, key: bytes, value: bytes, ttl_s: float | None) -> None:
        self.held[key] = value
        self.ttls.append(ttl_s)

    def delete(self, key: bytes) -> None:
        self.held.pop(key, None)

    def get_many(self, keys: Sequence[bytes]) -> Sequence[bytes]:
        return [key for key in keys if key not in self.held]

    def set_many(self, items: Mapping[bytes, bytes], ttl_s: float | None) -> None:
        for key, value in items.items():
            self.set(key, value, ttl_s)

    def delete_many(self, keys: Sequence[bytes]) -> None:
        for key in keys:
            self.delete(key)

    def memory_hits(self) -> int | None:
        return None

    def close(self) -> None:
        """Nothing is open."""


class AsyncDictSession:
    """The same, awaited."""

    not_found: type[BaseException] = Absent

    def __init__(self, session: DictSession) -> None:
        self._session = session

    async def get(self, key: bytes, /) -> object:
        return self._session.get(key)

    async def set(self, key: bytes, value: bytes, ttl_s: float | None) -> None:
        self._session.set(key, value, ttl_s)

    async def delete(self, key: bytes) -> None:
        self._session.delete(key)

    async def get_many(self, keys: Sequence[bytes]) -> Sequence[bytes]:
        return self._session.get_many(keys)

    async def set_many(self, items: Mapping[bytes, bytes], ttl_s: float | None) -> None:
        self._session.set_many(items, ttl_s)

    async def delete_many(self, keys: Sequence[bytes]) -> None:
        self._session.delete_many(keys)

    async def memory_hits(self) -> int | None:
        return None

    async def close(self) -> None:
        """Nothing is open."""


class Both:
    """Runs requests by both operators on one dict, and sees that they agree."""

    def __init__(self, *, raises: bool = False, filling: Filling | None = None) -> None:
        self.session = DictSession(raises=raises)
        self._other = DictSession(raises=raises)
        values = [Values(parse_sizes("3"), np.random.default_rng(1)) for _ in "ab"]
        self._sync = Operator(self.session, values[0], ttl_s=9.0, filling=filling)
        other = AsyncDictSession(self._other)
        self._async = AsyncOperator(other, values[1], ttl_s=9.0, filling=filling)

    def run(self, kind: int, keys: Keys) -> int:
        found = self._sync.run(kind, keys)
        assert asyncio.run(self._async.run(kind, keys)) == found
        assert self._other.held == self.session.held
        assert self._other.ttls == self.session.ttls
        return found


@pytest.mark.parametrize("raises", [False, True])
def test_reads_writes_and_deletes(raises: bool) -> None:
    both = Both(raises=raises)
    assert both.run(READ, b"a") == 0
    assert both.run(WRITE, b"a") == 0
    assert both.run(READ, b"a") == 1
    assert both.session.ttls == [9.0]
    assert both.run(DELETE, b"a") == 0
    assert both.run(READ, b"a") == 0


def test_batches_count_the_keys_that_came() -> None:
    both = Both()
    assert both.run(WRITE, [b"a", b"b"]) == 0
    assert both.run(READ, [b"a", b"b", b"c"]) == 2
    assert both.run(DELETE, [b"a", b"c"]) == 0
    assert both.session.held.keys() == {b"b"}


@pytest.mark.parametrize("raises", [False, True])
def test_a_read_fills_what_is_missing_where_the_target_loads_nothing(raises: bool) -> None:
    both = Both(raises=raises, filling=Filling(None, 4.0))
    assert both.run(READ, b"a") == 0
    assert both.run(READ, b"a") == 1
    assert both.run(READ, [b"a", b"b", b"c"]) == 1
    assert both.session.held.keys() == {b"a", b"b", b"c"}


def test_a_fill_waits_for_the_getter() -> None:
    asked: list[int] = []

    def delay() -> float:
        asked.append(1)
        return 0.0

    both = Both(filling=Filling(delay, None))
    both.run(READ, b"a")
    both.run(READ, b"a")
    assert len(asked) == 2  # one of each operator


@pytest.mark.parametrize(
    ("text", "mix"), [("1", (1, 0, 0)), ("90:10", (90, 10, 0)), ("0:0:3", (0, 0, 3))]
)
def test_mix(text: str, mix: tuple[int, int, int]) -> None:
    assert parse_mix(text) == mix


@pytest.mark.parametrize(
    "text", ["", "0:0:0", "1:2:3:4", "a:b", "-1:2", "1.5", "99999999:1", "2000000", "²"]
)
def test_no_mix(text: str) -> None:
    with pytest.raises(ValueError, match=r"mix|weights"):
        parse_mix(text)


def test_getter_times() -> None:
    random = np.random.default_rng(1)
    assert Delay("5").draw(random) == 0.005
    assert Delay("0").draw(random) == 0.0
    exponential = [Delay("exponential:5").draw(random) for _ in range(5000)]
    assert np.mean(exponential) == pytest.approx(0.005, rel=0.05)
    lognormal = [Delay("lognormal:5:0.5").draw(random) for _ in range(5000)]
    assert np.mean(lognormal) == pytest.approx(0.005, rel=0.05)
    assert np.std(np.log(lognormal)) == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize(
    "text", ["", "x", "-1", "nan", "60001", "exponential", "exponential:1:2", "lognormal:1"]
)
def test_no_getter_time(text: str) -> None:
    with pytest.raises(ValueError, match=r"time of a getter|getter's MS"):
        Delay(text)
