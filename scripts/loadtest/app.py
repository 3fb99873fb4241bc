"""A node's app for load tests: groups whose getter takes as long as it is told to.

*Process*: each worker of the node. Run it with::

    KAMACACHE_LOADTEST_GETTER_MS=5 kamacache-node --workers 8 --app scripts.loadtest.app:groups

The groups: ``load`` (a getter that blocks, as a database driver does), ``load-async`` (an
``async def``) and ``plain`` (no getter). Any key exists.

| variable | default | |
|---|---|---|
| KAMACACHE_LOADTEST_GETTER_MS | 0 | MS, exponential:MS or lognormal:MS:SIGMA: of one load |
| KAMACACHE_LOADTEST_VALUE_SIZE | 100 | as ``--value-size`` of the load test |
| KAMACACHE_LOADTEST_CACHE_BYTES | 64MiB | of each group |
| KAMACACHE_LOADTEST_TTL | | seconds; without it values do not expire |
| KAMACACHE_LOADTEST_SEED | 1 | of the times and sizes |
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Mapping
from typing import Any

import kamacache
from kamacache.errors import ConfigError
from scripts.loadtest.operations import Delay
from scripts.loadtest.sizes import Values, parse_sizes

PREFIX = "KAMACACHE_LOADTEST_"


class Database:
    """What the getters pretend to ask."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        """Read the variables; raises `ConfigError`, which the node shows."""
        try:
            self._delay = Delay(environment.get(f"{PREFIX}GETTER_MS", "0"))
            self._sizes = parse_sizes(environment.get(f"{PREFIX}VALUE_SIZE", "100"))
            self._seed = int(environment.get(f"{PREFIX}SEED", "1"))
        except ValueError as error:
            raise ConfigError(f"{PREFIX}...: {error}") from error
        self._local = threading.local()

    def load(self, key: str | bytes) -> bytes:
        """Wait in this thread, return a value."""
        delay_s, value = self._next()
        if delay_s:
            time.sleep(delay_s)
        return value

    async def aload(self, key: str | bytes) -> bytes:
        """Wait on the loop, return a value."""
        delay_s, value = self._next()
        if delay_s:
            await asyncio.sleep(delay_s)
        return value

    def _next(self) -> tuple[float, bytes]:
        # numpy's generators are not for several threads at once, and a fork copies them: each
        # thread of each process has its own.
        local = self._local
        if getattr(local, "pid", None) != os.getpid():
            import numpy as np

            local.pid = os.getpid()
            local.random = np.random.default_rng([self._seed, local.pid, threading.get_ident()])
            local.values = Values(self._sizes, local.random)
        return self._delay.draw(local.random), local.values.next()


def make_groups(environment: Mapping[str, str]) -> list[kamacache.Group]:
    """Return the groups that the variables ask for."""
    database = Database(environment)
    text = environment.get(f"{PREFIX}TTL")
    try:
        ttl = None if text is None else float(text)
    except ValueError as error:
        raise ConfigError(f"{PREFIX}TTL is {text!r}; give seconds") from error
    settings: dict[str, Any] = {
        "cache_bytes": environment.get(f"{PREFIX}CACHE_BYTES", "64MiB"),
        "ttl": ttl,
    }
    return [
        kamacache.Group("load", getter=database.load, **settings),
        kamacache.Group("load-async", getter=database.aload, **settings),
        kamacache.Group("plain", **settings),
    ]


def groups() -> list[kamacache.Group]:
    """Return the groups; the node's ``--app`` names this function."""
    return make_groups(os.environ)
