"""Serve-until: written by one process, trusted by the others for 2 s at most."""

from __future__ import annotations

from pathlib import Path

import pytest

from kamacache.clock import boottime_ms
from kamacache.errors import NodeUnavailableError
from kamacache.limits import SERVE_UNTIL_AHEAD_MS
from kamacache.rundir.control import (
    MEMBERSHIP,
    SERVE_UNTIL,
    ControlReader,
    ControlWriter,
    end_serving,
)


def test_reader_sees_what_the_writer_extends_and_ends(tmp_path: Path) -> None:
    writer = ControlWriter(tmp_path / "control")
    reader = ControlReader(tmp_path / "control")
    assert not reader.serving
    before = boottime_ms()
    writer.extend()
    assert before < reader.words[SERVE_UNTIL] <= boottime_ms() + SERVE_UNTIL_AHEAD_MS
    assert reader.serving
    writer.end()
    assert not reader.serving
    reader.close()
    writer.close()


def test_reader_cannot_write(tmp_path: Path) -> None:
    writer = ControlWriter(tmp_path / "control")
    reader = ControlReader(tmp_path / "control")
    with pytest.raises(TypeError):
        reader.words[SERVE_UNTIL] = 1
    reader.close()
    writer.close()


def test_second_writer_writes_the_words_that_the_first_made(tmp_path: Path) -> None:
    writer = ControlWriter(tmp_path / "control")
    writer.extend()
    second = ControlWriter.open(tmp_path / "control")
    second.words[MEMBERSHIP] = 5
    assert writer.words[MEMBERSHIP] == 5
    assert second.words[SERVE_UNTIL] == writer.words[SERVE_UNTIL]
    second.close()
    assert writer.words[MEMBERSHIP] == 5
    writer.close()


def test_successor_ends_what_a_dead_supervisor_promised(tmp_path: Path) -> None:
    writer = ControlWriter(tmp_path / "control")
    writer.extend()
    reader = ControlReader(tmp_path / "control")
    end_serving(tmp_path / "control")
    assert not reader.serving
    end_serving(tmp_path / "missing")
    reader.close()
    writer.close()


@pytest.mark.parametrize("content", [b"", b"x" * 4096])
def test_foreign_file_is_no_control_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "control").write_bytes(content)
    for opened in (ControlReader, ControlWriter.open):
        with pytest.raises(NodeUnavailableError):
            opened(tmp_path / "control")
    end_serving(tmp_path / "control")
    assert (tmp_path / "control").read_bytes() == content


def test_missing_file_is_an_unavailable_node(tmp_path: Path) -> None:
    for opened in (ControlReader, ControlWriter.open):
        with pytest.raises(NodeUnavailableError):
            opened(tmp_path / "control")
