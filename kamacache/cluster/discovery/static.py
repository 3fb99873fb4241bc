"""``static:A,B,C``: a list that does not change.

*Process*: agent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kamacache.cluster.discovery.lists import distinct
from kamacache.cluster.discovery.retry import for_ever
from kamacache.cluster.discovery.urls import Source
from kamacache.cluster.membership import Member, check_address


class StaticDiscovery:
    """Publishes one list."""

    def __init__(self, source: Source) -> None:
        """Read the list. Raises `ConfigError`."""
        source.allow_options()
        texts = [text for text in source.path.split(",") if text.strip()]
        if not texts:
            raise source.refused("it names nobody")
        self.members = distinct(check_address(text, "discover") for text in texts)

    async def run(self, publish: Callable[[Sequence[Member]], None]) -> None:
        """Publish the list, then wait."""
        publish(self.members)
        await for_ever()

    async def leave(self) -> None:
        """Do nothing: nobody keeps this list."""
