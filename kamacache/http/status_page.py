"""The status page: / and /status.json, which it asks once a second.

*Process*: http, on its loop::

    browsers ── / ────────────► one HTML document, made at the start of page/*
             ── /status.json ─► the node as of 1 s ago at most; one round for all who ask
                                     ▲
    Sampler ── each 2 s or 10 s ── snapshot ──► points of the charts, what happened of late

*Invariants*: the page loads nothing from elsewhere and runs nothing but its own script, named by
its hash (Content-Security-Policy). How many look changes nothing in what the node has to do: a
document is made once for each snapshot.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import importlib.resources
import logging
import time
from typing import Final

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from kamacache.errors import ConfigError, KamaCacheError
from kamacache.http.answers import answer_error
from kamacache.http.changes import Changes
from kamacache.http.history import COLUMNS, History, mark_of
from kamacache.http.routes import Page
from kamacache.http.status import document, peer_states, state_of
from kamacache.limits import (
    HISTORY_EVERY_S,
    HISTORY_IDLE_EVERY_S,
    HISTORY_LOOKED_S,
    LOG_EVERY_S,
    SNAPSHOT_EVERY_S,
)
from kamacache.local.observing import Observer
from kamacache.local.snapshot import NodeSnapshot

SCRIPTS: Final = ("dom", "charts", "ring", "tables", "live")  # in this order, of page/*.js

_TIMES_MS_MAX: Final = 1 << 53  # what a number of JavaScript tells exactly
_GUARDED: Final = {
    "cache-control": "no-store",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}

log = logging.getLogger("kamacache.http")


def page_document() -> tuple[str, str]:
    """Return the page as one HTML document, and the policy under which a browser may show it."""
    folder = importlib.resources.files("kamacache.http").joinpath("page")

    def text(name: str) -> str:
        return folder.joinpath(name).read_text("utf-8")

    style = text("page.css")
    script = "'use strict';\n" + "\n".join(text(f"{name}.js") for name in SCRIPTS)
    policy = "; ".join(
        (
            "default-src 'none'",
            f"style-src '{_source(style)}'",
            f"script-src '{_source(script)}'",
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    )
    html = text("page.html").replace("{{style}}", style).replace("{{script}}", script)
    return html, policy


def _source(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return "sha256-" + base64.b64encode(digest).decode()


class Sampler:
    """Keeps the history of a node, and the document of its last snapshot."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self.history = History()
        self.changes = Changes()
        self._taken: NodeSnapshot | None = None
        self._document: bytes = b""
        self._asked_s = float("-inf")
        self._logged_s = float("-inf")
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Take points from now on, until the loop ends."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """Take no more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait((self._task,))

    async def document(self, after_ms: int) -> bytes:
        """Return /status.json with the points after a time. Raises `NodeUnavailableError`."""
        self._asked_s = time.monotonic()
        snapshot = await self._observer.snapshot()
        self._take(snapshot)
        now_ms = int(snapshot.node.unix_s * 1000)
        columns = msgspec.json.encode(COLUMNS)
        points = self.history.since(after_ms, now_ms)
        history = b'{"columns":' + columns + b',"points":' + points + b"}"
        return self._document[:-1] + b',"history":' + history + b"}\n"

    def _take(self, snapshot: NodeSnapshot) -> None:
        """Take a snapshot in, once."""
        if snapshot is self._taken:
            return
        self._taken = snapshot
        now = mark_of(snapshot)
        self.changes.note(snapshot, state_of(snapshot), peer_states(snapshot))
        if self.history.age_s(now) >= self._every_s() - SNAPSHOT_EVERY_S / 2:
            self.history.add(now, int(snapshot.node.unix_s * 1000))
        before = self.history.recent(now)
        self.history.note(now)
        self._document = msgspec.json.encode(document(snapshot, now, before, self.changes))

    def _every_s(self) -> float:
        looked = time.monotonic() - self._asked_s < HISTORY_LOOKED_S
        return HISTORY_EVERY_S if looked else HISTORY_IDLE_EVERY_S

    async def _run(self) -> None:
        sampled_s = float("-inf")
        while True:
            if time.monotonic() - sampled_s >= self._every_s() - SNAPSHOT_EVERY_S / 2:
                sampled_s = time.monotonic()
                await self._sample()
            await asyncio.sleep(HISTORY_EVERY_S)  # who begins to look is seen by then

    async def _sample(self) -> None:
        try:
            self._take(await self._observer.snapshot())
        except KamaCacheError as error:  # the node ends, or is just being made
            log.debug("no point for the status page", extra={"why": str(error)})
        except Exception:  # the page must not go without points for ever for one that failed
            if time.monotonic() - self._logged_s >= LOG_EVERY_S:
                log.exception("no point for the status page")
                self._logged_s = time.monotonic()


def status_pages(observer: Observer) -> list[Page]:
    """Return / and /status.json. On a running loop the history begins."""
    sampler = Sampler(observer)
    sampler.start()
    return pages_of_sampler(sampler)


def pages_of_sampler(sampler: Sampler) -> list[Page]:
    """Return the two pages over a sampler."""
    html, policy = page_document()
    headers = {
        **_GUARDED,
        "content-security-policy": policy,
        "x-frame-options": "DENY",
        "cross-origin-opener-policy": "same-origin",
    }

    async def page(request: Request) -> Response:
        return Response(html, 200, headers, media_type="text/html")

    async def status(request: Request) -> Response:
        try:
            body = await sampler.document(_after_ms(request.query_params.get("after")))
        except KamaCacheError as error:
            return answer_error(error)
        return Response(body, 200, _GUARDED, media_type="application/json")

    return [
        Page(path="/", handle=page, name="page", always=True),
        Page(path="/status.json", handle=status, name="status", always=True),
    ]


def _after_ms(text: str | None) -> int:
    if text is None:
        return 0
    if not (text.isascii() and text.isdecimal() and int(text[:20]) <= _TIMES_MS_MAX):
        raise ConfigError(
            f"after={text[:32]!r} is no time; give milliseconds, such as unix_ms of a point",
            setting="after",
        )
    return int(text)
