"""Waiting for descriptors, whatever their numbers: `kamacache.node.readable`."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterator

import pytest

from kamacache.node.readable import wait_readable


@pytest.fixture
def high_pipe() -> Iterator[tuple[int, int]]:
    """A pipe whose ends select() does not take."""
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 2_100:
        pytest.skip("a process may have fewer than 2,100 files open here")
    low = os.pipe()
    high = (2_001, 2_002)
    for fd, number in zip(low, high, strict=True):
        os.dup2(fd, number, inheritable=False)
        os.close(fd)
    yield high
    for number in high:
        os.close(number)


def test_descriptors_above_1023_are_waited_for(high_pipe: tuple[int, int]) -> None:
    read, write = high_pipe
    assert wait_readable((read,), 0) == []
    os.write(write, b"x")
    assert wait_readable((read,)) == [read]


def test_the_wait_is_bounded(high_pipe: tuple[int, int]) -> None:
    began_s = time.monotonic()
    assert wait_readable((high_pipe[0],), 0.05) == []
    assert 0.05 <= time.monotonic() - began_s < 5
    assert wait_readable((high_pipe[0],), -1) == []


def test_an_end_counts_as_readable() -> None:
    read, write = os.pipe()
    os.close(write)
    assert wait_readable((read,), 5) == [read]
    os.close(read)
