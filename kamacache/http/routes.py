"""The table of what the HTTP role answers: each path, who may ask for it, what counts it.

*Process*: http. `kamacache.http.api` has the routes of the cache itself and of the probes; what
shows the node (metrics, the status page) makes a `Page` of its own, and `pages_of` names them all.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal

from starlette.requests import Request
from starlette.responses import Response

from kamacache.local.observing import Observer

Guard = Literal["open", "group", "stats"]
"""Who may ask, where a file of tokens is configured: anyone, who has the group's scope (checked
once the group is known), or who may see the node's numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """One path beside /api and the probes."""

    path: str
    handle: Callable[[Request], Awaitable[Response]]
    name: str  # of its requests in the metrics: one of `kamacache.rundir.meters.HTTP_HANDLERS`
    methods: tuple[str, ...] = ("GET",)
    guard: Guard = "stats"
    always: bool = False  # answered, too, while the node drains or has its fill of requests


def pages_of(observer: Observer) -> list[Page]:
    """Return the pages that show a node."""
    from kamacache.http.metrics import metrics_page
    from kamacache.http.status_page import status_pages

    return [metrics_page(observer), *status_pages(observer)]
