"""The routes: /api over the node's groups, /healthz and /readyz, and the pages of others.

*Process*: http, on its loop. What users may rely on is in docs/http.md::

    GET    /api?group=&key=       200 the value     404 no such key, no such group
    PUT    /api?group=&key=&ttl=  204 kept          413 too large
    DELETE /api?group=&key=       200 {"deleted": whether it was there}
    all                           400 bad request   502 the getter failed   503 draining, too busy
                                                    504 not in time

*Invariants*: a hit is read from shared memory here, like in any attached process; every request
ends at the group's load timeout or before; what requests hold is bounded (`Gate`, `Room`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import Final

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from kamacache.errors import (
    AccessDeniedError,
    ConfigError,
    GroupNotFoundError,
    KamaCacheError,
    KeyNotFoundError,
    ValueTooLargeError,
)
from kamacache.http.answers import (
    Room,
    ValueResponse,
    answer_busy,
    answer_error,
    answer_failure,
    answer_json,
)
from kamacache.http.metering import HttpMeter
from kamacache.http.query import PARAMETERS, deadline_of, key_of, read_query, ttl_ms_of
from kamacache.http.readiness import Readiness
from kamacache.http.routes import Guard, Page
from kamacache.http.settings import HttpSettings
from kamacache.local.attached import AttachedEngine
from kamacache.repeated import RepeatedLog
from kamacache.rundir.meters import Region
from kamacache.security.access import Access
from kamacache.security.tokens import Token
from kamacache.store.entries import Entry

GROUPS_NAMED_MAX: Final = 16
PROBES: Final = ("/healthz", "/readyz")
TOKEN: Final = "kamacache.token"  # in a request's scope: who asks

log = RepeatedLog(logging.getLogger("kamacache.http"))


class BusyError(KamaCacheError):
    """This process holds as much as it may."""


class Api:
    """Answers /api."""

    def __init__(self, engines: Mapping[str, AttachedEngine], room: Room, access: Access) -> None:
        self._engines = dict(engines)
        self._access = access
        self._room = room

    async def handle(self, request: Request) -> Response:
        """Answer one request, whatever happens."""
        try:
            asked = read_query(request.scope["query_string"], PARAMETERS[request.method])
            key = key_of(asked)
            engine = self._engine_of(asked.get("group"), request)
            deadline_s = deadline_of(asked)
            if request.method == "PUT":
                return await self._put(request, engine, key, ttl_ms_of(asked), deadline_s)
            if request.method == "DELETE":
                return answer_json({"deleted": await engine.adelete(key, deadline_s)})
            return await self._get(engine, key, deadline_s)
        except BusyError as error:
            return answer_busy(str(error))
        except KamaCacheError as error:
            return answer_error(error)
        except ClientDisconnect:
            return Response(status_code=400)  # nobody reads it
        except Exception as error:
            self._log_defect(error)
            return answer_failure(500, "InternalError", "internal error; the log says more")

    async def _get(self, engine: AttachedEngine, key: bytes, deadline_s: float | None) -> Response:
        value = engine.lookup(key)
        if value is None:
            value = await engine.aget(key, deadline_s)
        if not isinstance(value, bytes):
            raise KeyNotFoundError("there is no such key", key=key)
        entry = engine.lookup_entry(key)
        headers = {}
        # The value may have been replaced, expired or evicted since: then its TTL is not told.
        if isinstance(entry, Entry) and entry.value == value:
            headers["x-kamacache-version"] = str(entry.version)
            if entry.ttl_ms is not None:
                headers["x-kamacache-ttl-ms"] = str(entry.ttl_ms)
        return ValueResponse(value, headers, self._room)

    async def _put(
        self,
        request: Request,
        engine: AttachedEngine,
        key: bytes,
        ttl_ms: int | None,
        deadline_s: float | None,
    ) -> Response:
        limit = engine.arenas()[0].geometry.value_bytes_beside(len(key))
        told = request.headers.get("content-length")
        # h11 has checked the number, and that no more bytes than it says arrive.
        length = limit if told is None else int(told)
        if length > limit:
            raise _too_large(f"of {length} bytes", limit)
        if not self._room.take(length):
            raise BusyError("too many values are being stored; try again")
        try:
            value = bytearray()
            async for piece in request.stream():
                value += piece
                if len(value) > limit:
                    raise _too_large("that goes on", limit)
            await engine.aset(key, bytes(value), ttl_ms, deadline_s)
        finally:
            self._room.give(length)
        return Response(status_code=204)

    def _engine_of(self, name: bytes | None, request: Request) -> AttachedEngine:
        token: Token | None = request.scope.get(TOKEN)
        if name is None:
            if len(self._engines) == 1 and self._seen(token):
                text = next(iter(self._engines))
            else:
                raise ConfigError(
                    f"the query names no group, and this node has {self._named(token)}; write "
                    "/api?group=NAME&key=KEY",
                    setting="group",
                )
        else:
            text = name.decode("utf-8", "replace")
        write = request.method in ("PUT", "DELETE")
        self._access.permit(token, text, _client(request.scope), write=write)
        engine = self._engines.get(text)
        if engine is None:
            raise GroupNotFoundError(
                f"this node has no group {text[:64]!r}; it has {self._named(token)}",
                group=text[:64],
            )
        return engine

    def _seen(self, token: Token | None) -> list[str]:
        return [name for name in sorted(self._engines) if token is None or token.knows(name)]

    def _named(self, token: Token | None) -> str:
        known = self._seen(token)
        more = len(known) - GROUPS_NAMED_MAX
        named = ", ".join(known[:GROUPS_NAMED_MAX]) + (f" and {more} more" if more > 0 else "")
        return named or "none"

    def _log_defect(self, error: Exception) -> None:
        log.error("unexpected error in a request", exc_info=error)


class Gate:
    """The ASGI app: lets requests in, as many as may be, until the node drains.

    The probes always pass, and the pages that say so.
    """

    def __init__(
        self,
        engines: Mapping[str, AttachedEngine],
        readiness: Readiness,
        settings: HttpSettings,
        *,
        pages: Sequence[Page] = (),
        meters: Region | None = None,
        access: Access | None = None,
    ) -> None:
        """``meters`` count the requests, and outlive the process; None: as in a test.

        ``access``: who may; None: everybody.
        """
        self._access = access or Access()
        self._guards: dict[str, Guard] = dict.fromkeys(PROBES, "open")
        self._guards |= {page.path: page.guard for page in pages}
        api = Api(engines, Room(settings.held_bytes_max), self._access)
        self._readiness = readiness
        self._app = _routes(api, readiness, pages)
        self._names = {"/api": "api", **{path: path[1:] for path in PROBES}}
        self._names |= {page.path: page.name for page in pages}
        self._always = frozenset((*PROBES, *(page.path for page in pages if page.always)))
        self.meter = HttpMeter(meters)
        self._requests_max = settings.requests_max
        self.in_flight = 0
        self.idle = asyncio.Event()
        self.idle.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, and count it."""
        name = self._names.get(scope["path"], "other")
        await self.meter.count(name, self._guard, scope, receive, send)

    async def _guard(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let in who may; nothing of a request but its head was read before."""
        if _has_two_lengths(scope):
            message = "the request has both Content-Length and Transfer-Encoding; send one of them"
            refused = answer_failure(400, "BadRequest", message, connection="close")
            await refused(scope, receive, send)
            return
        guard = self._guards.get(scope["path"], "group")
        if guard != "open" and self._access.tokens is not None:
            client = _client(scope)
            try:
                token = self._access.identify(_authorization(scope), client)
                if guard == "stats":
                    self._access.permit_stats(token, scope["path"], client)
            except AccessDeniedError as error:
                await self._access.wait(error)
                await answer_error(error)(scope, receive, send)
                return
            scope[TOKEN] = token
        await self._admit(scope, receive, send)

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] not in self._names:
            # Not left to the routes: theirs is another idea of equal (to them "/metrics\n" is
            # /metrics), and who may was decided by the path to the letter.
            message = "there is no such page; try /api?key=Tom, /healthz or /readyz"
            await answer_failure(404, "PageNotFound", message)(scope, receive, send)
            return
        if scope["path"] in self._always:
            await self._app(scope, receive, send)
            return
        if self._readiness.draining:
            leaving = answer_busy("the node is draining; ask another")
            leaving.headers["connection"] = "close"
            await leaving(scope, receive, send)
            return
        if self.in_flight >= self._requests_max:
            busy = answer_busy(f"{self._requests_max} requests are under way; try again")
            await busy(scope, receive, send)
            return
        self.in_flight += 1
        self.idle.clear()
        try:
            await self._app(scope, receive, send)
        except asyncio.CancelledError:
            if not self._readiness.draining:
                raise
            # The connection is gone, and uvicorn would log this one with its traceback.
        finally:
            self.in_flight -= 1
            if not self.in_flight:
                self.idle.set()

    def drain(self) -> None:
        """Take no more requests; `idle` is set when the last is answered."""
        self._readiness.draining = True


def _routes(api: Api, readiness: Readiness, pages: Sequence[Page]) -> ASGIApp:
    async def healthz(request: Request) -> Response:
        return answer_json({"alive": True})

    async def readyz(request: Request) -> Response:
        reason = await readiness.why_not()
        if reason is None:
            return answer_json({"ready": True})
        return answer_json({"ready": False, "reason": reason}, 503, retry_after="1")

    app = Starlette(
        routes=[
            Route("/api", api.handle, methods=["GET", "PUT", "DELETE"]),
            Route("/healthz", healthz),
            Route("/readyz", readyz),
            *(Route(page.path, page.handle, methods=list(page.methods)) for page in pages),
        ],
        exception_handlers={HTTPException: _on_http_error},
    )
    app.router.redirect_slashes = False
    return app


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        message = "there is no such page; try /api?key=Tom, /healthz or /readyz"
        return answer_failure(404, "PageNotFound", message)
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "GET")
        message = f"{request.method[:32]} is not possible here; use {allowed}"
        return answer_failure(405, "MethodNotAllowed", message, allow=allowed)
    return answer_failure(error.status_code, "HttpError", str(error.detail))


def _has_two_lengths(scope: Scope) -> bool:
    """Tell whether this end and a proxy before it may see the request end in different places.

    h11 goes by the chunks then, so that the number is anybody's, and bounds nothing.
    """
    names = [name for name, _ in scope["headers"]]
    return b"transfer-encoding" in names and b"content-length" in names


def _authorization(scope: Scope) -> bytes | None:
    """Return the header's one value; two are none, as nobody could say which of them counts."""
    found: list[bytes] = [value for name, value in scope["headers"] if name == b"authorization"]
    return found[0] if len(found) == 1 else None


def _client(scope: Scope) -> str:
    host, port = scope.get("client") or ("", 0)
    return f"{host}:{port}"


def _too_large(how: str, limit: int) -> ValueTooLargeError:
    return ValueTooLargeError(
        f"a value {how} is above the group's limit of {limit} bytes", limit_bytes=limit
    )
