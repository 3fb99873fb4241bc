"""``kamacache drain``: has the node of a run directory finish what it does, and end."""

from __future__ import annotations

import os
import select
import signal
import time
from typing import Any, Final, NamedTuple

import click

from kamacache.cli.admin.output import duration, on_terminal
from kamacache.cli.client import EXIT_NOT_PERMITTED, EXIT_TIMEOUT, fail, place_of, say
from kamacache.errors import ConfigError, NodeUnavailableError
from kamacache.limits import CALL_TIMEOUT_MAX_S
from kamacache.rundir.description import NodeDescription, read_description
from kamacache.rundir.layout import RunDir, SupervisorLock
from kamacache.rundir.roster import Roster, read_roster

LOOK_EVERY_S: Final = 0.1
DRAIN_S: Final = 30.0


class NotPermittedError(Exception):
    """The node is another user's."""


class Supervisor(NamedTuple):
    """The supervisor of a node: a descriptor of that very process."""

    about: NodeDescription
    pidfd: int


@click.command("drain")
@click.option("--run-dir", type=click.Path(file_okay=False), metavar="DIR", help="The node's.")
@click.option(
    "--timeout",
    type=click.FloatRange(0, CALL_TIMEOUT_MAX_S),
    default=DRAIN_S,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait for its end; 0: only tell it.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(run_dir: str | None, timeout: float, as_json: bool) -> None:
    """Have the node finish what is under way, and end; wait for it.

    As SIGTERM does: other nodes are told, fronts and HTTP finish their calls, then the workers
    their loads. Its shards are kept for the next start (--warm-restart-max-downtime). Under
    systemd use `systemctl stop`, which systemd then knows of. Exit codes: 0 it has ended, 69 no
    node runs there, 75 it still drains, 77 the node is another user's.
    """
    path, address = place_of(run_dir, None)
    if address is not None:
        raise ConfigError(
            "a drain needs a run directory: run it on the node's host, with --run-dir",
            setting="address",
        )
    try:
        found = find_supervisor(RunDir(str(path)))
        signal.pidfd_send_signal(found.pidfd, signal.SIGTERM)
    except NotPermittedError as error:
        fail(str(error), EXIT_NOT_PERMITTED)
    except PermissionError:
        fail(_not_yours(str(path)), EXIT_NOT_PERMITTED)
    except ProcessLookupError:
        raise NodeUnavailableError(f"the node at {path} has just ended", run_dir=path) from None
    began_s = time.monotonic()
    ended = _wait(found, began_s + timeout, quiet=as_json)
    os.close(found.pidfd)
    took_s = time.monotonic() - began_s
    pid = found.about.pid
    if as_json:
        told: dict[str, Any] = {"run_dir": str(path), "pid": pid, "drained": ended}
        say({**told, "seconds": round(took_s, 3)})
    if not ended:
        fail(f"the node at {path} (pid {pid}) still drains after {timeout:g} s", EXIT_TIMEOUT)
    if not as_json:
        click.echo(f"the node at {path} (pid {pid}) has ended, after {duration(took_s)}")


def find_supervisor(run_dir: RunDir) -> Supervisor:
    """Return the supervisor that runs at a run directory; the caller closes the descriptor.

    A pid in a file may be anybody's by now. So: a descriptor of the process that has it, and then
    the question whether that pid holds the run directory's lock, which the kernel frees with its
    holder. If both are the same, the descriptor is of the supervisor, or of nobody any more.
    Raises `NodeUnavailableError`, `NotPermittedError`.
    """
    try:
        about = read_description(run_dir)
    except NodeUnavailableError as error:
        if isinstance(error.__cause__, PermissionError):
            raise NotPermittedError(_not_yours(str(run_dir.path))) from error
        raise
    nobody = NodeUnavailableError(
        f"no node runs at {run_dir.path}: its node.json is what one left that was killed",
        run_dir=str(run_dir.path),
    )
    try:
        pidfd = os.pidfd_open(about.pid)
    except ProcessLookupError:
        pidfd = -1
    try:
        holder = SupervisorLock.holder(run_dir)
    except PermissionError:
        _close(pidfd)
        raise NotPermittedError(_not_yours(str(run_dir.path))) from None
    if holder == about.pid and pidfd >= 0:
        return Supervisor(about, pidfd)
    _close(pidfd)
    if holder == 0:
        raise NotPermittedError(
            f"the node at {run_dir.path} runs in another pid namespace (a container); send SIGTERM "
            "there, such as with docker stop"
        )
    raise nobody


def _close(fd: int) -> None:
    if fd >= 0:
        os.close(fd)


def _not_yours(run_dir: str) -> str:
    return (
        f"the node at {run_dir} is another user's; run this as its user or as root, and under "
        "systemd: systemctl stop (with the name of its unit)"
    )


def _wait(found: Supervisor, until_s: float, *, quiet: bool) -> bool:
    """Wait for the end of the process, and show what is left; return whether it ended."""
    said = ""
    poll = select.poll()
    poll.register(found.pidfd, select.POLLIN)
    while True:
        left_s = until_s - time.monotonic()
        ended = bool(poll.poll(max(0.0, min(LOOK_EVERY_S, left_s)) * 1000))
        line = "" if ended else _progress(found.about)
        if not quiet and line != said:
            if on_terminal():
                click.echo(f"\r\x1b[K{line}", nl=False)
            elif line:
                click.echo(line)
            said = line
        if ended or left_s <= 0:
            if said and not quiet and on_terminal():
                click.echo()
            return ended


def _progress(about: NodeDescription) -> str:
    try:
        roster: Roster = read_roster(about.sockets_dir)
    except NodeUnavailableError:
        return "draining: the processes have ended"
    living: dict[str, int] = {}
    for role in roster.roles:
        if role.pid:
            living[role.role] = living.get(role.role, 0) + 1
    left = ", ".join(f"{number} {role}{'s' * (number > 1)}" for role, number in living.items())
    return f"draining: {left or 'no process'} left"
