"""What a reader of the results must know to believe them: sentences on how they came about.

*Process*: the parent.
"""

from __future__ import annotations

from collections.abc import Sequence

from scripts.loadtest import figures
from scripts.loadtest.histogram import Histogram
from scripts.loadtest.limits import (
    BEHIND_NOTED_S,
    CLIENT_BUSY_NOTED,
    GENERATOR_SHARE_NOTED,
    NOT_FOUND_NOTED,
    NOTES_MAX,
    START_DELAY_SHARE_NOTED,
)
from scripts.loadtest.results import RoundResult
from scripts.loadtest.tally import Tally
from scripts.loadtest.targets.specs import split_spec


def target_notes(
    target: str, rounds: Sequence[RoundResult], *, processes: int, clock_us: float, opened: bool
) -> list[str]:
    """Return what is to be said of one target's rounds."""
    seconds = sum(found.seconds for found in rounds) * processes
    operations = sum(found.operations for found in rounds)
    if not seconds or not operations:
        return []
    notes: list[str] = []
    latencies = Histogram()
    delays = Histogram()
    for found in rounds:
        latencies.add(found.histogram)
        if found.start_delay:
            delays.add(Histogram.decode(found.start_delay))
    (p50_us,) = latencies.percentiles_us([50.0])
    generator_us = max(found.generator_us for found in rounds)
    share = operations * generator_us / 1e6 / seconds
    if share > GENERATOR_SHARE_NOTED and not opened:
        notes.append(
            f"the load test's own work took about {min(share, 1.0):.0%} of its processes' time "
            f"({generator_us:.2f} us an operation): throughput is lower by that, latency is not"
        )
    if clock_us > GENERATOR_SHARE_NOTED * p50_us:
        notes.append(
            f"each latency includes about {clock_us:.2f} us of the load test's own: the clock "
            "and the call"
        )
    busy = sum(found.client_cpu_s for found in rounds) / seconds
    if busy > CLIENT_BUSY_NOTED and split_spec(target)[0] != "local":
        notes.append(
            f"its load processes were busy {min(busy, 1.0):.0%} of the time: the client, not "
            "the target, may be what was measured; more --processes tell"
        )
    notes += _open_notes(rounds, delays, p50_us)
    return [f"{target}: {note}" for note in notes][:NOTES_MAX]


def not_found_notes(tally: Tally, *, renamed: bool, loads: bool) -> list[str]:
    """Return what is to be said where a getter did not know the keys that it was asked for."""
    missing = tally.read - tally.found
    if not loads or not tally.read or missing < NOT_FOUND_NOTED * tally.read:
        return []
    why = (
        "a cold test asks for keys that nobody has; --as-is asks for them by their own names"
        if renamed
        else "--key-prefix, --keys or a trace name those that it knows"
    )
    return [f"the getter did not know {missing:,} of {tally.read:,} keys: {why}"]


def _open_notes(rounds: Sequence[RoundResult], delays: Histogram, p50_us: float) -> list[str]:
    notes = []
    whole = [found for found in rounds if not found.interrupted and found.failed is None]
    behind = sum(found.behind for found in whole)
    late_s = max((found.behind_s for found in whole), default=0.0)
    if behind and late_s >= BEHIND_NOTED_S:
        notes.append(
            f"{behind:,} requests were due and never begun, the oldest of them for {late_s:.1f} s: "
            "the rate is above what the target, or the load test, can take"
        )
        return notes  # and so all of them began late
    (delay_us,) = delays.percentiles_us([50.0])
    if delays.count and delay_us > START_DELAY_SHARE_NOTED * p50_us:
        notes.append(
            f"half of the requests began more than {figures.latency(delay_us)} after they were "
            "due, which is in their latency: they waited for a processor or a thread of the load "
            "test"
        )
    return notes
