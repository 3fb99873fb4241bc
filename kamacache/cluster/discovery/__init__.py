"""Where a node learns who its peers are, chosen by the scheme of ``--discover``'s URL.

*Process*: agent (`open_discovery` also where a URL is only checked). What a source needs (etcd's
client with grpc, dnspython, httpx) is imported when its scheme is chosen, never before.

*Invariant*: a source that fails publishes nothing; what it said last stays in force.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, Protocol

from kamacache.cluster.discovery.urls import Source, parse_source
from kamacache.cluster.membership import Member
from kamacache.errors import ConfigError

Publish = Callable[[Sequence[Member]], None]

# What an extra of ours installs, under the names that a failed import would give.
_EXTRAS: Final = {
    "dns": ("dns",),
    "etcd": ("aetcd", "grpc", "google"),
    "nacos": ("httpx",),
}


class Discovery(Protocol):
    """One source of peers."""

    async def run(self, publish: Publish) -> None:
        """Publish the list of peers, then each changed one, until cancelled.

        The list need not name this node. A failing source is logged and asked again, and
        ``publish`` is not called meanwhile. Nothing but cancellation ends it, unless ``publish``
        raises. May be run again after it was cancelled.
        """

    async def leave(self) -> None:
        """Take this node off the source's list, for good; at most `DISCOVERY_LEAVE_S`.

        Raises `SourceError` where the source could not be told: it will notice by itself.
        """


def open_discovery(url: str, own: Member) -> Discovery:
    """Return the source that ``url`` names, for the node ``own``; nothing is connected yet.

    Raises `ConfigError` for a URL that cannot work, and where its extra is not installed.
    """
    source = parse_source(url)
    try:
        return _open(source, own)
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in _EXTRAS.get(source.scheme, ()):
            raise
        raise ConfigError(
            f"discover: {source.shown} needs what is not installed ({error.name}); "
            f"pip install 'kamacache[{source.scheme}]'",
            setting="discover",
            value=source.shown,
        ) from error


def _open(source: Source, own: Member) -> Discovery:
    match source.scheme:
        case "static":
            from kamacache.cluster.discovery.static import StaticDiscovery

            return StaticDiscovery(source)
        case "file":
            from kamacache.cluster.discovery.file import FileDiscovery

            return FileDiscovery(source)
        case "dns":
            from kamacache.cluster.discovery.dns import DnsDiscovery

            return DnsDiscovery(source)
        case "etcd":
            from kamacache.cluster.discovery.etcd import EtcdDiscovery

            return EtcdDiscovery(source, own)
        case "nacos":
            from kamacache.cluster.discovery.nacos import NacosDiscovery

            return NacosDiscovery(source, own)
    raise source.refused("the scheme must be one of static, file, dns, etcd, nacos")
