"""The front as a process: attach to the node, listen, say ready, serve until told to stop.

*Process*: front, from just after its fork. grpc is imported in `run` and not before, so that the
supervisor, which imports this module to call `run` in the child, never loads it.

    TERM        drain: NOT_SERVING, calls in flight finish, at most drain_timeout_s; exit 0
    INT, QUIT   exit at once
    parent dead (its pidfd is readable)   exit at once
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from typing import TYPE_CHECKING, NoReturn

from kamacache.errors import ConfigError, KamaCacheError
from kamacache.front.settings import FrontSettings, set_grpc_environment
from kamacache.rundir.context import EXIT_OK, EXIT_ROLE, RoleContext

if TYPE_CHECKING:
    from kamacache.front.engine import Engine

log = logging.getLogger("kamacache.front")


def run(context: RoleContext, settings: FrontSettings | None = None) -> NoReturn:
    """Be a front until told to stop, then leave the process.

    Without ``settings`` the node's listen address and the defaults hold.
    """
    set_grpc_environment()
    import uvloop

    try:
        if settings is None:
            if context.description.listen is None:
                raise ConfigError("a front needs a listen address", setting="listen")
            settings = FrontSettings(
                listen=context.description.listen, drain_timeout_s=context.drain_timeout_s
            )
        code = uvloop.run(_serve(context, settings))
    except KamaCacheError as error:
        context.report_failed(EXIT_ROLE, f"front {context.index}: {error}")
        code = EXIT_ROLE
    # Not sys.exit: what the parent's stack and atexit hold is not this process's to unwind.
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


async def _serve(context: RoleContext, settings: FrontSettings) -> int:
    loop = asyncio.get_running_loop()
    told = asyncio.Event()
    drain = False

    def on_term() -> None:
        nonlocal drain
        drain = True
        told.set()

    loop.add_signal_handler(signal.SIGTERM, on_term)
    for at_once in (signal.SIGINT, signal.SIGQUIT):
        loop.add_signal_handler(at_once, told.set)

    def on_orphaned() -> None:
        loop.remove_reader(context.parent_pidfd)  # it stays readable
        told.set()

    loop.add_reader(context.parent_pidfd, on_orphaned)

    from kamacache.front.server import FrontServer

    server = FrontServer(_engines(context), settings)
    await server.start()
    context.report_ready()
    await told.wait()
    if drain:
        log.info("front drains", extra={"role": "front", "index": context.index})
        await server.drain()
    else:
        await server.stop()
    return EXIT_OK


def _engines(context: RoleContext) -> dict[str, Engine]:
    from kamacache.local.attach import attach_group

    return {
        spec.name: attach_group(context.run_dir, spec.name) for spec in context.description.groups
    }
