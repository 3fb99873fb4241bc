"""What a child of the supervisor does between its fork and its role's ``run``.

*Process*: each role, just forked. *Owns*: nothing yet; it undoes what it inherited
(signals, descriptors, stdout) and starts the one thread that watches the supervisor.
"""

from __future__ import annotations

import logging
import os
import select
import shutil
import signal
import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from importlib import import_module
from typing import NoReturn

from setproctitle import setproctitle

from kamacache.errors import ConfigError, KamaCacheError
from kamacache.node.app import load_groups
from kamacache.node.exits import NodeEndError, flush_streams
from kamacache.node.logs import configure_logs, node_label
from kamacache.node.signals import reset_in_child
from kamacache.rundir import context
from kamacache.rundir.cleaning import clean_orphaned
from kamacache.rundir.context import EXIT_CONFIG, EXIT_OK, EXIT_ROLE, RoleContext

log = logging.getLogger("kamacache.node")

EXIT_ORPHANED = 1


def become(told: RoleContext, *, close_fds: Iterable[int], log_format: str) -> NoReturn:
    """Turn the forked child into its role; ends the process, never returns or raises."""
    code = EXIT_ROLE
    try:
        context.node_role = told.role
        reset_in_child()
        for fd in close_fds:
            os.close(fd)
        os.dup2(2, 1)  # stdout has the ready line alone; what getters print goes to stderr
        setproctitle(f"kamacache-node: {told.role} {told.index}")
        _configure_logs(told, log_format)
        watch_supervisor(told)
        code = _run(told, log_format)
    finally:
        # os._exit: the stack below us is the supervisor's (or the user's program's), and so are
        # its finally blocks and atexit functions.
        flush_streams()
        if _is_dead(told.parent_pidfd):  # the watching thread would be cut short
            _clean(told)
        os._exit(code)


def _configure_logs(told: RoleContext, form: str) -> None:
    about = told.description
    node = node_label(about.name, about.listen, told.run_dir.path)
    configure_logs(told.live.log_level, form, node=node, role=told.role, shard=told.index)


def _run(told: RoleContext, log_format: str) -> int:
    try:
        if told.role == "worker" and told.app and not told.groups:
            told = replace(told, groups=load_groups(told.app))
            _configure_logs(told, log_format)  # the app may have configured its own way
        code = _role(told.role)(told)
    except NodeEndError as error:
        told.report_failed(error.code, error.message)
        return error.code
    except KamaCacheError as error:
        log.error("the role failed", extra={"error": str(error)})
        code = EXIT_CONFIG if isinstance(error, ConfigError) else EXIT_ROLE
        told.report_failed(code, str(error))
        return code
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else EXIT_ROLE * bool(error.code)
    except BaseException as error:
        log.exception("the role failed")
        told.report_failed(EXIT_ROLE, f"{type(error).__name__}: {error}")
        return EXIT_ROLE
    return code if isinstance(code, int) else EXIT_OK


def _role(role: str) -> Callable[[RoleContext], object]:
    # Here and not at the top: the supervisor loads neither grpc nor what only a role needs.
    run: Callable[[RoleContext], object] = import_module(f"kamacache.{role}.main").run
    return run


def watch_supervisor(told: RoleContext) -> None:
    """Start the thread that ends this process, and cleans up, when the supervisor is dead.

    A thread, not a watch on the role's loop alone: an async getter that blocks the loop must not
    leave an orphan. Not PR_SET_PDEATHSIG either: the kernel would kill us before we have removed
    the files, and it is bound to the parent's thread, not to its process.
    """
    thread = threading.Thread(target=_watch, args=(told,), name="watch-supervisor", daemon=True)
    thread.start()


def _watch(told: RoleContext) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # they are the main thread's
    while not _is_dead(told.parent_pidfd, wait_ms=None):
        pass
    _clean(told)
    os._exit(EXIT_ORPHANED)


def _is_dead(pidfd: int, wait_ms: int | None = 0) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(wait_ms))


def _clean(told: RoleContext) -> None:
    clean_orphaned(told.run_dir, told.description.epoch, told.description.shm_dir)
    if told.run_dir_is_temporary:
        shutil.rmtree(told.run_dir.path, ignore_errors=True)


def import_shared() -> None:
    """Load what every role needs once, before the forks, where it costs one process's time.

    None of it starts a thread or opens a descriptor; grpc does, and stays out.
    """
    import asyncio  # noqa: F401
    import concurrent.futures.thread  # noqa: F401

    import uvloop  # noqa: F401

    import kamacache.worker.main  # noqa: F401
