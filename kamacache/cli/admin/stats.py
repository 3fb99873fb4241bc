"""``kamacache stats``: what a node's groups and processes do, once or again and again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import click
import msgspec

from kamacache.cli.admin import figures
from kamacache.cli.admin.figures import GroupFigures
from kamacache.cli.admin.output import (
    BAD,
    Cell,
    Column,
    count,
    duration,
    on_terminal,
    rate,
    share,
    size,
    table,
)
from kamacache.cli.client import place_of, say, target_of, where_options
from kamacache.errors import GroupNotFoundError, NodeUnavailableError
from kamacache.local.observing import Observer
from kamacache.local.snapshot import NodeSnapshot
from kamacache.rundir.description import read_description

CLEAR: Final = "\x1b[H\x1b[2J"  # cursor to the corner, and an empty screen


class Frame(msgspec.Struct, kw_only=True):
    """What is shown at one moment."""

    at_s: float
    groups: dict[str, GroupFigures]
    snapshot: NodeSnapshot | None  # None: over gRPC

    def told(self, before: Frame | None) -> dict[str, Any]:
        """Return it for JSON; with what came before, the rates since."""
        groups = {name: msgspec.to_builtins(group) for name, group in self.groups.items()}
        if before is not None:
            for name, group in self.groups.items():
                if name in before.groups:
                    seconds = self.at_s - before.at_s
                    groups[name]["per_s"] = figures.rates(group, before.groups[name], seconds)
        snapshot = self.snapshot
        return {
            "node": None if snapshot is None else figures.of_node(snapshot),
            "groups": groups,
            "workers": [] if snapshot is None else figures.of_workers(snapshot),
            "roles": [] if snapshot is None else [figures.of_role(r) for r in snapshot.roles],
        }


class Local:
    """Frames of the node of a run directory, through its restarts."""

    def __init__(self, run_dir: str, group: str | None) -> None:
        self._run_dir = run_dir
        self._group = group
        self._runner = asyncio.Runner()
        self._observer: Observer | None = None
        self._epoch = ""

    def __call__(self) -> Frame:
        """Return the next; raises `NodeUnavailableError` while no node is there."""
        about = read_description(self._run_dir)
        if self._observer is None or about.epoch != self._epoch:
            self._drop()
            self._observer, self._epoch = self._runner.run(self._make()), about.epoch
        try:
            snapshot = self._runner.run(self._observer.snapshot())
        except NodeUnavailableError:
            self._drop()
            raise
        if not snapshot.node.serving:
            raise NodeUnavailableError(f"no node serves at {self._run_dir}")
        groups = {
            info.name: figures.of_group(info)
            for info in snapshot.groups
            if self._group in (None, info.name)
        }
        if self._group is not None and not groups:
            known = sorted(info.name for info in snapshot.groups)
            raise GroupNotFoundError(
                f"the node has no group {self._group!r}; it has {', '.join(known) or 'none'}",
                group=self._group,
                known=known,
            )
        return Frame(at_s=time.monotonic(), groups=groups, snapshot=snapshot)

    def close(self) -> None:
        """Close the connections."""
        self._drop()
        self._runner.close()

    async def _make(self) -> Observer:
        return Observer(self._run_dir)

    def _drop(self) -> None:
        if self._observer is not None:
            self._observer.close()
            self._observer = None


class Remote:
    """Frames of a node over gRPC: its groups' counters alone."""

    def __init__(self, address: str, group: str | None, timeout_s: float) -> None:
        self._where = (address, timeout_s)
        self._group = group

    def __call__(self) -> Frame:
        """Return the next."""
        target = target_of(None, *self._where)
        names = target.groups() if self._group is None else [self._group]
        groups = {name: figures.of_stats(target.stats(name)) for name in names}
        return Frame(at_s=time.monotonic(), groups=groups, snapshot=None)

    def close(self) -> None:
        """Nothing is open."""


@click.command("stats")
@click.argument("of_group", metavar="[GROUP]", required=False)
@click.option(
    "--watch",
    type=click.FloatRange(1, 3600),
    is_flag=False,
    flag_value=2.0,
    default=None,
    metavar="[=SECONDS]",
    help="Again and again, with rates per second, until Ctrl-C. Default: every 2 s.",
)
@where_options
def command(
    of_group: str | None,
    watch: float | None,
    group: str | None,
    run_dir: str | None,
    address: str | None,
    timeout: float,
    as_json: bool,
) -> None:
    """Print counters and sizes of all groups, or of GROUP, and the node's processes.

    Counters count from the node's start, over all of its processes and those attached to it. With
    --watch a node that is started anew is waited for. Over gRPC only the groups are told. With
    --json: one object a look, a line each.
    """
    if of_group and group and of_group != group:
        raise click.UsageError(f"two groups, {of_group!r} and {group!r}: name one")
    name = of_group or group
    run_dir, address = place_of(run_dir, address)
    frames = Remote(address, name, timeout) if address is not None else Local(str(run_dir), name)
    try:
        if watch is None:
            _print(frames(), None, as_json)
        else:
            _watch(frames, watch, as_json)
    finally:
        frames.close()


def _watch(frames: Callable[[], Frame], every_s: float, as_json: bool) -> None:
    before: Frame | None = None
    missing = False
    try:
        for at_s in _ticks(every_s):
            try:
                frame = frames()
            except NodeUnavailableError as error:
                if before is None and not missing:
                    raise  # it was not there to begin with
                if not missing:
                    click.echo(f"{_clock(at_s)} {error}; waiting for it", err=True)
                missing = True
                continue
            if missing:
                click.echo(f"{_clock(at_s)} the node is back", err=True)
                missing, before = False, None
            if on_terminal() and not as_json:
                click.echo(CLEAR, nl=False)
            _print(frame, before, as_json, watched=True)
            before = frame
    except KeyboardInterrupt:
        if on_terminal():
            click.echo()


def _ticks(every_s: float) -> Iterator[float]:
    due_s = time.monotonic()
    while True:
        yield time.time()
        due_s = max(due_s + every_s, time.monotonic())
        time.sleep(max(0.0, due_s - time.monotonic()))


def _clock(at_s: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(at_s))


def _print(frame: Frame, before: Frame | None, as_json: bool, *, watched: bool = False) -> None:
    if as_json:
        say(frame.told(before))
        return
    lines: list[str] = []
    if watched:
        lines.append(_clock(time.time()))
    if frame.snapshot is not None:
        node = frame.snapshot.node
        ready = node.state if node.ready else f"{node.state}, not ready"
        about = f"kamacache {node.version}, up {duration(node.uptime_s)}"
        lines += [f"node {node.name or node.run_dir}: {ready}, {about}", ""]
    lines += _groups(frame)
    if watched:
        lines += ["", "per second", *_rates(frame, before)]
    if frame.snapshot is not None:
        lines += ["", *_processes(frame.snapshot)]
    click.echo("\n".join(lines))
    if watched and not on_terminal():
        click.echo()


def _groups(frame: Frame) -> list[str]:
    columns = [
        *(Column("group", right=False), Column("items"), Column("bytes", optional=2)),
        *(Column("capacity", optional=1), Column("gets"), Column("hits")),
        *(Column("near", optional=5), Column("memory", optional=5), Column("loads")),
        *(Column("p50", optional=3), Column("p99"), Column("errors")),
        *(Column("evictions", optional=4), Column("expired", optional=7)),
        *(Column("fetches", optional=6), Column("mirrors", optional=8)),
    ]
    rows: list[list[str | Cell]] = []
    for name, group in frame.groups.items():
        errors = count(group.load_errors)
        p50_ms, p99_ms = group.load_p50_ms, group.load_p99_ms
        rows.append(
            [
                *(name, count(group.items), size(group.live_bytes), size(group.capacity_bytes)),
                *(count(group.gets), share(group.hit_ratio)),
                share(group.near_hits / group.gets if group.gets else None),
                share(group.memory_hits / group.gets if group.gets else None),
                count(group.loads),
                duration(None if p50_ms is None else p50_ms / 1000),
                duration(None if p99_ms is None else p99_ms / 1000),
                Cell(errors, BAD) if group.load_errors else errors,
                *(count(group.evictions), count(group.expired)),
                *(count(group.fetches), size(group.mirror_bytes)),
            ]
        )
    return table(columns, rows)


def _rates(frame: Frame, before: Frame | None) -> list[str]:
    names = ("gets", "near_hits", "memory_hits", "misses", "sets", "loads", "fetches", "evictions")
    rows = []
    for name, group in frame.groups.items():
        per_s: dict[str, float] = {}
        if before is not None and name in before.groups:
            per_s = figures.rates(group, before.groups[name], frame.at_s - before.at_s)
        rows.append([name, *(rate(per_s.get(counter)) for counter in names)])
    columns = [Column(name.removesuffix("_hits")) for name in names]
    return table([Column("group", right=False), *columns], rows)


def _processes(snapshot: NodeSnapshot) -> list[str]:
    columns = [
        *(Column("process", right=False), Column("pid"), Column("restarts")),
        *(Column("CPU"), Column("RSS"), Column("own", optional=1)),
        *(Column("loads", optional=2), Column("queued", optional=2)),
        *(Column("connections", optional=3), Column("", right=False)),
    ]
    workers = {worker.index: worker for worker in snapshot.workers}
    rows: list[list[str | Cell]] = []
    for role in snapshot.roles:
        worker = workers.get(role.index) if role.role == "worker" else None
        state = "" if role.ready else "not ready"
        if worker is not None and not worker.answered:
            state = "does not answer"
        restarts = str(role.restarts)
        rows.append(
            [
                role.role if role.role == "supervisor" else f"{role.role} {role.index}",
                str(role.pid) if role.pid else "none",
                Cell(restarts, BAD) if role.restarts else restarts,
                *(duration(role.cpu_s), size(role.rss_bytes), size(role.own_bytes)),
                "" if worker is None else count(worker.loads_in_flight),
                "" if worker is None else count(worker.loads_queued),
                "" if worker is None else count(worker.connections),
                Cell(state, BAD),
            ]
        )
    return table(columns, rows)
