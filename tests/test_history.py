"""The checker of histories: legal ones pass, and every kind of wrong read is found."""

from __future__ import annotations

import itertools
import random
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.history import (
    INFINITE,
    Cut,
    Journal,
    Read,
    Rules,
    Write,
    assert_legal,
    offences,
)

STRICT = Rules(cold_is_legal=False)


def put(value: str | None, start: float, end: float, node: str = "a", **more: object) -> Write:
    """A write of the cache alone."""
    cached = "set" if value is not None else "delete"
    return Write("k", value, node, start, end, cached=cached, **more)  # type: ignore[arg-type]


def through(value: str | None, store: float, end: float, node: str = "a", **more: object) -> Write:
    """A write of the database, over after 1, and then of the cache, from 2 on."""
    return put(
        value, store + 2, end, node, stored=True, store_start=store, store_end=store + 1, **more
    )


def get(value: str | None, start: float, end: float, node: str = "a") -> Read:
    return Read("k", value, node, start, end)


def wrong(writes: list[Write], read: Read, rules: Rules = STRICT, *, initial: bool = True) -> bool:
    return bool(offences(writes, [read], rules, initial=initial))


ONE, TWO = put("1", 10, 20), put("2", 30, 40)


@pytest.mark.parametrize(
    ("read", "is_wrong"),
    [
        (get("1", 12, 13), False),  # overlaps the write
        (get("1", 5, 9), True),  # before it was written
        (get("1", 5, 10), False),
        (get("1", 35, 36), False),  # the second write is not over
        (get("1", 40, 41), False),
        (get("1", 40.1, 41), True),
        (get("2", 29, 29.9), True),
        (get("2", 29, 30), False),
        (get(None, 15, 16), False),
        (get(None, 21, 22), True),
        (get("3", 35, 36), True),  # nobody wrote it
    ],
)
def test_a_read_sees_the_last_write_or_an_overlapping_one(read: Read, is_wrong: bool) -> None:
    assert wrong([ONE, TWO], read) is is_wrong


def test_overlapping_writes_may_have_happened_in_either_order() -> None:
    writes = [put("1", 10, 20), put("2", 19, 30)]
    assert not wrong(writes, get("1", 100, 101))
    assert not wrong(writes, get("2", 100, 101))
    assert wrong(writes, get(None, 100, 101))


def test_a_deleted_value_is_gone_and_what_is_deleted_is_not_found() -> None:
    writes = [ONE, put(None, 30, 40)]
    assert not wrong(writes, get("1", 39, 41))
    assert wrong(writes, get("1", 41, 42))
    assert wrong(writes, get(None, 21, 29))
    assert not wrong(writes, get(None, 41, 42))


def test_other_nodes_may_lag_and_the_writers_own_may_not() -> None:
    rules = Rules(other_node_s=5, cold_is_legal=False)
    writes = [put("1", 10, 20, "a"), put("2", 30, 40, "b")]
    assert wrong(writes, get("1", 41, 42, "b"), rules)
    assert not wrong(writes, get("1", 44, 46, "a"), rules)
    assert wrong(writes, get("1", 45.5, 46, "a"), rules)
    assert wrong([*writes, put("3", 41, 42, "a")], get("1", 43, 44, "a"), rules)


def test_a_failed_write_may_happen_for_a_while_and_replaces_nothing_for_sure() -> None:
    failed = put("2", 30, 40, ok=False)
    assert not wrong([ONE, failed], get("1", 100, 101))
    assert not wrong([ONE, failed], get("2", 100, 101))
    later = put("3", 50, 60)
    assert not wrong([ONE, failed, later], get("2", 100, 101))
    rules = Rules(unsure_s=5, cold_is_legal=False)
    assert wrong([ONE, failed, later], get("2", 100, 101), rules)
    assert not wrong([ONE, failed, replace(later, start=44)], get("2", 100, 101), rules)


def test_a_load_returns_what_the_database_held_meanwhile() -> None:
    writes = [through("1", 10, 20), through("2", 30, 40)]
    assert not wrong(writes, get("1", 10, 11))  # loaded before the cache was set
    assert wrong(writes, get("1", 8, 9))
    assert not wrong(writes, get("2", 30.5, 31))
    assert not wrong(writes, get("1", 39, 40))  # loaded before the write, kept until it was over
    assert wrong(writes, get("1", 41, 42))


def test_a_value_may_be_loaded_after_it_was_deleted_from_the_cache_alone() -> None:
    writes = [through("1", 10, 20), put(None, 30, 40)]
    assert not wrong(writes, get("1", 50, 51))
    assert wrong(writes, get(None, 50, 51))


def test_a_removal_from_the_database_is_not_found_afterwards() -> None:
    writes = [through("1", 10, 20), through(None, 30, 40)]
    assert not wrong(writes, get(None, 50, 51))
    assert wrong(writes, get("1", 50, 51))
    assert wrong(writes, get(None, 21, 22))


def test_writers_may_reach_the_database_and_the_cache_in_different_orders() -> None:
    first = Write("k", "1", "a", 6, 7, stored=True, store_start=0, store_end=1)
    second = Write("k", "2", "b", 4, 5, stored=True, store_start=2, store_end=3)
    assert not wrong([first, second], get("1", 10, 11))  # the cache was set to it last
    assert not wrong([first, second], get("2", 10, 11))  # and the database holds this


def test_a_cut_lets_others_lag_until_it_is_healed_and_some_time_passed() -> None:
    rules = Rules(other_node_s=1, cuts=(Cut(35, 60, 5),), cold_is_legal=False)
    writes = [put("1", 10, 20, "b"), put("2", 30, 40, "b")]
    assert not wrong(writes, get("1", 64, 66, "a"), rules)
    assert wrong(writes, get("1", 65.5, 66, "a"), rules)
    assert wrong(writes, get("1", 41, 42, "b"), rules)
    own_too = replace(rules, cuts=(Cut(35, 60, 5, own_too=True),))
    assert not wrong(writes, get("1", 41, 42, "b"), own_too)
    assert wrong(writes, get("1", 65.5, 66, "b"), own_too)
    before = [put("0", 1, 2, "b"), put("1", 10, 20, "b")]
    assert wrong(before, get("0", 50, 51, "a"), rules)


def test_without_a_getter_a_loss_is_legal_where_it_is_allowed() -> None:
    assert wrong([ONE], get(None, 50, 51))
    assert not wrong([ONE], get(None, 50, 51), Rules())
    assert wrong([through("1", 10, 20)], get(None, 50, 51), Rules())


def test_first_values_may_be_given() -> None:
    first = Write("k", "0", "", -INFINITE, -INFINITE, "", True, True, -INFINITE, -INFINITE)
    writes = [first, through("1", 10, 20)]
    assert not wrong(writes, get("0", 5, 6), initial=False)
    assert not wrong(writes, get("0", 15, 16), initial=False)
    assert wrong(writes, get("0", 21, 22), initial=False)
    assert wrong(writes, get(None, 5, 6), initial=False)


def test_a_report_shows_the_read_among_the_writes_around_it() -> None:
    writes = [
        replace(through("1", 10, 20), by="writer 1"),
        through("2", 30, 40, "b", by="writer 2"),
    ]
    with pytest.raises(AssertionError) as caught:
        assert_legal(writes, [replace(get("1", 45, 46), by="reader")], STRICT)
    text = str(caught.value)
    for part in ("1 of 1 reads", "'k' at a by reader: '1'", "5000.00 ms before", "'2' at b by wr"):
        assert part in text, text


def test_journals_are_the_same_after_a_file(tmp_path: Path) -> None:
    journal = Journal()
    journal.writes += [through("1", 10, 20), put(None, 30, 40, ok=False)]
    journal.reads += [get("1", 1.25, 2.5), get(None, 3, 4)]
    journal.save(tmp_path / "journal")
    again = Journal()
    again.load(tmp_path / "journal")
    assert (again.writes, again.reads) == (journal.writes, journal.reads)


# -- against every order in which a few operations can have happened ------------------------------

times = st.integers(0, 12)
spans = st.tuples(times, times).map(lambda pair: (min(pair), max(pair) + 0.5))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(spans, st.booleans()), max_size=5), spans, st.integers(0, 5))
def test_same_verdict_as_trying_every_order(
    drawn: list[tuple[tuple[int, float], bool]], span: tuple[int, float], chosen: int
) -> None:
    writes = [
        put(None if removes else str(at), *times) for at, (times, removes) in enumerate(drawn)
    ]
    values = [None, *(write.value for write in writes)]
    read = get(values[chosen % len(values)], *span)
    assert wrong(writes, read) is not _possible(writes, read)


def _possible(writes: list[Write], read: Read) -> bool:
    """Tell whether some order, true to time, has the read see its value."""
    operations: list[Write | Read] = [*writes, read]
    for order in itertools.permutations(operations):
        if any(later.end < earlier.start for earlier, later in itertools.combinations(order, 2)):
            continue
        before = order[: order.index(read)]
        last = before[-1].value if before else None
        if last == read.value:
            return True
    return False


# -- a cache that is right, step by step, and in whatever order its clients take their steps -----

Steps = Generator[None, None, None]


class Cluster:
    """A cache of one key over a database, with mirrors; each step of a client is atomic.

    ``fault``: "overwrite" lets a load store its value whatever was written meanwhile, "mirror"
    never drops mirrors, "lost" forgets to write, "detach" lets gets join a load older than a
    write.
    """

    def __init__(self, fault: str = "") -> None:
        self.fault = fault
        self.clock = 0.0
        self.database: str | None = None
        self.kept: tuple[str | None] | None = None  # by the owner; None: nothing
        self.mirrors: dict[str, tuple[str | None]] = {}
        self.flight: list[tuple[str | None]] | None = None
        self.journal = Journal()

    def write(self, value: str | None, node: str) -> Steps:
        store_start = self.clock
        yield
        self.database = value
        yield
        store_end = start = self.clock
        yield
        if self.fault != "lost":
            self.kept = (value,) if value is not None else None
            if self.fault != "detach":
                self.flight = None
            if self.fault != "mirror":
                self.mirrors.clear()
        yield
        self.journal.writes.append(
            Write(
                *("k", value, node, start, self.clock),
                cached="set" if value is not None else "delete",
                stored=True,
                store_start=store_start,
                store_end=store_end,
            )
        )

    def read(self, node: str) -> Steps:
        start = self.clock
        yield
        found = self.mirrors.get(node)
        if found is None:
            found = self.kept
            if found is None:
                flight = self.flight
                if flight is None:
                    flight = self.flight = []
                    yield
                    loaded = (self.database,)
                    yield
                    yield
                    if self.flight is flight:
                        self.flight = None
                        self.kept = loaded
                    elif self.fault == "overwrite":
                        self.kept = loaded
                    flight.append(loaded)
                while not flight:
                    yield
                found = flight[0]
            if self.kept == found:
                self.mirrors[node] = found
        yield
        self.journal.reads.append(Read("k", found[0], node, start, self.clock))

    def run(self, draw: random.Random, clients: int, operations: int) -> None:
        """Let clients, each with one operation after another, take steps in a random order."""
        value = 0
        running: list[Steps] = []
        while running or operations:
            while operations and len(running) < clients:
                operations -= 1
                node = draw.choice("ab")
                if draw.random() < 0.4:
                    value += 1
                    written = str(value) if draw.random() < 0.8 else None
                    running.append(self.write(written, node))
                else:
                    running.append(self.read(node))
            at = draw.randrange(len(running))
            self.clock += 1
            if draw.random() < 0.05:
                self.kept = None  # evicted
            if next(running[at], running) is running:
                running.pop(at)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 6))
def test_every_history_of_a_right_cache_is_legal(seed: int, clients: int) -> None:
    cluster = Cluster()
    cluster.run(random.Random(seed), clients, 60)
    assert_legal(cluster.journal.writes, cluster.journal.reads, STRICT)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 4), st.data())
def test_a_read_changed_to_an_older_value_or_a_later_one_is_found(
    seed: int, clients: int, data: st.DataObject
) -> None:
    cluster = Cluster()
    cluster.run(random.Random(seed), clients, 60)
    journal = cluster.journal
    known = [write for write in journal.writes if write.value is not None]
    changes = [
        (at, write.value)
        for at, read in enumerate(journal.reads)
        for write in known
        if write.store_start > read.end
        or any(write.end < other.store_start and other.end < read.start for other in journal.writes)
    ]
    if not changes:
        return
    at, value = data.draw(st.sampled_from(changes))
    changed = list(journal.reads)
    changed[at] = replace(changed[at], value=value)
    found = offences(journal.writes, changed, STRICT)
    assert [offence.read for offence in found] == [changed[at]]


@pytest.mark.parametrize("fault", ["overwrite", "mirror", "lost", "detach"])
def test_a_wrong_cache_is_caught(fault: str) -> None:
    caught = 0
    for seed in range(20):
        cluster = Cluster(fault)
        cluster.run(random.Random(seed), 6, 400)
        caught += bool(offences(cluster.journal.writes, cluster.journal.reads, STRICT))
    assert caught >= 15, caught


def test_long_histories_are_judged_in_time() -> None:
    cluster = Cluster()
    cluster.run(random.Random(1), 8, 20_000)
    assert_legal(cluster.journal.writes, cluster.journal.reads, STRICT)
