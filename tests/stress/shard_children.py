"""The processes of the store's stress tests; run as ``python -m tests.stress.shard_children``.

Roles: ``write`` (until the stop word), ``read`` (so many reads, or until the stop word) and
``kill``, a small process that forks writers, kills each in the middle of its work and checks what
the next one finds. Each prints one JSON object as its last line.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from kamacache.clock import boottime_ms, boottime_s
from kamacache.config import GroupSpec
from kamacache.node.readable import wait_readable
from kamacache.store import (
    NEGATIVE,
    Answer,
    NearCache,
    ShardIdentity,
    ShardPaths,
    ShardWriter,
    make_lookup,
    open_for_reading,
    open_writer,
    touch_of,
)
from tests.store.shards import check_accounting, live_by_segment
from tests.stress.journal import STOP, Journal, Operations

SEED = 0xA77AC
BOOT_ID = "stress"
HOT_KEYS = 32
REPORT_DEADLINE_S = 30.0


@dataclass(frozen=True)
class Setting:
    """What all processes of one test agree on; travels as JSON on the command line."""

    shm_dir: str
    eviction: str
    cache_bytes: int
    keys: int
    near: bool = True
    reads: int = 0
    kills: int = 0
    seed: int = 1

    def spec(self) -> GroupSpec:
        return GroupSpec(name="g", cache_bytes=self.cache_bytes, eviction=self.eviction)

    def open_journal(self, *, create: bool = False) -> Journal:
        return Journal(Path(self.shm_dir) / "journal", self.keys, create=create)

    def open_writer(self) -> ShardWriter:
        return open_writer(self.shm_dir, self.spec(), 0, 1, SEED, BOOT_ID)

    def operations(self, writer: ShardWriter | None = None) -> Operations:
        identity = ShardIdentity(self.spec(), 0, 1, SEED, BOOT_ID)
        return Operations(identity.geometry().value_bytes_max)

    def command(self, role: str) -> list[str]:
        return [sys.executable, "-m", __name__, role, json.dumps(asdict(self))]


def choose(numbers: random.Random, keys: int) -> int:
    return numbers.randrange(HOT_KEYS if numbers.random() < 0.5 else keys)


def write(
    setting: Setting, writer: ShardWriter, journal: Journal, numbers: random.Random
) -> dict[str, int]:
    """Do the next operation of one key after another until told to stop."""
    words, operations = journal.words, setting.operations()
    done = 0
    while not words[STOP]:
        k = choose(numbers, setting.keys)
        n = words[journal.attempt(k)] + 1
        answer, key, ttl_ms = operations.answer(k, n), operations.key(k), operations.ttl_ms(k, n)
        expiry_ms = boottime_ms() + ttl_ms if ttl_ms else 0
        words[journal.expiry(k, n)] = expiry_ms
        words[journal.attempt(k)] = n
        mirror = operations.mirror(k, n)
        if answer is None and n % 2:
            writer.drop_older(key, writer.now())
        elif answer is None:
            writer.delete(key)
        elif isinstance(answer, bytes):
            writer.put(key, answer, expiry_ms, mirror=mirror)
        else:
            writer.put(key, b"", expiry_ms, negative=True, mirror=mirror)
        words[journal.acknowledged(k)] = n
        done += 1
        if done % 500 == 0:
            writer.maintain()
    return {"operations": done, **writer.stats()}


@dataclass
class Reader:
    """One reading process: what it saw."""

    reads: int = 0
    hits: int = 0
    near_hits: int = 0
    longest_gap_s: float = 0.0
    wrong: list[str] = field(default_factory=list)

    def run(self, setting: Setting) -> None:
        paths = ShardPaths.of(setting.shm_dir, "g", 0)
        arena = open_for_reading(paths, ShardIdentity(setting.spec(), 0, 1, SEED, BOOT_ID))
        near = NearCache(10_000, 32 << 20) if setting.near else None
        lookup = make_lookup((arena,), hash_seed=SEED, touch=touch_of(setting.eviction), near=near)
        journal, operations = setting.open_journal(), setting.operations()
        words, get = journal.words, lookup.get
        numbers = random.Random(setting.seed)
        # Of each key the last operation that was seen and what it stored: the quick check.
        last: list[tuple[int, Answer]] = [(0, None)] * setting.keys
        keys = [operations.key(k) for k in range(setting.keys)]
        plan = [choose(numbers, setting.keys) for _ in range(65_536)]
        last_hit_s = boottime_s()
        while not words[STOP] and (not setting.reads or self.reads < setting.reads):
            for k in plan:
                since = words[3 + 2 * k]
                now_s = boottime_s()
                answer = get(keys[k])
                if answer is None:
                    continue
                self.hits += 1
                if now_s - last_hit_s > self.longest_gap_s:
                    self.longest_gap_s = now_s - last_hit_s
                last_hit_s = now_s
                n, expected = last[k]
                expiry_ms = words[journal.expiry(k, n)]
                if n >= since and answer == expected and not 0 < expiry_ms <= now_s * 1000:
                    continue
                n, wrong = journal.judge(operations, k, answer, since, int(now_s * 1000))
                if wrong and len(self.wrong) < 20:
                    self.wrong.append(f"key {k}: {wrong}")
                last[k] = (n, answer)
            self.reads += len(plan)
        self.near_hits = lookup.counts()[0]


def check_adopted(setting: Setting, writer: ShardWriter, journal: Journal) -> list[str]:
    """Return what the shard holds that it must not, as its new owner sees it."""
    operations, wrong = setting.operations(), []
    for k in range(setting.keys):
        now_ms = boottime_ms()
        answer = writer.get(operations.key(k))
        if answer is not None:
            since = journal.words[journal.acknowledged(k)]
            n, found = journal.judge(operations, k, answer, since, now_ms)
            if found:
                wrong.append(f"key {k}: {found}")
            held = writer.held(operations.key(k))
            # A value of 8 bytes says of which operation it is.
            whole = held is not None and held.value is not None and len(held.value) >= 8
            if held is not None and whole and held.mirror is not operations.mirror(k, n):
                wrong.append(f"key {k}: mirror is {held.mirror} after operation {n}")
    try:
        check_accounting(writer, crashed=True)
    except AssertionError as error:
        wrong.append(f"accounting: {error}")
    return wrong


def adopt(setting: Setting) -> tuple[ShardWriter, dict[str, object]]:
    """Become the writer; return it and what was found."""
    journal = setting.open_journal()
    began_s = time.monotonic()
    writer = setting.open_writer()
    open_s = time.monotonic() - began_s
    stats = writer.stats()
    live_bytes = sum(live_by_segment(writer.arena).values())
    report = {
        "open_s": open_s,
        "items": stats["items"],
        "drift_bytes": stats["live_bytes"] - live_bytes,
        "mirror_bytes": stats["mirror_bytes"],
        "wrong": check_adopted(setting, writer, journal),
    }
    return writer, report


def kill(setting: Setting) -> dict[str, object]:
    """Fork a writer, kill it in the middle of its work, fork the next one, ..."""
    numbers = random.Random(setting.seed)
    reports: list[dict[str, object]] = []
    for round_ in range(setting.kills + 1):
        receive_fd, send_fd = os.pipe()
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                os.close(receive_fd)
                writer, report = adopt(setting)
                os.write(send_fd, json.dumps(report).encode() + b"\n")
                os.close(send_fd)
                journal = setting.open_journal()
                write(setting, writer, journal, random.Random(setting.seed * 7919 + round_))
                status = 0
            finally:
                os._exit(status)
        os.close(send_fd)
        try:
            with os.fdopen(receive_fd, "rb") as pipe:
                ready = wait_readable((pipe.fileno(),), REPORT_DEADLINE_S)
                line = pipe.readline() if ready else b""
            if line:
                reports.append(json.loads(line))
                # Not synchronisation: the moment of death is what is random here.
                time.sleep(numbers.random() ** 2 * 0.02)
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        if not line:
            return {"failed": f"writer {round_} did not open", "reports": reports}
    return {"reports": reports}


def main() -> None:
    role, setting = sys.argv[1], Setting(**json.loads(sys.argv[2]))
    if role == "write":
        writer = setting.open_writer()
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        result: object = write(setting, writer, setting.open_journal(), random.Random(setting.seed))
        check_accounting(writer)
        writer.close()
    elif role == "read":
        reader = Reader()
        reader.run(setting)
        result = asdict(reader)
    elif role == "kill":
        result = kill(setting)
    else:
        raise SystemExit(f"no role {role!r}; {NEGATIVE!r}")
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
