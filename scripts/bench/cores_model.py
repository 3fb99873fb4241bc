"""What many cores would carry, computed from the CPU that a request takes in each role.

*Process*: `many_cores.py`, and `standard_page.py` from its JSON; nothing here measures.

The model. A request of some kind takes ``u[role]`` CPU microseconds in each role it passes. On
``C`` cores, with ``W`` workers and ``F`` fronts, a rate is possible as long as all of these hold:

- *cores*: the sum over all roles is at most C cores;
- *a worker* and *a front* each have one event loop under one GIL, so at most one core. The busiest
  worker has, beside its even share 1/W of the keys, the hottest key: `HOTTEST_KEY_SHARE` of all
  requests. A front has 1/F of the connections;
- *memory*: a hit that finds nothing in the processor's caches moves `HIT_BYTES`; a machine moves
  `MEMORY_BYTES_PER_S_A_CORE` for each of its cores, up to `MEMORY_BYTES_PER_S_MAX`.

The first to give out says what saturates. *Assumed*, and not to be seen on 2 cores: that the CPU a
request takes in a role does not rise with the number of cores (no lock is shared between processes,
and a hit writes one byte, only where that changes it; but a line that a worker wrote is fetched
from its core's cache, and across sockets that takes longer); that applications have processes
enough to use the cores; and that network and kernel keep up with the fronts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

CORES: Final = (8, 16, 64)
WORKERS_USUAL, FRONTS_USUAL = 8, 4
HOTTEST_KEY_SHARE: Final = 0.065  # zipf of theta 0.99 over a million keys
HIT_BYTES: Final = 6 * 64  # index, record of 136 bytes on 3 or 4 lines, access byte: whole lines
MEMORY_BYTES_PER_S_A_CORE: Final = 5e9
MEMORY_BYTES_PER_S_MAX: Final = 150e9  # of one socket

Roles = Mapping[str, float]


@dataclass(frozen=True)
class Workload:
    """A mix of the kinds that were measured; shares sum to 1."""

    name: str
    mix: Mapping[str, float]
    clients_elsewhere: bool = False  # then their CPU is not this machine's


WORKLOADS: Final = (
    Workload("local hits, near cache off", {"local hit, near cache off": 1.0}),
    Workload("local hits, near cache on", {"local hit, near cache on": 1.0}),
    Workload("local, 95 % hits, 5 % sets", {"local hit, near cache off": 0.95, "local set": 0.05}),
    Workload("local sets", {"local set": 1.0}),
    Workload("front, Gets of hits", {"front Get, 16 callers": 1.0}, clients_elsewhere=True),
    Workload(
        "front, 95 % Gets, 5 % Sets",
        {"front Get, 16 callers": 0.95, "front Set, 16 callers": 0.05},
        clients_elsewhere=True,
    ),
)


@dataclass(frozen=True)
class Row:
    """What one machine carries of one workload."""

    cores: int
    workers: int
    fronts: int
    workload: str
    requests_per_s: float
    first: str  # what saturates first
    limits: dict[str, float]  # requests a second that each part carries
    fronts_needed: int  # so that cores or memory saturate before workers and fronts do
    workers_needed: int | None  # None: no number does, the hottest key's worker gives out first

    def as_dict(self) -> dict[str, Any]:
        """Return this as JSON has it; what has no limit is left out."""
        whole = asdict(self)
        whole["limits"] = {k: v for k, v in self.limits.items() if math.isfinite(v)}
        return whole


def mixed(roles: Mapping[str, Roles], workload: Workload) -> dict[str, float]:
    """Return the CPU us of a request of the mix, by role."""
    used: dict[str, float] = {}
    for kind, share in workload.mix.items():
        for role, us in roles[kind].items():
            used[role] = used.get(role, 0.0) + share * us
    if workload.clients_elsewhere:
        used["client"] = 0.0
    return used


def busiest_share(workers: int) -> float:
    """Return the share of all requests that the busiest worker's keys have."""
    return HOTTEST_KEY_SHARE + (1 - HOTTEST_KEY_SHARE) / workers


def per_s(cores: float, us: float) -> float:
    """Return the requests a second that so many cores carry."""
    return cores * 1e6 / us if us > 0 else math.inf


def limits_of(used: Roles, cores: int, workers: int, fronts: int) -> dict[str, float]:
    """Return the requests a second that each part carries."""
    memory = min(cores * MEMORY_BYTES_PER_S_A_CORE, MEMORY_BYTES_PER_S_MAX)
    return {
        "cores": per_s(cores, sum(used.values())),
        "the busiest worker": per_s(1 / busiest_share(workers), used.get("worker", 0.0)),
        "fronts": per_s(fronts, used.get("front", 0.0)),
        "memory": memory / HIT_BYTES,
    }


def needed(used: Roles, cores: int) -> tuple[int, int | None]:
    """Return how many fronts and workers leave cores or memory as what saturates first."""
    limits = limits_of(used, cores, 1, 1)
    goal = min(limits["cores"], limits["memory"])
    fronts = max(1, math.ceil(goal / limits["fronts"]))
    # A worker's share falls to the hottest key's and no further.
    spare = 1e6 / (goal * used["worker"]) - HOTTEST_KEY_SHARE if used.get("worker") else 1.0
    workers = max(1, math.ceil((1 - HOTTEST_KEY_SHARE) / spare)) if spare > 0 else None
    return fronts, workers


def table(
    roles: Mapping[str, Roles],
    cores: Sequence[int] = CORES,
    workloads: Sequence[Workload] = WORKLOADS,
) -> list[Row]:
    """Return a row for each workload and machine; kinds that were not measured are left out.

    ``roles``: the CPU us of an operation by kind and role, as `many_cores.py` measures it.
    """
    rows = []
    for workload in workloads:
        if not workload.mix.keys() <= roles.keys():
            continue
        used = mixed(roles, workload)
        for count in cores:
            limits = limits_of(used, count, WORKERS_USUAL, FRONTS_USUAL)
            fronts_needed, workers_needed = needed(used, count)
            first = min(limits, key=limits.__getitem__)
            rows.append(
                Row(
                    cores=count,
                    workers=WORKERS_USUAL,
                    fronts=FRONTS_USUAL,
                    workload=workload.name,
                    requests_per_s=limits[first],
                    first=first,
                    limits=limits,
                    fronts_needed=fronts_needed,
                    workers_needed=workers_needed,
                )
            )
    return rows


def as_text(rows: Sequence[Row]) -> str:
    """Return the table for a terminal."""
    lines = ["  cores  workload                       requests/s  saturates first     would take"]
    for row in rows:
        workers = "no number of" if row.workers_needed is None else row.workers_needed
        lines.append(
            f"  {row.cores:5}  {row.workload:29} {row.requests_per_s:11,.0f}  {row.first:18}"
            f"  {workers} workers, {row.fronts_needed} fronts"
        )
    return "\n".join(lines)
