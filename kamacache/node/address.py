"""Where fronts and HTTP listen: reading HOST:PORT, and holding the port beside them.

*Process*: the supervisor. grpcio cannot adopt a listening descriptor, so every role binds its
port itself with SO_REUSEPORT. The supervisor keeps a socket that is bound and *never listens*:
the port stays ours while a front restarts, and port 0 is resolved once for all fronts. A parent
that listened too was given connections that nobody accepted (30 calls of 30 lost, measured).
"""

from __future__ import annotations

import functools
import ipaddress
import socket
from typing import Any, NamedTuple

from kamacache.errors import ConfigError
from kamacache.node.exits import NodeEndError
from kamacache.rundir.context import EXIT_ROLE


class Address(NamedTuple):
    """A host and a port; text as in ``127.0.0.1:8001`` and ``[::1]:8001``."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def loopback(self) -> bool:
        """Whether only this host can reach it."""
        return ipaddress.ip_address(self.host.partition("%")[0]).is_loopback


def parse_address(text: str, setting: str) -> Address:
    """Read HOST:PORT and look a name up; raises `ConfigError`. The port may be 0: any free one."""
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(
            f"{setting} is {text!r}; write HOST:PORT, such as 127.0.0.1:8001 or [::1]:8001",
            setting=setting,
            value=text,
        )
    try:
        found = list(_look_up(host, int(port)))
    except OSError as error:
        raise ConfigError(
            f"{setting} is {text!r}; the host cannot be looked up: {error.strerror}",
            setting=setting,
            value=text,
        ) from error
    # IPv4 first: "localhost" is both, and 127.0.0.1 is what people type on the other side.
    found.sort(key=lambda entry: entry[0] != socket.AF_INET)
    return Address(str(found[0][4][0]), int(port))


@functools.lru_cache(maxsize=16)
def _look_up(host: str, port: int) -> tuple[Any, ...]:
    """Return what a name stands for, asked once: a reload neither waits for DNS nor moves."""
    return tuple(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))


def hold_port(address: Address, setting: str = "listen") -> tuple[socket.socket, Address]:
    """Return a bound, never listening socket that keeps the port, and the address with its port.

    Raises `NodeEndError` where the port is taken or not ours to take.
    """
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    try:
        if address.port:
            # The plain bind tells a port that another node shares (SO_REUSEPORT) from a free one.
            # SO_REUSEADDR lets it pass over connections in TIME_WAIT, not over a listener.
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((address.host, address.port))
        held = socket.socket(family, socket.SOCK_STREAM)
        try:
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            held.bind((address.host, address.port))
        except BaseException:
            held.close()
            raise
    except OSError as error:
        raise NodeEndError(
            EXIT_ROLE,
            f"cannot listen on {address}: {error.strerror}; "
            f"end what uses the port (ss -ltnp shows it), or choose another --{setting}",
        ) from error
    return held, Address(address.host, held.getsockname()[1])
