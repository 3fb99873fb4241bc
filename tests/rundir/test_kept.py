"""The note on the shards that a node left: what is believed, and why they cannot be used."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from kamacache.clock import boottime_ms
from kamacache.config import GroupSpec
from kamacache.limits import KEPT_NOTE_BYTES_MAX
from kamacache.rundir.description import NodeDescription, read_boot_id
from kamacache.rundir.kept import NOTE, KeptFolder, find_kept, keep_shards, read_note
from kamacache.rundir.layout import new_epoch

SCORES = GroupSpec(name="scores", cache_bytes=1 << 20, codec="StrCodec")
FILES = [f"scores-{shard}.{end}" for shard in range(2) for end in ("data", "access", "lock")]


def keep(base: Path) -> Path:
    """Leave what a node leaves, and return its folder."""
    epoch = new_epoch()
    folder = base / epoch
    folder.mkdir(parents=True)
    for name in (*FILES, "owed.0", "farewell.1", "control", "counters", "membership", "meters"):
        (folder / name).write_bytes(b"x" * 5000)
    (folder / "nonsense").mkdir()
    about = NodeDescription(
        format=1,
        epoch=epoch,
        pid=1,
        boot_id=read_boot_id(),
        workers=2,
        hash_seed=7,
        shm_dir=str(folder),
        sockets_dir="",
        groups=[SCORES],
        listen=None,
        version="1",
        name="a:1",
        memory="0123",
        clustered=True,
    )
    keep_shards(about, [("a:1", 1), ("b:1", 2)], boottime_ms() - 5)
    return folder


def found(base: Path) -> KeptFolder:
    kept = find_kept(base)
    assert kept is not None
    return kept


def why(kept: KeptFolder, **settings: object) -> str:
    told = {"version": "1", "workers": 2, "name": "a:1", "away_max_s": 60.0} | settings
    return kept.why_cold(**told)  # type: ignore[arg-type]


def test_shards_and_what_is_owed_are_left_and_nothing_else(tmp_path: Path) -> None:
    folder = keep(tmp_path)
    assert {path.name for path in folder.iterdir()} == {*FILES, "owed.0", "farewell.1", NOTE}
    kept = found(tmp_path)
    assert (kept.path, kept.kept.memory, kept.kept.members) == (
        folder,
        "0123",
        [("a:1", 1), ("b:1", 2)],
    )
    assert why(kept) == ""
    assert 0 <= boottime_ms() - kept.kept.stopped_ms < 10_000
    assert (folder / NOTE).stat().st_mode & 0o777 == 0o600


def test_latest_of_several_is_found(tmp_path: Path) -> None:
    first = keep(tmp_path)
    edit(first / NOTE, stopped_ms=boottime_ms() - 500)
    second = keep(tmp_path)
    assert found(tmp_path).path == second


def test_taking_over_removes_the_note_and_what_is_not_wanted(tmp_path: Path) -> None:
    folder = keep(tmp_path)
    kept = found(tmp_path)
    (folder / "scores-1.data").unlink()
    (folder / "scores-1.data").symlink_to("/etc/hostname")
    (folder / "control").mkdir()
    assert kept.usable_bytes(kept.files([SCORES])) >= 5000 * 7
    to = tmp_path / new_epoch()
    kept.take(to, kept.files([SCORES]))
    assert {p.name for p in to.iterdir()} == {*FILES, "owed.0", "farewell.1"} - {"scores-1.data"}
    assert find_kept(tmp_path) is None
    with pytest.raises(FileNotFoundError):
        kept.take(to, set())


def edit(note: Path, **fields: object) -> None:
    note.write_text(json.dumps(json.loads(note.read_text()) | fields))


def pipe(note: Path) -> None:
    note.unlink()
    os.mkfifo(note)


def folder_in_its_place(note: Path) -> None:
    note.unlink()
    note.mkdir()


def link(note: Path) -> None:
    note.rename(note.with_name("x"))
    note.symlink_to("x")


def group_of_nonsense(note: Path) -> None:
    edit(note, groups=[{"name": "../..", "cache_bytes": -1}])


@pytest.mark.parametrize(
    "spoil",
    [
        Path.unlink,
        link,
        pipe,
        folder_in_its_place,
        group_of_nonsense,
        lambda note: note.write_bytes(b""),
        lambda note: note.write_bytes(b"\xff\x00garbage" * 99),
        lambda note: note.write_bytes(note.read_bytes()[:-9]),
        lambda note: note.write_bytes(b" " * (KEPT_NOTE_BYTES_MAX + 1)),
        lambda note: edit(note, format=99),
        lambda note: edit(note, workers="two"),
    ],
)
def test_note_that_cannot_be_believed_is_none(
    tmp_path: Path, spoil: Callable[[Path], object]
) -> None:
    folder = keep(tmp_path)
    assert read_note(folder) is not None
    spoil(folder / NOTE)
    assert read_note(folder) is None
    assert find_kept(tmp_path) is None


def test_why_it_cannot_be_used(tmp_path: Path) -> None:
    folder = keep(tmp_path)
    kept = found(tmp_path)
    assert why(kept, version="2") == "it was version 1, this is 2"
    assert why(kept, workers=3) == "it had 2 workers, this node has 3"
    assert why(kept, name=None) == "its name in the cluster was a:1, this node's is none"
    assert why(kept, away_max_s=0) == "warm restart is off"
    edit(folder / NOTE, stopped_ms=boottime_ms() - 61_000)
    assert why(found(tmp_path)) == "it stopped 61 s ago, and at most 60 s are allowed"
    edit(folder / NOTE, stopped_ms=boottime_ms() + 61_000)  # a clock that cannot be
    assert "at most 60 s" in why(found(tmp_path))
    edit(folder / NOTE, boot_id="another")
    assert why(found(tmp_path)) == "the machine was started anew"


def test_group_that_changed_begins_anew_by_itself(tmp_path: Path) -> None:
    keep(tmp_path)
    kept = found(tmp_path)

    def other(**fields: object) -> GroupSpec:
        return GroupSpec(**{"name": "scores", "cache_bytes": 1 << 20, "codec": "StrCodec"} | fields)  # type: ignore[arg-type]

    assert kept.changed(other(load_timeout_s=1.0, load_threads=2, has_getter=True)) == []
    for field, value in {
        "codec": "JsonCodec", "ttl_ms": 9, "cache_bytes": 9, "eviction": "s3fifo",
        "item_bytes_mean": 9, "negative_ttl_ms": 9, "mirror_ttl_ms": 0, "mirror_share": 0.2,
    }.items():  # fmt: skip
        changed = other(**{field: value})
        assert kept.changed(changed) == [field]
        assert kept.files([changed]).isdisjoint(FILES)
    assert kept.changed(other(name="new")) == []
    assert kept.files([other(name="new")]).isdisjoint(FILES)
