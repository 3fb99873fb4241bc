"""The work of drivers, on caches whose faults are known: it must find every one of them."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

import kamacache
from tests.cluster_app import Database
from tests.cluster_driver import (
    SIZES,
    Cache,
    Caller,
    Found,
    Work,
    make_value,
    name_of,
    run_threads,
)
from tests.history import Journal, Rules, offences

SECONDS = 1.0
KEYS = [f"k{number}" for number in range(8)]


class Toy:
    """A cache over the database with a mirror a node; right, but for what ``fault`` names."""

    def __init__(self, database: Database, fault: str = "") -> None:
        self._database = database
        self.fault = fault
        self.nodes: list[ToyNode] = []
        self.lock = threading.Lock()
        self.kept: dict[str, bytes | None] = {}
        self.loading: dict[str, object] = {}  # the load that may store its value

    def load(self, key: str) -> bytes | None:
        """Load a key, and keep what the load returned unless the key was written meanwhile."""
        turn = object()
        with self.lock:
            self.loading[key] = turn
        value = self._database.read(key)
        time.sleep(0.003)
        with self.lock:
            if self.loading.get(key) is turn or self.fault == "late load":
                self.kept[key] = value
        return value

    def write(self, key: str, value: bytes | None, writer: ToyNode) -> None:
        """Keep a value, or None: drop the key."""
        with self.lock:
            if self.fault == "lost write" and len(value or b"") > 5_000:
                return
            self.loading.pop(key, None)
            if value is not None:
                if self.fault == "torn" and len(value) > 5_000:
                    value = value[:-1]
                self.kept[key] = value
            elif self.fault != "lost delete":
                self.kept.pop(key, None)
            for node in self.nodes:
                if self.fault != "stale mirrors" or node is writer:
                    node.mirrors.pop(key, None)


class ToyNode:
    """What one node's processes see of it."""

    def __init__(self, toy: Toy) -> None:
        self._toy = toy
        self.mirrors: dict[str, bytes | None] = {}
        toy.nodes.append(self)

    def get(self, key: str, default: Any, *, timeout: float) -> Any:
        toy = self._toy
        with toy.lock:
            if key in self.mirrors:
                return self.mirrors[key]
            if key in toy.kept:
                value = self.mirrors[key] = toy.kept[key]
                return value
        return toy.load(key)

    def get_many(self, keys: list[str], *, timeout: float) -> dict[str, Any]:
        found = {key: self.get(key, None, timeout=timeout) for key in keys}
        if self._toy.fault == "mixed up" and len(set(found.values())) > 1:
            return dict(zip(found, reversed(found.values()), strict=True))
        return found

    def set(self, key: str, value: Any, *, timeout: float) -> None:
        self._toy.write(key, value, self)

    def set_many(self, items: dict[str, Any], *, timeout: float) -> None:
        for key, value in items.items():
            self.set(key, value, timeout=timeout)

    def delete(self, key: str, *, timeout: float) -> bool:
        self._toy.write(key, None, self)
        return True


def worked(caches: list[tuple[Cache, str]], database: Database) -> tuple[Journal, Found]:
    """Let three threads a node work for a while."""
    journal, found = Journal(), Found()
    work = Work("toy", KEYS, pause_s=0.0002)
    end_s = time.monotonic() + SECONDS
    threads = []
    for cache, node in caches:
        callers = [Caller(f"{node}.{at}", node, work, database, journal, found) for at in range(3)]
        threads += run_threads(callers, cache, lambda: time.monotonic() > end_s)
    for thread in threads:
        thread.join(30)
    return journal, found


def test_a_right_cache_passes(tmp_path: Path) -> None:
    database = Database(tmp_path)
    toy = Toy(database)
    journal, found = worked([(ToyNode(toy), "a"), (ToyNode(toy), "b")], database)
    assert offences(journal.writes, journal.reads, Rules()) == []
    assert found.operations > 500
    assert len(journal.writes) > 100


@pytest.mark.parametrize(
    "fault", ["late load", "lost write", "lost delete", "torn", "stale mirrors", "mixed up"]
)
def test_a_wrong_cache_is_found_out(fault: str, tmp_path: Path) -> None:
    database = Database(tmp_path)
    toy = Toy(database, fault)
    journal, _ = worked([(ToyNode(toy), "a"), (ToyNode(toy), "b")], database)
    found = offences(journal.writes, journal.reads, Rules(other_node_s=0.01))
    assert found, f"{len(journal.reads)} reads, all legal"


def test_a_group_of_this_process_is_right(tmp_path: Path) -> None:
    database = Database(tmp_path)

    def load(key: str) -> bytes:
        value = database.read(key)
        time.sleep(0.002)
        if value is None:
            raise KeyError(key)
        return value

    group = kamacache.Group("toy", cache_bytes="1MiB", getter=load, negative_ttl=60)
    journal, found = worked([(group, "a")], database)
    assert offences(journal.writes, journal.reads, Rules()) == []
    assert found.errors == []


def test_values_tell_whether_they_are_whole() -> None:
    for size in set(SIZES):
        value = make_value("driver.thread0:7", size)
        assert name_of(value) == "driver.thread0:7"
        assert name_of(value + b"x") != "driver.thread0:7"
        if size:
            assert name_of(value[:-1]) != "driver.thread0:7"
    assert name_of(None) is None
