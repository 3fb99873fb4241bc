"""Which key a request asks for: uniform, zipf, a hot set that moves, or a trace.

*Process*: each load process draws its own; the parent only checks the text. *Invariants*: the same
seed draws the same keys; memory does not grow with the number of keys. Draws come in blocks from
numpy, at some ten nanoseconds a key, so that the generator is not what is measured.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from scripts.loadtest.limits import FILE_BYTES_MAX, THETA_MAX, TRACE_KEYS_MAX

FORMS: Final = "uniform, zipf:THETA, hotset:SHARE:KEYS:SHIFT_S or trace:FILE"
SHIFT_S_MAX: Final = 86_400.0

Ranks = npt.NDArray[np.int64]


class Popularity(Protocol):
    """A distribution over the keys 0 to keys - 1."""

    def draw(self, count: int, at_s: float) -> Ranks:
        """Return the keys of the next requests, made ``at_s`` seconds after the start."""


class Uniform:
    """Each key is as likely as any other."""

    def __init__(self, keys: int, random: np.random.Generator) -> None:
        self._keys = keys
        self._random = random

    def draw(self, count: int, at_s: float) -> Ranks:
        """Return keys."""
        return self._random.integers(0, self._keys, count)


class Zipf:
    """Key k (from 0) is asked for in proportion to (k + 1) ** -theta, for any theta from 0 on.

    By rejection-inversion: W. Hörmann and G. Derflinger, "Rejection-inversion to generate variates
    from monotone discrete distributions", ACM TOMACS 6 (1996) 169-184. The density is bounded by
    its integral, which can be inverted, so that there is no table, whose size would be the number
    of keys, and no sum over all keys; at most one draw in four is rejected, most often few. Unlike
    Gray's approximation, which YCSB uses, it is exact, and theta may be 1 and more.
    """

    def __init__(self, keys: int, theta: float, random: np.random.Generator) -> None:
        self._keys = keys
        self._theta = theta
        self._random = random
        one, last, two = self._integral(np.array([1.5, keys + 0.5, 2.5]))
        self._first = one - 1.0  # H(1.5) - h(1): where the integral begins
        self._last = last
        # What lies so near above its key is taken without another look.
        self._near = 2.0 - float(self._inverse(np.array([two - 2.0**-theta]))[0])

    def draw(self, count: int, at_s: float) -> Ranks:
        """Return keys."""
        drawn: list[Ranks] = []
        missing = count
        while missing > 0:
            wanted = missing + missing // 8 + 8
            u = self._last + self._random.random(wanted) * (self._first - self._last)
            x = self._inverse(u)
            # Rounding may carry x past the last key.
            k = np.clip(np.floor(x + 0.5), 1.0, self._keys)
            taken = (k - x <= self._near) | (u >= self._integral(k + 0.5) - k**-self._theta)
            drawn.append(k[taken].astype(np.int64) - 1)
            missing -= drawn[-1].size
        return np.concatenate(drawn)[:count]

    def _integral(self, x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Return the integral of x ** -theta, 0 at 1: (x ** (1 - theta) - 1) / (1 - theta)."""
        log_x = np.log(x)
        t = (1.0 - self._theta) * log_x
        # expm1(t) / t, whose limit at theta = 1 is 1.
        return log_x * np.where(np.abs(t) > _TINY, np.expm1(t) / _nonzero(t), 1.0 + t / 2.0)

    def _inverse(self, y: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        t = np.maximum(y * (1.0 - self._theta), -1.0 + 1e-15)  # rounding may carry it below -1
        return np.exp(y * np.where(np.abs(t) > _TINY, np.log1p(t) / _nonzero(t), 1.0 - t / 2.0))


class HotSet:
    """A share of the requests goes to a few keys, which move on every few seconds."""

    def __init__(
        self,
        keys: int,
        share: float,
        hot_keys: int,
        shift_s: float,
        random: np.random.Generator,
    ) -> None:
        self._keys = keys
        self._share = share
        self._hot_keys = min(hot_keys, keys)
        self._shift_s = shift_s
        self._random = random

    def draw(self, count: int, at_s: float) -> Ranks:
        """Return keys; the set begins at key 0 and moves on by its size."""
        shifts = int(at_s / self._shift_s) if self._shift_s else 0
        first = shifts * self._hot_keys % self._keys
        hot = self._random.random(count) < self._share
        within = np.where(
            hot,
            self._random.integers(0, self._hot_keys, count),
            # The other keys are those behind the set, around the end.
            self._random.integers(self._hot_keys % self._keys, self._keys, count),
        )
        return (first + within) % self._keys


class Spec(Protocol):
    """What ``--popularity`` says, checked."""

    def start(self, keys: int, random: np.random.Generator) -> Popularity:
        """Return the distribution for one load process."""


class _UniformSpec:
    def start(self, keys: int, random: np.random.Generator) -> Popularity:
        return Uniform(keys, random)


class _ZipfSpec:
    def __init__(self, theta: float) -> None:
        self._theta = theta

    def start(self, keys: int, random: np.random.Generator) -> Popularity:
        return Zipf(keys, self._theta, random) if self._theta else Uniform(keys, random)


class _HotSetSpec:
    def __init__(self, share: float, hot_keys: int, shift_s: float) -> None:
        self._share, self._hot_keys, self._shift_s = share, hot_keys, shift_s

    def start(self, keys: int, random: np.random.Generator) -> Popularity:
        return HotSet(keys, self._share, self._hot_keys, self._shift_s, random)


class TraceSpec:
    """The keys of a file, in its order."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def start(self, keys: int, random: np.random.Generator) -> Popularity:
        """Never called: a trace names keys, it does not draw them."""
        raise TypeError("a trace is read, not drawn")


def parse_popularity(text: str) -> Spec:
    """Return what a ``--popularity`` asks for; raises ValueError with a sentence."""
    kind, _, rest = text.partition(":")
    if kind == "trace" and rest:
        return TraceSpec(Path(rest))
    if kind == "uniform" and not rest:
        return _UniformSpec()
    parts = rest.split(":")
    if kind == "zipf" and len(parts) == 1:
        theta = _number(parts[0], "zipf's THETA", THETA_MAX)
        return _ZipfSpec(theta)
    if kind == "hotset" and len(parts) == 3:
        share = _number(parts[0], "hotset's SHARE", 1.0)
        shift_s = _number(parts[2], "hotset's SHIFT_S", SHIFT_S_MAX)
        if not parts[1].isascii() or not parts[1].isdigit() or not int(parts[1]):
            raise ValueError(f"hotset's KEYS is {parts[1]!r}; give a whole number of 1 or more")
        return _HotSetSpec(share, int(parts[1]), shift_s)
    raise ValueError(f"{text!r} is no popularity; give {FORMS}")


def read_trace(path: Path, most_keys: int = TRACE_KEYS_MAX) -> list[bytes]:
    """Return the keys of a trace (text, one key a line; also .gz); raises ValueError."""
    from scripts.replay import read_trace as read

    try:
        if path.is_file() and path.stat().st_size > FILE_BYTES_MAX:
            raise ValueError(f"{path} is larger than {FILE_BYTES_MAX >> 20} MiB; cut it")
        keys = read(path)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"the trace {path} cannot be read: {reason}") from error
    if len(keys) > most_keys:
        raise ValueError(f"{path} has {len(keys):,} keys, the limit is {most_keys:,}; cut it")
    return keys


def distinct(keys: Sequence[bytes]) -> list[bytes]:
    """Return the keys of a trace once each, in the order they first come."""
    return list(dict.fromkeys(keys))


_TINY: Final = 1e-8


def _nonzero(t: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.where(np.abs(t) > _TINY, t, 1.0)


def _number(text: str, name: str, most: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= most:
        raise ValueError(f"{name} is {text!r}; give a number from 0 to {most:g}")
    return value
