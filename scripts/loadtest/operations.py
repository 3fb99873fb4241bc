"""What one request does to a target: read, write or delete one key or a batch.

*Process*: load processes. *Invariants*: a read of a target that loads nothing by itself is what
its application does: a get, and where nothing came the (simulated) load and a set; all of it is
the read's latency, as it is where the target loads. What a request raises is the caller's to count.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import numpy as np

from scripts.loadtest.limits import GETTER_MS_MAX, SIGMA_MAX
from scripts.loadtest.sizes import Values
from scripts.loadtest.targets.base import AsyncSession, SyncSession

READ: Final = 0
WRITE: Final = 1
DELETE: Final = 2
KINDS: Final = ("read", "write", "delete")

WEIGHT_MAX: Final = 1_000_000
DELAY_FORMS: Final = "MS, exponential:MS or lognormal:MS:SIGMA"

Keys = bytes | list[bytes]  # a batch is a list, its keys distinct


class Mix(NamedTuple):
    """How many of the requests are of each kind, as weights."""

    read: int
    write: int
    delete: int

    def shares(self) -> tuple[float, float]:
        """Return the share of reads, and of reads and writes."""
        total = sum(self)
        return self.read / total, (self.read + self.write) / total

    def __str__(self) -> str:
        return ":".join(map(str, self))


def parse_mix(text: str) -> Mix:
    """Return what ``--mix READ[:WRITE[:DELETE]]`` asks for; raises ValueError with a sentence."""
    parts = text.split(":")
    if not 1 <= len(parts) <= 3 or not all(
        part.isascii() and part.isdigit() and len(part) <= 7 for part in parts
    ):
        raise ValueError(f"{text!r} is no mix; give READ:WRITE:DELETE as weights, such as 90:9:1")
    weights = [int(part) for part in parts] + [0] * (3 - len(parts))
    if not sum(weights) > 0 or max(weights) > WEIGHT_MAX:
        raise ValueError(f"the weights {text!r} are all 0, or one is above {WEIGHT_MAX:,}")
    return Mix(*weights)


class Delay:
    """How long a getter is said to take: always the same, exponential, or lognormal."""

    def __init__(self, text: str) -> None:
        """Check; raises ValueError with a sentence."""
        kind, _, rest = text.partition(":")
        parts = [text] if kind not in ("exponential", "lognormal") else rest.split(":")
        if len(parts) != (2 if kind == "lognormal" else 1):
            raise ValueError(f"{text!r} is no time of a getter; give {DELAY_FORMS}")
        self._mean_s = _number(parts[0], "the getter's MS", GETTER_MS_MAX) / 1000
        self._sigma = _number(parts[1], "the getter's SIGMA", SIGMA_MAX) if parts[1:] else 0.0
        self._exponential = kind == "exponential"

    def draw(self, random: np.random.Generator) -> float:
        """Return seconds."""
        drawn = self._mean_s
        if self._exponential:
            drawn = random.exponential(self._mean_s)
        elif self._sigma and self._mean_s:
            mu = math.log(self._mean_s) - self._sigma**2 / 2
            drawn = random.lognormal(mu, self._sigma)
        return min(float(drawn), GETTER_MS_MAX / 1000)


class Filling(NamedTuple):
    """What a read does where nothing came."""

    delay: Callable[[], float] | None  # seconds that the application's own load takes
    ttl_s: float | None


class Operator:
    """Runs requests on a session that blocks."""

    def __init__(
        self,
        session: SyncSession,
        values: Values,
        *,
        ttl_s: float | None,
        filling: Filling | None,
    ) -> None:
        self._session = session
        self._values = values
        self._ttl_s = ttl_s
        self._filling = filling

    def run(self, kind: int, keys: Keys) -> int:
        """Do it; return how many keys came with a value."""
        session = self._session
        if kind == READ:
            if isinstance(keys, bytes):
                try:
                    found = session.get(keys) is not None
                except session.not_found:
                    found = False
                return 1 if found else self.fill(keys)
            missing = session.get_many(keys)
            if missing:
                self.fill(list(missing))
            return len(keys) - len(missing)
        if kind == WRITE:
            self._store(keys)
        elif isinstance(keys, bytes):
            session.delete(keys)
        else:
            session.delete_many(keys)
        return 0

    def fill(self, keys: Keys) -> int:
        """Store what a read did not find, where the target loads nothing; return 0."""
        if self._filling is not None:
            if self._filling.delay is not None:
                time.sleep(self._filling.delay())
            self._store(keys)
        return 0

    def store(self, keys: Sequence[bytes]) -> None:
        """Store keys before the test."""
        self._store(list(keys))

    def read(self, keys: Sequence[bytes]) -> None:
        """Read keys before the test, so that the target loads them."""
        self._session.get_many(keys)

    def _store(self, keys: Keys) -> None:
        if isinstance(keys, bytes):
            self._session.set(keys, self._values.next(), self._ttl_s)
        else:
            items = {key: self._values.next() for key in keys}
            self._session.set_many(items, self._ttl_s)


class AsyncOperator:
    """Runs requests on a session of the running loop; as `Operator` otherwise."""

    def __init__(
        self,
        session: AsyncSession,
        values: Values,
        *,
        ttl_s: float | None,
        filling: Filling | None,
    ) -> None:
        self._session = session
        self._values = values
        self._ttl_s = ttl_s
        self._filling = filling

    async def run(self, kind: int, keys: Keys) -> int:
        """Do it; return how many keys came with a value."""
        session = self._session
        if kind == READ:
            if isinstance(keys, bytes):
                try:
                    found = await session.get(keys) is not None
                except session.not_found:
                    found = False
                return 1 if found else await self.fill(keys)
            missing = await session.get_many(keys)
            if missing:
                await self.fill(list(missing))
            return len(keys) - len(missing)
        if kind == WRITE:
            await self._store(keys)
        elif isinstance(keys, bytes):
            await session.delete(keys)
        else:
            await session.delete_many(keys)
        return 0

    async def fill(self, keys: Keys) -> int:
        """As `Operator.fill`."""
        if self._filling is not None:
            if self._filling.delay is not None:
                await asyncio.sleep(self._filling.delay())
            await self._store(keys)
        return 0

    async def store(self, keys: Sequence[bytes]) -> None:
        """Store keys before the test."""
        await self._store(list(keys))

    async def read(self, keys: Sequence[bytes]) -> None:
        """Read keys before the test, so that the target loads them."""
        await self._session.get_many(keys)

    async def _store(self, keys: Keys) -> None:
        if isinstance(keys, bytes):
            await self._session.set(keys, self._values.next(), self._ttl_s)
        else:
            items = {key: self._values.next() for key in keys}
            await self._session.set_many(items, self._ttl_s)


def _number(text: str, name: str, most: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= most:
        raise ValueError(f"{name} is {text!r}; give a number from 0 to {most:g}")
    return value
