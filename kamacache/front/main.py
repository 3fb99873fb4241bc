"""The front as a process: attach to the node, listen, say ready, serve until told to stop.

*Process*: front, from just after its fork (`kamacache.node.roles` calls `run`, and ends the process
when the supervisor dies). grpc is imported in `run` and not before, so that whoever imports this
module does not load it.

    TERM   drain: NOT_SERVING, peers are told, calls in flight finish, at most drain_timeout_s
    QUIT   end all calls now, in a drain too

SIGINT stays ignored: a terminal sends it to the whole process group, and the supervisor decides.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal

from kamacache.cluster.environment import set_grpc_environment
from kamacache.cluster.membership import MembershipReader
from kamacache.errors import ConfigError
from kamacache.front.settings import FrontSettings
from kamacache.limits import WARM_ASK_EVERY_S
from kamacache.local.reloads import follow_reloads
from kamacache.rundir.context import RoleContext
from kamacache.rundir.control import SERVE_UNTIL, ControlReader
from kamacache.rundir.description import NodeDescription
from kamacache.rundir.live import LiveSettings

log = logging.getLogger("kamacache.front")


def run(context: RoleContext, settings: FrontSettings | None = None) -> None:
    """Be a front until told to stop.

    Without ``settings`` the node's listen address and the defaults hold. Raises `KamaCacheError`
    where it cannot start, before it has said that it is ready.
    """
    set_grpc_environment()
    import uvloop

    if settings is None:
        if context.description.listen is None:
            raise ConfigError("a front needs a listen address", setting="listen")
        settings = FrontSettings(
            listen=context.description.listen, drain_timeout_s=context.drain_timeout_s
        )
    uvloop.run(_serve(context, settings))


async def _serve(context: RoleContext, settings: FrontSettings) -> None:
    told, at_once = asyncio.Event(), asyncio.Event()

    def on_quit() -> None:
        at_once.set()
        told.set()

    loop = asyncio.get_running_loop()
    # A second TERM changes nothing: systemd and the supervisor may both send one.
    loop.add_signal_handler(signal.SIGTERM, told.set)
    loop.add_signal_handler(signal.SIGQUIT, on_quit)

    from kamacache.cluster.proving import Trust
    from kamacache.front.credentials import server_credentials
    from kamacache.front.peers import PeersServicer
    from kamacache.front.server import FrontServer
    from kamacache.local.attach import role_engines
    from kamacache.local.mapping import NodeMapping
    from kamacache.local.publishing import keep_publishing
    from kamacache.rundir.meters import FRONT, Meters
    from kamacache.security.access import Access
    from kamacache.security.certificates import Certificates

    about = context.description
    membership = MembershipReader(about)
    engines = role_engines(context.run_dir, about)
    keep_publishing(engines, loop)
    peers = None
    if about.clustered:
        # Links of their own, so that what peers ask and what clients ask do not wait in one line.
        workers = NodeMapping(about, in_node=True).async_links
        trust = Trust()
        trust.apply(context.live)
        settling = context.unsettled is not None
        peers = PeersServicer(engines, workers, about, trust=trust, settling=settling)
    certificates = Certificates(context.live.security)
    credentials = server_credentials(certificates)
    access = Access()
    access.apply(context.live)
    meters = Meters(about.shm_dir, writable=True).front(context.index)
    server = FrontServer(
        engines, settings, membership.current, peers, credentials, access, meters=meters
    )
    server.settle(settling=context.unsettled is not None)
    await server.start()

    def tell_expiry(_: LiveSettings) -> None:
        meters.words[FRONT.at("certificate_expires_unix_s")] = certificates.expires_unix_s

    tell_expiry(context.live)
    appliers = [certificates.reload, tell_expiry, access.apply]
    follow_reloads(context, loop, *appliers, *([peers.apply] if peers else []))
    context.report_ready()
    if context.unsettled is not None:
        await _settled(about, told)
        server.settle(settling=False)
    await told.wait()
    if not at_once.is_set():
        log.info("the front drains")
        draining = asyncio.ensure_future(server.drain())
        ruder = asyncio.ensure_future(at_once.wait())
        await asyncio.wait((draining, ruder), return_when=asyncio.FIRST_COMPLETED)
        ruder.cancel()
        if draining.done():
            await draining  # its error, where it had one
    await server.stop()


async def _settled(about: NodeDescription, told: asyncio.Event) -> None:
    """Return when the supervisor lets the node serve, or ends it."""
    control = ControlReader(about.control_path)
    while not control.words[SERVE_UNTIL] and not told.is_set():
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(told.wait(), WARM_ASK_EVERY_S)
    control.close()
