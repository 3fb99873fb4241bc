"""``--check-config``: what a node with these settings would be, and whether it could start.

*Process*: the command, which ends then. Nothing is begun: no run directory is made, no lock is
tried, no file of a node is written; a node that runs at this run directory notices nothing. The
app is imported in a child. Paths of files of secrets are shown, never what they hold.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kamacache.cluster.discovery.urls import parse_source
from kamacache.cluster.membership import Member
from kamacache.config import GroupSpec
from kamacache.errors import ConfigError
from kamacache.limits import BOOT_TIMEOUT_S
from kamacache.node.address import hold_port
from kamacache.node.app import probe_app
from kamacache.node.estate import Estate
from kamacache.node.exits import NodeEndError
from kamacache.node.group_options import merge_groups, parse_group
from kamacache.node.settings import ENVIRONMENT_PREFIX, READERS, NodeSettings, source_of
from kamacache.node.signals import SignalQueue
from kamacache.node.space import check_space, mib
from kamacache.rundir.context import EXIT_APP, EXIT_CONFIG, EXIT_OK
from kamacache.rundir.layout import RunDir, SupervisorLock
from kamacache.rundir.live import SecurityFiles

_SHOWN: Final[dict[str, Callable[[NodeSettings], Any]]] = {
    "socket_group": lambda settings: settings.socket_gid,
    "warm_restart_max_downtime": lambda settings: settings.warm_restart_max_downtime_s,
    "peers": lambda settings: " ".join(f"{m.address}={m.weight}" for m in settings.place.peers),
    "advertise": lambda settings: settings.place.name,
    "discover": lambda settings: (
        settings.place.discover and parse_source(settings.place.discover).shown
    ),
}


@dataclass(slots=True)
class Checked:
    """What was found; an exit code other than 0 is that of a start."""

    rows: list[tuple[str, str, str]]  # setting, value, where it comes from
    cautions: list[str]
    wrong: list[str]
    code: int = EXIT_OK

    def lines(self) -> Iterator[str]:
        """Yield the report for people."""
        name_chars = max(len(name) for name, _, _ in self.rows)
        value_chars = min(max(len(value) for _, value, _ in self.rows), 60)
        for name, value, source in self.rows:
            yield f"{name:{name_chars}}  {value:{value_chars}}  {source}"
        yield from (f"caution: {text}" for text in self.cautions)
        yield from (f"wrong: {text}" for text in self.wrong)
        yield "this node cannot start" if self.wrong else "a node can start with these settings"


def check(
    settings: NodeSettings,
    flags: Mapping[str, Any],
    environment: Mapping[str, str],
    file: Mapping[str, Any],
) -> Checked:
    """Return what can be known without starting, of settings that were read from these layers."""
    sources = {name: source_of(name, flags, environment, file) or "default" for name in READERS}
    found = Checked(
        [
            (name, _shown(name, settings), sources[name])
            for name in READERS
            if name not in ("group", "insecure")  # below; and in force already, or not needed
        ],
        list(settings.cautions),
        [],
    )
    run_dir = RunDir(settings.run_dir)
    runs = _holder(run_dir)
    if runs is not None:
        who = f"pid {runs}" if runs else "a process of another pid namespace"
        found.cautions.append(
            f"a node runs at {run_dir.path} ({who}); its ports and its memory count as free"
        )
    groups = _groups(settings, found)
    with _noting(found):
        _check_run_dir(run_dir)
    if groups:
        _check_groups(settings, run_dir, groups, found, _group_sources(flags, environment, file))
    if runs is None:
        _check_ports(settings, found)
    _check_peers(settings, found)
    return found


@contextlib.contextmanager
def _noting(found: Checked) -> Iterator[None]:
    """Take note of what is wrong instead of ending at the first."""
    try:
        yield
    except (ConfigError, NodeEndError, OSError) as error:
        found.wrong.append(str(error))
        app = isinstance(error, NodeEndError) and error.code == EXIT_APP
        found.code = EXIT_APP if app else found.code or EXIT_CONFIG


def _shown(name: str, settings: NodeSettings) -> str:
    if name in SecurityFiles.__struct_fields__:
        value = getattr(settings.security, name)
    elif name in _SHOWN:
        value = _SHOWN[name](settings)
    else:
        value = getattr(settings, name)
    return "none" if value is None or value == "" else str(value)


def _holder(run_dir: RunDir) -> int | None:
    with contextlib.suppress(OSError):  # not ours to ask: `_check_run_dir` says so
        return SupervisorLock.holder(run_dir)
    return None


def _groups(settings: NodeSettings, found: Checked) -> list[GroupSpec]:
    specs: list[GroupSpec] = []
    with _noting(found):
        if settings.app:
            signals = SignalQueue()
            try:
                specs = probe_app(settings.app, timeout_s=BOOT_TIMEOUT_S, signals=signals)
            finally:
                signals.close()
        return merge_groups(specs, settings.groups)
    return []


def _group_sources(
    flags: Mapping[str, Any], environment: Mapping[str, str], file: Mapping[str, Any]
) -> dict[str, str]:
    sources = dict.fromkeys(file.get("groups", ()), "file")
    for source, layer in (
        ("file", file.get("group")),
        ("environment", environment.get(ENVIRONMENT_PREFIX + "GROUP")),
        ("flag", flags.get("group")),
    ):
        texts = READERS["group"]("group", layer or ())
        sources |= {parse_group(text)[0]: source for text in texts}
    return sources


def _check_run_dir(run_dir: RunDir) -> None:
    """Raise `ConfigError` where the run directory cannot be this user's."""
    run_dir.check_length()
    path = run_dir.path
    if path.exists():
        if path.stat().st_uid != os.geteuid() or not path.is_dir():
            raise ConfigError(
                f"run_dir is {path}, which is not a folder of uid {os.geteuid()}; choose another",
                setting="run_dir",
                value=str(path),
            )
        return
    parent = next(parent for parent in path.parents if parent.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)):
        raise ConfigError(
            f"run_dir is {path}, and uid {os.geteuid()} may not make it in {parent}; "
            "choose another",
            setting="run_dir",
            value=str(path),
        )


def _check_groups(
    settings: NodeSettings,
    run_dir: RunDir,
    groups: list[GroupSpec],
    found: Checked,
    sources: Mapping[str, str],
) -> None:
    for spec in groups:
        value = f"{mib(spec.cache_bytes)}, {spec.eviction}"
        value += "" if spec.ttl_ms is None else f", ttl {spec.ttl_ms / 1000:g} s"
        found.rows.append((f"group {spec.name}", value, sources.get(spec.name, "app")))
    with _noting(found):
        required = Estate(run_dir, settings, groups).required_bytes()
        found.rows.append(("memory of all groups", mib(required), ""))
        # What the last node left, or one that runs has, is taken over or removed by a start.
        there = _bytes_below(run_dir.shm_base(os.path.realpath(settings.shm_dir)))
        check_space(Path(settings.shm_dir), max(0, required - there))


def _bytes_below(folder: Path) -> int:
    total = 0
    for place, _, files in os.walk(folder):
        for name in files:
            with contextlib.suppress(OSError):
                total += os.stat(os.path.join(place, name)).st_blocks * 512
    return total


def _check_ports(settings: NodeSettings, found: Checked) -> None:
    ports = {"listen": settings.listen if settings.fronts else None}
    if settings.api_fd is None:
        ports["api"] = settings.api
    with contextlib.ExitStack() as holding:  # all at once: they may be the same port
        for setting, address in ports.items():
            if address is not None:
                with _noting(found):
                    held, _ = hold_port(address, setting)
                    holding.enter_context(held)


def _check_peers(settings: NodeSettings, found: Checked) -> None:
    place = settings.place
    if place.discover is not None:
        # Here and not at the top: it loads what the source needs.
        from kamacache.cluster.discovery import open_discovery

        with _noting(found):
            open_discovery(place.discover, Member(place.name or "", place.weight))
    for member in place.peers:
        host, _, port = member.address.rpartition(":")
        try:
            socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
        except OSError as error:  # it may come to be later
            found.cautions.append(f"peer {member.address} cannot be looked up: {error.strerror}")
