"""Who belongs to the cluster: a numbered list that every role of the node reads.

*Process*: written by one (the supervisor at the start, then the agent where there is one), read by
all roles. A file beside the shards, renamed into place, and its number in a word of the control
file: a reader looks at the word, which costs no system call, and reads the file when it changed::

    writer:  file renamed ──► word = number          reader:  word changed? ──► file

*Invariants*: the node itself is always a member; addresses are distinct; members are sorted, so
that two nodes that know the same members have equal lists.
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
from collections.abc import Iterable
from typing import Final

import msgspec

from kamacache.errors import ConfigError, NodeUnavailableError
from kamacache.limits import MEMBERS_MAX, WEIGHT_MAX
from kamacache.rundir.control import MEMBERSHIP, ControlReader
from kamacache.rundir.description import NodeDescription
from kamacache.rundir.files import write_whole

_FILE: Final = "membership"
_HOST_NAME: Final = re.compile(r"[a-z0-9_]([a-z0-9._-]{0,252}[a-z0-9_])?\.?", re.ASCII)


class Member(msgspec.Struct, frozen=True, order=True):
    """One node: HOST:PORT, its name on the ring and where the others dial it; and its weight."""

    address: str
    weight: int = 1


class Membership(msgspec.Struct, frozen=True, kw_only=True):
    """What this node knows of the cluster at one time."""

    number: int  # counts up with every change, in one life of the node
    own: str
    members: tuple[Member, ...]

    @property
    def others(self) -> tuple[str, ...]:
        """The addresses of the other nodes."""
        return tuple(m.address for m in self.members if m.address != self.own)


def is_loopback(address: str) -> bool:
    """Tell whether HOST:PORT is on this host, as far as its name says so; no lookup."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def check_address(text: str, setting: str) -> Member:
    """Read ``HOST:PORT`` or ``HOST:PORT=WEIGHT``; no lookup. Raises `ConfigError`.

    The address is a name, the same text on every node: letters become small ones, an IPv6 address
    its short form, and nothing is resolved. It is dialled, too: no wildcard, no port 0.
    """
    address, equals, weight = text.strip().partition("=")
    host, colon, port = address.rpartition(":")
    name = _host_name(host.lower())
    if not (colon and name and _number(port) is not None and 1 <= int(port) <= 65_535):
        raise ConfigError(
            f"{setting}: {text!r} does not name a node; write HOST:PORT or HOST:PORT=WEIGHT, such "
            "as 10.0.0.1:8001, cache-1.internal:8001=2 or [fd00::1]:8001",
            setting=setting,
            value=text,
        )
    if name in ("0.0.0.0", "[::]"):
        raise ConfigError(
            f"{setting}: {text!r} is every address of a host, and names no node; write the address "
            "by which the other nodes reach it",
            setting=setting,
            value=text,
        )
    if equals and (_number(weight) is None or not 1 <= int(weight) <= WEIGHT_MAX):
        raise ConfigError(
            f"{setting}: the weight in {text!r} must be a whole number from 1 to {WEIGHT_MAX}",
            setting=setting,
            value=text,
        )
    return Member(f"{name}:{int(port)}", int(weight) if equals else 1)


def _host_name(host: str) -> str | None:
    """Return the one spelling of a host, None where it is none."""
    if host.startswith("[") and host.endswith("]"):
        with contextlib.suppress(ValueError):
            found = ipaddress.IPv6Address(host[1:-1])
            if found.scope_id is None:  # a scope means something on its own host only
                return f"[{found.compressed}]"
        return None
    if host.rpartition(".")[2].isdecimal():  # no top-level domain is a number
        with contextlib.suppress(ValueError):
            return str(ipaddress.IPv4Address(host))
        return None
    return host if _HOST_NAME.fullmatch(host) else None


def _number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 8 else None


def make_membership(number: int, own: str, members: Iterable[Member]) -> Membership:
    """Return a checked membership: sorted, the node itself added where it is missing.

    Raises `ConfigError` for an address named twice, a weight out of bounds, too many members.
    """
    known: dict[str, Member] = {}
    for member in members:
        if member.address in known:
            raise ConfigError(
                f"the members name {member.address} twice; name each node once",
                setting="peers",
                value=member.address,
            )
        if not 1 <= member.weight <= WEIGHT_MAX:
            raise ConfigError(
                f"the weight of {member.address} is {member.weight}; it must be from 1 to "
                f"{WEIGHT_MAX}",
                setting="peers",
                value=str(member.weight),
            )
        known[member.address] = member
    known.setdefault(own, Member(own))
    if len(known) > MEMBERS_MAX:
        raise ConfigError(
            f"the cluster has {len(known)} members; at most {MEMBERS_MAX} are allowed",
            setting="peers",
            value=str(len(known)),
        )
    return Membership(number=number, own=own, members=tuple(sorted(known.values())))


def membership_path(about: NodeDescription) -> str:
    """Return where a node's membership is written."""
    return f"{about.shm_dir}/{_FILE}"


def write_membership(about: NodeDescription, membership: Membership, words: memoryview) -> None:
    """Publish a membership; ``words`` are the control file's, writable. Raises OSError."""
    write_whole(membership_path(about), msgspec.json.encode(membership))
    words[MEMBERSHIP] = membership.number  # after the file: who sees the number finds it


class MembershipReader:
    """One role's view."""

    def __init__(self, about: NodeDescription) -> None:
        """Map the control words. Raises `NodeUnavailableError` where the node is gone."""
        self._about = about
        self._control = ControlReader(about.control_path)
        self._words = self._control.words
        self._number = -1
        self._last = Membership(number=0, own=about.name or "", members=())

    def current(self) -> Membership:
        """Return the present membership; the last that could be read while one cannot."""
        if self.changed():
            with contextlib.suppress(NodeUnavailableError):
                self._last = self.read()
        return self._last

    def changed(self) -> bool:
        """Tell whether there is a membership that `read` has not returned yet."""
        return self._words[MEMBERSHIP] != self._number

    def read(self) -> Membership:
        """Return the present membership; that of the node alone where none was written.

        Raises `NodeUnavailableError` where the file cannot be read or understood.
        """
        number = self._words[MEMBERSHIP]
        if not number:
            own = self._about.name or ""
            self._number = 0
            return Membership(number=0, own=own, members=(Member(own),) if own else ())
        path = membership_path(self._about)
        try:
            with open(path, "rb") as file:
                found = msgspec.json.decode(file.read(), type=Membership)
        except (OSError, msgspec.MsgspecError) as error:
            raise NodeUnavailableError(f"the membership {path} cannot be read: {error}") from error
        self._number = number  # of the word: the file may be newer, and is then read once more
        return found

    def close(self) -> None:
        """Unmap the words."""
        self._control.close()
