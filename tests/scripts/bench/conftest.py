"""The benchmarks run as files, with their own folder first on the path; so do their tests."""

from __future__ import annotations

import sys
from pathlib import Path

BENCHMARKS = str(Path(__file__).resolve().parents[3] / "scripts" / "bench")

if BENCHMARKS not in sys.path:
    sys.path.append(BENCHMARKS)
