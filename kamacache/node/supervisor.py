"""The supervisor: makes the shards, forks the roles, restarts the dead, drains, cleans up.

*Process*: supervisor. One loop over a selector, no threads (it forks), no grpc, no user code::

      signals ──► wakeup fd ──┐                ┌─ words and signals ──► roles
      roles' words ► sockets ─┼─► selector ────┼─ fork a role that is due
      program dead ► pidfd ───┘                ├─ serve-until = now + 2 s, every 500 ms
                                               └─ fold the counters of dead processes

*Owns*: ``supervisor.lock``, the epoch's folders, node.json, the control words, the held ports.

*Life*: start (lock, probe the app, clean, check space, reserve, publish) → boot (all roles say
ready) → ready → stop (`kamacache.node.stopping`): node.json gone, roles end → serve-until 0, files
removed.
Readers may hit until the last worker is gone: no write is acknowledged that they would not see.
"""

from __future__ import annotations

import gc
import os
import selectors
import shutil
import signal
import socket
import time
from collections.abc import Callable, Sequence
from typing import Final, NoReturn

import structlog
from setproctitle import setproctitle

from kamacache.clock import boottime_ms
from kamacache.errors import ConfigError
from kamacache.getters import Loadable
from kamacache.limits import (
    BOOT_TIMEOUT_S,
    PULSE_EVERY_S,
    SERVE_UNTIL_EVERY_S,
)
from kamacache.node.app import probe_app
from kamacache.node.children import Child, kill_all, make_children, may_start
from kamacache.node.estate import Estate, take_lock
from kamacache.node.exits import NodeEndError, bad_config, flush_streams
from kamacache.node.group_options import merge_groups
from kamacache.node.logs import node_label, relabel_logs
from kamacache.node.notify import Notifier
from kamacache.node.pulse import Pulses
from kamacache.node.reloading import Reloading
from kamacache.node.roles import become, import_shared
from kamacache.node.settings import NodeSettings
from kamacache.node.signals import Repeats, SignalQueue, signals_held
from kamacache.node.stopping import How, Stopping
from kamacache.node.telling import Teller
from kamacache.rundir import context
from kamacache.rundir.context import EXIT_OK, EXIT_ROLE, WORD_DRAIN, WORD_END, RoleContext
from kamacache.rundir.layout import RunDir
from kamacache.rundir.roster import State

FOLD_EVERY_S: Final = 10.0
_SIGNALS_TO_END: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)

log = structlog.get_logger("kamacache.node")


class Supervisor:
    """One node's parent process. `run` it once, in the main thread of a process without others."""

    def __init__(
        self,
        settings: NodeSettings,
        *,
        groups: Sequence[Loadable] = (),
        program_pidfd: int | None = None,
        run_dir_is_temporary: bool = False,
        close_in_roles: Sequence[int] = (),
        reread: Callable[[], NodeSettings] | None = None,
        on_ready: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Prepare nothing yet. ``groups`` are the embedding program's, with their getters.

        The node ends when ``program_pidfd`` says that the program did. ``reread`` returns the
        settings as a start would find them now, for SIGHUP. ``on_ready`` gets the ready line.
        """
        self._groups = tuple(groups)
        self._program_pidfd = program_pidfd
        self._temporary = run_dir_is_temporary
        self._close_in_roles = tuple(close_in_roles)
        self._on_ready = on_ready
        self._run_dir = RunDir(settings.run_dir)
        self._selector = selectors.DefaultSelector()
        self._children: list[Child] = []
        self._end_reason: NodeEndError | None = None
        self._stopping: Stopping | None = None
        self._repeats = Repeats()
        self._told_ready = False
        self._started_s = time.monotonic()
        self._notifier = Notifier.from_environment(embedded=program_pidfd is not None)
        self._teller = Teller(self._notifier, socket_gid=settings.socket_gid)
        self._reloading = Reloading(settings, reread, self._teller, self._notifier)
        self._pulses = Pulses()
        self._next_extend_s = self._next_fold_s = self._next_pulse_s = 0.0

    @property
    def _settings(self) -> NodeSettings:
        return self._reloading.settings

    def run(self) -> int:
        """Be the node until it ends; return its exit code. `NodeEndError` says why it cannot be."""
        context.node_role = "supervisor"
        setproctitle(f"kamacache-node: supervisor [{self._run_dir.path}]")
        self._signals = SignalQueue()
        try:
            try:
                self._run_dir.prepare(gid=self._settings.socket_gid)
            except ConfigError as error:
                raise bad_config(str(error)) from error
            self._lock = take_lock(self._run_dir)
            try:
                return self._run_locked()
            finally:
                self._lock.release()
                if self._temporary:
                    shutil.rmtree(self._run_dir.path, ignore_errors=True)
        except NodeEndError as error:
            self._notifier.status(error.message)
            raise
        finally:
            self._selector.close()
            self._signals.close()
            self._notifier.close()

    def _run_locked(self) -> int:
        settings = self._settings
        for caution in settings.cautions:
            log.warning("the node is less safe than it could be", detail=caution)
        self._notifier.extend(time.monotonic(), 2 * BOOT_TIMEOUT_S)  # nothing is said meanwhile
        try:
            specs = [group.spec for group in self._groups]
            if settings.app and not self._groups:
                specs = probe_app(settings.app, timeout_s=BOOT_TIMEOUT_S, signals=self._signals)
            merged = merge_groups(specs, settings.groups)
            self._estate = Estate(self._run_dir, settings, merged)
        except ConfigError as error:
            raise bad_config(str(error)) from error
        try:
            self._reserve()
            self._serve()
        finally:
            why_lost = self._why_lost()
            kill_all(self._children)
            left_ms = self._stopping.began_ms if self._stopping else 0
            self._estate.remove(why_lost, left_ms)
        if self._end_reason is not None:
            raise self._end_reason
        return EXIT_OK

    def _reserve(self) -> None:
        try:
            self._estate.reserve()
            about = self._estate.description
            relabel_logs(node_label(about.name, about.listen, self._run_dir.path))
            self._parent_pidfd = os.pidfd_open(os.getpid())
        except ConfigError as error:
            raise bad_config(str(error)) from error
        except OSError as error:  # StorageError, too
            raise NodeEndError(EXIT_ROLE, f"the node cannot be set up: {error}") from error

    def _why_lost(self) -> str:
        """Return why the next node may not have the shards; "": it may."""
        if self._stopping is None or self._end_reason is not None or not self._told_ready:
            return "the node failed"
        return "its folder is temporary" if self._temporary else self._stopping.why_lost

    # ------------------------------------------------------------------ the loop

    def _serve(self) -> None:
        settings, description = self._settings, self._estate.description
        self._children = make_children(
            settings.workers,
            settings.fronts if description.listen else 0,
            agent=settings.place.discover is not None,
            http=description.api is not None,
        )
        self._selector.register(self._signals, selectors.EVENT_READ, self._on_signals)
        if self._program_pidfd is not None:
            self._selector.register(
                self._program_pidfd, selectors.EVENT_READ, self._on_program_dead
            )
        self._on_signals()  # what came while the app was probed
        import_shared()
        gc.collect()
        gc.freeze()  # a collection in a child must not copy the pages of what it inherited
        while not self._done():
            for key, _ in self._selector.select(self._tick()):
                key.data()

    def _done(self) -> bool:
        return self._stopping is not None and not any(child.pid for child in self._children)

    def _tick(self) -> float:
        """Do what is due and return the seconds until something else is."""
        now_s = time.monotonic()
        if now_s >= self._next_extend_s:
            if self._estate.unsettled is None:
                self._estate.control.extend()
            self._next_extend_s = now_s + SERVE_UNTIL_EVERY_S
        if now_s >= self._next_fold_s:
            self._estate.counters.fold()
            self._next_fold_s = now_s + FOLD_EVERY_S
        if now_s >= self._next_pulse_s and not self._stopping:
            self._feel_pulses(now_s)
            self._next_pulse_s = now_s + PULSE_EVERY_S
        reload_s = self._reloading.tick(now_s, self._state, self._estate, self._children)
        heard_s = self._teller.tell(self._state, self._children, self._estate.description, now_s)
        wake_s = min(self._next_extend_s, heard_s, reload_s)
        settled = self._estate.unsettled is None
        if self._stopping:
            wake_s = min(wake_s, self._stopping.tick(now_s))
        for child in self._children:
            if child.pid and not child.ready and now_s >= child.boot_deadline_s:
                child.failure = EXIT_ROLE, f"it was not ready within {BOOT_TIMEOUT_S:g} s"
                child.send(signal.SIGKILL)
                child.boot_deadline_s = now_s + BOOT_TIMEOUT_S
            elif not self._stopping and may_start(child, self._children, settled=settled):
                if now_s >= child.start_at_s:
                    self._fork(child, now_s)
                else:
                    wake_s = min(wake_s, child.start_at_s)
        return max(0.0, wake_s - time.monotonic())

    # ------------------------------------------------------------------ roles

    def _fork(self, child: Child, now_s: float) -> None:
        ours, its = socket.socketpair()
        ours.setblocking(False)
        flush_streams()
        try:
            with ours, its, signals_held():
                pid = os.fork()
                if pid == 0:
                    self._become(child, ours.detach(), its.detach())
                words_fd = ours.detach()
        except OSError as error:  # EAGAIN: too many processes; ENOMEM
            child.failure = EXIT_ROLE, f"cannot fork: {error.strerror}"
            self._note_death(child, EXIT_ROLE)
            return
        child.forked(pid, words_fd, now_s + BOOT_TIMEOUT_S, boottime_ms())
        self._selector.register(words_fd, selectors.EVENT_READ, lambda: self._on_words(child))

    def _become(self, child: Child, our_fd: int, its_fd: int) -> NoReturn:
        try:
            told = RoleContext(
                role=child.role,
                index=child.index,
                run_dir=self._run_dir,
                description=self._estate.description,
                words_fd=its_fd,
                parent_pid=self._estate.description.pid,
                parent_pidfd=self._parent_pidfd,
                app=self._settings.app,
                discover=self._settings.place.discover,
                weight=self._settings.place.weight,
                groups=self._groups,
                run_dir_is_temporary=self._temporary,
                socket_gid=self._settings.socket_gid,
                keeps=self._settings.warm_restart_max_downtime_s > 0 and not self._temporary,
                unsettled=self._estate.unsettled,
                api_fd=self._settings.api_fd if child.role == "http" else None,
                live=self._reloading.live,
            )
            inherited = [
                our_fd,
                self._lock.fd,
                *self._signals.fds,
                *self._notifier.fds,
                *(other.words_fd for other in self._children if other.words_fd >= 0),
                *self._close_in_roles,
            ]
            if isinstance(self._selector, selectors.EpollSelector):
                inherited.append(self._selector.fileno())
            if self._program_pidfd is not None:
                inherited.append(self._program_pidfd)
            if self._settings.api_fd is not None and child.role != "http":
                inherited.append(self._settings.api_fd)
            self._estate.leave()
            self._pulses.end_all()
            become(
                told,
                close_fds=inherited,
                log_format=self._settings.log_format,
            )
        finally:
            os._exit(EXIT_ROLE)  # only when become itself failed

    def _on_words(self, child: Child) -> None:
        if child.words_fd < 0:  # reaped since select returned
            return
        was_ready = child.ready
        if child.hear():
            self._close_words(child)
        if child.ready and not was_ready and not self._stopping:
            self._on_role_ready(child)
        if child.asks_to_end:
            # Whoever signals the whole process group has signalled us, too: that comes first.
            self._on_signals()
            if not self._stopping:
                child.tell(WORD_END if child.idle else WORD_DRAIN)

    def _on_role_ready(self, child: Child) -> None:
        if child.role == "worker":
            self._pulses.begin(child.index, self._estate.description.socket_path(child.index))
        if child.restarts:
            log.info("role is back", child=child.name, child_pid=child.pid)
        if self._estate.unsettled and all(c.ready for c in self._children if c.role == "worker"):
            self._estate.publish()
        if not self._told_ready and all(c.ready for c in self._children):
            self._told_ready = True
            self._tell_ready()

    def _feel_pulses(self, now_s: float) -> None:
        for index in self._pulses.hung(now_s):
            child = self._children[index]  # workers come first
            log.error("worker answers no ping, killed", child=child.name, child_pid=child.pid)
            child.send(signal.SIGKILL)

    def _close_words(self, child: Child) -> None:
        if child.words_fd >= 0:
            self._selector.unregister(child.words_fd)
            os.close(child.words_fd)
            child.words_fd = -1

    def _reap(self) -> None:
        while True:
            try:
                pid, status, used = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            # A pid of no child: as process 1 of a container we inherit orphans of others.
            for child in self._children:
                if child.pid == pid:
                    if child.words_fd >= 0:  # what it said last is still to be read
                        child.hear()
                        self._close_words(child)
                    child.cpu_before_s += used.ru_utime + used.ru_stime
                    self._note_death(child, os.waitstatus_to_exitcode(status))

    def _note_death(self, child: Child, exit_code: int) -> None:
        was_ready, pid = child.ready, child.pid
        if child.role == "worker":
            self._pulses.end(child.index)
        child.died(exit_code, time.monotonic())
        if self._stopping:
            if exit_code not in (EXIT_OK, -signal.SIGTERM, -signal.SIGKILL):
                log.warning("role ended badly", child=child.name, child_pid=pid, code=exit_code)
            return
        fields = {"child": child.name, "child_pid": pid, "code": exit_code}
        if was_ready and exit_code == EXIT_OK:  # told to, as an agent at a reload
            log.info("role ended, forking it again", **fields)
            return
        if was_ready:
            log.warning("role died, forking it again", **fields)
            return
        reason = child.failure[1] if child.failure else ""
        log.error("role could not start", failures=child.boot_failures, reason=reason, **fields)
        if child.given_up(node_was_ready=self._told_ready):
            times = f", {child.boot_failures} times in a row" * (child.boot_failures > 1)
            why = f"{child.name} could not start{times}: {reason}"
            self._end_reason = NodeEndError(child.exit_code, why)
            self._stop("at once")

    def _tell_ready(self) -> None:
        description = self._estate.description
        count = self._settings.workers
        where = f"listening on {description.listen}" if description.listen else "not listening"
        line = (
            f"kamacache-node ready: {count} worker{'s' * (count != 1)}, {where}, "
            f"attach with KAMACACHE_RUN_DIR={self._run_dir.path}"
        )
        log.info(
            "node is ready",
            seconds=round(time.monotonic() - self._started_s, 3),
            groups=len(description.groups),
            name=description.name,
            api=description.api,
        )
        self._on_ready(line)

    @property
    def _state(self) -> State:
        return "stopping" if self._stopping else "ready" if self._told_ready else "starting"

    # ------------------------------------------------------------------ stopping

    def _on_signals(self) -> None:
        for number in self._signals.take():
            if number == signal.SIGHUP:
                self._reloading.ask()
            elif number in _SIGNALS_TO_END and self._repeats.is_new(number, time.monotonic()):
                if self._stopping and (number == signal.SIGTERM or self._stopping.how != "drain"):
                    self._stopping.kill(time.monotonic())  # told twice
                else:
                    self._stop("drain" if number == signal.SIGTERM else "at once")
        self._reap()

    def _on_program_dead(self) -> None:
        assert self._program_pidfd is not None
        self._selector.unregister(self._program_pidfd)
        log.warning("the program that started the node is gone")
        self._stop("at once")

    def _stop(self, how: How) -> None:
        now_s = time.monotonic()
        self._estate.unpublish()  # nobody attaches to a node that goes
        self._pulses.end_all()
        if self._stopping is None:
            self._stopping = Stopping(self._children, how, now_s)
        else:
            self._stopping.hasten(now_s)
