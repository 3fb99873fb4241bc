"""The listening socket that the service manager opened for HTTP: socket activation.

*Process*: the command, before it is the supervisor. The protocol is sd_listen_fds(3)::

    LISTEN_PID   for whom: it must be this process
    LISTEN_FDS   how many, from descriptor 3 on: one is taken, for HTTP
    LISTEN_FDNAMES   what the manager calls them

The manager keeps its own copy: who connects while no HTTP role runs, or no node, waits in the
socket's queue and is served by the next. (gRPC has no such way: grpcio cannot adopt a listening
descriptor.)
"""

from __future__ import annotations

import ipaddress
import os
import socket
import stat
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Final

from kamacache.errors import ConfigError
from kamacache.node.address import Address, parse_address

FD_FIRST: Final = 3
_COUNT, _FOR_PID, _NAMES = "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"
_VARIABLES: Final = (_COUNT, _FOR_PID, _NAMES, "LISTEN_PIDFDID")


@dataclass(frozen=True, slots=True)
class InheritedSocket:
    """A socket that listens already."""

    fd: int
    address: Address

    def agree(self, api: str | None) -> str:
        """Return where HTTP listens: there. Raises `ConfigError` where ``api`` says otherwise."""
        if api is None or self._is_at(api):
            return str(self.address)
        raise ConfigError(
            f"api is {api!r}, and the socket that was passed for HTTP (LISTEN_FDS) listens on "
            f"{self.address}; leave --api out, or say the same in both",
            setting="api",
            value=api,
        )

    def _is_at(self, api: str) -> bool:
        if ":" not in api:  # "none"
            return False
        told = parse_address(api, "api")
        return told == self.address or (
            # ListenStream=9999 is [::]:9999, which takes IPv4 too.
            told.port == self.address.port and _everywhere(told) and _everywhere(self.address)
        )


def take_inherited(environment: MutableMapping[str, str] = os.environ) -> InheritedSocket | None:
    """Return the socket that was passed for HTTP, None where none was; once in a process.

    Takes the variables out of the environment. Raises `ConfigError` where what was passed is not
    one TCP socket that listens.
    """
    told = {name: environment.pop(name, "") for name in _VARIABLES}
    if told[_FOR_PID] != str(os.getpid()) or not told[_COUNT].isdecimal():
        return None
    count = int(told[_COUNT])
    if count != 1:
        names = f" ({told[_NAMES]})" if told[_NAMES] else ""
        if not count:
            return None
        raise _refused(
            count,
            f"{count} sockets were passed{names}; the node takes one, for HTTP: one ListenStream= "
            "in the socket unit, and no other socket unit for this service",
        )
    return InheritedSocket(FD_FIRST, _listening(FD_FIRST))


def _listening(fd: int) -> Address:
    try:
        os.set_inheritable(fd, False)
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            raise _refused(fd, "what was passed is not a socket; write ListenStream=HOST:PORT")
        passed = socket.socket(fileno=fd)
    except OSError as error:
        raise _refused(fd, f"descriptor {fd} cannot be used: {error.strerror}") from error
    try:
        if passed.family not in (socket.AF_INET, socket.AF_INET6):
            raise _refused(
                fd, "the socket that was passed is no TCP socket; write ListenStream=HOST:PORT"
            )
        if passed.type != socket.SOCK_STREAM:
            raise _refused(fd, "a datagram socket was passed; write ListenStream=, for HTTP")
        if not passed.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise _refused(
                fd, "the socket that was passed does not listen; write Accept=no in the socket unit"
            )
        host, port = passed.getsockname()[:2]
        return Address(host, port)
    finally:
        passed.detach()  # it lives as long as the process


def _everywhere(address: Address) -> bool:
    return ipaddress.ip_address(address.host.partition("%")[0]).is_unspecified


def _refused(value: int, why: str) -> ConfigError:
    return ConfigError(f"socket activation (LISTEN_FDS): {why}", setting="api", value=str(value))
