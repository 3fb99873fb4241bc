"""What was measured, as data: reports of load processes, rounds, and the whole test.

*Process*: the parent makes `Interval`s and `RoundResult`s of what load processes report;
tables, plots and the JSON file read a `TestResult`. Times say their unit; a
histogram is `scripts.loadtest.histogram.Histogram`'s text. *Invariants*: ``operations`` are
those that ended without an error, a batch is one; ``hits`` and ``misses`` count keys, and are None
where the target cannot tell a hit from a load.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

import msgspec

from scripts.loadtest.histogram import Histogram

FORMAT: Final = 1
ALL_PROCESSES: Final = -1
PERCENTILES: Final = (50.0, 90.0, 99.0, 99.9)


class Interval(msgspec.Struct, frozen=True, kw_only=True):
    """The operations that ended in one slot of a round, as a rule of all load processes."""

    target: str
    round: int
    process: int  # ALL_PROCESSES: merged
    slot: int  # from 0; the slots of all processes of a round begin at the same times
    at_s: float  # its begin, from the round's
    seconds: float
    operations: int
    errors: int
    found: int  # keys read that came with a value
    hits: int | None
    misses: int | None
    p50_us: float
    p99_us: float
    max_us: float
    histogram: str  # of all operations

    @property
    def rate(self) -> float:
        """Operations a second."""
        return self.operations / self.seconds if self.seconds > 0 else 0.0


class OpResult(msgspec.Struct, frozen=True, kw_only=True):
    """The operations of one kind: read, write or delete."""

    kind: str
    count: int
    histogram: str


class NodeUse(msgspec.Struct, frozen=True, kw_only=True):
    """What one process of a server used during a round."""

    role: str
    pid: int
    cpu_s: float
    rss_bytes: int
    private_bytes: int  # unique to the process; shared memory is not in it
    ended: bool = False  # it died, or was replaced, in this round: cpu_s is as last seen


class RoundResult(msgspec.Struct, frozen=True, kw_only=True):
    """One target in one round, all load processes together."""

    target: str
    round: int
    seconds: float
    operations: int
    keys: int
    found: int
    hits: int | None
    misses: int | None
    errors: dict[str, int]
    first_errors: list[str]
    ops: list[OpResult]
    intervals: list[Interval]  # merged over the processes, in order
    use: list[NodeUse]  # empty where the server's processes could not be found
    start_delay: str
    behind: int
    behind_s: float
    client_cpu_s: float  # of all load processes
    generator_us: float
    interrupted: bool = False
    failed: str | None = None  # why the round ended early; a sentence
    notes: list[str] = []

    @property
    def histogram(self) -> Histogram:
        """Latencies of all operations."""
        return Histogram.merged(op.histogram for op in self.ops)

    @property
    def error_count(self) -> int:
        """Operations that failed."""
        return sum(self.errors.values())


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """All rounds of one target, merged."""

    target: str
    rounds: int
    seconds: float
    operations: int
    operations_per_s: float
    keys_per_s: float
    p50_us: float
    p90_us: float
    p99_us: float
    p999_us: float
    max_us: float
    mean_us: float
    hit_ratio: float | None
    errors: dict[str, int]
    behind: int
    ops: list[OpSummary]
    use: list[UseSummary]
    client_cpu_s_per_1000: float

    @property
    def error_count(self) -> int:
        """Operations that failed."""
        return sum(self.errors.values())


class OpSummary(msgspec.Struct, frozen=True, kw_only=True):
    """One kind of operation of one target, over all rounds."""

    kind: str
    count: int
    p50_us: float
    p90_us: float
    p99_us: float
    p999_us: float
    max_us: float
    mean_us: float


class UseSummary(msgspec.Struct, frozen=True, kw_only=True):
    """One process of one target's server, over all rounds."""

    role: str
    pid: int
    cpu_s: float
    cpu_s_per_1000: float  # operations, whichever process served them
    rss_bytes: int  # the greatest seen
    private_bytes: int


class TestResult(msgspec.Struct, frozen=True, kw_only=True):
    """The whole test; what ``--json`` writes."""

    __test__ = False  # pytest: not a test

    arguments: dict[str, Any]
    machine: dict[str, Any]
    versions: dict[str, str]
    began: str  # ISO 8601, UTC
    rounds: list[RoundResult]
    notes: list[str] = []
    format: int = FORMAT

    @property
    def targets(self) -> list[str]:
        """The names of the targets that were measured, in the order they were given."""
        return list(dict.fromkeys(found.target for found in self.rounds))

    def of(self, target: str) -> list[RoundResult]:
        """Return the rounds of one target, in order."""
        return [found for found in self.rounds if found.target == target]

    def histogram(self, target: str) -> Histogram:
        """Return the latencies of all operations of a target, over all rounds."""
        return Histogram.merged(op.histogram for found in self.of(target) for op in found.ops)

    def summary(self, target: str) -> Summary:
        """Return a target's rounds as one."""
        return summarise(target, self.of(target))


def summarise(target: str, rounds: Sequence[RoundResult]) -> Summary:
    """Merge the rounds of one target."""
    seconds = sum(found.seconds for found in rounds)
    operations = sum(found.operations for found in rounds)
    ops = merge_ops(op for found in rounds for op in found.ops)
    whole = Histogram.merged(op.histogram for op in ops)
    p50, p90, p99, p999 = whole.percentiles_us(PERCENTILES)
    hits, misses = add_known(r.hits for r in rounds), add_known(r.misses for r in rounds)
    read = (hits or 0) + (misses or 0)
    return Summary(
        target=target,
        rounds=len(rounds),
        seconds=seconds,
        operations=operations,
        operations_per_s=operations / seconds if seconds else 0.0,
        keys_per_s=sum(found.keys for found in rounds) / seconds if seconds else 0.0,
        p50_us=p50,
        p90_us=p90,
        p99_us=p99,
        p999_us=p999,
        max_us=whole.max_us,
        mean_us=whole.mean_us,
        hit_ratio=None if hits is None or misses is None or not read else hits / read,
        errors=add_counts(found.errors for found in rounds),
        behind=sum(found.behind for found in rounds),
        ops=[_op_summary(op) for op in ops],
        use=_use_summaries(rounds, operations),
        client_cpu_s_per_1000=_per_1000(sum(r.client_cpu_s for r in rounds), operations),
    )


def merge_ops(ops: Iterable[OpResult]) -> list[OpResult]:
    """Add up results of the same kind; kinds in the order they first came."""
    by_kind: dict[str, list[OpResult]] = {}
    for op in ops:
        by_kind.setdefault(op.kind, []).append(op)
    return [
        OpResult(
            kind=kind,
            count=sum(op.count for op in same),
            histogram=Histogram.merged(op.histogram for op in same).encode(),
        )
        for kind, same in by_kind.items()
    ]


def merge_intervals(intervals: Iterable[Interval]) -> list[Interval]:
    """Add up the processes' intervals of each slot of one round."""
    by_slot: dict[int, list[Interval]] = {}
    for interval in intervals:
        by_slot.setdefault(interval.slot, []).append(interval)
    return [_merged_slot(by_slot[slot]) for slot in sorted(by_slot)]


def add_counts(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    """Add up counts by name, the most frequent first."""
    total: dict[str, int] = {}
    for one in counts:
        for name, count in one.items():
            total[name] = total.get(name, 0) + count
    return dict(sorted(total.items(), key=lambda item: (-item[1], item[0])))


def add_known(counts: Iterable[int | None]) -> int | None:
    """Add up; None as soon as one is not known."""
    total = 0
    for count in counts:
        if count is None:
            return None
        total += count
    return total


def _merged_slot(same: Sequence[Interval]) -> Interval:
    whole = Histogram.merged(interval.histogram for interval in same)
    p50, p99 = whole.percentiles_us((50.0, 99.0))
    first = same[0]
    return Interval(
        target=first.target,
        round=first.round,
        process=ALL_PROCESSES,
        slot=first.slot,
        at_s=first.at_s,
        seconds=max(interval.seconds for interval in same),
        operations=sum(interval.operations for interval in same),
        errors=sum(interval.errors for interval in same),
        found=sum(interval.found for interval in same),
        hits=add_known(interval.hits for interval in same),
        misses=add_known(interval.misses for interval in same),
        p50_us=p50,
        p99_us=p99,
        max_us=max(interval.max_us for interval in same),
        histogram=whole.encode(),
    )


def _op_summary(op: OpResult) -> OpSummary:
    latencies = Histogram.decode(op.histogram)
    p50, p90, p99, p999 = latencies.percentiles_us(PERCENTILES)
    return OpSummary(
        kind=op.kind,
        count=op.count,
        p50_us=p50,
        p90_us=p90,
        p99_us=p99,
        p999_us=p999,
        max_us=latencies.max_us,
        mean_us=latencies.mean_us,
    )


def _use_summaries(rounds: Sequence[RoundResult], operations: int) -> list[UseSummary]:
    by_process: dict[tuple[str, int], list[NodeUse]] = {}
    for found in rounds:
        for use in found.use:
            by_process.setdefault((use.role, use.pid), []).append(use)
    summaries = []
    for (role, pid), uses in by_process.items():
        cpu_s = sum(use.cpu_s for use in uses)
        summaries.append(
            UseSummary(
                role=role,
                pid=pid,
                cpu_s=cpu_s,
                cpu_s_per_1000=_per_1000(cpu_s, operations),
                rss_bytes=max(use.rss_bytes for use in uses),
                private_bytes=max(use.private_bytes for use in uses),
            )
        )
    return summaries


def _per_1000(cpu_s: float, operations: int) -> float:
    return cpu_s * 1000 / operations if operations else 0.0
