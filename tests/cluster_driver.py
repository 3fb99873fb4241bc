"""A process attached to a node of a cluster, told what to do by a test, and what it found.

One JSON line a command, one line an answer. It makes calls, in many threads or tasks at once, or
works: reads and writes of all kinds until it is told to stop, all of it written to a journal for
`tests.history`. Its groups have no getter of their own and raise where the node is gone, so every
load is a node's.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self

import kamacache
from kamacache.node.readable import wait_readable
from tests.cluster_app import NODE, PLACE, Database
from tests.history import Journal, Read, Write, now
from tests.node_process import ROOT

ANSWER_S = 40.0
ERRORS_MAX = 200  # kept in full by one process
FAILED_PAUSE_S = 0.05  # before a caller whose call failed makes the next
SIZES = (0, 0, 0, 50, 700, 9_000)  # of what a value has beyond its name


@dataclass(frozen=True)
class Answer:
    """How one call ended: with a value, or an error by its class's name. Times: `history.now`."""

    value: Any
    error: str | None
    message: str
    began_s: float
    ended_s: float

    @property
    def took_s(self) -> float:
        """How long it took."""
        return self.ended_s - self.began_s

    def good(self) -> Any:
        """Return the value; fails where there is none."""
        assert self.error is None, f"{self.error}: {self.message}"
        return self.value


@dataclass
class Work:
    """What a driver does with a group; shares are of all operations, the rest are gets."""

    group: str
    keys: list[str]
    seconds: float = 60.0  # at most; `Driver.stop` ends it
    threads: int = 2
    tasks: int = 0
    timeout_s: float = 5.0
    set_share: float = 0.15  # the database, then the cache
    drop_share: float = 0.03  # the cache alone
    replace_share: float = 0.03  # the database, then a delete of the cache
    remove_share: float = 0.03  # from both
    many_share: float = 0.05  # gets, and as many sets, of several keys
    pause_s: float = 0.001  # between two operations of one caller
    stored: bool = True  # whether there is a database
    seed: int = 0


@dataclass
class Found:
    """What a driver saw while it worked."""

    operations: int = 0
    slowest_s: float = 0.0
    errors: list[dict[str, Any]] = field(default_factory=list)  # caller, what, kind, began, took
    errors_count: int = 0

    def errors_of(self, caller: str) -> list[dict[str, Any]]:
        """Return the errors of one caller."""
        return [error for error in self.errors if error["caller"] == caller]


class Driver:
    """One attached process; a context manager that leaves nothing behind."""

    def __init__(self, run_dir: Path, node: str, place: Path, name: str) -> None:
        self.name = name
        self.journal_path = place / f"journal-{name}"
        self._stop = place / f"stop-{name}"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.cluster_driver", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "KAMACACHE_RUN_DIR": str(run_dir),
                NODE: node,
                PLACE: str(place),
            },
        )

    def ask(self, do: str, **what: Any) -> None:
        """Begin something; `answer` must follow."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **what}).encode() + b"\n")
        self.process.stdin.flush()

    def answer(self, deadline_s: float = ANSWER_S) -> Any:
        """Return what it has to say."""
        assert self.process.stdout is not None
        readable = wait_readable((self.process.stdout.fileno(),), deadline_s)
        assert readable, f"driver {self.name}: no answer within {deadline_s} s"
        line = self.process.stdout.readline()
        assert line, f"driver {self.name} ended"
        return json.loads(line)

    def call(self, group: str, method: str, *args: Any, **more: Any) -> Answer:
        """Make one call; ``args`` are texts, which become bytes where values are meant."""
        self.ask_call(group, method, *args, **more)
        return self.answers()[0]

    def ask_call(
        self,
        group: str,
        method: str,
        *args: Any,
        threads: int = 1,
        tasks: int = 0,
        at_s: float = 0.0,
        timeout_s: float = 10.0,
    ) -> None:
        """Begin one call in so many threads, or tasks, at ``at_s`` (`history.now`)."""
        self.ask(
            "call",
            group=group,
            method=method,
            args=args,
            threads=threads,
            tasks=tasks,
            at_s=at_s,
            timeout_s=timeout_s,
        )

    def answers(self, deadline_s: float = ANSWER_S) -> list[Answer]:
        """Return how each of the calls ended."""
        return [Answer(**one) for one in self.answer(deadline_s)]

    def begin(self, work: Work) -> None:
        """Begin to work."""
        self._stop.unlink(missing_ok=True)
        self.ask("work", **asdict(work))

    def stop(self) -> None:
        """Let the work end, soon."""
        self._stop.touch()

    def finish(self, journal: Journal, deadline_s: float = ANSWER_S) -> Found:
        """Wait for the end of the work; add what was done to a journal."""
        self.stop()
        found = Found(**self.answer(deadline_s))
        journal.load(self.journal_path)
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


@contextlib.contextmanager
def started(drivers: Sequence[Driver]) -> Iterator[list[Driver]]:
    """Wait until all of them listen, and end them afterwards."""
    with contextlib.ExitStack() as stack:
        for driver in drivers:
            stack.enter_context(driver)
        for driver in drivers:
            driver.ask("started")
        for driver in drivers:
            driver.answer()
        yield list(drivers)


# -- values that tell when they are torn ----------------------------------------------------------


def make_value(name: str, size: int) -> bytes:
    """Return a value that holds its name and is so much longer."""
    return f"{name}#{size}#".encode() + b"x" * size


def name_of(value: bytes | None) -> str | None:
    """Return the name that a value holds; another text where it is not whole."""
    if value is None:
        return None
    name, _, rest = value.decode("latin-1").partition("#")
    size, _, padding = rest.partition("#")
    if not size.isdigit() or padding != "x" * int(size):
        return f"not whole: {value[:60]!r}, {len(value)} bytes"
    return name


# -- the work --------------------------------------------------------------------------------------


class Cache(Protocol):
    """What the work is done on: a Group, or a toy."""

    def get(self, key: str, default: Any, *, timeout: float) -> Any: ...
    def get_many(self, keys: list[str], *, timeout: float) -> dict[str, Any]: ...
    def set(self, key: str, value: Any, *, timeout: float) -> None: ...
    def set_many(self, items: dict[str, Any], *, timeout: float) -> None: ...
    def delete(self, key: str, *, timeout: float) -> bool: ...


@dataclass
class Plan:
    """One operation that a caller is about to do."""

    kind: str
    keys: list[str]
    values: list[bytes | None]


class Caller:
    """One thread's or task's operations, each written to the journal."""

    def __init__(
        self, name: str, node: str, work: Work, database: Database, journal: Journal, found: Found
    ) -> None:
        self.name = name
        self.node = node
        self.work = work
        self._database = database
        self._journal = journal
        self._found = found
        self._draw = random.Random(f"{work.seed} {name}")
        self._count = 0

    def plan(self) -> Plan:
        """Draw the next operation."""
        work, draw = self.work, self._draw
        turn = draw.random()
        keys = [draw.choice(work.keys)]
        kind = "get"
        for other, share in (
            ("set", work.set_share),
            ("drop", work.drop_share),
            ("replace", work.replace_share if work.stored else 0.0),
            ("remove", work.remove_share),
            ("set_many", work.many_share * work.set_share),
            ("get_many", work.many_share),
        ):
            if turn < share:
                kind = other
                break
            turn -= share
        if kind.endswith("many"):
            keys = draw.sample(work.keys, min(len(work.keys), 4))
        values: list[bytes | None] = [
            self._new_value() if kind in ("set", "set_many", "replace") else None for _ in keys
        ]
        return Plan(kind, keys, values)

    def _new_value(self) -> bytes:
        self._count += 1
        return make_value(f"{self.name}:{self._count}", self._draw.choice(SIZES))

    def run(self, cache: Cache, plan: Plan) -> bool:
        """Do an operation by blocking calls; tell whether it was answered."""
        timeout = self.work.timeout_s
        stores = self._store(plan)
        start = now()
        got: Any = None
        error: kamacache.KamaCacheError | None = None
        try:
            if plan.kind == "get":
                got = {plan.keys[0]: cache.get(plan.keys[0], None, timeout=timeout)}
            elif plan.kind == "get_many":
                got = cache.get_many(plan.keys, timeout=timeout)
            elif plan.kind == "set":
                cache.set(plan.keys[0], plan.values[0], timeout=timeout)
            elif plan.kind == "set_many":
                cache.set_many(dict(zip(plan.keys, plan.values, strict=True)), timeout=timeout)
            else:
                cache.delete(plan.keys[0], timeout=timeout)
        except kamacache.KamaCacheError as caught:
            error = caught
        self._done(plan, stores, start, now(), got, error)
        return error is None

    async def arun(self, group: kamacache.Group, plan: Plan) -> bool:
        """Do an operation on the event loop; likewise."""
        timeout = self.work.timeout_s
        stores = self._store(plan)
        start = now()
        got: Any = None
        error: kamacache.KamaCacheError | None = None
        try:
            if plan.kind == "get":
                got = {plan.keys[0]: await group.aget(plan.keys[0], None, timeout=timeout)}
            elif plan.kind == "get_many":
                got = await group.aget_many(plan.keys, timeout=timeout)
            elif plan.kind == "set":
                await group.aset(plan.keys[0], plan.values[0], timeout=timeout)
            elif plan.kind == "set_many":
                items = dict(zip(plan.keys, plan.values, strict=True))
                await group.aset_many(items, timeout=timeout)
            else:
                await group.adelete(plan.keys[0], timeout=timeout)
        except kamacache.KamaCacheError as caught:
            error = caught
        self._done(plan, stores, start, now(), got, error)
        return error is None

    def _store(self, plan: Plan) -> list[tuple[float, float]]:
        """Write to the database first; return when, for each key."""
        if not self.work.stored or plan.kind not in ("set", "set_many", "replace", "remove"):
            return []
        stores = []
        for key, value in zip(plan.keys, plan.values, strict=True):
            began_s = now()
            self._database.write(key, value)
            stores.append((began_s, now()))
        return stores

    def _done(
        self,
        plan: Plan,
        stores: list[tuple[float, float]],
        start: float,
        end: float,
        got: dict[str, bytes | None] | None,
        error: kamacache.KamaCacheError | None,
    ) -> None:
        found = self._found
        found.operations += 1
        found.slowest_s = max(found.slowest_s, end - start)
        if error is not None:
            found.errors_count += 1
            if len(found.errors) < ERRORS_MAX:
                found.errors.append(
                    {
                        "caller": self.name,
                        "what": plan.kind,
                        "kind": type(error).__name__,
                        "message": str(error),
                        "began_s": start,
                        "took_s": end - start,
                    }
                )
        if plan.kind in ("get", "get_many"):
            if got is not None:
                self._journal.reads += [
                    Read(key, name_of(got.get(key)), self.node, start, end, self.name)
                    for key in plan.keys
                ]
            return
        for at, (key, value) in enumerate(zip(plan.keys, plan.values, strict=True)):
            store_start, store_end = stores[at] if stores else (0.0, 0.0)
            self._journal.writes.append(
                Write(
                    key=key,
                    value=name_of(value),
                    node=self.node,
                    start=start,
                    end=end,
                    cached="set" if plan.kind in ("set", "set_many") else "delete",
                    ok=error is None,
                    stored=bool(stores),
                    store_start=store_start,
                    store_end=store_end,
                    by=self.name,
                )
            )


def run_threads(
    callers: Sequence[Caller], cache: Cache, until: Callable[[], bool]
) -> list[threading.Thread]:
    """Start a thread a caller, which works until it is told to stop."""

    def run(caller: Caller) -> None:
        while not until():
            good = caller.run(cache, caller.plan())
            time.sleep(caller.work.pause_s if good else FAILED_PAUSE_S)

    threads = [threading.Thread(target=run, args=(caller,), daemon=True) for caller in callers]
    for thread in threads:
        thread.start()
    return threads


async def run_tasks(
    callers: Sequence[Caller], group: kamacache.Group, until: Callable[[], bool]
) -> None:
    """Work in a task a caller until told to stop."""

    async def run(caller: Caller) -> None:
        while not until():
            good = await caller.arun(group, caller.plan())
            await asyncio.sleep(caller.work.pause_s if good else FAILED_PAUSE_S)

    await asyncio.gather(*(run(caller) for caller in callers))


# -- the process -----------------------------------------------------------------------------------


class Process:
    """The driver itself."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._place = Path(os.environ[PLACE])
        self._node = os.environ[NODE]
        self._database = Database(self._place)
        self._groups: dict[str, kamacache.Group] = {}
        kamacache.attach(os.environ["KAMACACHE_RUN_DIR"])

    def group(self, name: str) -> kamacache.Group:
        """Return the node's group of that name."""
        found = self._groups.get(name)
        if found is None:
            found = self._groups[name] = kamacache.Group(name, fallback="error")
        return found

    def call(self, command: dict[str, Any]) -> list[dict[str, Any]]:
        """Make a call, several times at once."""
        group, method = self.group(command["group"]), command["method"]
        args = [_as_argument(method, at, arg) for at, arg in enumerate(command["args"])]
        timeout, at_s = command["timeout_s"], command["at_s"]
        if command["tasks"]:

            async def one_task() -> dict[str, Any]:
                await asyncio.sleep(at_s - now())
                return await _acall(lambda: getattr(group, method)(*args, timeout=timeout))

            async def all_tasks() -> list[dict[str, Any]]:
                return list(await asyncio.gather(*(one_task() for _ in range(command["tasks"]))))

            return asyncio.run(all_tasks())

        def one(_: int) -> dict[str, Any]:
            time.sleep(max(0.0, at_s - now()))
            return _call(lambda: getattr(group, method)(*args, timeout=timeout))

        with ThreadPoolExecutor(command["threads"]) as threads:
            return list(threads.map(one, range(command["threads"])))

    def work(self, work: Work) -> dict[str, Any]:
        """Read and write until told to stop; save the journal and tell the rest."""
        journal, found = Journal(), Found()
        group = self.group(work.group)
        stop, end_s = self._place / f"stop-{self._name}", now() + work.seconds

        def until() -> bool:
            return now() > end_s or stop.exists()

        def callers(kind: str, count: int) -> list[Caller]:
            return [
                Caller(f"{self._name}.{kind}{at}", self._node, work, self._database, journal, found)
                for at in range(count)
            ]

        threads = run_threads(callers("thread", work.threads), group, until)
        if work.tasks:
            asyncio.run(run_tasks(callers("task", work.tasks), group, until))
        for thread in threads:
            thread.join()
        journal.save(self._place / f"journal-{self._name}")
        return asdict(found)

    def obey(self, command: dict[str, Any]) -> Any:
        """Do what a line says."""
        do = command.pop("do")
        if do == "call":
            return self.call(command)
        if do == "work":
            return self.work(Work(**command))
        return os.getpid()


def _as_argument(method: str, at: int, arg: Any) -> Any:
    if method in ("set", "aset") and at:
        return arg.encode()
    if method in ("set_many", "aset_many"):
        return {key: value.encode() for key, value in arg.items()}
    return arg


async def _acall(call: Callable[[], Awaitable[Any]]) -> dict[str, Any]:
    began_s = now()
    try:
        return _answer(began_s, await call())
    except Exception as error:
        return _answer(began_s, None, error)


def _call(call: Callable[[], Any]) -> dict[str, Any]:
    began_s = now()
    try:
        return _answer(began_s, call())
    except Exception as error:
        return _answer(began_s, None, error)


def _answer(began_s: float, value: Any, error: Exception | None = None) -> dict[str, Any]:
    kind, message = (None, "") if error is None else (type(error).__name__, str(error))
    return asdict(Answer(_as_text(value), kind, message, began_s, now()))


def _as_text(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("latin-1")
    if isinstance(value, dict):
        return {key: _as_text(one) for key, one in value.items()}
    return value


if __name__ == "__main__":
    process = Process(sys.argv[1])
    for line in sys.stdin:
        print(json.dumps(process.obey(json.loads(line))), flush=True)  # noqa: T201
