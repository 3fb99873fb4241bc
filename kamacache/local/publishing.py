"""A role that serves others publishes its counts each second, also when nobody asks any more.

*Process*: front and http, on their loops. An application publishes with its next call
(`kamacache.local.counting`), since it has no loop of ours; a burst of its last second is told late.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from kamacache.limits import COUNTER_FLUSH_S
from kamacache.local.attached import AttachedEngine


def keep_publishing(engines: Mapping[str, AttachedEngine], loop: asyncio.AbstractEventLoop) -> None:
    """Publish the counts of these engines from now on, for as long as ``loop`` runs."""

    def publish() -> None:
        for engine in engines.values():
            engine.flush()
        loop.call_later(COUNTER_FLUSH_S, publish)

    loop.call_later(COUNTER_FLUSH_S, publish)
