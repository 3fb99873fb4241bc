"""The store against a dict: whatever is done in whatever order, and wherever the writer dies.

The model holds what was put and not deleted. The store may know less (evicted: then for good),
never something else: no wrong, outdated or expired value, nothing back from the dead; and nothing
is missing as long as nothing was evicted: of owned entries and mirrors each its own kind.
"""

from __future__ import annotations

import random
from collections.abc import Callable
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
from kamacache.store import NEGATIVE, Answer, Held
from kamacache.store.entries import Entry, make_entry_lookup
from kamacache.store.eviction import classes_of
from tests.store.crashing import Crash, Fuse, fused
from tests.store.shards import SEED, Shard, check_accounting, segments_by_class

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
    mirror: bool = False


class StoreMachine(RuleBasedStateMachine):
    """One shard, its writer, three kinds of readers, and the dict."""

    def __init__(self) -> None:
        super().__init__()
        self.model: dict[bytes, Kept] = {}
        self.written = 0
        self.evicted = False
        self.evicted_mirrors = False
        self.crashed = False

    @initialize(
        eviction=st.sampled_from(EVICTIONS),
        tight=st.booleans(),
        mirror_share=st.sampled_from((1 / 8, 1 / 8, 0.01, 0.5, 0)),
    )
    def open(self, eviction: str, tight: bool, mirror_share: float) -> None:
        # A tight index makes room for new keys at the expense of others.
        mean = 1 << 20 if tight else 128
        self.shard = Shard(eviction=eviction, item_bytes_mean=mean, mirror_share=mirror_share)
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
        stats = self.shard.writer.stats()
        self.evicted |= stats["evictions"] > 0
        self.evicted_mirrors |= stats["mirror_evictions"] > 0

    def keep(self, key: bytes, answer: Answer, expiry_ms: int = 0, *, mirror: bool = False) -> None:
        """Note what was stored just now."""
        version = self.shard.writer.version_of(key)
        assert version > 0
        self.model[key] = Kept(answer, expiry_ms, version, mirror)

    # -- writes ------------------------------------------------------------------------------

    def put(
        self,
        key: bytes,
        value: bytes,
        expiry_ms: int = 0,
        *,
        negative: bool = False,
        version: int | None = None,
        mirror: bool = False,
    ) -> None:
        writer = self.shard.writer
        before = writer.version_of(key)
        done = writer.put(key, value, expiry_ms, negative=negative, version=version, mirror=mirror)
        if version is not None and before > version:
            assert not done
        elif 0 < expiry_ms <= self.now_ms() or (mirror and not self.shard.mirror_share):
            assert not done
            self.model.pop(key, None)
            assert writer.get(key) is None
        elif mirror and not done:
            assert not before, "only for want of a slot"
            self.model.pop(key, None)
        else:
            assert done
            self.keep(key, NEGATIVE if negative else value, expiry_ms, mirror=mirror)
            assert writer.version_of(key) == (version or writer.version_of(key))
            assert writer.last_version >= writer.version_of(key)
            self.look(key, must=True)

    @rule(key=keys, size=sizes)
    def put_plain(self, key: bytes, size: int) -> None:
        self.put(key, self.value_of(size))

    @rule(key=keys, size=sizes, ttl_ms=st.integers(-5, 400), negative=st.booleans())
    def put_with_ttl(self, key: bytes, size: int, ttl_ms: int, negative: bool) -> None:
        value = b"" if negative else self.value_of(size)
        self.put(key, value, self.now_ms() + ttl_ms, negative=negative)

    @rule(key=keys, size=sizes, step=st.integers(-2, 2))
    def put_with_version(self, key: bytes, size: int, step: int) -> None:
        version = max(self.shard.writer.version_of(key) + step, 1)
        self.put(key, self.value_of(size), version=version)

    @rule(
        key=keys,
        size=sizes,
        ttl_ms=st.integers(-5, 4_000),
        negative=st.booleans(),
        step=st.one_of(st.none(), st.integers(-2, 2)),
    )
    def put_mirror(
        self, key: bytes, size: int, ttl_ms: int, negative: bool, step: int | None
    ) -> None:
        value = b"" if negative else self.value_of(size)
        version = None if step is None else max(self.shard.writer.version_of(key) + step, 1)
        until_ms = self.now_ms() + ttl_ms
        self.put(key, value, until_ms, negative=negative, version=version, mirror=True)

    @rule(
        chosen=st.lists(keys, unique=True),
        size=sizes,
        ttl_ms=st.one_of(st.just(0), st.integers(1, 400)),
    )
    def put_many(self, chosen: list[bytes], size: int, ttl_ms: int) -> None:
        expiry_ms = self.now_ms() + ttl_ms if ttl_ms else 0
        items = [(key, self.value_of(size)) for key in chosen]
        self.shard.writer.put_many(items, expiry_ms)
        for key, value in items:  # those that still have a slot: a run may be larger than a log
            if self.shard.writer.version_of(key):
                self.keep(key, value, expiry_ms)
            else:
                self.model.pop(key, None)
            self.look(key)

    @rule(key=keys)
    def put_negative(self, key: bytes) -> None:
        self.put(key, b"", negative=True)

    @rule(
        first=st.integers(0, 1000),
        count=st.integers(1, 120),
        size=st.integers(0, 3_000),
        mirror=st.booleans(),
    )
    def fill(self, first: int, count: int, size: int, mirror: bool) -> None:
        expiry_ms = self.now_ms() + 3_000 if mirror else 0
        for number in range(first, first + count):
            key = b"fill-%d" % number
            value = self.value_of(size)
            if self.shard.writer.put(key, value, expiry_ms, mirror=mirror):
                self.keep(key, value, expiry_ms, mirror=mirror)
            else:
                assert self.shard.writer.version_of(key) == 0
                self.model.pop(key, None)

    @rule(key=keys)
    def delete(self, key: bytes) -> None:
        alive = isinstance(self.shard.writer.get(key), bytes)
        assert self.shard.writer.delete(key) is alive
        self.model.pop(key, None)
        self.look(key)

    # -- what other nodes say ------------------------------------------------------------------

    @rule(key=keys, step=st.integers(-2, 2))
    def drop_older(self, key: bytes, step: int) -> None:
        before = self.shard.writer.version_of(key)
        dropped = self.shard.writer.drop_older(key, max(before + step, 1))
        assert dropped is (before > 0 and step > 0)
        if dropped:
            self.model.pop(key, None)
        self.look(key)

    @precondition(lambda self: self.model)
    @rule(data=st.data(), step=st.integers(-1, 1), count=st.integers(1, 3_000))
    def flush_older(self, data: st.DataObject, step: int, count: int) -> None:
        kept = self.model[data.draw(st.sampled_from(sorted(self.model)))]
        version, start = kept.version + step, 0
        while start >= 0:
            start = self.shard.writer.flush_older(version, start, count)
        self.forget(lambda key: self.model[key].version < version)
        assert all(self.shard.writer.version_of(key) >= version for key in self.held_keys())

    @rule(odd=st.integers(0, 1), count=st.integers(1, 3_000))
    def sweep(self, odd: int, count: int) -> None:
        start = 0
        while start >= 0:
            start = self.shard.writer.sweep(lambda key: key[-1] & 1 == odd, start, count)
        self.forget(lambda key: not self.model[key].mirror and key[-1] & 1 != odd)

    def forget(self, gone: Callable[[bytes], bool]) -> None:
        for key in list(self.model):
            if gone(key):
                del self.model[key]
                self.look(key)

    def held_keys(self) -> list[bytes]:
        return [key for key, _, _ in self.shard.writer.walk()]

    @rule(ahead=st.integers(-5, 5))
    def observe(self, ahead: int) -> None:
        writer = self.shard.writer
        seen = max(writer.last_version + ahead, 0)
        writer.observe(seen)
        assert writer.last_version >= seen
        assert writer.now() > seen

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
        last = self.shard.writer.last_version
        assert self.shard.open_writer().last_version == last

    # -- death -----------------------------------------------------------------------------------

    @rule(
        key=keys,
        size=sizes,
        stores=st.integers(0, 25),
        kind=st.sampled_from(("put", "put", "mirror", "mirror", "delete", "drop")),
    )
    def die_in_one_write(self, key: bytes, size: int, stores: int, kind: str) -> None:
        self.note_evictions()
        fuse = Fuse()
        writer = self.shard.open_writer(fused(self.shard.arena, fuse))
        fuse.left = stores
        value, old = self.value_of(size), self.model.get(key)
        before = writer.version_of(key)
        mirror, expiry_ms = kind == "mirror", self.now_ms() + 2_000 if kind == "mirror" else 0
        stored = False
        try:
            if kind == "delete":
                writer.delete(key)
            elif kind == "drop":
                writer.drop_older(key, before + 1)
            else:
                stored = writer.put(key, value, expiry_ms, mirror=mirror)
            finished = True
        except Crash:
            finished = False
        stats = writer.stats()
        self.evicted |= stats["evictions"] > 0 or not finished
        self.evicted_mirrors |= stats["mirror_evictions"] > 0 or not finished
        self.crashed |= not finished
        after = self.shard.open_writer().version_of(key)
        if finished and stored:
            assert after > before
        elif finished:
            assert not after
        if not after:
            self.model.pop(key, None)
        elif after != before:
            assert kind in ("put", "mirror")
            self.keep(key, value, expiry_ms, mirror=mirror)
        else:
            assert old is not None
        self.look(key)

    @precondition(lambda self: self.model)
    @rule(stores=st.integers(0, 2_000), size=st.integers(1, 3_000), mirrors=st.integers(1, 4))
    def die_while_filling(self, stores: int, size: int, mirrors: int) -> None:
        self.note_evictions()
        fuse = Fuse()
        writer = self.shard.open_writer(fused(self.shard.arena, fuse))
        fuse.left = stores
        acknowledged: dict[bytes, Kept] = {}
        key, value, mirror, expiry_ms = b"", b"", False, 0
        try:
            for number in range(2_000):
                key, value = b"dying-%d" % number, self.value_of(size)
                mirror = number % mirrors == 1
                expiry_ms = self.now_ms() + 2_000 if mirror else 0
                if writer.put(key, value, expiry_ms, mirror=mirror):
                    acknowledged[key] = Kept(value, expiry_ms, writer.version_of(key), mirror)
        except Crash:
            pass
        self.evicted = self.evicted_mirrors = self.crashed = True
        old = self.model.get(key)
        self.model.update(acknowledged)
        after = self.shard.open_writer().version_of(key)
        if after and (old is None or after != old.version) and key not in acknowledged:
            self.keep(key, value, expiry_ms, mirror=mirror)

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
        entry, held = self.entries(key), shard.writer.held(key)
        kept = self.model.get(key)
        if kept is not None and 0 < kept.expiry_ms <= self.now_ms():
            kept = None
        if answer is None:
            assert entry is None
            assert held is None
            if kept is not None:
                self.note_evictions()
                evicted = self.evicted_mirrors if kept.mirror else self.evicted
                assert evicted, f"{key!r} is lost though nothing was ever evicted"
                assert not must
                del self.model[key]  # evicted, and it must not come back
            return
        assert kept is not None, f"{key!r} came back from the dead or the past"
        assert answer == kept.answer
        left = kept.expiry_ms - self.now_ms() if kept.expiry_ms else None
        value = answer if isinstance(answer, bytes) else None
        assert held == Held(value, left, kept.version, kept.mirror)
        if isinstance(entry, Entry):
            assert (entry.value, entry.version) == (kept.answer, kept.version)
            assert entry.ttl_ms == left
        else:
            assert entry is answer is NEGATIVE

    # -- always ------------------------------------------------------------------------------------

    @invariant()
    def accounts_agree(self) -> None:
        if hasattr(self, "shard"):
            check_accounting(self.shard.writer, crashed=self.crashed)

    @invariant()
    def mirrors_stay_within_their_share(self) -> None:
        if hasattr(self, "shard"):
            sizes, share = self.shard.geometry, self.shard.mirror_share
            found = segments_by_class(self.shard.arena)[classes_of(self.shard.eviction)]
            # A writer that died while it moved mirrors together leaves one more.
            assert found <= (max(int(sizes.segments * share), 2) + self.crashed if share else 0)

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
