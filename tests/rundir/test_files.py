"""Files that are replaced whole."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from kamacache.rundir.files import open_at_once, write_whole


def test_a_file_is_replaced_and_is_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "told.json"
    path.write_text("before, and longer")
    with path.open() as opened:
        write_whole(path, b"now")
        assert opened.read() == "before, and longer"  # who has it open goes on with it
    assert path.read_bytes() == b"now"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    write_whole(path, b"now", gid=os.getgid())
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert os.listdir(tmp_path) == ["told.json"]


def test_what_cannot_be_written_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "told"
    path.mkdir()
    (path / "kept").touch()
    with pytest.raises(OSError, match=r"told"):
        write_whole(path, b"now")
    assert sorted(os.listdir(tmp_path)) == ["told"]
    elsewhere = tmp_path / "elsewhere"
    (tmp_path / "other.new").symlink_to(elsewhere)
    with pytest.raises(OSError, match=r"other\.new"):
        write_whole(tmp_path / "other", b"now")
    assert not elsewhere.exists()


@pytest.mark.timeout(10)
def test_a_pipe_is_opened_without_its_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with open(tmp_path / "pipe", "rb", opener=open_at_once) as pipe:
        assert not pipe.read(1)
