"""Readers, with near caches, against a writer that overwrites, deletes and evicts all the time.

10 million reads at full length (``make soak``). A read that begins after a set or delete was
acknowledged must not return what stood before it; no read may return torn, foreign or expired
bytes.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from kamacache.config import EVICTIONS
from kamacache.store import ShardPaths, unlink_files
from tests.stress.conftest import Start
from tests.stress.journal import STOP
from tests.stress.shard_children import Setting

READS_FULL = 10_000_000
READS_SHORT = 200_000
READERS = 2


@pytest.mark.stress
@pytest.mark.parametrize("eviction", EVICTIONS)
def test_no_reader_sees_torn_foreign_outdated_or_expired_values(
    eviction: str, shm_dir: Path, start: Start, stress_full: bool
) -> None:
    reads = (READS_FULL if stress_full else READS_SHORT) // READERS
    setting = Setting(
        shm_dir=str(shm_dir), eviction=eviction, cache_bytes=2 << 20, keys=4_000, reads=reads
    )
    journal = setting.open_journal(create=True)
    writer = start(setting.command("write"))
    writer.wait_ready()
    readers = [
        start(replace(setting, seed=10 + number, near=number > 0).command("read"))
        for number in range(READERS)
    ]
    deadline_s = 1_800 if stress_full else 50
    found = [reader.result(deadline_s) for reader in readers]
    journal.words[STOP] = 1
    written = writer.result(60)
    sys.stdout.write(f"\n{eviction}: writer {written}, readers {found}\n")
    unlink_files(ShardPaths.of(shm_dir, "g", 0))
    assert [reader["wrong"] for reader in found] == [[]] * READERS
    assert all(reader["reads"] >= reads for reader in found)
    # That it was a race at all: much was hit, near and in memory, and much was evicted.
    assert all(reader["hits"] > reads // 10 for reader in found)
    assert found[1]["near_hits"] > reads // 50
    assert written["evictions"] > 100
    assert written["expired"] > 0
    assert written["segments_freed"] > 200
