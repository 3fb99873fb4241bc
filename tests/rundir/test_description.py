"""node.json, and the clean-up that removes it."""

from __future__ import annotations

from pathlib import Path

import pytest

from kamacache.config import GroupSpec
from kamacache.errors import NodeUnavailableError
from kamacache.rundir.cleaning import clean_epoch, clean_orphaned, clean_stale
from kamacache.rundir.control import ControlReader, ControlWriter
from kamacache.rundir.description import (
    DESCRIPTION_FORMAT,
    NodeDescription,
    read_boot_id,
    read_description,
    write_description,
)
from kamacache.rundir.layout import RunDir, SupervisorLock, new_epoch


def publish(
    run_dir: RunDir, shm_root: Path, *, version: int = DESCRIPTION_FORMAT
) -> NodeDescription:
    """Make the files of an epoch as a supervisor would, and return its description."""
    epoch = new_epoch()
    shm_dir, sockets_dir = run_dir.shm_dir(shm_root, epoch), run_dir.sockets_dir(epoch)
    shm_dir.mkdir(parents=True)
    sockets_dir.mkdir(parents=True)
    description = NodeDescription(
        format=version,
        epoch=epoch,
        pid=1,
        boot_id=read_boot_id(),
        workers=2,
        hash_seed=(1 << 64) - 1,
        shm_dir=str(shm_dir),
        sockets_dir=str(sockets_dir),
        groups=[GroupSpec(name="scores", cache_bytes=1 << 20), GroupSpec(name="b", cache_bytes=1)],
        listen=None,
        version="0",
    )
    write_description(run_dir, description)
    return description


def test_description_survives_the_round_trip(short_dir: Path) -> None:
    run_dir = RunDir(short_dir / "run")
    run_dir.prepare()
    written = publish(run_dir, short_dir / "shm")
    assert read_description(short_dir / "run") == written
    assert written.group_index("b") == 1
    assert [path.name for path in run_dir.path.iterdir() if path.name.endswith(".new")] == []


def test_no_node_and_unreadable_descriptions_are_unavailable(short_dir: Path) -> None:
    run_dir = RunDir(short_dir / "run")
    with pytest.raises(NodeUnavailableError, match="no node runs"):
        read_description(run_dir)
    run_dir.prepare()
    run_dir.description_path.write_text('{"format": 1}')
    with pytest.raises(NodeUnavailableError, match="cannot be understood"):
        read_description(run_dir)
    publish(run_dir, short_dir / "shm", version=DESCRIPTION_FORMAT + 1)
    with pytest.raises(NodeUnavailableError, match="format"):
        read_description(run_dir)


def test_successor_removes_what_crashed_nodes_left(short_dir: Path) -> None:
    run_dir, shm = RunDir(short_dir / "run"), short_dir / "shm"
    run_dir.prepare()
    other_root = publish(run_dir, short_dir / "elsewhere")
    control = ControlWriter(Path(other_root.shm_dir) / "control")
    control.extend()
    reader = ControlReader(Path(other_root.shm_dir) / "control")
    (run_dir.shm_dir(shm, new_epoch())).mkdir(parents=True)
    (run_dir.path / "not-an-epoch").mkdir()

    clean_stale(run_dir, shm)

    assert not reader.serving
    assert sorted(path.name for path in run_dir.path.iterdir()) == ["not-an-epoch"]
    assert list(run_dir.shm_base(shm).iterdir()) == []
    assert not Path(other_root.shm_dir).exists()
    reader.close()
    control.close()


def test_shards_that_are_kept_are_spared_and_their_sockets_are_not(short_dir: Path) -> None:
    run_dir, shm = RunDir(short_dir / "run"), short_dir / "shm"
    run_dir.prepare()
    kept, other = publish(run_dir, shm), publish(run_dir, shm)
    assert clean_stale(run_dir, shm, but=kept.epoch) == 3
    assert Path(kept.shm_dir).is_dir()
    assert not Path(other.shm_dir).exists()
    assert list(run_dir.path.iterdir()) == []


def test_own_epoch_is_removed_and_another_left_alone(short_dir: Path) -> None:
    run_dir, shm = RunDir(short_dir / "run"), short_dir / "shm"
    run_dir.prepare()
    old, new = publish(run_dir, shm), publish(run_dir, shm)
    clean_epoch(run_dir, old.epoch, old.shm_dir)
    assert not Path(old.shm_dir).exists()
    assert not Path(old.sockets_dir).exists()
    assert read_description(run_dir) == new
    clean_epoch(run_dir, new.epoch, new.shm_dir)
    assert list(run_dir.path.iterdir()) == []
    assert list(shm.iterdir()) == []


def test_orphans_clean_up_in_any_order(short_dir: Path) -> None:
    run_dir, shm = RunDir(short_dir / "run"), short_dir / "shm"
    run_dir.prepare()
    left = publish(run_dir, shm)
    for _ in range(3):
        clean_orphaned(run_dir, left.epoch, left.shm_dir)
    assert list(run_dir.path.iterdir()) == []
    assert list(shm.iterdir()) == []
    assert isinstance(SupervisorLock.take(run_dir), SupervisorLock)
