"""Loads that wait have a bound, in a group with threads and in one without."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from kamacache.errors import LoadError
from kamacache.worker import loader, pools
from tests.worker.harness import Gate, Running, in_threads

BOUND = 3


@pytest.mark.parametrize("kind", ["threads", "loop"])
def test_loads_beyond_the_bound_fail_at_once_and_those_before_finish(
    worker: Running, wait_until: Any, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(loader, "LOADS_QUEUED_MAX", BOUND)
    monkeypatch.setattr(pools, "LOADS_QUEUED_MAX", BOUND)
    gate = Gate()

    async def slow(key: str) -> bytes:
        while not gate.open.is_set():  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        return b"late"

    worker.group(gate if kind == "threads" else slow, load_threads=1)
    taken = BOUND + (kind == "threads")  # one runs
    opener = gate.open_when(lambda: worker.counter("loads_refused") == 4)
    found = in_threads(taken + 4, lambda number: worker.get(f"k{number}"))
    opener.join()
    refused = [error for error in found if isinstance(error, LoadError)]
    assert len(refused) == 4
    assert {error.cause_type for error in refused} == {"overloaded"}
    assert len([value for value in found if isinstance(value, bytes)]) == taken
