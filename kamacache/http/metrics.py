"""/metrics: the node's numbers for Prometheus, made of one snapshot.

*Process*: http, on its loop.
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from kamacache.http.answers import answer_failure
from kamacache.http.routes import Page
from kamacache.local.observing import Observer


def metrics_page(observer: Observer) -> Page:
    """Return the page."""

    async def handle(request: Request) -> Response:
        return answer_failure(501, "NotImplemented", "metrics come with the next change")

    return Page(path="/metrics", handle=handle, name="metrics", always=True)
