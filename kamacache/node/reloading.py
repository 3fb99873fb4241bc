"""Reload: SIGHUP re-reads the settings, and files of secrets are taken up when they change.

*Process*: the supervisor, in its loop, a few milliseconds at a time::

    HUP ──► flags, environment, file again ──► all checked ──┬─► wrong: one line says why; nothing
    files of secrets have changed ──► these checked ─────────┘         changes
                                                             └─► live.json, membership ─► "reload"

*Invariants*: what can change is changed together or not at all: everything is checked before
anything is published. What only a restart can change is named and left as it is. Names of settings
are logged, and paths; never what a file of secrets holds.

The files are looked at as well as waited for, since a container's secrets change without a signal.
stat(2) follows links, so that a swap of Kubernetes' ``..data`` is seen. What has changed must stay
as it is for a moment, because a certificate and its key are two files.
"""

from __future__ import annotations

import fcntl
import os
import signal
import struct
import termios
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Final

import structlog

from kamacache.cluster.membership import Member, make_membership, write_membership
from kamacache.errors import ConfigError
from kamacache.limits import RELOAD_EVERY_S, SECRETS_LOOK_EVERY_S, SECRETS_SETTLE_S
from kamacache.local.reloads import apply_log_level
from kamacache.node.children import Child
from kamacache.node.estate import Estate
from kamacache.node.exposure import check_own
from kamacache.node.notify import Notifier
from kamacache.node.place import Place
from kamacache.node.settings import LOG_LEVELS, NodeSettings
from kamacache.node.stopping import LEAVE_TIMEOUT_S
from kamacache.node.telling import Teller
from kamacache.rundir.context import WORD_RELOAD
from kamacache.rundir.control import MEMBERSHIP
from kamacache.rundir.live import SecurityFiles, write_live
from kamacache.rundir.roster import State

_NEVER_S: Final = float("inf")
_FREE: Final = ("log_level", "slow_load_ms")  # of NodeSettings
_SWITCHES: Final = ("tls_cert", "tls_key", "tls_client_ca")  # a port has TLS for its life, or none
_NAMES: Final = {
    "groups": "group",
    "socket_gid": "socket_group",
    "warm_restart_max_downtime_s": "warm_restart_max_downtime",
}

# What of a file changes when it does: times, device and inode, size. None: it is not there.
_Mark = tuple[int, ...] | None

log = structlog.get_logger("kamacache.reload")


@dataclass(frozen=True, slots=True)
class Changes:
    """What another set of settings means for a node that runs."""

    settings: NodeSettings  # to be in force now
    changed: tuple[str, ...]
    restart: tuple[str, ...]  # differ, and stay as they are until a restart


def compare(now: NodeSettings, fresh: NodeSettings, *, clustered: bool) -> Changes:
    """Return what changes from ``now`` to ``fresh``; ``clustered``: the roles look for peers."""
    place, place_changed, place_restart = _compare_places(now.place, fresh.place, clustered)
    security, security_changed, security_restart = _compare_files(now.security, fresh.security)
    differ = [
        field.name
        for field in fields(NodeSettings)
        if field.name not in ("place", "security", "cautions")
        and getattr(now, field.name) != getattr(fresh, field.name)
    ]
    free = {name: getattr(fresh, name) for name in _FREE}
    return Changes(
        settings=replace(now, place=place, security=security, cautions=fresh.cautions, **free),
        changed=(
            *(_NAMES.get(name, name) for name in differ if name in _FREE),
            *place_changed,
            *security_changed,
        ),
        restart=(
            *(_NAMES.get(name, name) for name in differ if name not in _FREE),
            *place_restart,
            *security_restart,
        ),
    )


def _compare_places(
    now: Place, fresh: Place, clustered: bool
) -> tuple[Place, list[str], list[str]]:
    differ = [
        setting
        for setting, name in (("advertise", "name"), ("peers", "peers"), ("discover", "discover"))
        if getattr(now, name) != getattr(fresh, name)
    ]
    if fresh.weight != now.weight and "peers" not in differ:
        differ.append("weight")
    # The agent is there or not for the node's life, and so are the links of a node without peers.
    source_stays = (now.discover is None) == (fresh.discover is None)
    if now.name != fresh.name or not source_stays or (fresh.clustered and not clustered):
        return now, [], differ
    if now.discover is not None and "peers" in differ:  # where a source rules, the first list only
        differ.remove("peers")
        return replace(fresh, peers=now.peers), differ, ["peers"]
    return fresh, differ, []


def _compare_files(
    now: SecurityFiles, fresh: SecurityFiles
) -> tuple[SecurityFiles, list[str], list[str]]:
    old = {name: getattr(now, name) for name in SecurityFiles.__struct_fields__}
    new = {name: getattr(fresh, name) for name in SecurityFiles.__struct_fields__}
    restart: list[str] = []
    if any((old[name] is None) != (new[name] is None) for name in _SWITCHES):
        restart = [name for name in old if name.startswith("tls_") and old[name] != new[name]]
        new |= {name: old[name] for name in restart}
    return SecurityFiles(**new), [name for name in old if old[name] != new[name]], restart


class Reloading:
    """The settings in force, and how they change; `tick` in every turn of a node that is ready."""

    def __init__(
        self,
        settings: NodeSettings,
        reread: Callable[[], NodeSettings] | None,
        teller: Teller,
        notifier: Notifier,
    ) -> None:
        """``reread`` returns the settings as they would be now; None: only files of secrets."""
        self.settings = settings
        self.live = settings.live(0)
        self._reread = reread
        self._teller = teller
        self._notifier = notifier
        self._asked = False
        self._marks = marks(settings.security)
        self._moving: dict[str, _Mark] | None = None  # what was seen to change, until it stays
        self._next_reload_s = 0.0
        self._next_look_s = 0.0
        self._kill_agent: tuple[float, int] | None = None  # when, and its pid

    def ask(self) -> None:
        """Take note of a SIGHUP; any number of them before the next `tick` are one."""
        self._asked = True

    def tick(self, now_s: float, state: State, estate: Estate, children: Sequence[Child]) -> float:
        """Do what is due, and return the time at which to come again.

        A SIGHUP that comes before the node is ready waits until it is.
        """
        if state != "ready":
            if state == "stopping" and self._asked:
                self._asked = False
                log.info("the node stops, nothing is reloaded")
            return _NEVER_S
        due_s = [self._look(now_s, estate, children)]
        if self._asked:
            if now_s >= self._next_reload_s:
                self._asked = False
                self._next_reload_s = now_s + RELOAD_EVERY_S
                self._notifier.reloading()
                self._reload(estate, children, now_s)
                self._notifier.reloaded()
            else:
                due_s.append(self._next_reload_s)
        if self._kill_agent is not None:
            due_s.append(self._see_off_agent(now_s, children))
        return min(due_s)

    # -- what is to be in force ------------------------------------------------------------

    def _reload(self, estate: Estate, children: Sequence[Child], now_s: float) -> None:
        found = marks(self.settings.security)
        try:
            fresh = self._reread() if self._reread else self.settings
            check_own(fresh.security, fresh.place)
        except ConfigError as error:
            self._marks = found
            self._refuse(str(error))
            return
        except Exception as error:  # whatever a file holds: no reason for the node to end
            self._marks = found
            self._refuse(f"{type(error).__name__}: {error}")
            return
        changes = compare(self.settings, fresh, clustered=estate.description.clustered)
        files = self._changed_files(found)
        if self._take(changes, files, estate, children, now_s) and changes.restart:
            log.warning(
                "settings that only a restart can change stay as they are",
                settings=" ".join(changes.restart),
            )

    def _look(self, now_s: float, estate: Estate, children: Sequence[Child]) -> float:
        if not self._marks:
            return _NEVER_S
        if now_s < self._next_look_s:
            return self._next_look_s
        found = marks(self.settings.security)
        self._next_look_s = now_s + SECRETS_LOOK_EVERY_S
        if found == self._marks:
            self._moving = None
        elif found != self._moving:
            self._moving = found
            self._next_look_s = now_s + SECRETS_SETTLE_S
        else:
            self._moving = None
            files = self._changed_files(found)
            try:
                check_own(self.settings.security, self.settings.place)
            except ConfigError as error:
                self._marks = found  # until they change once more
                self._refuse(str(error))
            else:
                self._take(Changes(self.settings, (), ()), files, estate, children, now_s)
        return self._next_look_s

    def _changed_files(self, found: dict[str, _Mark]) -> tuple[str, ...]:
        return tuple(name for name, mark in found.items() if mark != self._marks.get(name))

    # -- in force --------------------------------------------------------------------------

    def _take(
        self,
        changes: Changes,
        files: tuple[str, ...],
        estate: Estate,
        children: Sequence[Child],
        now_s: float,
    ) -> bool:
        before, settings = self.settings, changes.settings
        live = settings.live(self.live.number + 1)
        sockets_dir = estate.description.sockets_dir
        try:
            write_live(sockets_dir, live)
            if settings.place.discover is None and settings.place.peers != before.place.peers:
                _publish(estate, settings.place)
        except OSError as error:
            # Nobody was told: a role reads the file at the word only, and is forked with ours.
            self._refuse(f"it cannot be published: {error}")
            return False
        self.settings, self.live = settings, live
        self._marks = marks(settings.security)
        quieter = LOG_LEVELS.index(live.log_level) > LOG_LEVELS.index(before.log_level)
        if not quieter:  # else the lines on this reload would be the first that it hides
            apply_log_level(live)
        self._teller.reloads += 1
        self._teller.trouble = ""
        for child in children:
            _tell_reload(child)
        if settings.place.discover is not None and settings.place != before.place:
            self._renew_agent(now_s, children)
        log.info(
            "reloaded",
            number=live.number,
            changed=" ".join(changes.changed) or "no setting",
            **({"files": " ".join(files)} if files else {}),
        )
        for caution in settings.cautions:
            if caution not in before.cautions:
                log.warning("the node is less safe than it could be", detail=caution)
        if quieter:
            apply_log_level(live)
        return True

    def _refuse(self, reason: str) -> None:
        self._teller.reloads_refused += 1
        self._teller.trouble = f"the last reload was refused: {reason}"
        log.error("reload refused, all stays as it was", reason=reason)

    def _renew_agent(self, now_s: float, children: Sequence[Child]) -> None:
        """Let the agent leave its source; the next one follows the new. The membership stays."""
        for child in children:
            if child.role == "agent" and child.pid:
                child.send(signal.SIGTERM)
                self._kill_agent = now_s + LEAVE_TIMEOUT_S, child.pid

    def _see_off_agent(self, now_s: float, children: Sequence[Child]) -> float:
        assert self._kill_agent is not None
        when_s, pid = self._kill_agent
        agents = [child for child in children if child.pid == pid]
        if agents and now_s < when_s:
            return when_s
        for agent in agents:
            log.warning("agent did not leave in time, killed", child=agent.name, child_pid=pid)
            agent.send(signal.SIGKILL)
        self._kill_agent = None
        return _NEVER_S


def marks(files: SecurityFiles) -> dict[str, _Mark]:
    """Return what tells whether each of the files has changed, by the setting that names it."""
    found: dict[str, _Mark] = {}
    for name in SecurityFiles.__struct_fields__:
        path = getattr(files, name)
        if path is None:
            continue
        try:
            seen = os.stat(path)
        except (OSError, ValueError):
            found[name] = None
        else:
            found[name] = (
                seen.st_mtime_ns,
                seen.st_ctime_ns,
                seen.st_dev,
                seen.st_ino,
                seen.st_size,
            )
    return found


def _publish(estate: Estate, place: Place) -> None:
    """Make a list of peers the membership; of a node without an agent. Raises OSError."""
    about = estate.description
    assert about.name is not None  # find_place refuses peers of a node without a name
    members = place.peers or (Member(about.name, place.weight),)
    words = estate.control.words
    write_membership(about, make_membership(words[MEMBERSHIP] + 1, about.name, members), words)


def _tell_reload(child: Child) -> None:
    """Say the word, unless one stands there unread.

    A role that hangs must not have its words pile up until none has room: "drain" would be lost.
    The unread one is as good, since the file is read after it.
    """
    if child.words_fd < 0:
        return
    unread = fcntl.ioctl(child.words_fd, termios.TIOCOUTQ, b"\0" * 4)
    if not struct.unpack("i", unread)[0]:
        child.tell(WORD_RELOAD)
