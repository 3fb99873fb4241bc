"""A node's place in the cluster: its name on the ring, its peers, and where it looks for them.

*Process*: read from settings by the command or the embedding program, used by the supervisor.

*Invariants*: a name is a text that means this node on every host, so it is compared and never
looked up; a node that is told its peers is one of them under its own name. (With its own name
missing, a node would take its own keys for another's, and no two nodes had the same ring.)
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from kamacache.cluster.discovery.urls import parse_source
from kamacache.cluster.membership import Member, check_address, is_loopback, make_membership
from kamacache.errors import ConfigError
from kamacache.node.address import Address

NAMES_TOLD_MAX: Final = 5  # in a message, of the peers


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """What one node says of itself and of the others; checked."""

    name: str | None = None  # HOST:PORT; None: it does not listen, or everywhere and says no name
    weight: int = 1
    peers: tuple[Member, ...] = ()  # the whole cluster, this node included; (): not told
    discover: str | None = None  # URL of the source that knows the peers

    @property
    def clustered(self) -> bool:
        """Whether there may be other nodes, now or later."""
        return self.discover is not None or any(peer.address != self.name for peer in self.peers)

    def hidden(self, listen: Address) -> str | None:
        """Return the name of a node on another host, as it seems, where they cannot reach this one.

        That is the case where it listens on loopback only; without a lookup it is a guess.
        """
        if not (self.clustered and listen.loopback):
            return None
        names = [*(peer.address for peer in self.peers), *([self.name] if self.name else [])]
        return next((name for name in names if not is_loopback(name)), None)

    def on_port(self, port: int) -> Place:
        """Return this place with the port that port 0 became."""
        if self.name is None or not self.name.endswith(":0"):
            return self
        return replace(self, name=f"{self.name[:-1]}{port}")


def find_place(
    listen: Address | None,
    *,
    listen_text: str = "",
    peers: Sequence[str] = (),
    discover: str | None = None,
    advertise: str | None = None,
) -> Place:
    """Return the place that these settings describe; raises `ConfigError`.

    ``listen_text`` is the address as the user wrote it: without ``advertise`` it is the name.
    """
    if listen is None:
        _refuse_deaf(peers, discover, advertise)
        return Place()
    if discover:
        parse_source(discover)  # refuses what is no such URL; the agent, what its source cannot
    members = tuple(check_address(peer, "peers") for peer in peers)
    grouped = bool(members or discover)
    name: str | None
    if advertise:
        own = check_address(advertise, "advertise")
        name, weight = own.address, own.weight
    else:
        name, weight = _listen_name(listen, listen_text, grouped=grouped), 1
    if members:
        assert name is not None  # a node without a name has been refused above
        weight = _own_weight(name, weight, members, listen)
        members = make_membership(1, name, members).members
    return Place(name=name, weight=weight, peers=members, discover=discover or None)


def _refuse_deaf(peers: Sequence[str], discover: str | None, advertise: str | None) -> None:
    told = {"peers": peers, "discover": discover, "advertise": advertise}
    for setting, value in told.items():
        if value:  # not shown: a URL may hold a password
            raise ConfigError(
                f"{setting} is set, but the node does not listen, so that no other node can reach "
                "it; give --listen HOST:PORT and at least one front",
                setting=setting,
            )


def _listen_name(listen: Address, text: str, *, grouped: bool) -> str | None:
    """Return the name of a node that advertises none: its listen address as it was written."""
    if ipaddress.ip_address(listen.host.partition("%")[0]).is_unspecified:
        if not grouped:
            return None
        raise ConfigError(
            f"listen is {text or listen}, every address of this host, and names no node; say with "
            "--advertise HOST:PORT by which address the other nodes reach this one",
            setting="advertise",
            value=None,
        )
    host = (text or str(listen)).rpartition(":")[0]
    if ":" in host and not host.startswith("["):
        host = f"[{host}]"
    try:
        # Port 0 is no name; it is replaced when the port is known.
        checked = check_address(f"{host}:{listen.port or 1}", "listen").address
    except ConfigError as error:
        if not grouped:
            return str(listen)
        raise ConfigError(
            f"listen is {text}, which cannot be a node's name on other hosts; give --advertise "
            "HOST:PORT, the address by which the other nodes reach this one",
            setting="advertise",
            value=None,
        ) from error
    return f"{checked.rpartition(':')[0]}:{listen.port}"


def _own_weight(name: str, weight: int, members: tuple[Member, ...], listen: Address) -> int:
    if not listen.port:
        raise ConfigError(
            f"listen is {listen}, any free port, which the peers cannot know; "
            "choose the port that --peers names for this node",
            setting="listen",
            value=str(listen),
        )
    for member in members:
        if member.address == name:
            if weight not in (1, member.weight):
                raise ConfigError(
                    f"advertise gives {name} the weight {weight}, and peers {member.weight}; "
                    "the weight is the same on every node, so leave it out of --advertise",
                    setting="advertise",
                    value=f"{name}={weight}",
                )
            return member.weight
    known = ", ".join(member.address for member in members[:NAMES_TOLD_MAX])
    more = f" and {len(members) - NAMES_TOLD_MAX} more" if len(members) > NAMES_TOLD_MAX else ""
    raise ConfigError(
        f"this node is {name}, and the peers are {known}{more}; every node is among its own peers "
        "under the same text (localhost is not 127.0.0.1): add it to --peers, or say with "
        "--advertise HOST:PORT which of them it is",
        setting="peers",
        value=name,
    )
