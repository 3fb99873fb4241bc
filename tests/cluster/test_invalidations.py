"""`kamacache.cluster.invalidations`: bounded, nothing forgotten, the newest version holds."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kamacache.cluster.invalidations import InvalidationQueue, Told
from kamacache.wire.messages import Flush, Invalidate

GROUPS = st.sampled_from(["a", "b", "c"])
KEYS = st.integers(0, 12).map(lambda number: b"key%02d" % number)


class Clock:
    def __init__(self) -> None:
        self.now = 100

    def __call__(self) -> int:
        self.now += 1
        return self.now


def taken(queue: InvalidationQueue) -> list[tuple[int, Told]]:
    """Take all that may be sent now."""
    found = []
    while (following := queue.next()) is not None:
        found.append(following)
    return found


def test_keys_coalesce_to_their_highest_version() -> None:
    queue = InvalidationQueue(Clock())
    queue.add("a", [(b"x", 5), (b"y", 1)])
    queue.add("a", [(b"x", 3), (b"y", 9)])
    queue.add("b", [(b"x", 2)])
    assert queue.pending == 3
    told = [(t.group, t.items) for _, t in taken(queue) if isinstance(t, Invalidate)]
    assert told == [("a", [(b"x", 5), (b"y", 9)]), ("b", [(b"x", 2)])]


def test_what_is_sent_is_pending_until_it_is_acknowledged() -> None:
    queue = InvalidationQueue(Clock(), batch_keys_max=2)
    queue.add("a", [(b"%d" % i, i) for i in range(5)])
    sent = taken(queue)
    assert [len(told.items) for _, told in sent if isinstance(told, Invalidate)] == [2, 2, 1]
    assert (queue.pending, queue.under_way) == (5, 3)
    queue.acknowledged(sent[1][0])
    queue.acknowledged(sent[1][0])
    assert (queue.pending, queue.under_way) == (3, 2)
    queue.failed(sent[0][0])
    assert queue.pending == 3
    again = queue.next()
    assert again is not None
    assert isinstance(again[1], Invalidate)
    assert again[1].items == [(b"0", 0), (b"1", 1)]


def test_overflow_turns_the_fullest_group_into_a_flush_at_the_time_of_sending() -> None:
    clock = Clock()
    queue = InvalidationQueue(clock, items_max=10)
    queue.add("small", [(b"s", 1)])
    queue.add("large", [(b"%d" % i, i) for i in range(10)])
    assert queue.pending == 2
    queue.add("large", [(b"more", clock())])  # the flush will cover it
    assert queue.pending == 2
    (_, first), (_, second) = taken(queue)
    assert isinstance(first, Flush)
    assert (first.group, first.version) == ("large", clock.now)
    assert isinstance(second, Invalidate)
    assert second.group == "small"
    queue.add("large", [(b"later", clock())])  # of what comes behind it the flush knows nothing
    assert queue.pending == 3


def test_bytes_are_bounded_too() -> None:
    queue = InvalidationQueue(Clock(), bytes_max=100)
    queue.add("a", [(b"%03d" % i + bytes(20), i) for i in range(5)])
    assert [type(told) for _, told in taken(queue)] == [Flush]


def test_a_new_connection_begins_with_all_that_was_not_answered() -> None:
    queue = InvalidationQueue(Clock(), batch_keys_max=2)
    queue.add("a", [(b"1", 1), (b"2", 2)])
    assert queue.next() is not None
    queue.add("a", [(b"3", 3), (b"1", 7)])
    queue.restart()
    assert not queue.caught_up
    queue.add("a", [(b"later", 9)])
    seen: dict[bytes, int] = {}
    while not queue.caught_up:
        following = queue.next()
        assert following is not None
        assert isinstance(following[1], Invalidate)
        seen.update(following[1].items)
        queue.acknowledged(following[0])
    assert seen == {b"1": 7, b"2": 2, b"3": 3}  # and what came later keeps nobody from being up
    assert queue.pending == 1


def test_one_that_fails_keeps_the_link_from_being_caught_up() -> None:
    queue = InvalidationQueue(Clock())
    queue.add("a", [(b"1", 1)])
    queue.restart()
    first = queue.next()
    assert first is not None
    queue.failed(first[0])
    assert not queue.caught_up
    again = queue.next()
    assert again is not None
    assert not queue.caught_up
    queue.acknowledged(again[0])
    assert queue.caught_up


def test_a_flush_that_was_lost_is_made_again_with_a_later_clock() -> None:
    clock = Clock()
    queue = InvalidationQueue(clock, items_max=2)
    queue.add("a", [(b"%d" % i, i) for i in range(4)])
    sent = queue.next()
    assert sent is not None
    assert isinstance(sent[1], Flush)
    before = sent[1].version
    queue.add("a", [(b"new", clock())])
    queue.restart()
    assert queue.pending == 1
    again = queue.next()
    assert again is not None
    assert isinstance(again[1], Flush)
    assert again[1].version > before
    assert not queue.caught_up
    queue.acknowledged(again[0])
    assert queue.caught_up
    assert queue.pending == 0


class QueueMachine(RuleBasedStateMachine):
    """Against a peer that holds a version of every key, and must end with none that is old."""

    ITEMS_MAX = 8

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.queue = InvalidationQueue(self.clock, items_max=self.ITEMS_MAX, batch_keys_max=3)
        self.due: dict[tuple[str, bytes], int] = {}  # what the peer must still drop
        self.sent: dict[int, Told] = {}

    @rule(group=GROUPS, keys=st.lists(KEYS, max_size=6))
    def write(self, group: str, keys: list[bytes]) -> None:
        items = [(key, self.clock()) for key in keys]
        for key, version in items:
            self.due[group, key] = version
        self.queue.add(group, items)

    @rule()
    def send(self) -> None:
        unsent = self.queue.unsent
        following = self.queue.next()
        assert (following is not None) == unsent
        if following is not None:
            self.sent[following[0]] = following[1]

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(sorted(self.sent)))
        self.drop(self.sent.pop(ticket))
        self.queue.acknowledged(ticket)

    @precondition(lambda self: self.sent)
    @rule(data=st.data(), done=st.booleans())
    def fail(self, data: st.DataObject, done: bool) -> None:
        ticket = data.draw(st.sampled_from(sorted(self.sent)))
        told = self.sent.pop(ticket)
        if done:  # the peer did it, and only its answer was lost
            self.drop(told)
        self.queue.failed(ticket)

    @rule()
    def break_and_return(self) -> None:
        self.sent.clear()
        self.queue.restart()

    def drop(self, told: Told) -> None:
        if isinstance(told, Flush):
            for place in [
                p for p, v in self.due.items() if p[0] == told.group and v < told.version
            ]:
                del self.due[place]
            return
        for key, version in told.items:
            if self.due.get((told.group, key), version + 1) <= version:
                del self.due[told.group, key]

    @invariant()
    def bounded(self) -> None:
        assert self.queue._items <= self.ITEMS_MAX
        assert self.queue.pending <= self.ITEMS_MAX + 2 * 3
        assert bool(self.due) <= bool(self.queue.pending)
        waits = [*self.queue._since_s.values(), *self.queue._cut_since_s.values()]
        assert bool(waits) == bool(self.queue.pending)  # there is an age as long, and no longer

    def teardown(self) -> None:
        self.queue.restart()
        for _ in range(100):
            for ticket, told in taken(self.queue):
                self.drop(told)
                self.queue.acknowledged(ticket)
        assert not self.due
        assert self.queue.caught_up
        assert self.queue.pending == self.queue._items == self.queue._bytes == 0


TestQueue = QueueMachine.TestCase
TestQueue.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


@given(st.lists(st.tuples(GROUPS, KEYS, st.integers(1, 99)), max_size=60))
def test_every_key_is_told_once_with_its_highest_version(
    writes: list[tuple[str, bytes, int]],
) -> None:
    queue = InvalidationQueue(Clock(), batch_keys_max=4)
    highest: dict[tuple[str, bytes], int] = {}
    for group, key, version in writes:
        queue.add(group, [(key, version)])
        highest[group, key] = max(version, highest.get((group, key), 0))
    told = {}
    for _, batch in taken(queue):
        assert isinstance(batch, Invalidate)
        assert 1 <= len(batch.items) <= 4
        for key, version in batch.items:
            assert (batch.group, key) not in told
            told[batch.group, key] = version
    assert told == highest


def test_a_whole_flush_stays_one_until_it_is_acknowledged() -> None:
    queue = InvalidationQueue(Clock())
    queue.flush_whole("a")
    queue.add("b", [(b"x", 1)])
    queue.flush_all()
    flushes: dict[str, int] = {}
    for again in (queue.take_back, queue.restart, queue.take_back):
        again()
        sent = [(ticket, told) for ticket, told in taken(queue) if isinstance(told, Flush)]
        assert {told.group: told.whole for _, told in sent} == {"a": True, "": False}
        flushes = {told.group: ticket for ticket, told in sent}
    queue.failed(flushes["a"])
    ((ticket, told),) = taken(queue)
    assert isinstance(told, Flush)
    assert told.whole
    queue.acknowledged(ticket)
    queue.acknowledged(flushes[""])
    assert not [t for _, t in taken(queue) if isinstance(t, Flush)]
    queue.flush_all()
    assert [t.whole for _, t in taken(queue) if isinstance(t, Flush)] == [False]


class Seconds:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_the_lag_is_the_age_of_the_oldest_that_is_not_acknowledged() -> None:
    seconds = Seconds()
    queue = InvalidationQueue(Clock(), batch_keys_max=2, now_s=seconds)
    assert queue.lag_s == 0
    queue.add("a", [(b"x", 1)])
    seconds.now_s += 1
    queue.add("b", [(b"y", 1)])
    seconds.now_s += 2
    assert queue.lag_s == 3
    (first, _), (second, _) = taken(queue)
    assert queue.lag_s == 3  # under way, and as old
    queue.acknowledged(first)
    assert queue.lag_s == 2
    queue.failed(second)
    assert queue.lag_s == 2
    ((again, _),) = taken(queue)
    queue.acknowledged(again)
    assert queue.lag_s == 0
    seconds.now_s += 60
    queue.add("a", [(b"x", 2)])
    assert queue.lag_s == 0


def test_the_lag_outlives_a_broken_link_and_the_flush_that_takes_the_place_of_keys() -> None:
    seconds = Seconds()
    queue = InvalidationQueue(Clock(), items_max=3, now_s=seconds)
    queue.add("a", [(b"1", 1), (b"2", 1)])
    seconds.now_s += 5
    queue.next()
    queue.add("a", [(b"3", 1), (b"4", 1)])  # one too many: the group is flushed
    assert queue.lag_s == 5
    taken(queue)
    queue.take_back()
    assert queue.lag_s == 5
    queue.restart()
    seconds.now_s += 1
    assert queue.lag_s == 6
    ((ticket, told),) = taken(queue)
    assert isinstance(told, Flush)
    queue.acknowledged(ticket)
    assert queue.lag_s == 0
