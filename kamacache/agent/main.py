"""The agent as a process: follow a source of peers, publish what it says, leave it when told to.

*Process*: agent, from just after its fork (`kamacache.node.roles` calls `run`, and ends the process
when the supervisor dies). What reaches a source (etcd's client loads grpc) is imported in `run`::

    source ── lists ──► Publisher ── file, number ──► all roles of the node

    TERM   leave the source, at most `DISCOVERY_LEAVE_S`, and end: a drain begins here, so that
           the other nodes ask somebody else before this one stops answering
    QUIT   the same in `LEAVE_AT_ONCE_S`

Ready is: the first list stands, or `DISCOVERY_FIRST_S` have passed; a node whose source is down
serves alone (or with the peers it was told), and the agent goes on looking.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from kamacache.agent.publisher import Publisher
from kamacache.cluster.environment import set_grpc_environment
from kamacache.cluster.membership import Member
from kamacache.errors import ConfigError
from kamacache.limits import (
    DISCOVERY_FIRST_S,
    DISCOVERY_LEAVE_S,
    RESTART_BACKOFF_FIRST_S,
    RESTART_BACKOFF_MAX_S,
)
from kamacache.local.reloads import follow_reloads
from kamacache.rundir.context import RoleContext

if TYPE_CHECKING:
    from kamacache.cluster.discovery import Discovery

LEAVE_AT_ONCE_S: Final = 0.5

log = logging.getLogger("kamacache.agent")


def run(context: RoleContext) -> None:
    """Be the agent until told to stop.

    Raises `ConfigError` where the source cannot be followed, before it has said that it is ready.
    """
    set_grpc_environment()  # etcd's client loads grpc
    import uvloop

    uvloop.run(_run(context))


async def _run(context: RoleContext) -> None:
    told, at_once = asyncio.Event(), asyncio.Event()

    def on_quit() -> None:
        at_once.set()
        told.set()

    loop = asyncio.get_running_loop()
    # A second TERM changes nothing: systemd and the supervisor may both send one.
    loop.add_signal_handler(signal.SIGTERM, told.set)
    loop.add_signal_handler(signal.SIGQUIT, on_quit)

    from kamacache.cluster.discovery import open_discovery

    about = context.description
    if context.discover is None or about.name is None:
        raise ConfigError("an agent needs a name and --discover", setting="discover")
    own = Member(about.name, context.weight)
    discovery = open_discovery(context.discover, own)
    publisher = Publisher(about, own, loop.call_later)
    follow_reloads(context, loop)
    try:
        await follow(discovery, publisher, context.report_ready, told=told, at_once=at_once)
    finally:
        publisher.close()


async def follow(
    discovery: Discovery,
    publisher: Publisher,
    report_ready: Callable[[], None],
    *,
    told: asyncio.Event,
    at_once: asyncio.Event,
) -> None:
    """Publish what a source says until ``told``, then leave it; quickly where ``at_once`` is set.

    Raises `ConfigError` where the source says so before its first list.
    """
    begun = asyncio.Event()

    def publish(members: Sequence[Member]) -> None:
        if publisher.publish(members):
            begun.set()

    following = asyncio.create_task(_keep_running(discovery, publish, begun))
    first, end = asyncio.create_task(begun.wait()), asyncio.create_task(told.wait())
    try:
        await asyncio.wait(
            (following, first, end),
            timeout=DISCOVERY_FIRST_S,
            return_when=asyncio.FIRST_COMPLETED,
        )
        if following.done():
            await following  # raises: nothing else ends it
        if not told.is_set():
            if not begun.is_set():
                log.warning("the source of peers has said nothing yet, the node begins without")
            report_ready()
            await end
    finally:
        for task in (following, first, end):
            task.cancel()
        # The source must have ended before it is left, or it registers again.
        await asyncio.wait((following,), timeout=LEAVE_AT_ONCE_S)
    await _leave(discovery, at_once)


async def _keep_running(
    discovery: Discovery, publish: Callable[[Sequence[Member]], None], begun: asyncio.Event
) -> None:
    """Run a source for ever: one that ends or fails is run again, later each time."""
    failures = 0
    while True:
        reason = "it ended"
        try:
            await discovery.run(publish)
        except ConfigError:
            if not begun.is_set():
                raise
            log.exception("the source of peers refuses its settings, the last list stays")
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            reason = "something in it was cancelled"  # as gRPC does with calls of a closed channel
        except Exception as error:
            log.exception("the source of peers failed, the last list stays")
            reason = str(error)
        wait_s = min(RESTART_BACKOFF_FIRST_S * 2.0**failures, RESTART_BACKOFF_MAX_S)
        failures = min(failures + 1, 30)
        log.warning("the source is asked again", extra={"reason": reason, "seconds": wait_s})
        await asyncio.sleep(wait_s)


async def _leave(discovery: Discovery, at_once: asyncio.Event) -> None:
    leaving = asyncio.create_task(discovery.leave())
    ruder = asyncio.create_task(at_once.wait())
    await asyncio.wait(
        (leaving, ruder), timeout=DISCOVERY_LEAVE_S, return_when=asyncio.FIRST_COMPLETED
    )
    if at_once.is_set() and not leaving.done():
        await asyncio.wait((leaving,), timeout=LEAVE_AT_ONCE_S)
    ruder.cancel()
    if not leaving.done():
        leaving.cancel()
        log.warning("the source of peers could not be left in time, it will notice by itself")
    elif leaving.exception() is not None:
        log.warning("the source could not be left", extra={"error": str(leaving.exception())})
