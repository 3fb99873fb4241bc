"""What many processes did to a cache, and whether every value that they read was legal.

A *history* is the operations of all processes with the times at which each began and ended, on
CLOCK_MONOTONIC of one host. Each key is a register: a set writes it, a delete empties it, and an
empty one is filled from the database by a load, at any time. Every write carries a value that no
other write of the key carries, so a value read names the write that it comes from. A writer
changes the database first and the cache then (write-through)::

    write   |-- database --|  |---- cache: set, or delete ----|
             store_start..end  start .................... end      ok: it was acknowledged

*Judgement*: overlapping operations happened in any order. A read of a value that some write W
wrote is legal if W began before the read ended and either of these is possible:

- *kept*: the cache still had it: no acknowledged write of the cache began after W's ended and
  was over, by the lag allowed between the two nodes, before the read began;
- *loaded*: the database still had it at some time after which no such write of the cache was
  over in that sense. (So a slow load that overwrites a newer write is caught.)

The lag is 0 on the node of the acknowledged write: reads there see it. On other nodes it is what
`Rules` says. A write that failed may have happened until `Rules.unsure_s` later, and makes no
older value illegal. "Not found" is a value: that of the removals, and the first of a key.

The judgement is of each read by itself: it proves that every value read was legal, not that one
process's reads of a node other than the writer's never go back within the lag.
"""

from __future__ import annotations

import bisect
import json
import math
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

INFINITE: Final = math.inf
AROUND: Final = 6  # writes shown before and after those that an offending read is about


@dataclass(frozen=True, slots=True)
class Write:
    """One write; ``value`` None: a removal. Times are seconds of CLOCK_MONOTONIC.

    A write with ``stored`` changed the database from ``store_start`` to ``store_end``. What it did
    to the cache is ``cached``: "set", "delete", or "" where it was left alone.
    """

    key: str
    value: str | None
    node: str
    start: float
    end: float
    cached: str = "set"
    ok: bool = True
    stored: bool = False
    store_start: float = 0.0
    store_end: float = 0.0
    by: str = ""


@dataclass(frozen=True, slots=True)
class Read:
    """One read that had an answer; ``value`` None: not found."""

    key: str
    value: str | None
    node: str
    start: float
    end: float
    by: str = ""


@dataclass(frozen=True, slots=True)
class Cut:
    """A time in which nodes could not tell each other; they agree ``lag_s`` after its end.

    ``own_too``: until then even the writer's own node need not see what was written meanwhile.
    """

    start: float
    end: float
    lag_s: float
    own_too: bool = False


@dataclass(frozen=True, slots=True)
class Rules:
    """How old a value may be that another node than the writer's returns."""

    same_node_s: float = 0.0
    other_node_s: float = 0.0
    unsure_s: float = INFINITE  # after a failed write's end: it may still happen
    cuts: tuple[Cut, ...] = ()
    cold_is_legal: bool = True  # a group without a getter may lose any value: not found is legal

    def seen_everywhere(self, write: Write) -> float:
        """Return the time from which no node may return what an acknowledged write replaced."""
        latest = write.end + self.other_node_s
        for cut in self.cuts:
            if _during(write, cut, self.other_node_s):
                latest = max(latest, cut.end + cut.lag_s)
        return latest

    def seen_here(self, write: Write) -> float:
        """Return the time from which the writer's own node may not."""
        latest = write.end + self.same_node_s
        for cut in self.cuts:
            if cut.own_too and _during(write, cut, 0.0):
                latest = max(latest, cut.end + cut.lag_s)
        return latest


def _during(write: Write, cut: Cut, later_s: float) -> bool:
    return write.start <= cut.end and write.end + later_s >= cut.start


@dataclass(frozen=True, slots=True)
class Offence:
    """A read of a value that was not current at any allowed time."""

    read: Read
    reason: str
    late_s: float  # a lag so much longer would have made it legal; infinite: none would
    writes: tuple[Write, ...] = ()

    def __str__(self) -> str:
        """Show the read among the writes around it, in milliseconds from its start."""
        zero = self.read.start

        def at(time_s: float) -> str:
            return f"{(time_s - zero) * 1000:+.2f}"

        read = self.read
        lines = [
            f"illegal read of {read.key!r} at {read.node} by {read.by}: {read.value!r}",
            f"  {self.reason}",
            f"  read    {at(read.start)} .. {at(read.end)} ms, from {read.start:.3f} s on",
        ]
        for write in self.writes:
            stored = (
                f" database {at(write.store_start)} .. {at(write.store_end)}"
                if write.stored
                else ""
            )
            lines.append(
                f"  {write.cached or 'no cache':7s} {at(write.start)} .. {at(write.end)} ms"
                f"{'' if write.ok else ' FAILED'} {write.value!r} at {write.node} by {write.by}"
                f"{stored}"
            )
        return "\n".join(lines)


class _Replaced:
    """When the values of one key were replaced in the cache, for each node that may read."""

    def __init__(self, writes: Iterable[Write], rules: Rules) -> None:
        self._by_start = sorted((w for w in writes if w.ok and w.cached), key=lambda w: w.start)
        self._starts = [write.start for write in self._by_start]
        # suffix minima: the first time at which any write from here on is over
        everywhere = INFINITE
        here: dict[str, float] = {}
        self._everywhere = [INFINITE] * (len(self._by_start) + 1)
        self._here: list[dict[str, float]] = [{}] * (len(self._by_start) + 1)
        for at in range(len(self._by_start) - 1, -1, -1):
            write = self._by_start[at]
            everywhere = min(everywhere, rules.seen_everywhere(write))
            here = {
                **here,
                write.node: min(here.get(write.node, INFINITE), rules.seen_here(write)),
            }
            self._everywhere[at] = everywhere
            self._here[at] = here

    def gone(self, after: float, node: str) -> float:
        """Return when a node may no longer return what was in the cache until ``after``."""
        at = bisect.bisect_right(self._starts, after)
        return min(self._everywhere[at], self._here[at].get(node, INFINITE))


@dataclass
class _Key:
    """One key's register."""

    writes: list[Write]
    rules: Rules
    replaced: _Replaced = field(init=False)
    by_value: dict[str | None, list[Write]] = field(init=False)
    stores: list[Write] = field(init=False)
    store_gone: list[float] = field(init=False)

    def __post_init__(self) -> None:
        self.replaced = _Replaced(self.writes, self.rules)
        self.by_value = defaultdict(list)
        for write in self.writes:
            self.by_value[write.value].append(write)
        self.stores = sorted((w for w in self.writes if w.stored), key=lambda w: w.store_start)
        self.store_gone = [INFINITE] * (len(self.stores) + 1)
        for at in range(len(self.stores) - 1, -1, -1):
            self.store_gone[at] = min(self.store_gone[at + 1], self.stores[at].store_end)

    def judge(self, read: Read) -> tuple[float, str] | None:
        """Return by how much a read is late and what is wrong with it, or None."""
        sources = self.by_value.get(read.value, [])
        if read.value is None and self.rules.cold_is_legal and not self.stores:
            return None
        if not sources:
            return INFINITE, "nobody ever wrote this value"
        late_s = read.start - max(self._gone(read, write) for write in sources)
        if late_s <= 0:
            return None
        if late_s == INFINITE:
            return late_s, "it was written after the read had ended"
        return late_s, f"it had to be gone {late_s * 1000:.2f} ms before the read began"

    def _gone(self, read: Read, write: Write) -> float:
        """Return when the reading node could have had what a write wrote for the last time."""
        gone = -INFINITE
        in_cache = write.cached == "set" or (write.cached == "delete" and not self.stores)
        if in_cache and write.start <= read.end:
            end = write.end if write.ok else write.end + self.rules.unsure_s
            gone = self.replaced.gone(end, read.node)
        if write.stored and write.store_start <= read.end:
            at = bisect.bisect_right(
                self.stores, write.store_end, key=lambda other: other.store_start
            )
            # A hair before: the write that changed the database is over there before it goes on.
            until = math.nextafter(self.store_gone[at], -INFINITE)
            gone = max(gone, self.replaced.gone(until, read.node))
        return gone

    def around(self, read: Read) -> tuple[Write, ...]:
        """Return the writes that explain a read: its sources, and those next to it in time."""
        by_end = sorted(self.writes, key=lambda write: write.end)
        at = bisect.bisect_left(by_end, read.start, key=lambda write: write.end)
        shown = {*by_end[max(0, at - AROUND) : at + AROUND], *self.by_value.get(read.value, [])[:3]}
        return tuple(sorted(shown, key=lambda write: write.start))


def offences(
    writes: Iterable[Write],
    reads: Iterable[Read],
    rules: Rules = Rules(),
    *,
    initial: bool = True,
) -> list[Offence]:
    """Return the illegal reads, in time's order.

    ``initial``: the database of every key is empty at the beginning, so "not found" is legal until
    the first write; else the caller gives the first values as writes.
    """
    by_key: dict[str, list[Write]] = defaultdict(list)
    for write in writes:
        by_key[write.key].append(write)
    registers: dict[str, _Key] = {}
    found: list[Offence] = []
    for read in sorted(reads, key=lambda read: read.start):
        register = registers.get(read.key)
        if register is None:
            known = by_key[read.key]
            if initial:
                stored = any(write.stored for write in known) or not known
                known = [_nothing(read.key, stored=stored), *known]
            register = registers[read.key] = _Key(known, rules)
        verdict = register.judge(read)
        if verdict is not None:
            late_s, reason = verdict
            found.append(Offence(read, reason, late_s, register.around(read)))
    return found


def assert_legal(
    writes: Sequence[Write], reads: Sequence[Read], rules: Rules, *, initial: bool = True
) -> None:
    """Fail with the first offences, each among the writes around it."""
    found = offences(writes, reads, rules, initial=initial)
    shown = "\n".join(str(offence) for offence in found[:5])
    assert not found, f"{len(found)} of {len(reads)} reads are illegal under {rules}\n{shown}"


def worst_lag_s(writes: Sequence[Write], reads: Sequence[Read]) -> float:
    """Return the lag between nodes that makes all of a history's reads legal; for reports."""
    found = offences(writes, reads, Rules(other_node_s=0.0))
    return max((offence.late_s for offence in found), default=0.0)


def _nothing(key: str, *, stored: bool) -> Write:
    return Write(
        key=key,
        value=None,
        node="",
        start=-INFINITE,
        end=-INFINITE,
        cached="delete",
        stored=stored,
        store_start=-INFINITE,
        store_end=-INFINITE,
        by="the beginning",
    )


class Journal:
    """What one process did: appended from any thread, saved at its end."""

    def __init__(self) -> None:
        self.writes: list[Write] = []
        self.reads: list[Read] = []

    def save(self, path: Path) -> None:
        """Write everything to a file, whole or not at all."""
        kept = {
            "writes": [asdict(write) for write in self.writes],
            "reads": [[r.key, r.value, r.node, r.start, r.end, r.by] for r in self.reads],
        }
        new = path.with_name(path.name + ".new")
        new.write_text(json.dumps(kept))
        new.replace(path)

    def load(self, path: Path) -> None:
        """Add what another process saved."""
        kept = json.loads(path.read_text())
        self.writes += [Write(**write) for write in kept["writes"]]
        self.reads += [Read(*read) for read in kept["reads"]]


def now() -> float:
    """The clock of histories: the same for all processes of a host."""
    return time.clock_gettime(time.CLOCK_MONOTONIC)
