"""Tests of lines on stderr that never hold a process up."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from kamacache.limits import LOG_LINE_BYTES_MAX
from kamacache.node.stderr import Stderr, StderrHandler

LINE = "x" * 999 + "\n"


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    read, write = os.pipe()
    yield read, write
    os.close(read)
    os.close(write)


def record(message: str, *arguments: object) -> logging.LogRecord:
    return logging.LogRecord("test", logging.INFO, "file.py", 7, message, arguments, None)


def fill(stderr: Stderr) -> int:
    """Write until there is no room; return how many lines had."""
    count = 0
    while stderr.write(LINE):
        count += 1
        assert count < 10_000
    return count


def test_a_pipe_that_is_full_drops_lines_and_takes_more_when_it_is_read(
    pipe: tuple[int, int],
) -> None:
    read, write = pipe
    stderr = Stderr(write)
    count = fill(stderr)
    assert count > 10
    assert os.get_blocking(write), "others have this descriptor, too"
    assert len(os.read(read, count * len(LINE))) == count * len(LINE)
    assert stderr.write("more\n")
    assert os.read(read, 100) == b"more\n"
    stderr.close()


def test_the_journals_socket_is_written_to_without_waiting() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        stderr = Stderr(ours.fileno())
        assert fill(stderr) > 10
        assert ours.getblocking()
        stderr.close()


@pytest.mark.parametrize("how", ["closed", "unread"])
def test_a_descriptor_that_nobody_reads_is_no_error(how: str) -> None:
    read, write = os.pipe()
    os.close(read)
    stderr = None if how == "closed" else Stderr(write)
    os.close(write)
    stderr = stderr or Stderr(write)
    stderr.write("lost\n")
    stderr.close()


def test_what_has_no_utf8_is_escaped(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as file:
        assert Stderr(file.fileno()).write("lone \udc80\n")
    assert (tmp_path / "log").read_bytes() == b"lone \\udc80\n"


def test_long_text_goes_in_whole_lines(pipe: tuple[int, int]) -> None:
    read, write = pipe
    lines = [f"{number:03}" + "y" * 100 for number in range(100)]
    stderr = Stderr(write)
    assert stderr.write("\n".join(lines) + "\n")
    stderr.close()
    assert os.read(read, 1 << 16).decode().splitlines() == lines
    assert sum(map(len, lines)) > LOG_LINE_BYTES_MAX


def test_the_count_of_what_was_lost_is_told(pipe: tuple[int, int]) -> None:
    read, write = pipe
    handler = StderrHandler(Stderr(write))
    handler.setFormatter(logging.Formatter("%(message)s %(lines)s", defaults={"lines": ""}))
    fill(handler.stderr)
    for _ in range(3):
        handler.emit(record(LINE))
    assert handler.lost == 3
    os.read(read, 1 << 20)
    handler.emit(record("after"))
    assert os.read(read, 1 << 16).decode().splitlines() == [
        "after ",
        "log lines before were lost, since nobody read them 3",
    ]
    assert handler.lost == 0
    handler.stderr.close()


def test_a_record_that_cannot_be_formatted_is_told_and_harms_nobody(
    pipe: tuple[int, int],
) -> None:
    class Mute:
        def __str__(self) -> str:
            raise RuntimeError("no words")

    read, write = pipe
    handler = StderrHandler(Stderr(write))
    handler.setFormatter(logging.Formatter("%(message)s %(error)s", defaults={"error": ""}))
    handler.emit(record("%s", Mute()))
    handler.emit(record("%d", "no number"))
    told = os.read(read, 1 << 16).decode().splitlines()
    assert told == [
        "a log line could not be formatted RuntimeError",
        "a log line could not be formatted TypeError",
    ]
    handler.stderr.close()
