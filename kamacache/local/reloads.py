"""A role takes up the settings that a reload may change, at the supervisor's word.

*Process*: each role, in its loop::

    supervisor: live.json renamed into place ─► "reload" ──► role: read live.json, apply

*Invariants*: a role that was forked meanwhile has the newest settings: it is told those of its
fork, and each later word waits on its socket until the role listens. A word that is lost for want
of room loses nothing, since a word before it stands there still. What cannot be read or applied
is logged, and what was in force stays.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from kamacache.errors import NodeUnavailableError
from kamacache.rundir.context import WORD_RELOAD, RoleContext
from kamacache.rundir.live import LiveSettings, read_live

Apply = Callable[[LiveSettings], None]

log = logging.getLogger("kamacache.reload")


def apply_log_level(live: LiveSettings) -> None:
    """Let this process log at the node's level; structlog goes by the root logger's, too."""
    logging.getLogger().setLevel(live.log_level.upper())


def take_reload(context: RoleContext, *appliers: Apply) -> None:
    """Read the settings and give them to each applier, the log level first; never raises.

    An applier that cannot take them leaves its own in force and raises; the others go on.
    """
    try:
        live = read_live(context.description.sockets_dir)
    except NodeUnavailableError as error:
        log.error("the settings of a reload cannot be read", extra={"reason": str(error)})
        return
    for apply in (apply_log_level, *appliers):
        try:
            apply(live)
        except Exception:
            log.exception("a reload could not be taken up", extra={"number": live.number})
    log.debug("a reload was taken up", extra={"number": live.number})


def follow_reloads(context: RoleContext, loop: asyncio.AbstractEventLoop, *appliers: Apply) -> None:
    """Take each reload from now on, in ``loop``; for a role that hears no other words."""

    def on_words() -> None:
        words = context.hear()
        if not words:  # the supervisor is dead: the thread that watches it ends this process
            loop.remove_reader(context.words_fd)
        elif WORD_RELOAD in words:  # several at once are one
            take_reload(context, *appliers)

    loop.add_reader(context.words_fd, on_words)
