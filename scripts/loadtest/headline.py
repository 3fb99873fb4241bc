"""What was asked of the targets, in two lines: over the tables, and over the picture.

*Process*: the parent. The arguments are those of the JSON file; one that is missing is left out,
since other programs make results, too, and know less of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from scripts.loadtest import figures

TRACE: Final = "trace:"
CACHES: Final = {
    "warm": "stored before",
    "cold": "new to the target in each round",
    "as-is": "taken as they were",
}


def headline(arguments: Mapping[str, Any]) -> list[str]:
    """Return the workload, then how it was offered; fewer lines where less is known."""
    lines = [", ".join(_workload(arguments)), ", ".join(_offer(arguments))]
    return [line for line in lines if line]


def _workload(arguments: Mapping[str, Any]) -> list[str]:
    said = []
    if mix := arguments.get("mix"):
        said.append(f"mix {mix}")
    popularity, keys = arguments.get("popularity"), arguments.get("keys")
    if popularity and popularity.startswith(TRACE):
        said.append(popularity)
    elif popularity and keys:
        cache = CACHES.get(str(arguments.get("cache")))
        said.append(f"{popularity} over {figures.amount(keys)} keys{f' {cache}' if cache else ''}")
    if size := arguments.get("value_size"):
        said.append(f"values of {size} bytes" if str(size).isdigit() else f"values {size}")
    if (batch := arguments.get("batch") or 1) > 1:
        said.append(f"{batch:,} keys a request")
    if ttl_s := arguments.get("ttl_s"):
        said.append(f"ttl {ttl_s:g} s")
    return said


def _offer(arguments: Mapping[str, Any]) -> list[str]:
    said = []
    processes, concurrency = arguments.get("processes"), arguments.get("concurrency")
    rate, crew = arguments.get("rate"), ""
    if processes and concurrency:
        crew = f"{processes:,} process{'es' if processes > 1 else ''} of {concurrency:,} "
        each = "connection" if rate else "request"
        crew += f"{each}s" if concurrency > 1 else each
    if rate:
        said.append(f"open loop of {rate:,g} requests/s ({arguments.get('arrivals', 'even')})")
    elif crew:
        said.append("closed loop")
        crew += " at a time"
    if crew:
        said.append(crew)
    if (seed := arguments.get("seed")) is not None:
        said.append(f"seed {seed}")
    return said
