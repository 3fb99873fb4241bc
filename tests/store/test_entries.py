"""`kamacache.store.entries`: reads with time to live and version."""

from __future__ import annotations

from typing import Any

from kamacache.clock import boottime_ms
from kamacache.config import GroupSpec
from kamacache.store import NEGATIVE, private_shard
from kamacache.store.entries import Entry, make_entry_lookup


class Clock:
    """A clock that stands."""

    def __init__(self) -> None:
        self.now_s = boottime_ms() / 1000

    def __call__(self) -> float:
        return self.now_s


def made(serve_until: memoryview | None = None) -> tuple[Any, Any, Any, Clock]:
    writer, lookup = private_shard(GroupSpec(name="g", cache_bytes=1 << 20))
    clock = Clock()
    entry = make_entry_lookup(
        (writer.arena,), hash_seed=writer._seed, serve_until=serve_until, clock_s=clock
    )
    return writer, lookup, entry, clock


def test_an_entry_tells_value_ttl_and_version() -> None:
    writer, _, entry, clock = made()
    writer.put(b"a", b"1")
    assert entry(b"a") == Entry(b"1", None, writer.version_of(b"a"))
    expiry_ms = int(clock.now_s * 1000) + 5_000
    writer.put(b"a", b"22", expiry_ms)
    value, ttl_ms, version = entry(b"a")
    assert value == b"22"
    assert 4_998 <= ttl_ms <= 5_000
    assert version == writer.version_of(b"a")
    clock.now_s += 6
    assert entry(b"a") is None
    writer.close()


def test_empty_absent_negative_and_deleted_differ() -> None:
    writer, _, entry, _ = made()
    writer.put(b"empty", b"")
    writer.put(b"no", b"", negative=True)
    assert entry(b"empty")[0] == b""
    assert entry(b"no") is NEGATIVE
    assert entry(b"absent") is None
    writer.delete(b"empty")
    assert entry(b"empty") is None
    writer.close()


def test_what_the_plain_lookup_finds_the_entry_lookup_finds() -> None:
    writer, lookup, entry, _ = made()
    keys = [b"key-%d" % i for i in range(5_000)]
    for key in keys:
        writer.put(key, key * 2)
    found = [key for key in keys if lookup.get(key) is not None]
    assert len(found) > 4_000
    assert all(entry(key)[0] == key * 2 for key in found)
    writer.close()


def test_nothing_is_read_past_serve_until() -> None:
    word = memoryview(bytearray(8)).cast("Q")
    writer, _, entry, clock = made(word)
    writer.put(b"a", b"1")
    assert entry(b"a") is None
    word[0] = int(clock.now_s * 1000) + 1_000
    assert entry(b"a")[0] == b"1"
    clock.now_s += 1
    assert entry(b"a") is None
    writer.close()
