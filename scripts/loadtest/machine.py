"""What a load test ran on and with, for whoever reads its results later.

*Process*: the parent.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import psutil

import kamacache
from scripts.loadtest.targets.base import Target


def machine() -> dict[str, Any]:
    """Return processor, cores, memory, kernel, and how busy it was at the start."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count() or 1,
        "memory_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "load_1min": round(os.getloadavg()[0], 2),
    }


def versions(targets: Iterable[Target]) -> dict[str, str]:
    """Return the versions of Python, of this package, and of each target's two sides."""
    found = {
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "kamacache": kamacache.__version__,
        "numpy": np.__version__,
    }
    for target in targets:
        found[f"{target.name}, client"] = target.client
        found[f"{target.name}, server"] = target.server
    return found


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
