"""The store against a dict: whatever is done in whatever order, and wherever the writer dies.

The model holds what was put and not deleted. The store may know less (evicted: then for good),
never something else: no wrong, outdated or expired value, nothing back from the dead; and nothing
is missing as long as nothing was evicted.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from kamacache.config import EVICTIONS
from kamacache.store import NEGATIVE, Answer
from kamacache.store.entries import Entry, make_entry_lookup
from tests.store.crashing import Crash, Fuse, fused
from tests.store.shards import SEED, Shard, check_accounting

KEYS = [b"k", b"a" * 7, b"b" * 8, b"c" * 1024, *(b"key-%d" % n for n in range(40))]
keys = st.sampled_from(KEYS)
sizes = st.one_of(
    st.integers(0, 64), st.integers(0, 1_000), st.integers(1_000, 3_000), st.just(3_040)
)
BYTES = random.Random(7).randbytes(1 << 16)


@dataclass(frozen=True)
class Kept:
    """What the model knows of a key."""

    answer: Answer
    expiry_ms: int
    version: int


class StoreMachine(RuleBasedStateMachine):
    """One shard, its writer, three kinds of readers, and the dict."""

    def __init__(self) -> None:
        super().__init__()
        self.model: dict[bytes, Kept] = {}
        self.written = 0
        self.evicted = False
        self.crashed = False

    @initialize(eviction=st.sampled_from(EVICTIONS), tight=st.booleans())
    def open(self, eviction: str, tight: bool) -> None:
        # A tight index makes room for new keys at the expense of others.
        self.shard = Shard(eviction=eviction, item_bytes_mean=1 << 20 if tight else 128)
        self.entries = make_entry_lookup(
            (self.shard.arena,), hash_seed=SEED, clock_s=self.shard.clock.s
        )

    def value_of(self, size: int) -> bytes:
        self.written += 1
        start = self.written * 31 % (1 << 15)
        return BYTES[start : start + size]

    def now_ms(self) -> int:
        return self.shard.clock.now_ms

    def note_evictions(self) -> None:
        self.evicted |= self.shard.writer.stats()["evictions"] > 0

    # -- writes ------------------------------------------------------------------------------

    def put(
        self, key: bytes, value: bytes, expiry_ms: int, negative: bool, version: int | None
    ) -> None:
        writer = self.shard.writer
        before = writer.version_of(key)
        done = writer.put(key, value, expiry_ms, negative=negative, version=version)
        if version is not None and before > version:
            assert not done
        elif 0 < expiry_ms <= self.now_ms():
            assert not done
            self.model.pop(key, None)
            assert writer.get(key) is None
        else:
            assert done
            answer = NEGATIVE if negative else value
            self.model[key] = Kept(answer, expiry_ms, writer.version_of(key))
            assert writer.version_of(key) == (version or writer.version_of(key)) > 0
            self.look(key, must=True)

    @rule(key=keys, size=sizes)
    def put_plain(self, key: bytes, size: int) -> None:
        self.put(key, self.value_of(size), 0, False, None)

    @rule(key=keys, size=sizes, ttl_ms=st.integers(-5, 400), negative=st.booleans())
    def put_with_ttl(self, key: bytes, size: int, ttl_ms: int, negative: bool) -> None:
        value = b"" if negative else self.value_of(size)
        self.put(key, value, self.now_ms() + ttl_ms, negative, None)

    @rule(key=keys, size=sizes, step=st.integers(-2, 2))
    def put_with_version(self, key: bytes, size: int, step: int) -> None:
        version = max(self.shard.writer.version_of(key) + step, 1)
        self.put(key, self.value_of(size), 0, False, version)

    @rule(key=keys)
    def put_negative(self, key: bytes) -> None:
        self.put(key, b"", 0, True, None)

    @rule(first=st.integers(0, 1000), count=st.integers(1, 120), size=st.integers(0, 3_000))
    def fill(self, first: int, count: int, size: int) -> None:
        for number in range(first, first + count):
            key = b"fill-%d" % number
            value = self.value_of(size)
            self.shard.writer.put(key, value)
            self.model[key] = Kept(value, 0, self.shard.writer.version_of(key))

    @rule(key=keys)
    def delete(self, key: bytes) -> None:
        alive = isinstance(self.shard.writer.get(key), bytes)
        assert self.shard.writer.delete(key) is alive
        self.model.pop(key, None)
        self.look(key)

    # -- time and upkeep -----------------------------------------------------------------------

    @rule(ms=st.one_of(st.integers(1, 50), st.integers(50, 6_000)))
    def wait(self, ms: int) -> None:
        self.shard.clock.now_ms += ms

    @rule()
    def maintain(self) -> None:
        self.shard.writer.maintain()

    @rule()
    def reopen(self) -> None:
        self.note_evictions()
        self.shard.open_writer()

    # -- death -----------------------------------------------------------------------------------

    @rule(key=keys, size=sizes, stores=st.integers(0, 25), delete=st.booleans())
    def die_in_one_write(self, key: bytes, size: int, stores: int, delete: bool) -> None:
        self.note_evictions()
        fuse = Fuse()
        writer = self.shard.open_writer(fused(self.shard.arena, fuse))
        fuse.left = stores
        value = self.value_of(size)
        old = self.model.get(key)
        try:
            if delete:
                writer.delete(key)
            else:
                writer.put(key, value)
            finished = True
        except Crash:
            finished = False
        self.evicted |= writer.stats()["evictions"] > 0 or not finished
        self.crashed |= not finished
        self.shard.open_writer()
        now = self.shard.writer.get(key)
        live = None if old is None or 0 < old.expiry_ms <= self.now_ms() else old.answer
        if finished:
            assert now == (None if delete else value)
        elif delete:
            assert now is None or now == live
        else:
            assert now in (None, value) or now == live
        if now is None:
            self.model.pop(key, None)
        elif not delete and now == value and (finished or now != live):
            self.model[key] = Kept(value, 0, self.shard.writer.version_of(key))

    @precondition(lambda self: self.model)
    @rule(stores=st.integers(0, 2_000), size=st.integers(1, 3_000))
    def die_while_filling(self, stores: int, size: int) -> None:
        self.note_evictions()
        fuse = Fuse()
        writer = self.shard.open_writer(fused(self.shard.arena, fuse))
        fuse.left = stores
        acknowledged: dict[bytes, Kept] = {}
        key = b""
        value = b""
        try:
            for number in range(2_000):
                key, value = b"dying-%d" % number, self.value_of(size)
                writer.put(key, value)
                acknowledged[key] = Kept(value, 0, writer.version_of(key))
        except Crash:
            pass
        self.evicted = self.crashed = True
        self.model.update(acknowledged)
        self.shard.open_writer()
        now = self.shard.writer.get(key)
        if now == value:
            self.model[key] = Kept(value, 0, self.shard.writer.version_of(key))

    # -- reads -----------------------------------------------------------------------------------

    @rule(key=keys)
    def read(self, key: bytes) -> None:
        self.look(key)

    @rule(first=st.integers(0, 1000), count=st.integers(1, 30))
    def read_filled(self, first: int, count: int) -> None:
        for number in range(first, first + count):
            self.look(b"fill-%d" % number)

    def look(self, key: bytes, *, must: bool = False) -> None:
        """Read a key in every way there is; all agree with each other and with the model."""
        shard = self.shard
        answer = shard.writer.get(key)
        # Nobody else writes meanwhile: all ways find what the owner finds.
        assert shard.lookup.get(key) == answer
        assert shard.near.get(key) == answer
        assert shard.near.get(key) == answer
        text = key.decode()
        assert shard.near.get(text) == answer
        entry = self.entries(key)
        kept = self.model.get(key)
        if kept is not None and 0 < kept.expiry_ms <= self.now_ms():
            kept = None
        if answer is None:
            assert entry is None
            if kept is not None:
                self.note_evictions()
                assert self.evicted, f"{key!r} is lost though nothing was ever evicted"
                assert not must
                del self.model[key]  # evicted, and it must not come back
            return
        assert kept is not None, f"{key!r} came back from the dead or the past"
        assert answer == kept.answer
        if isinstance(entry, Entry):
            assert (entry.value, entry.version) == (kept.answer, kept.version)
            left = kept.expiry_ms - self.now_ms() if kept.expiry_ms else None
            assert entry.ttl_ms == left
        else:
            assert entry is answer is NEGATIVE

    # -- always ------------------------------------------------------------------------------------

    @invariant()
    def accounts_agree(self) -> None:
        if hasattr(self, "shard"):
            check_accounting(self.shard.writer, crashed=self.crashed)

    def teardown(self) -> None:
        """Nothing that the store still holds is unknown to the model."""
        if hasattr(self, "shard"):
            for key, value, expiry_ms in self.shard.writer.walk():
                if expiry_ms and expiry_ms <= self.now_ms():
                    continue
                kept = self.model.get(key)
                assert kept is not None
                assert value == (b"" if kept.answer is NEGATIVE else kept.answer)
            for key in list(self.model):
                self.look(key)


TestStoreModel = StoreMachine.TestCase
TestStoreModel.settings = settings(
    max_examples=60,
    stateful_step_count=50,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
