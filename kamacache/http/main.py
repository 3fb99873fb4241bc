"""The HTTP role as a process: attach to the node, listen, say ready, serve until told to stop.

*Process*: http, from just after its fork (`kamacache.node.roles` calls `run`, and ends the process
when the supervisor dies). starlette and uvicorn are imported in `run` and not before: they are an
extra, and nobody else needs them.

    TERM   drain: /readyz says 503, requests in flight finish, at most drain_timeout_s
    QUIT   end all requests now, in a drain too

SIGINT stays ignored: a terminal sends it to the whole process group, and the supervisor decides.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from typing import TYPE_CHECKING

from kamacache.errors import ConfigError
from kamacache.http.settings import HttpSettings
from kamacache.local.reloads import follow_reloads
from kamacache.rundir.context import EXIT_OK, RoleContext

if TYPE_CHECKING:
    from kamacache.http.server import HttpServer
    from kamacache.http.tls import TlsDoor
    from kamacache.rundir.live import LiveSettings
    from kamacache.rundir.meters import Region
    from kamacache.security.access import Access
    from kamacache.security.certificates import Certificates

log = logging.getLogger("kamacache.http")


def run(context: RoleContext, settings: HttpSettings | None = None) -> int:
    """Be the HTTP role until told to stop; return the exit code.

    Without ``settings`` the node's ``api`` address and the defaults hold. Raises `KamaCacheError`
    where it cannot start, before it has said that it is ready.
    """
    import uvloop

    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"the HTTP interface needs {error.name}, which is not installed; "
            "pip install 'kamacache[http]'",
            setting="api",
        ) from error
    if settings is None:
        if context.description.api is None:
            raise ConfigError("the HTTP role needs an address", setting="api")
        settings = HttpSettings(
            listen=context.description.api,
            listen_fd=context.api_fd,
            drain_timeout_s=context.drain_timeout_s,
        )
    uvloop.run(_serve(context, settings))
    return EXIT_OK


async def _serve(context: RoleContext, settings: HttpSettings) -> None:
    told, at_once = asyncio.Event(), asyncio.Event()

    def on_quit() -> None:
        at_once.set()
        told.set()

    loop = asyncio.get_running_loop()
    # A second TERM changes nothing: systemd and the supervisor may both send one.
    loop.add_signal_handler(signal.SIGTERM, told.set)
    loop.add_signal_handler(signal.SIGQUIT, on_quit)

    from kamacache.rundir.meters import HTTP, Meters
    from kamacache.security.access import Access
    from kamacache.security.certificates import Certificates

    access = Access()
    access.apply(context.live)
    certificates = Certificates(context.live.security)
    door = _make_door(certificates, settings)
    meters = Meters(context.description.shm_dir, writable=True).http
    server = _make_server(context, settings, door, access, meters)

    def tell_expiry(_: LiveSettings) -> None:
        meters.words[HTTP.at("certificate_expires_unix_s")] = certificates.expires_unix_s

    tell_expiry(context.live)
    await server.start()
    follow_reloads(context, loop, access.apply, *([door.reload, tell_expiry] if door else []))
    context.report_ready()
    await told.wait()
    if not at_once.is_set():
        log.info("the HTTP role drains")
        draining = asyncio.ensure_future(server.drain())
        ruder = asyncio.ensure_future(at_once.wait())
        await asyncio.wait((draining, ruder), return_when=asyncio.FIRST_COMPLETED)
        ruder.cancel()
        if draining.done():
            await draining  # its error, where it had one
            return
    await server.stop()


def _make_door(certificates: Certificates, settings: HttpSettings) -> TlsDoor | None:
    from kamacache.http.tls import TlsDoor

    if certificates.material is None:
        return None
    return TlsDoor(certificates, certificates.material, connections_max=settings.connections_max)


def _make_server(
    context: RoleContext,
    settings: HttpSettings,
    door: TlsDoor | None,
    access: Access,
    meters: Region,
) -> HttpServer:
    from kamacache.http.api import Gate
    from kamacache.http.readiness import Readiness
    from kamacache.http.routes import pages_of
    from kamacache.http.server import HttpServer
    from kamacache.local.attach import role_engines
    from kamacache.local.observing import Observer
    from kamacache.local.publishing import keep_publishing

    about = context.description
    engines = role_engines(context.run_dir, about)
    keep_publishing(engines, asyncio.get_running_loop())
    gate = Gate(
        engines,
        Readiness(about),
        settings,
        pages=pages_of(Observer(context.run_dir, about)),
        meters=meters,
        access=access,
    )
    return HttpServer(gate, settings, door)
