"""Numbers and names as a person reads them: short, aligned, with their unit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

NOTHING = "–"  # noqa: RUF001 - an en dash stands where there is no number


def latency(us: float | None) -> str:
    """Return microseconds as µs, ms or s: three digits, at most two behind the point."""
    if us is None:
        return NOTHING
    if us == 0:
        return "0 µs"
    if us < 999.5:
        return f"{significant(us)} µs"
    if us < 999_500:
        return f"{significant(us / 1e3)} ms"
    return f"{significant(us / 1e6)} s"


def rate(per_s: float | None) -> str:
    """Return a number a second: exact below a million."""
    if per_s is None:
        return NOTHING
    if per_s < 99.95:
        return f"{per_s:.1f}"
    if per_s < 999_999.5:
        return f"{per_s:,.0f}"
    return f"{per_s / 1e6:.2f}M"


def share(value: float | None) -> str:
    """Return a share as a percentage that says 100 % only where it is all."""
    if value is None:
        return NOTHING
    percent = value * 100
    if 0 < percent < 0.1:
        return "<0.1%"
    if 99.9 < percent < 100:
        return ">99.9%"
    return f"{percent:.1f}%"


def amount(value: int) -> str:
    """Return a count: exact below a million, then three digits."""
    if value < 1_000_000:
        return f"{value:,}"
    return f"{significant(value / 1e6)}M" if value < 999_500_000 else f"{significant(value / 1e9)}G"


def memory(size_bytes: int) -> str:
    """Return bytes as MiB or GiB, three digits."""
    mib = size_bytes / 2**20
    if mib < 1023.5:
        return f"{significant(mib)} MiB"
    return f"{significant(mib / 1024)} GiB"


def seconds(value: float) -> str:
    """Return a duration: 7.5 s, 2:05 min, 1:02:05 h."""
    if value < 99.95:
        return f"{value:.1f} s"
    whole = round(value)
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02} min"
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02} h"


def ratio(value: float | None) -> str:
    """Return a ratio: 0.012, 0.98, 1.25, 12.5, 125."""
    if value is None:
        return NOTHING
    if value < 0.0995:
        return f"{value:.2g}"
    return f"{value:.2f}" if value < 9.995 else significant(value)


def significant(value: float) -> str:
    """Return three digits: 1.23, 12.3, 123; never an exponent."""
    if value < 9.995:
        return f"{value:.2f}"
    if value < 99.95:
        return f"{value:.1f}"
    return f"{value:,.0f}"


def shorten(text: str, chars: int) -> str:
    """Return ``text`` with its middle left out where it is longer than ``chars``."""
    if len(text) <= chars:
        return text
    tail = (chars - 1) // 2
    return f"{text[: chars - 1 - tail]}…{text[len(text) - tail :]}"


def labels(targets: Sequence[str]) -> dict[str, str]:
    """Return a short name of each target: its scheme, numbered where several have the same."""
    schemes = [target.partition(":")[0] for target in targets]
    numbers: Counter[str] = Counter()
    named = {}
    for target, scheme in zip(targets, schemes, strict=True):
        numbers[scheme] += 1
        several = schemes.count(scheme) > 1
        named[target] = f"{scheme} {numbers[scheme]}" if several else scheme
    return named
