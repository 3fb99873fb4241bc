"""A process attached to a node whose processes are killed: writes, reads, loads, and judges.

*Judgement*: a key is written by one process only. After an acknowledged set a get has that value;
after an acknowledged delete, or in a later life of the node, what the getter loads; while no node
serves, what this process's own getter gives, where it has one. A key whose write failed is left
alone: the write may still happen. Any other value is wrong; any error is a `KamaCacheError`, and
none comes later than the deadline and what a busy machine adds.

Prints one JSON object when the file ``stop`` appears.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import kamacache

TIMEOUT_S = 5.0
KEYS = 40
VALUE_BYTES = (1, 100, 5_000, 60_000)


class Client:
    """One process's keys, and what it found."""

    def __init__(self, number: int, here: Path, fallback: str) -> None:
        self.here = here
        self.name = f"client{number}"
        self.draw = random.Random(number)
        self.group = kamacache.Group(
            "scores",
            getter=(lambda key: b"own " + key.encode()) if fallback == "getter" else None,
            fallback=fallback,
            near_cache_items=0 if number % 2 else 1000,
        )
        self.falls_back = fallback == "getter"
        self.held: dict[int, tuple[str, bytes | None, int]] = {}  # key, value, life of the node
        self.names = 0
        self.found: dict[str, Any] = {"calls": 0, "errors": {}, "slowest_s": 0.0, "wrong": []}

    def life(self) -> int:
        """A number that changes before and after each kill of the supervisor."""
        return (self.here / "lives").stat().st_size

    def call(self, method: str, *args: Any) -> Any:
        """Call the group, sync or async; None when it failed."""
        began_s = time.monotonic()
        try:
            if self.draw.random() < 0.2:
                return asyncio.run(getattr(self.group, "a" + method)(*args, timeout=TIMEOUT_S))
            return getattr(self.group, method)(*args, timeout=TIMEOUT_S)
        except kamacache.KamaCacheError as error:
            kind = type(error).__name__
            self.found["errors"][kind] = self.found["errors"].get(kind, 0) + 1
            time.sleep(0.002)
            return None
        finally:
            self.found["calls"] += 1
            took_s = time.monotonic() - began_s
            self.found["slowest_s"] = max(self.found["slowest_s"], took_s)

    def fresh(self, place: int) -> None:
        """Give a place a key that nobody has written."""
        self.names += 1
        self.held[place] = f"{self.name}-{place}-{self.names}", None, self.life()

    def write(self, place: int) -> None:
        key = self.held[place][0]
        size = self.draw.choice(VALUE_BYTES)
        value = (f"set {key} {self.draw.random()} ".encode() * (size // 20 + 1))[: size + 30]
        life = self.life()
        if self.draw.random() < 0.8:
            failed = self.failed("set", key, value)
            self.held[place] = key, value, life
        else:
            failed = self.failed("delete", key)
            self.held[place] = key, None, life
        if failed:
            self.fresh(place)

    def failed(self, method: str, *args: Any) -> bool:
        before = sum(self.found["errors"].values())
        self.call(method, *args)
        return bool(sum(self.found["errors"].values()) > before)

    def read(self, place: int) -> None:
        key, value, life = self.held[place]
        got = self.call("get", key)
        if got is None:
            return
        allowed = set()
        if value is not None:
            allowed.add(value)
        if value is None or self.life() != life:
            allowed.add(b"loaded " + key.encode())
        if self.falls_back:
            allowed.add(b"own " + key.encode())
        if got not in allowed:
            self.found["wrong"].append([key, got[:60].decode(), str(value)[:60], life, self.life()])

    def load(self) -> None:
        """Read keys that all processes read and nobody writes; those of ``outer`` are nested."""
        number = self.draw.randrange(100_000)
        for key in (f"load-{number % 200}", f"nest-{number}"):
            got = self.call("get", key)
            expected = {b"loaded " + key.encode(), b"nested loaded deep-" + key.encode()}
            if self.falls_back:
                expected.add(b"own " + key.encode())
            if got is not None and got not in expected:
                self.found["wrong"].append([key, got[:60].decode()])

    def run(self) -> None:
        for place in range(KEYS):
            self.fresh(place)
        while not (self.here / "stop").exists():
            for _ in range(20):
                place = self.draw.randrange(KEYS)
                turn = self.draw.random()
                if turn < 0.3:
                    self.write(place)
                elif turn < 0.9:
                    self.read(place)
                else:
                    self.load()
        print(json.dumps(self.found))  # noqa: T201


if __name__ == "__main__":
    Client(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]).run()
