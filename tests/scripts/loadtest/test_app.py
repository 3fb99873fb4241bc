"""The app of a node under test: its getters take as long as they are told to."""

from __future__ import annotations

import asyncio
import time

import pytest

from kamacache.errors import ConfigError
from scripts.loadtest.app import Database, make_groups


def test_groups_with_and_without_a_getter() -> None:
    made = {group.name: group for group in make_groups({"KAMACACHE_LOADTEST_CACHE_BYTES": "1MiB"})}
    assert set(made) == {"load", "load-async", "plain"}
    assert made["load"].has_getter
    assert made["load-async"].is_async
    assert not made["plain"].has_getter
    assert {group.spec.cache_bytes for group in made.values()} == {1 << 20}


def test_getters_wait_and_return_a_value_of_the_size_asked_for() -> None:
    environment = {
        "KAMACACHE_LOADTEST_GETTER_MS": "30",
        "KAMACACHE_LOADTEST_VALUE_SIZE": "321",
    }
    database = Database(environment)
    began_s = time.monotonic()
    assert len(database.load("a")) == 321
    between_s = time.monotonic()
    assert len(asyncio.run(database.aload(b"\xff"))) == 321
    assert between_s - began_s >= 0.03
    assert time.monotonic() - between_s >= 0.03


def test_without_variables_a_load_is_at_once() -> None:
    assert len(Database({}).load("a")) == 100


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("GETTER_MS", "soon"),
        ("VALUE_SIZE", "big"),
        ("SEED", "x"),
        ("TTL", "x"),
        ("CACHE_BYTES", "x"),
    ],
)
def test_wrong_variables_are_a_sentence_of_the_node(name: str, value: str) -> None:
    with pytest.raises(ConfigError):
        make_groups({f"KAMACACHE_LOADTEST_{name}": value})
