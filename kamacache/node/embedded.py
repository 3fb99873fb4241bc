"""The node that a program starts itself: ``with kamacache.Node("127.0.0.1:8001"): ...``.

*Process*: the program, which becomes an attached process of the node::

    program ── fork ──► supervisor ── fork ──► workers (with the program's groups and getters)
       │  ◄── pipe: ready, or why not ──┘          fronts
       └── attaches to the run directory

*Invariants*: the fork happens in a process without other threads and without grpc, neither of
which survives it. The node dies with the program, however that ends (the supervisor watches the
program's pidfd), and only the process that started a node stops it.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NoReturn, Self

import msgspec

from kamacache.errors import ConfigError, KamaCacheError, NodeUnavailableError
from kamacache.getters import Loadable
from kamacache.limits import BOOT_FAILURES_MAX, BOOT_TIMEOUT_S, DRAIN_TIMEOUT_S
from kamacache.node.address import parse_address
from kamacache.node.exits import NodeEndError, flush_streams, why_no_node
from kamacache.node.exposure import check_exposure
from kamacache.node.place import find_place
from kamacache.node.readable import wait_readable
from kamacache.node.settings import (
    READERS,
    NodeSettings,
    group_id,
    read_api,
    workers_default,
)
from kamacache.node.signals import reset_inherited
from kamacache.rundir import context
from kamacache.rundir.context import EXIT_CONFIG, EXIT_OK, EXIT_ROLE
from kamacache.rundir.layout import SHM_ROOT
from kamacache.rundir.live import SecurityFiles

STOP_WAIT_S: Final = DRAIN_TIMEOUT_S + 5
_REPORT_BYTES_MAX: Final = 1 << 16


class _Report(msgspec.Struct):
    """What the supervisor tells the program, once."""

    ready: bool
    code: int = EXIT_OK
    message: str = ""


class Node:
    """A node of this program's own: its workers inherit the program's groups and getters.

    ``listen``: HOST:PORT of the gRPC fronts; None, or ``fronts=0``: no gRPC. ``peers``: all nodes
    of the cluster, this one included, each HOST:PORT or HOST:PORT=WEIGHT; ``discover``: the URL of
    what knows them instead. ``advertise``: this node's name among them, where that is not
    ``listen``. ``api``: HOST:PORT of the HTTP interface. ``run_dir``: None makes one that goes
    with the node. ``socket_group``: a Unix group whose processes may attach, too. ``tls_...``,
    ``tokens`` and ``peer_secret``: paths of files, as the flags of that name; ``insecure``: listen
    beyond loopback without them. ``warm_restart_max_downtime``: seconds for which a node that was
    stopped leaves its shards to one that starts at the same ``run_dir``; 0: they go with it. Start
    it early: a program with threads, a running event loop or grpc cannot be forked.
    """

    def __init__(
        self,
        listen: str | None = None,
        *,
        peers: Iterable[str] = (),
        discover: str | None = None,
        advertise: str | None = None,
        api: str | None = None,
        workers: int | None = None,
        fronts: int | None = None,
        run_dir: str | os.PathLike[str] | None = None,
        shm_dir: str | os.PathLike[str] | None = None,
        groups: Iterable[Loadable] = (),
        socket_group: str | None = None,
        insecure: bool = False,
        tls_cert: str | os.PathLike[str] | None = None,
        tls_key: str | os.PathLike[str] | None = None,
        tls_ca: str | os.PathLike[str] | None = None,
        tls_client_ca: str | os.PathLike[str] | None = None,
        tokens: str | os.PathLike[str] | None = None,
        peer_secret: str | os.PathLike[str] | None = None,
        slow_load_ms: int = 0,
        warm_restart_max_downtime: float = 0,
        log_level: str = "warning",
        log_format: str = "console",
    ) -> None:
        self._address = None
        if listen is not None and fronts != 0:
            self._address = parse_address(listen, "listen")
        self._place = find_place(
            self._address,
            listen_text=listen or "",
            peers=READERS["peers"]("peers", peers if isinstance(peers, str) else list(peers)),
            discover=discover,
            advertise=advertise,
        )
        self._api = read_api(api)
        files = (tls_cert, tls_key, tls_ca, tls_client_ca, tokens, peer_secret)
        names = ("tls_cert", "tls_key", "tls_ca", "tls_client_ca", "tokens", "peer_secret")
        self._security = SecurityFiles(
            **{n: os.path.abspath(f) if f else None for n, f in zip(names, files, strict=True)}
        )
        self._cautions = check_exposure(
            self._security,
            self._place,
            {"listen": self._address, "api": self._api},
            insecure=insecure,
        )
        self._slow_load_ms = READERS["slow_load_ms"]("slow_load_ms", slow_load_ms)
        self._downtime_s = READERS["warm_restart_max_downtime"](
            "warm_restart_max_downtime", warm_restart_max_downtime
        )
        self._socket_gid = group_id(socket_group)
        self._workers = READERS["workers"](
            "workers", workers_default() if workers is None else workers
        )
        self._fronts = READERS["fronts"]("fronts", 1 if fronts is None else fronts)
        self._run_dir_given = None if run_dir is None else Path(run_dir)
        self._shm_dir = Path(shm_dir or os.environ.get("KAMACACHE_SHM_DIR") or SHM_ROOT)
        self._logs = log_level, log_format
        self._groups: dict[str, Loadable] = {}
        self._run_dir: Path | None = None
        self._pid = 0
        self._pidfd = -1
        self._owner_pid = 0
        self.listening: str | None = None
        self.api: str | None = None
        for group in groups:
            self.register_group(group)

    @property
    def groups(self) -> tuple[Loadable, ...]:
        """The registered groups."""
        return tuple(self._groups.values())

    @property
    def run_dir(self) -> Path | None:
        """Where other processes attach; None before the start where none was given."""
        return self._run_dir or self._run_dir_given

    @property
    def pid(self) -> int | None:
        """The supervisor's pid while the node runs."""
        return self._pid or None

    def register_group(self, group: Loadable) -> None:
        """Make a group one of this node's; only before `start`."""
        if self._pid:
            raise ConfigError("register_group: the node runs already; register groups before")
        if not isinstance(group, Loadable):
            raise ConfigError(
                f"register_group: {type(group).__name__} is not a kamacache.Group", setting="groups"
            )
        if self._groups.setdefault(group.spec.name, group) is not group:
            raise ConfigError(
                f"the node has a group named {group.spec.name!r} already",
                setting="groups",
                value=group.spec.name,
            )

    def start(self) -> Self:
        """Fork the node, wait until it is ready, and attach this process to it.

        Raises `ConfigError` where this process cannot be forked or a setting is wrong, and
        `NodeUnavailableError` with the node's reason where it does not come up.
        """
        if (reason := why_no_node()) is not None:
            raise ConfigError(reason, setting="platform", value=sys.platform)
        if not self._groups:
            raise ConfigError("the node has no group; register_group() one first", setting="groups")
        self._check_forkable()
        temporary = self._run_dir_given is None
        self._run_dir = self._run_dir_given or _temporary_run_dir()
        settings = NodeSettings(
            run_dir=self._run_dir,
            shm_dir=self._shm_dir,
            workers=self._workers,
            fronts=self._fronts,
            listen=self._address,
            place=self._place,
            api=self._api,
            socket_gid=self._socket_gid,
            slow_load_ms=self._slow_load_ms,
            warm_restart_max_downtime_s=self._downtime_s,
            security=self._security,
            cautions=self._cautions,
            log_level=self._logs[0],
            log_format=self._logs[1],
        )
        read, write = os.pipe()
        program_pidfd = os.pidfd_open(os.getpid())
        flush_streams()
        try:
            self._pid = os.fork()
            if self._pid == 0:
                os.close(read)
                self._become_supervisor(settings, write, program_pidfd, temporary=temporary)
        finally:
            os.close(program_pidfd)
            os.close(write)
        self._owner_pid = os.getpid()
        self._pidfd = os.pidfd_open(self._pid)
        try:
            self._await_ready(read)
            self._attach()
        except BaseException:
            self._end(signal.SIGINT)
            raise
        finally:
            os.close(read)
        atexit.register(self._at_exit)
        return self

    def stop(self) -> None:
        """Drain the node and wait for its end; nothing where it does not run, or is not ours."""
        if not self._pid or os.getpid() != self._owner_pid:
            return
        atexit.unregister(self._at_exit)
        with contextlib.suppress(NodeUnavailableError):
            self._detach()
        self._end(signal.SIGTERM)

    def run(self) -> int:
        """Start (unless it runs) and block until SIGTERM or SIGINT or the node's end.

        Returns the node's exit code, 0 when it was told to stop.
        """
        if not self._pid:
            self.start()
        told: list[int] = []
        before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
        read, write = os.pipe()
        os.set_blocking(write, False)
        wakeup_before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        for number in before:
            signal.signal(number, lambda number, frame: told.append(number))
        try:
            while not told:
                readable = wait_readable((self._pidfd, read))
                if self._pidfd in readable:
                    return self._reaped()
                os.read(read, 64)
        finally:
            signal.set_wakeup_fd(wakeup_before)
            for number, handler in before.items():
                signal.signal(number, handler)
            os.close(read)
            os.close(write)
        self.stop()
        return EXIT_OK

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    # ------------------------------------------------------------------ inside

    def _check_forkable(self) -> None:
        if context.node_role:
            raise ConfigError(
                f"this process is a {context.node_role} of a node and cannot start another; put "
                'Node.start() under if __name__ == "__main__", so that importing does not run it'
            )
        if self._pid and os.getpid() == self._owner_pid:
            raise ConfigError("the node runs already")
        if "grpc" in sys.modules:
            raise ConfigError(
                "a node is forked from this program, and grpc, which this program has imported, "
                "does not survive a fork; start the node before importing grpc, or run "
                "kamacache-node beside the program and attach to it"
            )
        others = [t.name for t in threading.enumerate() if t is not threading.current_thread()]
        if others:
            raise ConfigError(
                "a node is forked from this program, and threads do not survive a fork; start the "
                f"node before these are started: {', '.join(others)}; or run kamacache-node beside "
                "the program and attach to it"
            )
        with contextlib.suppress(RuntimeError):
            asyncio.get_running_loop()
            raise ConfigError(
                "a node is forked from this program and must not inherit a running event loop; "
                "start the node before asyncio.run()"
            )

    def _become_supervisor(
        self, settings: NodeSettings, write: int, program_pidfd: int, *, temporary: bool
    ) -> NoReturn:
        code = EXIT_ROLE
        try:
            from kamacache.node.logs import configure_logs, node_label
            from kamacache.node.supervisor import Supervisor

            reset_inherited()
            configure_logs(
                settings.log_level,
                settings.log_format,
                node=node_label(settings.place.name, settings.listen, settings.run_dir),
            )

            def report(told: _Report) -> None:
                data = msgspec.msgpack.encode(told)
                with contextlib.suppress(OSError):  # the program is gone: its pidfd ends us
                    os.write(write, data)

            try:
                code = Supervisor(
                    settings,
                    groups=self.groups,
                    program_pidfd=program_pidfd,
                    run_dir_is_temporary=temporary,
                    close_in_roles=(write,),
                    on_ready=lambda line: report(_Report(True)),
                ).run()
                report(_Report(False, code, "a role could not start; the node's log says why"))
            except NodeEndError as error:
                code = error.code
                report(_Report(False, code, error.message))
        finally:
            flush_streams()
            os._exit(code)  # the stack below is the program's

    def _await_ready(self, read: int) -> None:
        deadline_s = time.monotonic() + BOOT_TIMEOUT_S * BOOT_FAILURES_MAX
        left_s = max(deadline_s - time.monotonic(), 0)
        readable = wait_readable((read,), left_s)
        data = os.read(read, _REPORT_BYTES_MAX) if readable else b""
        if not data:
            raise NodeUnavailableError(
                "the node ended before it was ready"
                if readable
                else f"the node was not ready within {BOOT_TIMEOUT_S * BOOT_FAILURES_MAX:g} s",
                run_dir=str(self._run_dir),
            )
        report = msgspec.msgpack.decode(data, type=_Report)
        if not report.ready:
            if report.code == EXIT_CONFIG:
                raise ConfigError(report.message)
            raise NodeUnavailableError(report.message, run_dir=str(self._run_dir))

    def _attach(self) -> None:
        from kamacache.local.attach import attach
        from kamacache.rundir.description import read_description

        assert self._run_dir is not None
        described = read_description(self._run_dir)
        self.listening, self.api = described.listen, described.api
        attach(self._run_dir)

    def _detach(self) -> None:
        from kamacache.local.attach import detach

        detach()

    def _end(self, number: int) -> None:
        """Send a signal, wait for the end, and kill what does not end in time."""
        for send, wait_s in ((number, STOP_WAIT_S), (signal.SIGKILL, STOP_WAIT_S)):
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, send)
            if wait_readable((self._pidfd,), wait_s):
                break
        self._reaped()

    def _reaped(self) -> int:
        try:
            _, status = os.waitpid(self._pid, 0)
            code = os.waitstatus_to_exitcode(status)
        except ChildProcessError:  # the program collects its children itself
            code = EXIT_OK
        os.close(self._pidfd)
        self._pid, self._pidfd, self.listening, self.api = 0, -1, None, None
        if self._run_dir_given is None and self._run_dir is not None:
            shutil.rmtree(self._run_dir, ignore_errors=True)
            self._run_dir = None
        return code

    def _at_exit(self) -> None:
        # A forked child of the program inherits this registration, not the node.
        with contextlib.suppress(KamaCacheError):
            self.stop()


def _temporary_run_dir() -> Path:
    base: Any = os.environ.get("XDG_RUNTIME_DIR")
    return Path(
        tempfile.mkdtemp(prefix="kamacache-", dir=base if base and os.path.isdir(base) else "/tmp")
    )
