"""Writers that are killed with SIGKILL in the middle of sets and deletes, under running readers.

1,000 kills at full length (``make soak``), 50 in the short form, values from 1 B to the largest.
No wrong byte is ever read, no acknowledged delete comes back, an acknowledged set is there or
evicted but never older, and the next writer opens at once.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest

from kamacache.config import EVICTIONS
from kamacache.store import ShardPaths, create_shard, unlink_files
from tests.stress.conftest import Start
from tests.stress.journal import STOP
from tests.stress.shard_children import BOOT_ID, SEED, Setting

OPEN_S_MAX = 1.0


@pytest.mark.stress
@pytest.mark.parametrize("eviction", EVICTIONS)
def test_a_writer_killed_at_any_moment_leaves_nothing_wrong(
    eviction: str, shm_dir: Path, start: Start, stress_full: bool
) -> None:
    kills = 500 if stress_full else 25  # for each policy
    setting = Setting(
        shm_dir=str(shm_dir), eviction=eviction, cache_bytes=512 << 10, keys=1_000, kills=kills
    )
    journal = setting.open_journal(create=True)
    geometry = create_shard(str(shm_dir), setting.spec(), 0, 1, SEED, BOOT_ID)
    readers = [
        start(replace(setting, seed=number, near=number > 0).command("read")) for number in range(2)
    ]
    killer = start(setting.command("kill"))
    outcome = killer.result(1_200 if stress_full else 50)
    journal.words[STOP] = 1
    found = [reader.result(60) for reader in readers]
    unlink_files(ShardPaths.of(shm_dir, "g", 0))
    reports = outcome["reports"]
    done = sum(journal.words[journal.acknowledged(k)] for k in range(setting.keys))
    opens_s = [report["open_s"] for report in reports]
    sys.stdout.write(
        f"\n{eviction}: {kills} kills, {done} operations, open median {median(opens_s):.4f} s, "
        f"most {max(opens_s):.4f} s, items at the end {reports[-1]['items']}, drift most "
        f"{max(report['drift_bytes'] for report in reports)} B, readers {found}\n"
    )
    assert "failed" not in outcome, outcome
    assert len(reports) == kills + 1
    assert [wrong for report in reports for wrong in report["wrong"]] == []
    assert [reader["wrong"] for reader in found] == [[], []]
    assert max(opens_s) < OPEN_S_MAX
    # The shard was taken over each time, not made anew, and readers went on hitting.
    assert all(report["items"] > 0 for report in reports[2:])
    assert any(report["mirror_bytes"] > 0 for report in reports[2:])
    assert all(reader["hits"] > 1_000 for reader in found)
    assert max(report["drift_bytes"] for report in reports) < geometry.log_bytes // 4
