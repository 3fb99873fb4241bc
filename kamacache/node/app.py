"""The user's app: importing ``module:attr``, and asking a probe child what groups it has.

*Process*: `load_groups` runs in the probe child and in each worker, after the fork; `probe_app` in
the supervisor, which never imports the app itself: what an import leaves behind (threads, sockets,
grpc channels) does not survive a fork, and a broken app must not take the supervisor with it.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterable
from typing import Any, Final

import msgspec
from setproctitle import setproctitle

from kamacache.config import GroupSpec
from kamacache.getters import Loadable
from kamacache.node.exits import NodeEndError, flush_streams
from kamacache.node.readable import wait_readable
from kamacache.node.signals import SignalQueue, reset_in_child, signals_held
from kamacache.rundir import context
from kamacache.rundir.context import EXIT_APP, EXIT_OK

TRACEBACK_LINES: Final = 8
PROBE_ANSWER_BYTES_MAX: Final = 1 << 20
_STOPPING: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)


class _Answer(msgspec.Struct):
    """What the probe child writes to its pipe."""

    groups: list[GroupSpec]
    failure: str = ""


def load_groups(target: str) -> tuple[Loadable, ...]:
    """Import ``module:attr`` with the working directory on sys.path and return its groups.

    ``attr`` (dotted names are followed) is a Group, a list of Groups, a Node, or a callable that
    returns one of these. Of a Node the groups count: where it listens and the like is said to the
    command. Raises `NodeEndError` with code 4.
    """
    module_name, colon, attribute = target.partition(":")
    if not colon or not module_name or not attribute:
        raise NodeEndError(
            EXIT_APP, f"--app {target!r}: write module:attr, such as myapp.cache:groups"
        )
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
        for name in attribute.split("."):
            found = getattr(found, name)
        if callable(found) and not isinstance(found, Loadable):
            found = found()
    except Exception as error:
        raise NodeEndError(
            EXIT_APP, f"--app {target} cannot be loaded:\n{last_lines(error)}"
        ) from error
    except SystemExit as error:
        raise NodeEndError(
            EXIT_APP, f"--app {target} cannot be loaded: it exits with {error.code!r}"
        ) from error
    return _as_groups(target, found)


def _as_groups(target: str, found: Any) -> tuple[Loadable, ...]:
    if hasattr(found, "register_group"):  # a Node, told without importing what it brings
        found = found.groups
    members = [found] if isinstance(found, Loadable) or not isinstance(found, Iterable) else found
    groups: dict[str, Loadable] = {}
    for member in members:
        if not isinstance(member, Loadable):
            raise NodeEndError(
                EXIT_APP,
                f"--app {target} is or holds a {type(member).__name__}; it must be a "
                "kamacache.Group, a list of them, a kamacache.Node, or a callable that returns one",
            )
        if groups.setdefault(member.spec.name, member) is not member:
            raise NodeEndError(
                EXIT_APP, f"--app {target} has two groups named {member.spec.name!r}"
            )
    return tuple(groups.values())


def last_lines(error: BaseException) -> str:
    """Return the end of a traceback: where it happened, and what."""
    lines = "".join(traceback.format_exception(error)).rstrip().splitlines()
    return "\n".join(lines[-TRACEBACK_LINES:])


def probe_app(target: str, *, timeout_s: float, signals: SignalQueue) -> list[GroupSpec]:
    """Return the groups of an app as a child of ours sees them; no import happens here.

    Raises `NodeEndError`: code 4 where the app cannot be loaded or takes too long, code 0 where a
    signal to stop came meanwhile.
    """
    read, write = os.pipe()
    flush_streams()
    with signals_held():
        pid = os.fork()
        if pid == 0:
            os.close(read)
            _probe(target, write, signals)
    os.close(write)
    try:
        answer = _collect(target, read, signals, time.monotonic() + timeout_s)
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        raise
    finally:
        os.close(read)
        _, status = os.waitpid(pid, 0)
    if not answer:
        code = os.waitstatus_to_exitcode(status)
        how = f"was killed by signal {-code}" if code < 0 else f"exited with {code}"
        raise NodeEndError(EXIT_APP, f"--app {target} cannot be loaded: the import {how}")
    told = msgspec.msgpack.decode(answer, type=_Answer)
    if told.failure:
        raise NodeEndError(EXIT_APP, told.failure)
    return told.groups


def _collect(target: str, read: int, signals: SignalQueue, deadline_s: float) -> bytes:
    answer = b""
    hung_up = False
    while len(answer) < PROBE_ANSWER_BYTES_MAX:
        left_s = deadline_s - time.monotonic()
        readable = wait_readable((read, signals.fileno()), left_s)
        came = signals.take()
        if any(number in _STOPPING for number in came):
            raise NodeEndError(EXIT_OK, "told to stop while the app was being loaded")
        hung_up |= signal.SIGHUP in came
        if read in readable:
            part = os.read(read, 1 << 16)
            if not part:
                break
            answer += part
        elif left_s <= 0:
            raise NodeEndError(EXIT_APP, f"--app {target} cannot be loaded: the import hangs")
    if hung_up:
        signals.keep(signal.SIGHUP)  # the node reloads when it is ready
    return answer


def _probe(target: str, write: int, signals: SignalQueue) -> None:
    """Be the probe child; never returns."""
    try:
        reset_in_child()
        for fd in signals.fds:
            os.close(fd)
        context.node_role = "probe"
        setproctitle("kamacache-node: probe")
        os.dup2(2, 1)  # what the app prints must not mix with the ready line
        try:
            answer = _Answer([group.spec for group in load_groups(target)])
        except NodeEndError as error:
            answer = _Answer([], error.message)
        data = msgspec.msgpack.encode(answer)
        while data:
            data = data[os.write(write, data) :]
        flush_streams()
    finally:
        # Not sys.exit: threads that the app's import started would be waited for.
        os._exit(EXIT_OK)
