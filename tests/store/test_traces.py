"""The eviction policies on real traces, against an exact LRU of as many objects as were resident.

The traces are not part of the repository but of a folder ``shared/traces`` beside it; without it
these tests are skipped.
"""

from __future__ import annotations

import gzip
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from kamacache.config import EVICTIONS
from kamacache.store.layout import RECORD_HEADER_BYTES
from tests.store.shards import Shard

TRACES = Path(__file__).parents[3] / "shared" / "traces"
NAMES = ("web07", "corda", "multi3", "cloudphysics")
SHARES = (0.1, 0.2)
VALUE_BYTES = 1_000

pytestmark = pytest.mark.skipif(
    not TRACES.is_dir(), reason=f"no traces at {TRACES}: one key a line, NAME.txt.gz"
)


@dataclass(frozen=True)
class Replay:
    """How one policy did on one trace."""

    miss_ratio: float
    exact_lru: float
    resident: float
    wanted: float


@cache
def trace(name: str) -> Sequence[bytes]:
    path = TRACES / f"{name}.txt.gz"
    with gzip.open(path, "rb") as file:
        return file.read().split()


def exact_lru(keys: Sequence[bytes], items: int) -> float:
    kept: OrderedDict[bytes, None] = OrderedDict()
    misses = 0
    for key in keys:
        if key in kept:
            kept.move_to_end(key)
        else:
            misses += 1
            kept[key] = None
            if len(kept) > items:
                kept.popitem(last=False)
    return misses / len(keys)


@cache
def replay(name: str, share: float, eviction: str) -> Replay:
    keys = trace(name)
    wanted = share * len(set(keys))
    record_bytes = RECORD_HEADER_BYTES + 8 + VALUE_BYTES
    # 3 % of the log and 12 bytes of index an item are what the geometry reserves beside records.
    cache_bytes = int(wanted * (record_bytes / 0.97 + 12))
    shard = Shard(cache_bytes, item_bytes_mean=VALUE_BYTES + 6, eviction=eviction)
    get, put = shard.near.get, shard.writer.put
    value = b"v" * VALUE_BYTES
    misses = resident = 0
    for at, key in enumerate(keys):
        if get(key) is None:
            misses += 1
            put(key, value)
        if at >= len(keys) // 2:
            resident += shard.writer.items
    mean = resident / (len(keys) - len(keys) // 2)
    return Replay(misses / len(keys), exact_lru(keys, round(mean)), mean, wanted)


def ratios(eviction: str) -> dict[tuple[str, float], float]:
    found = {}
    for name in NAMES:
        for share in SHARES:
            result = replay(name, share, eviction)
            found[name, share] = result.miss_ratio / result.exact_lru
    return found


@pytest.mark.timeout(180)
def test_lru_is_within_2_percent_of_exact_lru() -> None:
    found = ratios("lru")
    assert sum(found.values()) / len(found) <= 1.02, found
    assert max(found.values()) <= 1.08, found


@pytest.mark.timeout(180)
def test_s3fifo_is_at_least_5_percent_below_exact_lru() -> None:
    found = ratios("s3fifo")
    assert sum(found.values()) / len(found) <= 0.95, found


@pytest.mark.timeout(180)
@pytest.mark.parametrize("eviction", EVICTIONS)
def test_as_many_items_are_resident_as_fit(eviction: str) -> None:
    for name in NAMES:
        for share in SHARES:
            result = replay(name, share, eviction)
            # Fewer keys than fit, or one-time keys only, fill no cache: not with these traces.
            assert 0.9 <= result.resident / result.wanted <= 1.05, (name, share, result)
