"""How large the values are that writes store: fixed, lognormal, or drawn from a list.

*Process*: load processes, and the node's app (`scripts.loadtest.app`) for what its getter returns.
Values are slices of one random buffer: incompressible, cheap to make, and of the given size; no
client looks into them.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from kamacache.limits import VALUE_BYTES_CEILING
from scripts.loadtest.limits import FILE_BYTES_MAX, SIGMA_MAX, SIZES_MAX

FORMS: Final = "BYTES, lognormal:MEAN:SIGMA or list:FILE"
DRAWN_AHEAD: Final = 256


class Sizes:
    """What ``--value-size`` says, checked."""

    def __init__(
        self, *, fixed: int | None = None, mu: float = 0.0, sigma: float = 0.0, listed: Path | None
    ) -> None:
        self._fixed = fixed
        self._mu, self._sigma = mu, sigma
        self._listed = None if listed is None else read_sizes(listed)

    @property
    def fixed_bytes(self) -> int | None:
        """The size, where all values have the same."""
        return self._fixed

    @property
    def mean_bytes(self) -> float:
        """About the mean size, for bounds."""
        if self._fixed is not None:
            return float(self._fixed)
        if self._listed is not None:
            return float(self._listed.mean())
        return math.exp(self._mu + self._sigma**2 / 2)

    def draw(self, count: int, random: np.random.Generator) -> list[int]:
        """Return sizes in bytes; a lognormal one is cut at the largest value there can be."""
        if self._fixed is not None:
            return [self._fixed] * count
        if self._listed is not None:
            drawn: list[int] = random.choice(self._listed, count).tolist()
            return drawn
        sizes = random.lognormal(self._mu, self._sigma, count)
        rounded: list[int] = np.clip(np.rint(sizes), 1, VALUE_BYTES_CEILING).astype(int).tolist()
        return rounded


class Values:
    """An endless row of values of one load process."""

    def __init__(self, sizes: Sizes, random: np.random.Generator) -> None:
        self._sizes = sizes
        self._random = random
        self._ahead: list[int] = []
        self._buffer = random.bytes(sizes.fixed_bytes or 1 << 16)
        self._fixed = None if sizes.fixed_bytes is None else self._buffer[: sizes.fixed_bytes]

    def next(self) -> bytes:
        """Return a value."""
        if self._fixed is not None:
            return self._fixed
        if not self._ahead:
            self._ahead = self._sizes.draw(DRAWN_AHEAD, self._random)
        size = self._ahead.pop()
        if size > len(self._buffer):
            self._buffer = self._random.bytes(min(2 * size, VALUE_BYTES_CEILING))
        return self._buffer[:size]


def parse_sizes(text: str) -> Sizes:
    """Return what a ``--value-size`` asks for; raises ValueError with a sentence."""
    kind, _, rest = text.partition(":")
    if kind == "list" and rest:
        return Sizes(listed=Path(rest))
    parts = rest.split(":")
    if kind == "lognormal" and len(parts) == 2:
        mean = _number(parts[0], "lognormal's MEAN", 1.0, float(VALUE_BYTES_CEILING))
        sigma = _number(parts[1], "lognormal's SIGMA", 0.0, SIGMA_MAX)
        # So that the mean of the values is MEAN, and not that of their logarithms.
        return Sizes(mu=math.log(mean) - sigma**2 / 2, sigma=sigma, listed=None)
    if text.isascii() and text.isdigit():
        size = int(text)
        if size > VALUE_BYTES_CEILING:
            raise ValueError(f"a value of {size} bytes; the limit is {VALUE_BYTES_CEILING}")
        return Sizes(fixed=size, listed=None)
    raise ValueError(f"{text!r} is no size of values; give {FORMS}")


def read_sizes(path: Path) -> npt.NDArray[np.int64]:
    """Return the sizes of a list, one a line; raises ValueError with a sentence."""
    try:
        if path.is_file() and path.stat().st_size > FILE_BYTES_MAX:
            raise ValueError(f"{path} is larger than {FILE_BYTES_MAX >> 20} MiB; cut it")
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ValueError(f"the list of sizes {path} cannot be read: {error.strerror}") from error
    sizes = []
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text:
            continue
        if not text.isdigit() or int(text) > VALUE_BYTES_CEILING:
            raise ValueError(
                f"{path}: line {number} is {text[:40].decode(errors='replace')!r}; "
                f"write bytes from 0 to {VALUE_BYTES_CEILING}, one a line"
            )
        sizes.append(int(text))
        if len(sizes) > SIZES_MAX:
            raise ValueError(f"{path} has more than {SIZES_MAX:,} sizes; cut it")
    if not sizes:
        raise ValueError(f"{path} holds no sizes; write one a line, in bytes")
    return np.array(sizes, dtype=np.int64)


def _number(text: str, name: str, least: float, most: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not least <= value <= most:
        raise ValueError(f"{name} is {text!r}; give a number from {least:g} to {most:g}")
    return value
